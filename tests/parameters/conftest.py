"""One tiny model and one whole server in this process, shared by the tests of parameters."""
from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine_proc.tiny import Reference
from tests.parameters.whole import Whole, make_model


@pytest.fixture(scope="package")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("parameters") / "model")


@pytest.fixture(scope="package")
def whole(directory: Path) -> Whole:
    return Whole(directory)


@pytest.fixture(scope="package")
def reference(directory: Path) -> Reference:
    return Reference(directory)

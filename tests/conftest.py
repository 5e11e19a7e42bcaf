"""What holds for every test: a clean environment, no network for model hubs, and no child process left behind."""
from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.waiting import until

KEPT = {"QUARTET_CACHE", "QUARTET_TEST_GGUF"}
for name in [n for n in os.environ if n.startswith("QUARTET_") and n not in KEPT]:
    del os.environ[name]                                 # the settings of whoever runs the tests are not ours
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1")

# A loaded machine is no reason to fail: what is fast enough is measured in benchmarks/, not in tests.
settings.register_profile("quartet", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("quartet")


def pytest_configure(config: pytest.Config) -> None:
    """A worker of pytest-xdist would nest its directories too deep for the paths of UNIX sockets."""
    if hasattr(config, "workerinput"):
        config.option.basetemp = Path(tempfile.mkdtemp(prefix="qt-", dir="/tmp"))


def pytest_unconfigure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        shutil.rmtree(config.option.basetemp, ignore_errors=True)


def children() -> set[int]:
    """The child processes of this one, dead ones that nobody has reaped included."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in (task / "children").read_text().split())
    return found


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") or "a zombie"
    return "gone"


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Fail the test that leaves a child process. Servers of wider fixtures were there before and may stay."""
    before = children()
    yield
    with contextlib.suppress(AssertionError):
        until(lambda: children() <= before, 3.0)
    left = {pid: _command(pid) for pid in children() - before}
    assert not left, f"the test left child processes: {left}"


@pytest.fixture(autouse=True)
def nothing_leaks_in_shared_servers(request: pytest.FixtureRequest) -> Iterator[None]:
    """A snapshot around every test of a server that several tests share: descriptors, threads, gauges of work."""
    names = set(request.fixturenames) & {"null", "smollm", "slow_null", "real"}
    servers = [request.getfixturevalue(name) for name in sorted(names)]
    before = [server.held() for server in servers]
    yield
    for server, held in zip(servers, before):
        server.assert_nothing_leaked(held)

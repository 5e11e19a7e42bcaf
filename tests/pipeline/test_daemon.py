"""The daemon: the configuration that supervisord reads, and one life under a real supervisord."""
from __future__ import annotations

import configparser
import json
import os
import signal
import socketserver
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipeline import daemon, exits
from pipeline.errors import StartError
from pipeline.settings import resolve
from pipeline.supervisord import configuration, control
from tests.serving import ROOT, processes_of
from tests.waiting import until


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A daemon's directory; whatever runs there at the end is stopped."""
    directory = tmp_path / "home"
    monkeypatch.setenv("QUARTET_HOME", str(directory))
    monkeypatch.setenv("STUB", "{}")
    monkeypatch.setenv("STUB_ORDER", str(tmp_path / "order"))
    yield directory
    if control(directory) is not None:
        daemon.down(directory)


def parsed(directory: Path, *words: str, shutdown_s: float = 30.0) -> configparser.ConfigParser:
    parser = configparser.RawConfigParser()
    parser.read_string(configuration(directory, words, shutdown_s, {"A": 'x "y" 50%'}))
    return parser


def test_the_program_is_restarted_on_unexpected_exits_only_and_has_time_to_drain(tmp_path: Path) -> None:
    program = parsed(tmp_path, "python", "-m", "pipeline", "serve", "my model", shutdown_s=45.5)["program:quartet"]
    assert program["autorestart"] == "unexpected"
    assert program["exitcodes"] == "0,2,3,6"
    assert (program["stopasgroup"], program["killasgroup"], program["stopsignal"]) == ("true", "true", "TERM")
    assert int(program["stopwaitsecs"]) > 45.5
    assert program["command"] == "python -m pipeline serve 'my model'"
    assert program["environment"] == 'A="x \\"y\\" 50%%"'
    assert {"stdout_logfile_maxbytes", "stdout_logfile_backups", "startsecs"} <= set(program)


def test_the_control_socket_is_private(tmp_path: Path) -> None:
    conf = parsed(tmp_path)
    assert conf["unix_http_server"] == {"file": f"{tmp_path}/control.sock", "chmod": "0600"}
    assert "inet_http_server" not in conf


def test_the_sample_is_what_quartet_up_writes() -> None:
    sample, made = configparser.RawConfigParser(), parsed(Path("/x"), "quartet", "serve")
    sample.read_string((ROOT / "deploy" / "supervisord.conf").read_text())
    theirs, ours = dict(sample["program:quartet"]), dict(made["program:quartet"])
    for name in ("command", "directory", "environment", "stdout_logfile"):
        ours.pop(name)
        theirs.pop(name, None)
    assert theirs == ours


def test_keys_never_reach_the_command_line(tmp_path: Path) -> None:
    arguments = ["--api-key", "sesame", "model", "--api-key=open", "--port", "1"]
    assert daemon._without_keys(arguments, resolve(arguments, {}), tmp_path) == [
        "model", "--port", "1", "--api-key-file", str(tmp_path / "keys")]
    assert (tmp_path / "keys").read_text() == "sesame\nopen\n"
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    environment = {"QUARTET_API_KEY": "k1,k2"}
    assert daemon._without_keys([], resolve([], environment), tmp_path) == ["--api-key-file", str(tmp_path / "keys")]
    assert (tmp_path / "keys").read_text() == "k1\nk2\n"
    assert daemon._without_keys(["model"], resolve(["model"], {}), tmp_path) == ["model"]


@pytest.mark.parametrize(("command", "arguments", "part"), [
    ("up", ["--prot", "1"], "did you mean --port?"), ("up", ["--check"], "belong to quartet serve"),
    ("status", ["x"], "takes no 'x'"), ("down", ["-f"], "takes no '-f'"), ("logs", [], "There is no log at")])
def test_wrong_commands_are_a_sentence(home: Path, command: str, arguments: list[str], part: str) -> None:
    with pytest.raises(StartError) as caught:
        daemon.main(command, arguments)
    assert part in caught.value.message and caught.value.exit_code == exits.CONFIG


def test_without_a_daemon_status_says_so_and_down_is_content(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon.main("status", []) == 1
    assert daemon.main("down", []) == 0
    assert capsys.readouterr().out == "The daemon is not running.\n" * 2


def test_a_life_under_supervisord(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.supervisord.START_S", 1)
    serve = ["-m", "tests.pipeline.stub_launcher", str(tmp_path), "{}"]
    assert daemon.up(home, ["--api-key", "sesame"], serve) == 0
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "control.sock").stat().st_mode & 0o777 == 0o600
    until(lambda: daemon.last_url(home / "quartet.log"), 20, "the server's URL")
    capsys.readouterr()
    assert daemon.main("status", []) == 1                      # a stub answers no HTTP
    shown = capsys.readouterr().out
    assert "server: running" in shown and "URL: http://127.0.0.1:" in shown and "ready: no" in shown
    assert daemon.main("logs", []) == 0
    assert "serves stub" in capsys.readouterr().out
    with pytest.raises(StartError, match="running already"):
        daemon.up(home, [])

    supervisor = control(home)
    first = supervisor.getProcessInfo("quartet")["pid"]
    assert b"sesame" not in Path(f"/proc/{first}/cmdline").read_bytes()
    os.kill(first, signal.SIGKILL)                             # the launcher dies: supervisord starts the next one
    until(lambda: supervisor.getProcessInfo("quartet")["pid"] not in (0, first), 20, "started again")

    until(lambda: len(processes_of(str(tmp_path / "quartet-"))) == 4, 20, "four stages")
    assert daemon.main("down", []) == 0
    assert processes_of(str(tmp_path)) == {}
    assert control(home) is None
    assert not (home / "control.sock").exists() and not (home / "keys").exists()


def test_an_expected_exit_code_is_not_tried_again(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STUB", json.dumps({"engine.0": {"exit": 3, "say": "The weights are of chocolate."}}))
    monkeypatch.setattr("pipeline.supervisord.START_S", 0)
    assert daemon.up(home, [], ["-m", "tests.pipeline.stub_launcher", str(tmp_path), "{}"]) == 0
    until(lambda: control(home).getProcessInfo("quartet")["statename"] == "EXITED", 20, "the end")
    capsys.readouterr()
    assert daemon.main("status", []) == 1
    assert "quartet: The weights are of chocolate." in capsys.readouterr().out


class _Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" and self.server.is_up else 503)  # type: ignore[attr-defined]
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


class _UnixServer(socketserver.UnixStreamServer):
    def get_request(self):  # type: ignore[no-untyped-def]
        request, _ = super().get_request()
        return request, ("local", 0)


@pytest.mark.parametrize("unix", [False, True])
def test_readiness_is_what_the_server_says(tmp_path: Path, unix: bool) -> None:
    path = str(tmp_path / "s")
    server = _UnixServer(path, _Answer) if unix else HTTPServer(("127.0.0.1", 0), _Answer)
    url = f"http+unix://{path}" if unix else f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        for is_up in (True, False):
            server.is_up = is_up  # type: ignore[union-attr]
            assert daemon.is_ready(url) is is_up
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert daemon.is_ready(url) is False


def test_the_url_is_that_of_the_newest_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("Starting a ...\nReady in 1.0 s on http://127.0.0.1:1\n")
    assert daemon.last_url(log) == "http://127.0.0.1:1"
    with open(log, "a") as stream:
        stream.write("Starting a ...\n")
    assert daemon.last_url(log) == ""
    assert daemon.last_url(tmp_path / "none") == ""

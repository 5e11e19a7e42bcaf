"""``quartet up | status | logs | down``: the server as a daemon under supervisord (the package `supervisor`).

Writes a configuration whose one program is ``quartet serve ...`` into a private directory, and drives it from there.
Keys never stay on a command line.
"""
from __future__ import annotations

import contextlib
import http.client
import os
import select
import shutil
import ssl
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import assemble
from pipeline.endpoints import MAX_PATH_BYTES
from pipeline.errors import StartError
from pipeline.exits import CONFIG, OK
from pipeline.procs import environment
from pipeline.settings import Settings, resolve
from pipeline.supervisord import PROGRAM, SOCKET, configuration, control, unix_connection

NOT_READY = 1                        # what `up` and `status` return while the server cannot answer
UP_WAIT_S = 30.0
SHOWN_LINES = 100


def home(variables: Mapping[str, str]) -> Path:
    """The daemon's own directory: $QUARTET_HOME, or ~/.local/state/quartet."""
    own = variables.get("QUARTET_HOME")
    if own:
        return Path(own).expanduser().absolute()
    state = variables.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state").absolute() / "quartet"


def main(command: str, arguments: Sequence[str]) -> int:
    """Run one of the daemon's commands; the exit code. StartError with one sentence."""
    directory = home(os.environ)
    if command == "up":
        return up(directory, arguments)
    allowed = {"-f", "--follow"} if command == "logs" else set()
    if set(arguments) - allowed:
        raise StartError(CONFIG, f"quartet {command} takes no {sorted(set(arguments) - allowed)[0]!r}.")
    if command == "logs":
        return logs(directory, follow=bool(arguments))
    return status(directory) if command == "status" else down(directory)


def up(directory: Path, arguments: Sequence[str], serve: Sequence[str] = ("-m", "pipeline", "serve")) -> int:
    """Check the options, write the configuration, start supervisord, and wait for its first word on the program.

    serve: what Python runs; the tests put something lighter there.
    """
    settings = resolve(arguments, os.environ)
    for warning in settings.warnings:
        print(f"quartet: {warning}", file=sys.stderr)
    assemble.check(settings)
    if settings.print_config or settings.check:
        raise StartError(CONFIG, "--print-config and --check belong to quartet serve.")
    if control(directory) is not None:
        raise StartError(CONFIG, "The daemon is running already: quartet down ends it.")
    program = shutil.which("supervisord", path=str(Path(sys.executable).parent)) or shutil.which("supervisord")
    if program is None:
        raise StartError(CONFIG, "The program supervisord is not installed: pip install supervisor.")
    _make_home(directory)
    words = [sys.executable, *serve, *_without_keys(arguments, settings, directory)]
    if not settings.given("log_dir"):
        words += ["--log-dir", str(directory / "logs")]
    variables = {"PYTHONPATH": environment(one_thread=False)["PYTHONPATH"], "PYTHONSAFEPATH": "1"}
    file = directory / "supervisord.conf"
    _write(file, configuration(directory, words, settings["shutdown_timeout"], variables))
    inherited = {name: value for name, value in os.environ.items() if name != "QUARTET_API_KEY"}
    done = subprocess.run([program, "-c", str(file)], env=inherited, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise StartError(CONFIG, f"supervisord did not start: {said[-1] if said else 'it said nothing'}.")
    deadline = time.monotonic() + UP_WAIT_S
    while (state := _state(directory)) not in ("RUNNING", "EXITED", "FATAL") and time.monotonic() < deadline:
        time.sleep(0.1)
    print(f"The daemon is up; its log is {directory / 'quartet.log'}.")
    status(directory)
    return OK if state == "RUNNING" else NOT_READY


def _make_home(directory: Path) -> None:
    if len(os.fsencode(directory / SOCKET)) > MAX_PATH_BYTES:
        raise StartError(CONFIG, f"The path of {directory} is too long for a UNIX socket: set QUARTET_HOME.")
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.chmod(0o700)
    except OSError as error:
        raise StartError(CONFIG, f"The directory {directory} cannot be made: {error.strerror}.") from None


def _without_keys(arguments: Sequence[str], settings: Settings, directory: Path) -> list[str]:
    """The arguments with keys of flags and environment moved to a private file, out of sight of `ps`."""
    if settings.values["api_key"].source not in ("flag", "QUARTET_API_KEY"):
        return list(arguments)
    words, left = list(arguments), []
    while words:
        word = words.pop(0)
        if word == "--api-key":
            words.pop(0)
        elif not word.startswith("--api-key="):
            left.append(word)
    if settings["api_key_file"] is not None:
        raise StartError(CONFIG, "quartet up takes keys from --api-key or from --api-key-file, not from both.")
    path = directory / "keys"
    _write(path, "".join(key + "\n" for key in settings["api_key"]))
    return [*left, "--api-key-file", str(path)]


def _write(path: Path, text: str) -> None:
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.write(text)


def _state(directory: Path) -> str:
    """supervisord's name for the program's state; '' when it does not answer."""
    supervisor = control(directory)
    with contextlib.suppress(OSError, http.client.HTTPException, xmlrpc.client.Error):
        return str(supervisor.getProcessInfo(PROGRAM)["statename"]) if supervisor is not None else ""
    return ""


def status(directory: Path) -> int:
    """Print state, URL and readiness. The exit code is 0 when the server is ready."""
    supervisor = control(directory)
    if supervisor is None:
        print("The daemon is not running.")
        return NOT_READY
    info = supervisor.getProcessInfo(PROGRAM)
    print(f"supervisord: running (pid {supervisor.getPID()})")
    print(f"server: {info['statename'].lower()} ({info['description']})")
    url = last_url(directory / "quartet.log") if info["statename"] == "RUNNING" else ""
    if not url:
        if info["statename"] == "RUNNING":
            print("ready: no, it is loading")
        else:
            for line in tail(directory / "quartet.log", 3):
                print(f"  {line}")
        return NOT_READY
    ready = is_ready(url)
    print(f"URL: {url}\nready: {'yes' if ready else 'no'}")
    return OK if ready else NOT_READY


def last_url(log: Path) -> str:
    """The URL of the newest "Ready in" line since the server's last start; '' where there is none."""
    for line in reversed(tail(log, 400)):
        if line.startswith("Ready in ") and " on " in line:
            return line.rsplit(" on ", 1)[1].strip()
        if line.startswith("Starting "):
            return ""
    return ""


def is_ready(url: str) -> bool:
    """Whether GET /ready says 200."""
    try:
        scheme, _, place = url.partition("://")
        if scheme == "http+unix":
            connection = unix_connection(place, 5)
        elif scheme == "https":
            # Our own server on this machine, and nothing secret is sent: whose certificate it is does not matter.
            connection = http.client.HTTPSConnection(place, timeout=5, context=ssl._create_unverified_context())
        else:
            connection = http.client.HTTPConnection(place, timeout=5)
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def tail(path: Path, count: int, max_bytes: int = 256 * 1024) -> list[str]:
    """The last lines of a file; [] when there is none."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - max_bytes))
            return stream.read(max_bytes).decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []


def logs(directory: Path, follow: bool) -> int:
    """Print the log's last lines; with `follow`, go on until interrupted."""
    path = directory / "quartet.log"
    if not path.exists():
        raise StartError(CONFIG, f"There is no log at {path}: quartet up starts the daemon.")
    for line in tail(path, SHOWN_LINES):
        print(line)
    if not follow:
        return OK
    sys.stdout.flush()
    stream = open(path, errors="replace")
    try:
        stream.seek(0, os.SEEK_END)
        while True:
            text = stream.read(64 * 1024)
            if text:
                print(text, end="", flush=True)
                continue
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino != os.fstat(stream.fileno()).st_ino:     # rotated
                    stream.close()
                    stream = open(path, errors="replace")
            time.sleep(0.2)
    finally:
        stream.close()


def down(directory: Path) -> int:
    """Stop the server (it drains) and supervisord; return when both have ended."""
    supervisor = control(directory)
    if supervisor is None:
        print("The daemon is not running.")
        return OK
    pid = int(supervisor.getPID())
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        handle = -1
    supervisor.shutdown()
    if handle >= 0:
        select.select([handle], [], [])
        os.close(handle)
    else:
        while control(directory) is not None:
            time.sleep(0.1)
    for name in (SOCKET, "keys"):
        with contextlib.suppress(OSError):
            (directory / name).unlink()
    print("The daemon is down.")
    return OK

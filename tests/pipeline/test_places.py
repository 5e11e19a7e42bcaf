"""Run directories and listening sockets: private, exclusive, and gone afterwards."""
from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import pytest

from pipeline import listen, rundir
from pipeline.errors import StartError
from pipeline.exits import CONFIG, PORT_IN_USE
from pipeline.rundir import RunDirectory, sweep


def test_a_run_directory_is_private_locked_and_removed(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, "quartet-") as run:
        assert run.path.parent == tmp_path and run.path.name.startswith("quartet-")
        assert run.path.stat().st_mode & 0o777 == 0o700
        with open(run.path / "lock") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (run.path / "logs").mkdir()
        (run.path / "logs" / "x").touch()
    assert list(tmp_path.iterdir()) == []


def test_the_directories_of_dead_runs_are_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = tmp_path / "quartet-dead"
    dead.mkdir(mode=0o700)
    (dead / "lock").touch()
    (dead / "config.json").touch()
    (tmp_path / "quartet-fresh").mkdir(mode=0o700)             # being made: not locked yet
    shared = tmp_path / "quartet-shared"                       # readable for others: not made by us
    shared.mkdir()
    shared.chmod(0o755)
    (shared / "lock").touch()
    other = tmp_path / "other"
    other.mkdir(mode=0o700)
    (other / "lock").touch()
    (tmp_path / "quartet-link").symlink_to(other)
    with RunDirectory(tmp_path, "quartet-") as alive:
        assert not dead.exists()
        assert sweep(tmp_path, "quartet-") == []
        assert alive.path.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"quartet-fresh", "quartet-shared", "quartet-link", "other"}
    assert (other / "lock").exists()


def test_a_path_too_long_for_sockets_names_the_variable_to_shorten(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="XDG_RUNTIME_DIR or TMPDIR") as caught:
        RunDirectory(tmp_path / ("x" * 90), "quartet-")
    assert caught.value.exit_code == CONFIG


def test_where_run_directories_go(tmp_path: Path) -> None:
    uid = os.getuid()
    assert rundir.parent_of_runs(None, {"XDG_RUNTIME_DIR": str(tmp_path)}) == (tmp_path, "quartet-")
    assert rundir.parent_of_runs(None, {"XDG_RUNTIME_DIR": "/no/such"}) == (Path("/tmp"), f"quartet-{uid}-")
    assert rundir.parent_of_runs(None, {"TMPDIR": str(tmp_path)}) == (tmp_path, f"quartet-{uid}-")
    assert rundir.parent_of_runs(str(tmp_path), {"TMPDIR": "/x"}) == (tmp_path, "quartet-")


def test_a_parent_that_does_not_exist_is_a_sentence() -> None:
    with pytest.raises(StartError, match="No run directory can be made in /no/such"):
        RunDirectory(Path("/no/such"), "quartet-")


def test_the_log_directory_is_made_or_refused(tmp_path: Path) -> None:
    assert rundir.log_directory(str(tmp_path / "a" / "b"), tmp_path).is_dir()
    assert rundir.log_directory(None, tmp_path) == tmp_path / "logs"
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be made"):
        rundir.log_directory(str(tmp_path / "file"), tmp_path)


def test_every_frontend_has_a_listening_socket_of_its_own_on_one_port() -> None:
    with listen.bind("127.0.0.1", 0, None, 3) as listeners:
        assert len({listeners.fd(i) for i in range(3)}) == 3
        assert {sock.getsockname()[1] for sock in listeners.sockets} == {listeners.port} and listeners.port > 0
        assert listeners.url == f"http://127.0.0.1:{listeners.port}" and listeners.loopback
        for _ in range(10):
            socket.create_connection(("127.0.0.1", listeners.port), timeout=2).close()


@pytest.mark.parametrize("count", [1, 3])
def test_a_second_server_on_the_port_is_noticed(count: int) -> None:
    with listen.bind("127.0.0.1", 0, None, count) as first, pytest.raises(StartError, match="in use") as caught:
        listen.bind("127.0.0.1", first.port, None, count)
    assert caught.value.exit_code == PORT_IN_USE


def test_a_port_that_just_closed_connections_can_be_taken_again() -> None:
    with listen.bind("127.0.0.1", 0, None, 1) as first:
        port = first.port
        with socket.create_connection(("127.0.0.1", port)):
            accepted, _ = first.sockets[0].accept()
            accepted.close()                                   # we close first: TIME_WAIT is ours
    listen.bind("127.0.0.1", port, None, 1).close()


@pytest.mark.parametrize(("host", "part"), [
    ("no.such.host.invalid", "neither an address nor a known name"),
    ("203.0.113.7", "does not belong to this machine")])
def test_wrong_hosts(host: str, part: str) -> None:
    with pytest.raises(StartError, match=part) as caught:
        listen.bind(host, 0, None, 1)
    assert caught.value.exit_code == CONFIG


def test_ipv6_and_all_interfaces() -> None:
    with listen.bind("::1", 0, None, 2) as listeners:
        assert listeners.url == f"http://[::1]:{listeners.port}" and listeners.loopback
        socket.create_connection(("::1", listeners.port), timeout=2).close()
    with listen.bind("0.0.0.0", 0, None, 1) as listeners:
        assert listeners.url == f"http://127.0.0.1:{listeners.port}" and not listeners.loopback


def test_a_unix_socket_is_made_shared_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "q.sock"
    with listen.bind("", 0, str(path), 2) as listeners:
        assert listeners.fd(0) == listeners.fd(1) and listeners.loopback and listeners.port == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        with pytest.raises(StartError, match="in use") as caught:
            listen.bind("", 0, str(path), 1)
        assert caught.value.exit_code == PORT_IN_USE
    assert not path.exists()


def test_a_dead_unix_socket_is_taken_over_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "q.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    listen.bind("", 0, str(path), 1).close()
    path.write_text("precious")
    with pytest.raises(StartError, match="not a socket"):
        listen.bind("", 0, str(path), 1)
    assert path.read_text() == "precious"
    with pytest.raises(StartError, match="longer than"):
        listen.bind("", 0, str(tmp_path / ("x" * 120)), 1)

"""The tokenizer as a process: started from its configuration file alone, driven over its sockets."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import zmq

from pipeline import codec, sockets
from pipeline.config import ModelConfig, ServerConfig, save
from pipeline.endpoints import endpoint
from pipeline.exits import CONFIG, MODEL_LOAD
from pipeline.ids import RidMaker
from pipeline.messages import Adds, Chat, Failed, Kind, Route, Submit, unpack_ids
from pipeline.params import DetokSpec, SamplingParams
from pipeline.transport import Address
from tests.detok_proc import zoo

ROOT = Path(__file__).parents[2]
BOMB = ("{% if messages[0].content == 'x' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
        "{% endfor %}"
        "{% endif %}{{ messages[0].content }}")


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "tokenizer_proc", "--config", str(folder / "config.json"), "--index", "0",
            "--epoch", "4"]


def configure(folder: Path, **model: str) -> ServerConfig:
    config = ServerConfig(run_dir=str(folder), log_dir=str(folder),
                          models=(ModelConfig(names=("m",), path=str(folder / "m"), **model),))  # type: ignore[arg-type]
    save(config, folder / "config.json")
    return config


@pytest.mark.parametrize(("broken", "code", "says"), [
    ("tokenizer", MODEL_LOAD, "There is no tokenizer.json in "), ("template", MODEL_LOAD, "syntax error in line 1"),
    ("config", CONFIG, "cannot be read")])
def test_what_cannot_start_says_why_in_one_sentence(tmp_path: Path, broken: str, code: int, says: str) -> None:
    if broken == "template":
        zoo.save(zoo.byte_level(), tmp_path / "m")
        configure(tmp_path, chat_template="{% if %}")
    elif broken == "tokenizer":
        configure(tmp_path)
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and says in done.stderr and len(done.stderr.splitlines()) <= 2


def test_a_process_tokenizes_and_a_bomb_holds_it_up_no_longer_than_its_deadline(tmp_path: Path) -> None:
    """The alarm that ends the bomb must work in the stage's own loop, beside its signal handlers and its poller."""
    zoo.save(zoo.byte_level(), tmp_path / "m", {"chat_template": BOMB})
    config, rids, ctx = configure(tmp_path), RidMaker(0, 1), sockets.context()
    process = subprocess.Popen(command(tmp_path), cwd=ROOT)
    try:
        engine = sockets.pull(ctx, endpoint(config, Address(Kind.ENGINE, 0)))
        frontend = sockets.pull(ctx, endpoint(config, Address(Kind.FRONTEND, 0)))
        out = sockets.push(ctx, endpoint(config, Address(Kind.TOKENIZER, 0)))
        bomb, good = rids.next(), rids.next()
        for rid, content in ((bomb, "x"), (good, "The dog")):
            chat = Chat(b'[{"role": "user", "content": "%s"}]' % content.encode())
            out.send_multipart(codec.encode(Submit(
                rid, Route(0, 4, 0, 1, 0, 1), 0, 1, 0, None, chat, b"", b"", False, None, SamplingParams(), DetokSpec(),
                0)))
        failed, adds = (_receive(socket) for socket in (frontend, engine))
        assert isinstance(failed, Failed) and [(i.rid, i.code) for i in failed.items] == [(bomb, "invalid_request")]
        assert isinstance(adds, Adds) and adds.items[0].rid == good
        assert list(unpack_ids(adds.items[0].ids)) == zoo.byte_level().encode("The dog").ids
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        ctx.destroy(linger=0)


def _receive(socket: zmq.Socket[bytes]) -> object:
    assert socket.poll(30_000), "nothing arrived"
    return codec.decode(socket.recv_multipart())

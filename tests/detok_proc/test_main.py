"""The detokenizer as a process: started from its configuration file alone, driven over its sockets."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline import codec, sockets
from pipeline.config import ModelConfig, ServerConfig, save
from pipeline.endpoints import endpoint
from pipeline.exits import MODEL_LOAD
from pipeline.ids import RidMaker
from pipeline.messages import Deltas, Kind, Open, StepOut, StopHit, TokenOut, pack_ids
from pipeline.params import DetokSpec
from pipeline.transport import Address
from tests.detok_proc import zoo

ROOT = Path(__file__).parents[2]


def command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "detok_proc", "--config", str(folder / "config.json"), "--index", "0", "--epoch", "4"]


def configure(folder: Path) -> ServerConfig:
    config = ServerConfig(run_dir=str(folder), log_dir=str(folder), models=(
        ModelConfig(names=("m",), path=str(folder / "m")),))
    save(config, folder / "config.json")
    return config


def test_a_missing_tokenizer_ends_the_stage_with_one_sentence_and_the_load_exit_code(tmp_path: Path) -> None:
    configure(tmp_path)
    done = subprocess.run(command(tmp_path), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == MODEL_LOAD
    assert done.stderr.splitlines()[-1] == f"There is no tokenizer.json in {tmp_path / 'm'}."


def test_a_process_turns_steps_into_deltas_and_stop_hits(tmp_path: Path) -> None:
    zoo.save(zoo.byte_level(), tmp_path / "m")
    config, rid, ctx = configure(tmp_path), RidMaker(0, 1).next(), sockets.context()
    process = subprocess.Popen(command(tmp_path), cwd=ROOT)
    try:
        frontend = sockets.pull(ctx, endpoint(config, Address(Kind.FRONTEND, 0)))
        control = sockets.pull(ctx, endpoint(config, Address(Kind.ENGINE, 0, "ctl")))
        out = sockets.push(ctx, endpoint(config, Address(Kind.DETOKENIZER, 0)))
        ids = zoo.byte_level().encode("The dog!").ids
        out.send_multipart(codec.encode(StepOut(0, 1, 4, [Open(rid, DetokSpec(stop=["!"]), b"", b"")],
                                                [TokenOut(rid, 0, pack_ids(ids))])))
        assert frontend.poll(30_000) and control.poll(30_000), "nothing arrived"
        deltas, hit = (codec.decode(socket.recv_multipart()) for socket in (frontend, control))
        assert isinstance(deltas, Deltas) and [(d.rid, d.text, d.stop) for d in deltas.items] == [(rid, "The dog", "!")]
        assert hit == StopHit(rid, len(ids))
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        ctx.destroy(linger=0)

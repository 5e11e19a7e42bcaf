"""Sockets and outboxes: never a blocking send, bounded queues, garbage does no harm."""
from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from pipeline import codec, outbox, sockets
from pipeline.config import ModelConfig, ServerConfig
from pipeline.endpoints import check_run_dir, endpoint
from pipeline.errors import StartError
from pipeline.messages import Abort, Kind
from pipeline.outbox import Outbox, Outboxes
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.waiting import until


@pytest.fixture
def ctx() -> Iterator[zmq.Context]:
    context = sockets.context()
    yield context
    start = time.monotonic()
    context.destroy(linger=0)
    assert time.monotonic() - start < 2, "closing must not wait for unsent messages"


def test_what_is_sent_before_the_receiver_binds_arrives(ctx: zmq.Context, tmp_path: Path) -> None:
    box = Outbox(sockets.push(ctx, f"ipc://{tmp_path}/a"))
    assert box.send(codec.encode(Abort(b"x" * 8, 1)))
    inbox = sockets.pull(ctx, f"ipc://{tmp_path}/a")
    assert inbox.poll(5000)
    assert codec.decode(inbox.recv_multipart()) == Abort(b"x" * 8, 1)


def test_a_peer_that_never_reads_costs_a_bounded_queue_and_no_time(ctx: zmq.Context, tmp_path: Path) -> None:
    box = Outbox(sockets.push(ctx, f"ipc://{tmp_path}/nobody", hwm=10))
    taken = 0
    while box.send([b"frame"]):
        taken += 1
        assert taken < 10_000
    assert taken <= outbox.MAX_QUEUED + 40 and box.pressure() == 1.0


def test_bytes_bound_the_queue_too(ctx: zmq.Context, tmp_path: Path) -> None:
    box = Outbox(sockets.push(ctx, f"ipc://{tmp_path}/nobody", hwm=1))
    big = b"x" * (outbox.MAX_QUEUED_BYTES // 4)
    sent = 0
    while box.send([big]):
        sent += 1
    assert sent <= 8


def test_a_queue_drains_in_order_once_the_peer_reads(ctx: zmq.Context, tmp_path: Path) -> None:
    box = Outbox(sockets.push(ctx, f"ipc://{tmp_path}/late", hwm=2))
    for number in range(100):
        assert box.send([str(number).encode()])
    inbox = sockets.pull(ctx, f"ipc://{tmp_path}/late")
    got: list[bytes] = []

    def drained() -> bool:
        box.flush()
        while inbox.poll(0):
            got.append(inbox.recv())
        return len(got) == 100
    until(drained)
    assert got == [str(number).encode() for number in range(100)]


def test_large_frames_arrive_whole(ctx: zmq.Context, tmp_path: Path) -> None:
    inbox = sockets.pull(ctx, f"ipc://{tmp_path}/big")
    box = Outbox(sockets.push(ctx, f"ipc://{tmp_path}/big"))
    body = os.urandom(3_000_000)
    assert box.send([b"head", memoryview(body)])
    assert inbox.poll(5000) and inbox.recv_multipart() == [b"head", body]


def test_outboxes_connect_at_first_use(ctx: zmq.Context, tmp_path: Path) -> None:
    config = ServerConfig(run_dir=str(tmp_path), log_dir=str(tmp_path), models=(ModelConfig(names=("m",), path="/"),))
    made: list[Address] = []

    def connect(to: Address) -> zmq.Socket:
        made.append(to)
        return sockets.push(ctx, endpoint(config, to))
    boxes = Outboxes(connect)
    to = Address(Kind.ENGINE, 0, "ctl")
    assert boxes.pressure(to) == 0.0 and not made
    inbox = sockets.pull(ctx, endpoint(config, to))
    assert boxes.send(to, Abort(b"", 2)) and boxes.send(to, Abort(b"", 3)) and made == [to]
    assert inbox.poll(5000)
    assert codec.decode(inbox.recv_multipart()).reason == 2
    boxes.close()


def test_garbage_from_a_raw_peer_does_not_disturb_real_traffic(ctx: zmq.Context, tmp_path: Path) -> None:
    import socket as stdlib
    inbox = sockets.pull(ctx, f"ipc://{tmp_path}/in")
    rng = random.Random(3)
    for size in (1, 11, 64, 4096):
        with stdlib.socket(stdlib.AF_UNIX) as raw:
            raw.connect(f"{tmp_path}/in")
            raw.sendall(rng.randbytes(size))
    stranger = sockets.push(ctx, f"ipc://{tmp_path}/in")
    stranger.send_multipart([rng.randbytes(50)] * 3)
    box = Outbox(sockets.push(ctx, f"ipc://{tmp_path}/in"))
    assert box.send(codec.encode(Abort(b"", 1)))
    good = bad = 0
    while good == 0:
        assert inbox.poll(5000)
        try:
            codec.decode(inbox.recv_multipart())
            good += 1
        except BadFrame:
            bad += 1
    assert bad <= 5                                       # libzmq still speaks ZMTP 1.0, where any byte may be a frame


def test_a_run_directory_that_is_too_long_is_told(tmp_path: Path) -> None:
    check_run_dir("/tmp/quartet-0-abcdefgh")
    with pytest.raises(StartError, match="XDG_RUNTIME_DIR"):
        check_run_dir("/tmp/" + "x" * 100)

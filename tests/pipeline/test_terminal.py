"""What the terminal shows, and that a stuck one stops nobody."""
from __future__ import annotations

import io
import os

from pipeline import banner
from pipeline.config import HttpConfig, ModelConfig, ServerConfig
from pipeline.listen import bind
from pipeline.terminal import MAX_PROGRESS, Terminal


def shown(host: str = "127.0.0.1", facts: dict[str, object] | None = None, **http: object) -> list[str]:
    config = ServerConfig(run_dir="/r", log_dir="/l", http=HttpConfig(**http),  # type: ignore[arg-type]
                          models=(ModelConfig(names=("tiny",), path="/m", max_model_len=1024),))
    with bind(host, 0, None, 1) as listeners:
        lines = banner.lines(config, listeners, {0: facts or {}}, 3.21)
        return [line.replace(str(listeners.port), "PORT") for line in lines]


def test_the_banner_names_model_memory_authentication_and_urls() -> None:
    facts = {"dtype": "bfloat16", "device": "cpu", "kv_blocks": 128, "block_size": 16}
    lines = shown(facts=facts, api_keys=("sesame",))
    text = "\n".join(lines)
    assert "serves tiny (bfloat16, cpu)" in lines[0]
    assert "context 1024 tokens, KV cache 2048 tokens (2.0 requests of full length)" in text
    assert "API key required" in text and "sesame" not in text and "WARNING" not in text
    assert "OpenAI base URL http://127.0.0.1:PORT/v1, documentation http://127.0.0.1:PORT/docs" in text
    assert lines[-1] == "Ready in 3.2 s on http://127.0.0.1:PORT"


def test_the_banner_lists_every_model_and_who_is_missing() -> None:
    config = ServerConfig(run_dir="/r", log_dir="/l", models=(
        ModelConfig(names=("chat",), path="/m", max_model_len=1024, replicas=2),
        ModelConfig(names=("minilm",), path="/m", task="embed", max_model_len=256),
        ModelConfig(names=("moods",), path="/m", task="classify", max_model_len=512)))
    facts = {0: {"dtype": "bfloat16"}, 2: {"dtype": "float32", "dimension": 384}}
    with bind("127.0.0.1", 0, None, 1) as listeners:
        lines = banner.lines(config, listeners, facts, 1.0)
    assert lines[0].endswith("serves 3 models")
    assert lines[1:3] == ["  chat (generate, bfloat16, 2 engines)", "    context 1024 tokens, up to 64 requests in a step"]
    assert lines[3:6] == ["  minilm (embed, float32)", "    context 256 tokens, 384 dimensions", "  moods (classify): given up"]


def test_a_server_without_a_key_beyond_loopback_warns_loudly_once() -> None:
    assert sum("WARNING" in line for line in shown("0.0.0.0")) == 1
    assert sum("WARNING" in line for line in shown("0.0.0.0", api_keys=("k",))) == 0
    assert sum("WARNING" in line for line in shown()) == 0


def test_progress_is_bounded_and_lines_are_not() -> None:
    stream = io.StringIO()
    terminal = Terminal(stream)
    for number in range(50):
        terminal.progress(f"p{number}")
    terminal.line("last")
    terminal.close()
    assert stream.getvalue().splitlines() == [f"p{n}" for n in range(MAX_PROGRESS)] + ["last"]


def test_a_pipe_that_nobody_reads_holds_up_nobody() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    terminal = Terminal(os.fdopen(write, "w"))
    for _ in range(5000):
        terminal.line("x" * 1000)                       # far more than the pipe and the queue take
    terminal.close()                                    # returns, with the thread still stuck in its write
    os.close(read)


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    terminal = Terminal(os.fdopen(write, "w"))
    terminal.line("into the void")
    terminal.close()
    assert not terminal._thread.is_alive()

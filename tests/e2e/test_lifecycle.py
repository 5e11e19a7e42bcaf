"""Start and stop as an operator sees them: exit codes, sentences, and nothing left behind."""
from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.serving import ROOT, Server, gguf, processes_of
from tests.waiting import until


def serve(*args: str, cwd: Path = ROOT, timeout: float = 60, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pipeline", "serve", *args], cwd=cwd, capture_output=True, text=True,
                          timeout=timeout, env={**os.environ, "PYTHONPATH": str(ROOT), **env})


def one_sentence(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr + result.stdout
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines and lines[-1].startswith("quartet: "), result.stderr
    return lines[-1]


def null_server(*args: str, script: str = "hash", **kwargs) -> Server:
    return Server("--null-engine", script, "--served-model-name", "null", *args, model=str(gguf()), **kwargs)


def test_it_is_quiet_until_ready_and_says_where_it_is() -> None:
    with null_server() as server:
        assert len(server.lines) <= 20
        for path in ("/health", "/ready", "/live"):
            assert server.get(path)[0] == 200
        assert set(processes_of(server.run_dir).values()) == {"frontend", "tokenizer_proc", "engine_proc", "detok_proc"}
        assert oct(Path(server.run_dir).stat().st_mode & 0o777) == "0o700"


def test_kill_9_of_the_launcher_leaves_no_process() -> None:
    server = null_server().start()
    pids = list(processes_of(server.run_dir))
    assert len(pids) == 4
    server.process.kill()
    server.process.wait()
    until(lambda: not processes_of(server.run_dir), 2.0, "all stages gone")
    with null_server(env={"XDG_RUNTIME_DIR": str(server.root)}):          # the next start sweeps the dead run's directory
        until(lambda: not Path(server.run_dir).exists(), 5.0, "the dead run's directory swept")


def test_a_port_in_use_is_exit_code_6() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = serve(str(gguf()), "--null-engine", "hash", "--port", str(taken.getsockname()[1]), timeout=10)
    assert result.returncode == 6 and "in use" in one_sentence(result)


def test_a_second_server_on_the_same_port_is_refused() -> None:
    with null_server() as server:
        port = server.url.rsplit(":", 1)[1]
        assert serve(str(gguf()), "--null-engine", "hash", "--port", port, timeout=10).returncode == 6
        assert server.get("/health")[0] == 200


def test_wrong_paths_and_flags_are_exit_code_2(tmp_path: Path) -> None:
    for args in (["/no/such/model"], ["--no-such-flag"], [str(gguf()), "--port", "99999"], [str(gguf()), "--api-key", ""],
                 [str(gguf()), "--max-model-len", "10000000"], ["--config", str(tmp_path / "none.yaml")]):
        start = time.monotonic()
        result = serve(*args, timeout=20)
        assert result.returncode == 2, (args, result.stderr)
        assert "Traceback" not in result.stderr and time.monotonic() - start < 5


def corrupt_model(tmp_path: Path, **files: bytes) -> Path:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
              "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text(
        '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,'
        '"post_processor":null,"decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    for name, data in files.items():
        (tmp_path / name.replace("_dot_", ".")).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("files", [
    {"model_dot_safetensors": b"\x10\0\0\0\0\0\0\0{\"truncated"}, {"model_dot_safetensors": b""},
    {"config_dot_json": b"{not json", "model_dot_safetensors": b""},
    {"tokenizer_dot_json": b"{broken", "model_dot_safetensors": b""}])
def test_a_corrupt_checkpoint_is_one_sentence_and_a_code(tmp_path: Path, files: dict[str, bytes]) -> None:
    result = serve(str(corrupt_model(tmp_path, **files)), "--port", "0", timeout=90)
    assert result.returncode in (2, 3), result.stderr
    one_sentence(result)


def test_sigterm_lets_streams_finish() -> None:
    with null_server(script="hash", env={"QUARTET_NULL_STEP": "0.02"}) as server:
        lines: list[str] = []
        started = threading.Event()

        def stream() -> None:
            body = {"model": "null", "prompt": "hello", "max_tokens": 60, "stream": True, "ignore_eos": True}
            with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    lines.append(line)
                    started.set()
        reader = threading.Thread(target=stream)
        reader.start()
        assert started.wait(20)
        assert server.stop() == 0
        reader.join(10)
        data = [line for line in lines if line.startswith("data: ")]
        assert data[-1] == "data: [DONE]"
        assert json.loads(data[-2][6:])["choices"][0]["finish_reason"] == "length"
        server._root = type(server._root)()                                # already stopped and checked
        server.process = subprocess.Popen(["true"])
        server.process.wait()


def test_a_second_signal_means_now() -> None:
    server = null_server("--shutdown-timeout", "60", env={"QUARTET_NULL_STEP": "0.05"}).start()
    with httpx.stream("POST", server.url + "/v1/completions", timeout=60, json={
            "model": "null", "prompt": "hello", "max_tokens": 2000, "stream": True, "ignore_eos": True}) as answer:
        lines = answer.iter_lines()                                        # kept: its end would close the stream
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/ready")[0] == 503 if server.process.poll() is None else True, 10, "draining")
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(5)
    until(lambda: not processes_of(server.run_dir), 2.0, "all stages gone")
    assert not Path(server.run_dir).exists()


def test_keys_guard_every_route_but_the_open_ones() -> None:
    with null_server("--api-key", "sesame-1", "--api-key", "sesame-2") as server:
        for path, status in (("/health", 200), ("/live", 200), ("/ready", 200), ("/v1/models", 401), ("/version", 401),
                             ("/openapi.json", 401), ("/nothing", 401)):
            assert server.get(path)[0] == status, path
        body = {"model": "null", "prompt": "x", "max_tokens": 1}
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            refused = httpx.post(server.url + path, json=body)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        for key in ("sesame-1", "sesame-2"):
            assert httpx.post(server.url + "/v1/completions", json=body,
                              headers={"Authorization": f"Bearer {key}"}).status_code == 200
        secrets = " ".join(server.lines) + server.logs()
        assert "sesame" not in secrets

"""Flags that users of vLLM type: each is an option, is taken with a sentence, or is refused with one."""
from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import assemble, foreign
from pipeline.errors import StartError
from pipeline.options import BY_NAME
from pipeline.settings import resolve
from tests import certificates
from tests.pipeline.test_options import refused

# Section 5.1 of the yardstick: what `vllm serve` knows and its users type.
KNOWN = """
    host port uds api-key served-model-name root-path ssl-keyfile ssl-certfile ssl-ca-certs ssl-cert-reqs
    enable-ssl-refresh allowed-origins allowed-methods allowed-headers allow-credentials middleware
    enable-request-id-headers disable-fastapi-docs uvicorn-log-level disable-uvicorn-access-log
    disable-access-log-for-endpoints h11-max-incomplete-event-size h11-max-header-count api-server-count
    enable-log-requests max-log-len enable-log-outputs disable-log-stats log-error-stack chat-template
    chat-template-content-format trust-request-chat-template default-chat-template-kwargs response-role
    enable-auto-tool-choice tool-call-parser exclude-tools-when-tool-choice-none reasoning-parser tool-strict-level
    tool-parser-plugin tool-server reasoning-parser-plugin return-tokens-as-token-ids max-logprobs
    enable-prompt-tokens-details enable-force-include-usage enable-per-request-metrics enable-server-load-tracking
    enable-tokenizer-info-endpoint sse-keep-alive-interval fingerprint-mode fingerprint-value generation-config
    override-generation-config max-model-len dtype quantization tokenizer tokenizer-mode revision trust-remote-code
    hf-overrides load-format download-dir seed gpu-memory-utilization kv-cache-memory-bytes kv-cache-dtype block-size
    enable-prefix-caching enable-chunked-prefill max-num-seqs max-num-batched-tokens scheduling-policy
    max-num-queued-reqs max-num-queued-tokens shutdown-timeout async-scheduling speculative-config enable-lora
    lora-modules max-loras max-lora-rank tensor-parallel-size pipeline-parallel-size data-parallel-size
    limit-mm-per-prompt allowed-local-media-path allowed-media-domains media-io-kwargs mm-processor-kwargs
    trust-request-mm-kwargs interleave-mm-strings enable-mm-embeds mm-processor-cache-gb enable-sleep-mode
    otlp-traces-endpoint show-hidden-metrics-for-version enable-scale-out
""".split()


@pytest.mark.parametrize("name", KNOWN)
def test_every_flag_of_vllm_is_known(name: str) -> None:
    assert (name in BY_NAME) is not (name in foreign.BY_FLAG)


@pytest.mark.parametrize("flag", foreign.FOREIGN, ids=lambda flag: flag.name)
def test_a_foreign_flag_is_one_sentence_that_ends(flag: foreign.Foreign) -> None:
    assert flag.says.endswith(".") and flag.says[0].isupper() and "\n" not in flag.says


@pytest.mark.parametrize(("arguments", "warnings"), [
    (["--enable-request-id-headers"], 1), (["--pipeline-parallel-size", "1", "model"], 1),
    (["--pipeline-parallel-size=1"], 1), (["--gpu-memory-utilization", "0.9", "--enforce-eager"], 2),
    (["--no-enable-lora"], 1), (["--enable_chunked_prefill"], 1), (["--uvicorn-log-level", "debug"], 1)])
def test_what_asks_for_nothing_else_is_taken_with_a_word(arguments: list[str], warnings: int) -> None:
    settings = resolve(arguments, {})
    assert len(settings.warnings) == warnings and all("no effect of its own" in text for text in settings.warnings)
    assert settings["model"] == ("model" if "model" in arguments else None)


@pytest.mark.parametrize(("arguments", "part"), [
    (["--middleware", "my.Middleware"], "--middleware is not supported. Python code is not loaded"),
    (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size is not supported with '2'. A model's layers are not"),
    (["--enable-lora"], "merge the adapter"), (["--lora-modules", "a=b"], "merge the adapter"),
    (["--no-enable-chunked-prefill"], "always chunked"), (["--revision", "main"], "org/name@revision"),
    (["--speculative-config", "{}"], "Speculative decoding"), (["--kv-cache-dtype", "fp8"], "type of the model"),
])
def test_what_quartet_cannot_do_is_refused_with_the_way_to_go(arguments: list[str], part: str) -> None:
    assert part in refused(arguments)


def test_keys_of_a_file_for_vllm(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("pipeline-parallel-size: 1\nenforce_eager: true\ndisable-fastapi-docs: true\n")
    settings = resolve(["--config", str(tmp_path / "c.yaml")], {})
    assert len(settings.warnings) == 2 and settings["disable_docs"] is True
    (tmp_path / "c.yaml").write_text("pipeline_parallel_size: 4\n")
    assert "pipeline_parallel_size is not supported with '4'" in refused(["--config", str(tmp_path / "c.yaml")])


def test_aliases_and_json_lists() -> None:
    settings = resolve(["--allowed-origins", '["https://a.org", "http://b.org:8000"]', "--sse-keep-alive-interval", "0",
                        "--disable-uvicorn-access-log", "--disable-access-log-for-endpoints", "/health,/v1/models",
                        "--h11-max-incomplete-event-size", "4194304", "--api-server-count", "3"],
                       {"QUARTET_ALLOWED_HEADERS": '["x-a", "x-b"]'})
    assert settings["allowed_origins"] == ("https://a.org", "http://b.org:8000")
    assert settings["disable_access_log_for_endpoints"] == ("/health", "/v1/models")
    assert settings["allowed_headers"] == ("x-a", "x-b") and settings["frontends"] == 3
    assert (settings["max_header_bytes"], settings["keep_alive_interval"]) == (4194304, 0.0)
    assert settings["disable_access_log"] is True


@pytest.mark.parametrize(("arguments", "part"), [
    (["--allowed-origins", "example.org"], "an origin such as"),
    (["--allowed-origins", "*", "--allow-credentials"], "that are named"),
    (["--ssl-keyfile", "/k"], "needs --ssl-certfile"), (["--ssl-certfile", "/no/such"], "does not exist"),
    (["--root-path", "llm"], "a path such as"), (["--enable-log-outputs"], "needs --enable-log-requests"),
    (["--disable-access-log-for-endpoints", "health"], "begins with /"),
    (["--chat-template-content-format", "parts"], "one of auto, string, openai")])
def test_what_is_wrong_with_the_web_options_is_said(arguments: list[str], part: str) -> None:
    assert part in refused(arguments)


def test_a_certificate_needs_a_key_and_a_network(tmp_path: Path) -> None:
    certificate, key = (str(path) for path in certificates.write(tmp_path))
    good = ["--ssl-certfile", certificate, "--ssl-keyfile", key]
    assemble.check(resolve(good, {}))
    assert "belong together" in refused(["--ssl-certfile", certificate])
    assert "exclude each other" in refused([*good, "--uds", str(tmp_path / "s")])
    assert "needs --ssl-ca-certs" in refused([*good, "--ssl-cert-reqs", "2"])


@pytest.mark.parametrize("name", ["chatml", "llama2", "alpaca", "vicuna", "zephyr", "plain"])
def test_our_own_templates_are_taken_by_name(name: str) -> None:
    text = assemble.chat_template(resolve(["--chat-template", name], {}))
    assert text and "messages" in text
    assert text == (Path(__file__).parents[2] / "examples" / "templates" / f"{name}.jinja").read_text()


def test_a_name_that_is_no_template_is_looked_for_as_a_file() -> None:
    with pytest.raises(StartError, match="cannot be read"):
        assemble.chat_template(resolve(["--chat-template", "chatmI"], {}))


def test_the_documentation_lists_every_foreign_flag() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert [flag.name for flag in foreign.FOREIGN if f"| `--{flag.name}` |" not in page or flag.says not in page] == []

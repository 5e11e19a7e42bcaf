"""vLLM's flags that Quartet has no option for: taken with a stated effect, or refused with what to use instead.

Run by the command line only. A flag is here or in pipeline.options; one that is in neither is unknown, and said so.
Nothing here changes a configuration: what is taken is what Quartet does in any case.
"""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """One flag of vLLM. `values`: those that ask for nothing else than what Quartet does; () refuses the flag."""

    name: str
    values: tuple[str, ...]          # "*": any; of a switch: "true" and "false"
    switch: bool = False
    says: str                        # the whole sentence: what happens instead, or what to use

    def takes(self, value: str) -> bool:
        return "*" in self.values or value in self.values


def _switch(name: str, says: str) -> Foreign:
    """On is what Quartet does; off cannot be had."""
    return Foreign(name=name, values=("true",), switch=True, says=says)


def _off(name: str, says: str) -> Foreign:
    """Only --no-NAME is taken."""
    return Foreign(name=name, values=("false",), switch=True, says=says)


def _only(name: str, *values: str, says: str) -> Foreign:
    return Foreign(name=name, values=values, says=says)


def _any(name: str, says: str) -> Foreign:
    return Foreign(name=name, values=("*",), says=says)


_NO_LORA = "LoRA adapters are not served: merge the adapter into the model first."
_NO_MEDIA = "Image and video input is not supported."
_TEXT_ONLY = "There are no image or video inputs that it could be about."

FOREIGN: tuple[Foreign, ...] = (
    # ---- always so
    _switch("enable-request-id-headers", "X-Request-Id is in every answer."),
    _switch("enable-prompt-tokens-details", "The field usage.prompt_tokens_details is in every answer."),
    _switch("enable-server-load-tracking", "The route /load always counts."),
    _switch("enable-auto-tool-choice", "Tool calls are looked for whenever a request has tools; see --tool-call-parser."),
    _switch("exclude-tools-when-tool-choice-none", "With tool_choice none the template sees no tools."),
    _switch("enable-chunked-prefill", "Prefill is always chunked; see --max-prefill-chunk."),
    _switch("async-scheduling", "Steps are always planned ahead on an accelerator."),
    _switch("log-error-stack", "Stacks of unexpected errors are always in the stages' log files."),
    Foreign(name="disable-log-stats", values=("true", "false"), switch=True,
            says="No statistics are logged periodically: they are at /metrics."),
    Foreign(name="disable-log-requests", values=("true", "false"), switch=True,
            says="Requests are logged only with --enable-log-requests."),
    Foreign(name="enforce-eager", values=("true", "false"), switch=True,
            says="There is no graph capture that it could turn off."),
    Foreign(name="disable-custom-all-reduce", values=("true", "false"), switch=True,
            says="The ranks of a model always add up through torch.distributed."),
    _any("uvicorn-log-level", "The HTTP server logs at --log-level."),
    _any("h11-max-header-count", "Headers are limited by their size, --max-header-bytes."),
    _any("gpu-memory-utilization", "The KV cache is sized from what the weights leave, or by --kv-cache-memory-bytes."),
    _any("swap-space", "Nothing is swapped out: requests that do not fit wait, or are computed again."),
    _any("mm-processor-cache-gb", _TEXT_ONLY),
    _any("limit-mm-per-prompt", _TEXT_ONLY),
    _any("media-io-kwargs", _TEXT_ONLY),
    _any("mm-processor-kwargs", _TEXT_ONLY),
    _any("allowed-local-media-path", _TEXT_ONLY),
    _any("allowed-media-domains", _TEXT_ONLY),
    Foreign(name="interleave-mm-strings", values=("true", "false"), switch=True, says=_TEXT_ONLY),
    Foreign(name="trust-request-mm-kwargs", values=("true", "false"), switch=True, says=_TEXT_ONLY),
    # ---- only with the value that Quartet has
    _only("load-format", "auto", "safetensors", says="Weights are safetensors, or a GGUF file given as MODEL."),
    _only("tokenizer-mode", "auto", "hf", says="Tokenizers are read from tokenizer.json."),
    _only("kv-cache-dtype", "auto", says="The KV cache has the type of the model."),
    _only("pipeline-parallel-size", "1", says="A model's layers are not dealt out to devices: use --tensor-parallel-size."),
    _only("distributed-executor-backend", "mp", "uni", says="Ranks are processes of one machine; see --tensor-parallel-size."),
    _only("cpu-offload-gb", "0", says="Weights are not offloaded: use --quantization int8 or a smaller model."),
    _only("tool-strict-level", "auto", "function", says="A tool's arguments are constrained where it says strict: true, "
          "and wherever a call is required."),
    # ---- refused
    _only("middleware", says="Python code is not loaded into the server: put a proxy in front of it."),
    _only("revision", says="Write the revision into the model: org/name@revision."),
    _only("tokenizer-revision", says="Give a directory to --tokenizer."),
    _only("code-revision", says="Give a directory with the code as MODEL, and --trust-remote-code."),
    _only("download-dir", says="Set HF_HOME to choose where models of the hub are kept."),
    _only("tool-parser-plugin", says="Python code is not loaded into the server; see --tool-call-parser."),
    _only("reasoning-parser-plugin", says="Python code is not loaded into the server; see --reasoning-parser."),
    _only("logits-processors", says="Python code is not loaded into the server."),
    _only("tool-server", says="The server calls no tools itself: clients do."),
    _only("speculative-config", says="Speculative decoding is not supported."),
    _off("enable-lora", _NO_LORA),
    _only("lora-modules", says=_NO_LORA),
    _only("max-loras", says=_NO_LORA),
    _only("max-lora-rank", says=_NO_LORA),
    _off("enable-mm-embeds", _NO_MEDIA),
    _off("enable-sleep-mode", "Stop the server to free its memory: it starts within seconds."),
    _off("enable-per-request-metrics", "Times are in openai-processing-ms and /metrics, not in answers."),
    _off("enable-scale-out", "The in-cluster client does that; see docs/client.md."),
    _off("enable-fault-tolerance", "Processes that die are always replaced, and their requests go on."),
    _off("enable-offline-docs", "The page /docs needs nothing from elsewhere."),
    _only("otlp-traces-endpoint", says="There is no tracing: the access log has the times of every request."),
    _only("show-hidden-metrics-for-version", says="All metrics are shown; docs/metrics.md lists them."),
    _only("max-num-queued-tokens", says="Use --max-inflight-tokens."),
    _only("fingerprint-mode", says="The field system_fingerprint names model, type and version, and nothing else."),
    _only("fingerprint-value", says="The field system_fingerprint names model, type and version, and nothing else."),
    _only("profiler-config", says="Profile a stage from outside; SIGUSR2 writes its stacks."),
    _only("custom-histogram-buckets", says="Buckets are those of vLLM's own boards."),
)
BY_FLAG = {flag.name: flag for flag in FOREIGN}


def look_up(word: str, following: str | None) -> tuple[Foreign, str, int] | None:
    """(flag, its value, how many words it takes) for ``--name``, ``--no-name``, ``--name value`` or ``--name=value``."""
    if not word.startswith("--"):
        return None
    name, given, value = word[2:].replace("_", "-").partition("=")
    if name.startswith("no-") and name[3:] in BY_FLAG and BY_FLAG[name[3:]].switch:
        return BY_FLAG[name[3:]], "false", 1
    flag = BY_FLAG.get(name)
    if flag is None:
        return None
    if flag.switch:
        return flag, value.lower() if given else "true", 1
    if given:
        return flag, value, 1
    if following is None or following.startswith("--"):
        return flag, "", 1
    return flag, following, 2


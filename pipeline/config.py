"""The resolved configuration: frozen dataclasses that every stage reads from one JSON file in the run directory.

The launcher writes the file (0600, in a 0700 directory); the topology (who binds what, which engine serves which
model) is a pure function of it. How flags, environment and YAML become a ServerConfig: pipeline.options.
"""
from __future__ import annotations

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.messages import Kind

POOLING_TASKS = ("embed", "classify", "score")     # of ModelConfig.task: these models give numbers, not text
DIRECT_TASKS = (*POOLING_TASKS, "transcribe")      # whose results pass no detokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine process: memory, batch limits and arithmetic."""

    backend: str = "auto"                    # auto | own | transformers | null
    device: str = "auto"                     # auto | cpu | cuda
    dtype: str = "auto"                      # auto | bfloat16 | float16 | float32
    quantization: str | None = None          # None | int8
    block_size: int = 16                     # tokens per KV block
    kv_cache_bytes: int | None = None        # None: sized from free memory
    num_kv_blocks: int | None = None         # overrides kv_cache_bytes (tests)
    max_num_seqs: int = 64                   # sequences in one step
    max_step_tokens: int = 512               # token budget of one step (--max-num-batched-tokens)
    max_prefill_chunk: int = 512             # the most tokens of one prompt in one step
    max_mixed_prefill: int = 192             # the most prompt tokens in a step in which other sequences decode
    max_waiting: int = 1024                  # requests queued in the engine
    enable_prefix_caching: bool = True
    scheduling_policy: str = "fcfs"          # fcfs | priority
    threads: int | None = None               # None: by core count
    logprobs_mode: str = "raw_logprobs"      # raw_logprobs | processed_logprobs | raw_logits | processed_logits
    kernels: bool = True                     # our own CPU kernels, where a compiler is found
    tensor_parallel: int = 1                 # processes over which each layer of the model is split
    null_script: str = ""                    # backend null: what it answers, see engine_proc.null
    null_step_s: float = 0.0                 # backend null: least duration of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One served model. `path` is a prepared Hugging Face directory (see engine_proc.prepare)."""

    names: tuple[str, ...]                   # served names, the first is the one in answers
    path: str
    source: str = ""                         # what the user wrote
    tokenizer: str = ""                      # directory with tokenizer.json; "" : path
    task: str = "generate"                   # generate | embed | classify | score | transcribe
    max_model_len: int = 2048
    vocab_size: int = 0                      # rows of the logits
    trust_remote_code: bool = False
    chat_template: str | None = None         # text of a template that overrides the tokenizer's
    content_format: str = "auto"             # auto | string | openai: how the template takes message contents
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)   # variables for every chat of this model
    tool_parser: str = ""                    # families.table.FAMILIES; "": answers are not searched for tool calls
    reasoning_parser: str = ""               # families.reasoning.REASONINGS; "": answers hold no reasoning
    generation_defaults: dict[str, float | int | None] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()            # the first one is EOS, the rest count as stop ids
    replicas: int = 1
    pooler: dict[str, Any] = field(default_factory=dict)     # --pooler-config, over what the model's files say
    num_type_ids: int = 1                    # token types that the model tells apart (two texts in one input)
    prompts: dict[str, str] = field(default_factory=dict)    # sentence-transformers: put ahead of a text, by name
    default_prompt: str = ""                 # the one that a request which names none gets
    long_inputs: str = "error"               # error | truncate | chunk: inputs of pooling models beyond max_model_len
    max_embed_len: int = 0                   # tokens of an input that is computed in parts; 0: none is
    include_prompt: bool = True              # whether the tokens of a prompt ahead of a text are pooled
    pair_template: str = ""                  # of a model that scores two texts as one chat; "": it takes them as a pair
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """HTTPS. Files are read by the frontends, again on SIGHUP."""

    certfile: str | None = None              # None: plain HTTP
    keyfile: str | None = None               # None: in certfile
    ca_certs: str | None = None              # of client certificates
    cert_reqs: int = 0                       # 0 none, 1 optional, 2 required
    refresh: bool = False                    # watch the files


@dataclass(frozen=True, slots=True, kw_only=True)
class CorsConfig:
    """Which web pages may call. No origin: none may."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessLogConfig:
    """What the frontends log of requests."""

    enabled: bool = True                     # a line per HTTP request
    quiet_paths: tuple[str, ...] = ()        # no line for these
    requests: bool = False                   # prompts and parameters
    outputs: bool = False                    # answers, too
    max_len: int = 16384                     # characters of a text, or ids


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    host: str = "127.0.0.1"
    port: int = 8000                         # the port bound (0 is resolved by the launcher)
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None
    metrics_need_key: bool = False
    allowed_hosts: tuple[str, ...] = ()      # further Host names accepted on loopback
    max_body_bytes: int = 32 * 2**20
    max_logprobs: int = 20                   # -1: the vocabulary
    prompt_embeds: bool = False              # requests may bring embeddings in place of tokens
    stream_interval: int = 1                 # least tokens of one streamed chunk, the first and last excepted
    enable_docs: bool = True
    request_timeout_s: float = 3600.0        # deadline of a request
    keep_alive_s: float = 10.0               # comment lines in quiet streams; headers wait this long for a first token
    slow_client_s: float = 60.0              # a blocked write ends the request after this
    root_path: str = ""                      # prefix that a proxy puts in front of every path
    max_header_bytes: int = 8192
    response_role: str = "assistant"
    force_usage: bool = False                # usage in every stream
    tokens_as_ids: bool = False              # log-probabilities name tokens token_id:N by default
    tokenizer_info: bool = False             # serve /tokenizer_info
    tls: TlsConfig = field(default_factory=TlsConfig)
    cors: CorsConfig = field(default_factory=CorsConfig)
    log: AccessLogConfig = field(default_factory=AccessLogConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioConfig:
    """Limits of what is uploaded to be transcribed."""

    max_bytes: int = 25 * 2**20              # of a file
    max_seconds: float = 4 * 3600.0          # of sound in it


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeConfig:
    """The side door for `pipeline.client`."""

    endpoint: str | None = None              # ipc path or tcp host:port; frontend i appends .i or adds i to the port
    key_dir: str | None = None               # CURVE keys, needed for TCP that is not loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsConfig:
    """Admission permits over all frontends; each frontend takes its share."""

    max_requests: int = 512
    max_bytes: int = 256 * 2**20             # of bodies in flight
    max_tokens: int = 2_000_000              # estimated prompt + output tokens in flight


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeoutsConfig:
    shutdown_s: float = 30.0
    hang_s: float = 60.0
    start_s: float = 1800.0
    beacon_s: float = 0.1
    census_s: float = 5.0
    crash_deaths: int = 5                    # of one process within 60 s: a crash loop


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Everything. Indices into `models` are the model numbers on the wire."""

    run_dir: str
    log_dir: str
    models: tuple[ModelConfig, ...]
    log_level: str = "INFO"
    frontends: int = 1
    tokenizers: int = 1
    detokenizers: int = 1
    seed: int | None = None                  # --seed: fixes the seeds of requests that name none
    launcher_pid: int = 0
    http: HttpConfig = field(default_factory=HttpConfig)
    edge: EdgeConfig = field(default_factory=EdgeConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    timeouts: TimeoutsConfig = field(default_factory=TimeoutsConfig)
    trust_request_chat_template: bool = False
    started_ns: int = 0                      # monotonic, when the launcher started

    def engines(self) -> list[int]:
        """Engine index -> model number: the replicas of each model in turn."""
        return [number for number, model in enumerate(self.models) for _ in range(model.replicas)]

    def count(self, kind: Kind) -> int:
        """How many processes of a kind there are."""
        return {Kind.FRONTEND: self.frontends, Kind.TOKENIZER: self.tokenizers, Kind.ENGINE: len(self.engines()),
                Kind.DETOKENIZER: self.detokenizers, Kind.LAUNCHER: 1}[kind]

    def members(self) -> list[tuple[Kind, int]]:
        """Every stage process, in the order of a drain."""
        return [(kind, index) for kind in (Kind.FRONTEND, Kind.TOKENIZER, Kind.ENGINE, Kind.DETOKENIZER)
                for index in range(self.count(kind))]


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1)


def save(config: ServerConfig, path: Path) -> None:
    """Write the configuration readable by its owner only; atomic."""
    temporary = path.with_suffix(".tmp")
    temporary.touch(mode=0o600)
    temporary.write_text(to_json(config))
    temporary.rename(path)


def load(path: str | Path) -> ServerConfig:
    """Read what `save` wrote; StartError if it is no configuration."""
    try:
        return typing.cast(ServerConfig, build(ServerConfig, json.loads(Path(path).read_text())))
    except (OSError, ValueError) as error:
        raise StartError(CONFIG, f"The configuration file {path} cannot be read: {error}.") from None


def build(hint: Any, value: Any, where: str = "configuration") -> Any:
    """A dataclass of nested dataclasses from plain JSON values; ValueError names what does not fit."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping")
        hints = typing.get_type_hints(hint)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"{where} has an unknown key '{sorted(unknown)[0]}'")
        return hint(**{k: build(hints[k], v, f"{where}.{k}") for k, v in value.items()})  # type: ignore[operator]
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list")
        return tuple(build(typing.get_args(hint)[0], v, where) for v in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping")
        return dict(value)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return build(next(a for a in typing.get_args(hint) if a is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be of type {hint.__name__}")
    return value

"""Settings to a ServerConfig: which option feeds which field, and what must hold between options.

Run by the command line only. `check` needs no model and runs before anything else; `model_config` needs the prepared
directory. StartError with one sentence for whatever does not fit.
"""
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import keys, pooling, pooling_files, served, tls, tokenizer_files
from pipeline.checkpoint import GENERATION_DEFAULTS, Source, describe
from pipeline.config import (
    POOLING_TASKS,
    AccessLogConfig,
    AudioConfig,
    CorsConfig,
    EdgeConfig,
    EngineConfig,
    HttpConfig,
    LimitsConfig,
    ModelConfig,
    ServerConfig,
    TimeoutsConfig,
    TlsConfig,
)
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.families import table as families
from pipeline.options import BY_KEY, nearest
from pipeline.pooling_files import PoolingFiles
from pipeline.settings import Settings
from pipeline.values import TEMPLATE_NAMES, api_key

MAX_TEXT_BYTES = 2**20
NEVER_S = 1e9                    # what --keep-alive-interval 0 stands for
TEMPLATES = pooling.TEMPLATES


def check(settings: Settings) -> None:
    """What can be said without the models; StartError with the first thing that is wrong."""
    if settings["max_request_bytes"] > settings["max_inflight_bytes"]:
        raise _wrong("--max-request-bytes must not exceed --max-inflight-bytes.")
    if settings["uds"] is not None and any(settings[key] != BY_KEY[key].default for key in ("host", "port")):
        raise _wrong("--uds takes the place of --host and --port: give one or the other.")
    if settings["api_key_file"] is not None:
        keys_in(Path(settings["api_key_file"]).expanduser())
    _check_edge(settings)
    _check_web(settings)
    for one in served.model_settings(settings):
        _check_model(one)


def _check_model(settings: Settings) -> None:
    """What must hold between the options of one model."""
    budget, chunk = settings["max_num_batched_tokens"], settings["max_prefill_chunk"]
    if budget < settings["max_num_seqs"]:
        raise _wrong(f"--max-num-batched-tokens ({budget}) must be at least --max-num-seqs "
                     f"({settings['max_num_seqs']}).")
    if chunk > budget and settings.given("max_prefill_chunk"):
        raise _wrong(f"--max-prefill-chunk ({chunk}) must not exceed --max-num-batched-tokens ({budget}).")
    if settings["kv_cache_memory_bytes"] is not None and settings["num_kv_blocks"] is not None:
        raise _wrong("--kv-cache-memory-bytes and --num-kv-blocks exclude each other.")
    if settings["null_step"] and settings["null_engine"] is None:
        raise _wrong("--null-step needs --null-engine.")
    if len(set(settings["served_model_name"])) != len(settings["served_model_name"]):
        raise _wrong("--served-model-name holds a name twice.")
    unknown = set(settings["override_generation_config"] or ()) - set(GENERATION_DEFAULTS)
    if unknown:
        name = sorted(unknown)[0]
        raise _wrong(f"--override-generation-config has an unknown key '{name}'" + nearest(name, GENERATION_DEFAULTS))
    if settings["runner"] == "generate" and settings["convert"] not in ("auto", "none"):
        raise _wrong("--convert needs --runner pooling.")
    generation_directory(settings, Path("/"))
    chat_template(settings)


def _check_edge(settings: Settings) -> None:
    """TCP that others can reach needs keys, and the keys must be there."""
    endpoint, directory = settings["zmq_endpoint"], settings["zmq_keys"]
    if directory is not None:
        if endpoint is None:
            raise _wrong("--zmq-keys needs --zmq-endpoint.")
        for name in ("server.key", "server.pub"):
            keys.read(Path(directory).expanduser() / name)
    elif endpoint is not None and endpoint.startswith("tcp://"):
        host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        if host not in ("127.0.0.1", "localhost", "[::1]"):
            raise _wrong(f"--zmq-endpoint {endpoint} can be reached from other machines and needs --zmq-keys: "
                         "make them with `quartet keys DIR`.")


def _check_web(settings: Settings) -> None:
    """TLS files that can be used, and no cookie for pages from everywhere."""
    certificate = settings["ssl_certfile"]
    if certificate is None:
        for key in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs", "enable_ssl_refresh"):
            if settings[key]:
                raise _wrong(f"--{BY_KEY[key].name} needs --ssl-certfile.")
    elif settings["uds"] is not None:
        raise _wrong("--ssl-certfile and --uds exclude each other: a UNIX socket is not on the network.")
    else:
        tls.context(tls_config(settings))
    if settings["allow_credentials"] and "*" in settings["allowed_origins"]:
        raise _wrong("--allow-credentials needs --allowed-origins that are named: with * every page could act for the "
                     "user.")
    if settings["enable_log_outputs"] and not settings["enable_log_requests"]:
        raise _wrong("--enable-log-outputs needs --enable-log-requests.")


def tls_config(settings: Settings) -> TlsConfig:
    return TlsConfig(
        certfile=_absolute(settings["ssl_certfile"]), keyfile=_absolute(settings["ssl_keyfile"]),
        ca_certs=_absolute(settings["ssl_ca_certs"]), cert_reqs=settings["ssl_cert_reqs"],
        refresh=settings["enable_ssl_refresh"])


def log_config(settings: Settings) -> AccessLogConfig:
    length = settings["max_log_len"]
    return AccessLogConfig(
        enabled=not settings["disable_access_log"], quiet_paths=settings["disable_access_log_for_endpoints"],
        requests=settings["enable_log_requests"], outputs=settings["enable_log_outputs"],
        max_len=AccessLogConfig().max_len if length is None else length)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser().absolute())


def keys_in(path: Path) -> tuple[str, ...]:
    """The keys of a key file: one per line, '#' starts a comment line. A file without a key is an error."""
    keys = []
    for number, line in enumerate(_text(path, "API key file").splitlines(), 1):
        if (key := line.strip()) and not key.startswith("#"):
            try:
                keys.append(api_key(key))
            except ValueError as error:
                raise _wrong(f"Line {number} of the API key file {path} must be {error}.") from None
    if not keys:
        raise _wrong(f"The API key file {path} holds no key.")
    return tuple(keys)


def chat_template(settings: Settings) -> str | None:
    """The text of --chat-template: one of our own by its name, a file's contents, or the value itself."""
    value: str | None = settings["chat_template"]
    if value is None or "{{" in value or "{%" in value or "\n" in value:
        return value
    if value in TEMPLATE_NAMES:
        return _text(TEMPLATES / f"{value}.jinja", "chat template")
    return _text(Path(value).expanduser(), "chat template")


def generation_directory(settings: Settings, model: Path) -> Path | None:
    """Where sampling defaults are read from; None with ``vllm``."""
    value = settings["generation_config"]
    if value in ("auto", "vllm"):
        return model if value == "auto" else None
    path = Path(value).expanduser()
    if not (path / "generation_config.json").is_file():
        raise _wrong("--generation-config must be auto, vllm or a directory with a generation_config.json, "
                     f"not '{value}'.")
    return path


def model_config(settings: Settings, source: Source, directory: Path, tokenizer: Path) -> ModelConfig:
    """The configuration of one model, from its prepared directory."""
    null = settings["null_engine"] is not None
    facts = describe(directory, tokenizer, generation_directory(settings, directory), weights=not null)
    task = pooling.task(settings, directory)
    pooler = pooling.pooler(settings)
    files = PoolingFiles() if task not in POOLING_TASKS else pooling_files.describe(directory, pooler)
    wanted, longest = settings["max_model_len"], facts.longest
    length = min(facts.max_model_len, files.max_seq_length or facts.max_model_len)
    if task not in POOLING_TASKS:
        for key in ("pooler_config", "long_inputs", "hf_overrides"):
            if settings.given(key):
                raise _wrong(f"--{BY_KEY[key].name} is for pooling models, and '{source.name}' is there to {task}.")
    if settings["tensor_parallel_size"] > 1 and (task != "generate" or null):
        raise _wrong("--tensor-parallel-size is for models that generate text" + (", not for the null engine." if null else
                     f", and '{source.name}' is there to {task}."))
    tools, reasoning = _parsers(settings, tokenizer)
    if wanted is not None and longest is not None and wanted > longest:
        raise _wrong(f"--max-model-len is {wanted}, and the model has a context of {longest} tokens.")
    return ModelConfig(
        names=settings["served_model_name"] or (source.name,), path=str(directory), source=source.where,
        tokenizer="" if tokenizer == directory else str(tokenizer), max_model_len=wanted or length, task=task,
        vocab_size=facts.vocab_size, trust_remote_code=settings["trust_remote_code"],
        chat_template=chat_template(settings), tool_parser=tools, reasoning_parser=reasoning,
        content_format=settings["chat_template_content_format"],
        chat_template_kwargs=settings["default_chat_template_kwargs"] or {}, eos_ids=facts.eos_ids,
        replicas=settings["data_parallel_size"], pooler=pooler, num_type_ids=facts.num_type_ids,
        prompts=files.prompts, default_prompt=files.default_prompt or "", include_prompt=files.include_prompt,
        **pooling.long_inputs(settings, task, files, wanted or length),
        pair_template=pooling.pair_template(settings, task, directory, chat_template(settings)),
        generation_defaults={**facts.generation_defaults, **_overrides(settings["override_generation_config"] or {})},
        engine=engine_config(settings))


def _parsers(settings: Settings, tokenizer: Path) -> tuple[str, str]:
    """The families of tool calls and of reasoning: named, or as the chat template tells. "" for none."""
    template = chat_template(settings)
    if template is None:
        template = "\n".join(tokenizer_files.read(tokenizer).templates.values())
    tools, reasoning = settings["tool_call_parser"], settings["reasoning_parser"]
    tools = families.family_of(template) if tools == "auto" else "" if tools == "none" else tools
    reasoning = families.reasoning_of(template) if reasoning == "auto" else "" if reasoning == "none" else reasoning
    return tools, reasoning


def _overrides(values: Mapping[str, Any]) -> dict[str, float | int | None]:
    for key, value in values.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise _wrong(f"--override-generation-config: {key} must be a number or null.")
    return dict(values)


def engine_config(settings: Settings) -> EngineConfig:
    null = settings["null_engine"]
    return EngineConfig(
        backend=settings["backend"] if null is None else "null",
        null_script=null or "", null_step_s=settings["null_step"],
        device=settings["device"], dtype=settings["dtype"], quantization=settings["quantization"],
        block_size=settings["block_size"], kv_cache_bytes=settings["kv_cache_memory_bytes"],
        num_kv_blocks=settings["num_kv_blocks"], max_num_seqs=settings["max_num_seqs"],
        max_step_tokens=settings["max_num_batched_tokens"], max_waiting=settings["max_num_queued_reqs"],
        max_prefill_chunk=min(settings["max_prefill_chunk"], settings["max_num_batched_tokens"]),
        max_mixed_prefill=settings["max_mixed_prefill"],
        enable_prefix_caching=settings["enable_prefix_caching"], scheduling_policy=settings["scheduling_policy"],
        logprobs_mode=settings["logprobs_mode"], threads=settings["threads"], kernels=settings["enable_kernels"],
        tensor_parallel=settings["tensor_parallel_size"])


def server_config(settings: Settings, models: Sequence[ModelConfig], *, run_dir: Path, log_dir: Path, port: int,
                  started_ns: int) -> ServerConfig:
    """The resolved configuration of this launcher's run; `port` is the one that was bound."""
    return ServerConfig(
        run_dir=str(run_dir), log_dir=str(log_dir), models=tuple(models), log_level=settings["log_level"],
        frontends=settings["frontends"], tokenizers=settings["tokenizers"], detokenizers=settings["detokenizers"],
        seed=settings["seed"], launcher_pid=os.getpid(), started_ns=started_ns,
        trust_request_chat_template=settings["trust_request_chat_template"],
        http=HttpConfig(
            host=settings["host"], port=port, uds=settings["uds"], api_keys=settings["api_key"],
            api_key_file=_absolute(settings["api_key_file"]),
            metrics_need_key=settings["metrics_need_key"], allowed_hosts=settings["allowed_hosts"],
            max_body_bytes=settings["max_request_bytes"], max_logprobs=settings["max_logprobs"],
            prompt_embeds=settings["enable_prompt_embeds"], stream_interval=settings["stream_interval"],
            enable_docs=not settings["disable_docs"], request_timeout_s=settings["request_timeout"],
            keep_alive_s=settings["keep_alive_interval"] or NEVER_S, slow_client_s=settings["slow_client_timeout"],
            root_path=settings["root_path"], max_header_bytes=settings["max_header_bytes"],
            response_role=settings["response_role"], force_usage=settings["enable_force_include_usage"],
            tokens_as_ids=settings["return_tokens_as_token_ids"],
            tokenizer_info=settings["enable_tokenizer_info_endpoint"], tls=tls_config(settings),
            cors=CorsConfig(
                origins=settings["allowed_origins"], methods=settings["allowed_methods"],
                headers=settings["allowed_headers"], credentials=settings["allow_credentials"]),
            log=log_config(settings)),
        audio=AudioConfig(max_bytes=settings["max_audio_clip_filesize_mb"] * 2**20,
                          max_seconds=settings["max_audio_seconds"]),
        edge=EdgeConfig(endpoint=settings["zmq_endpoint"], key_dir=_absolute(settings["zmq_keys"])),
        limits=LimitsConfig(max_requests=settings["max_requests"], max_bytes=settings["max_inflight_bytes"],
                            max_tokens=settings["max_inflight_tokens"]),
        timeouts=TimeoutsConfig(shutdown_s=settings["shutdown_timeout"], hang_s=settings["hang_timeout"],
                                start_s=settings["start_timeout"], crash_deaths=settings["crash_limit"]))


def _text(path: Path, what: str) -> str:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise _wrong(f"The {what} {path} is larger than {MAX_TEXT_BYTES} bytes.")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise _wrong(f"The {what} {path} cannot be read: {reason}.") from None


def _wrong(sentence: str) -> StartError:
    return StartError(CONFIG, sentence)

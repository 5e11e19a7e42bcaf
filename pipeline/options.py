"""The table of `quartet serve` options and how the text of one becomes a value. Run by the command line only.

Every option is one row: flag, environment variable (QUARTET_...) and YAML key follow from its name. Imports nothing
heavy, so that ``quartet --help`` answers at once; where the values come from is pipeline.settings' business.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from pipeline import values
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.families import table as families
from pipeline.values import integer, seconds

MAX_STAGES = 64                 # processes of one kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option. `parse` turns text into a value or raises ValueError with the rest of "--name must be ...".

    flag: a switch with --no-name beside it. many: a tuple, given by repeating the flag or as a JSON list; words: several
    at once, too; commas: separate values wherever they are written.
    """

    name: str
    group: str
    help: str
    parse: Callable[[str], Any] = str
    default: Any = None
    metavar: str = ""
    choices: tuple[str, ...] = ()
    flag: bool = False
    many: bool = False
    words: bool = False
    commas: bool = False
    secret: bool = False
    positional: bool = False
    aliases: tuple[str, ...] = ()
    spelling: str = ""                  # the flag, where it is not called as the key of the file
    server_wide: bool = False           # in a group of per-model options, and yet about the whole server
    per_model: bool = False             # the other way round

    @property
    def of_a_model(self) -> bool:
        """Whether each served model has a value of its own."""
        return self.per_model or (self.group in (MODEL, ENGINE) and not self.server_wide)

    @property
    def key(self) -> str:
        """The name in Python and, with underscores or dashes, in YAML."""
        return self.name.replace("-", "_")

    @property
    def env(self) -> str:
        return "QUARTET_" + self.key.upper()

    def value(self, text: str) -> Any:
        """The value that `text` stands for; ValueError with the rest of "... must be ..."."""
        if self.flag:
            return values.switch(text)
        if self.choices and text not in self.choices:
            raise ValueError("one of " + ", ".join(self.choices))
        return self.parse(text)


# ---- the table ---------------------------------------------------------------------------------------------------

HTTP, MODEL, ENGINE, PROCESSES, LIMITS, LOGS, TEST = (
    "HTTP server", "Model", "Engine", "Processes", "Limits", "Logging and files", "Checks and tests")
GROUPS = (HTTP, MODEL, ENGINE, PROCESSES, LIMITS, LOGS, TEST)

OPTIONS: tuple[Option, ...] = (
    Option(name="model", group=MODEL, positional=True, metavar="MODEL",
           help="Hugging Face directory, GGUF file or hub id (default: the embedded SmolLM2-135M-Instruct)"),
    Option(name="models", group=MODEL, many=True, default=(), parse=values.named_model, metavar="NAME=PATH", spelling="model",
           server_wide=True, help="serve this model besides (repeatable; in the file `models`: a list with their options)"),
    Option(name="task", group=MODEL, default="auto", choices=("auto", "generate", "embed", "classify", "score", "transcribe"),
           help="what the model is for (auto: as its files say)"),
    Option(name="runner", group=MODEL, default="auto", choices=("auto", "generate", "pooling"),
           help="pooling: take vectors or class scores from a model that generates text"),
    Option(name="convert", group=MODEL, default="auto", choices=("auto", "none", "embed", "classify"),
           help="what a model that generates text becomes with --runner pooling"),
    Option(name="pooler-config", group=MODEL, parse=values.json_object, metavar="JSON",
           help='pooling in place of what the model says, such as \'{"pooling_type": "CLS", "normalize": true}\''),
    Option(name="hf-overrides", group=MODEL, parse=values.json_object, metavar="JSON",
           help="of vLLM: what it says about pooling is taken, anything else refused; see docs/models.md"),
    Option(name="long-inputs", group=MODEL, default="error", choices=("error", "truncate", "chunk"),
           help="what becomes of inputs beyond the context of a pooling model; chunk: the mean of the parts' embeddings"),
    Option(name="host", group=HTTP, default="127.0.0.1", parse=values.host, help="address to listen on"),
    Option(name="port", group=HTTP, default=8000, parse=integer(0, 65535),
           help="TCP port; 0 takes a free one, which the banner shows"),
    Option(name="uds", group=HTTP, metavar="PATH", help="listen on this UNIX socket instead of host and port"),
    Option(name="api-key", group=HTTP, many=True, secret=True, default=(), parse=values.api_key, metavar="KEY",
           help="require this bearer key (repeatable); prefer QUARTET_API_KEY or --api-key-file,"
                " which `ps` cannot show"),
    Option(name="api-key-file", group=HTTP, metavar="FILE", help="file with one key per line, read again on SIGHUP"),
    Option(name="metrics-need-key", group=HTTP, flag=True, default=False, help="/metrics requires a key, too"),
    Option(name="allowed-hosts", group=HTTP, many=True, default=(), parse=values.host, metavar="NAME",
           help="further Host header names that a server on loopback accepts"),
    Option(name="disable-docs", group=HTTP, flag=True, default=False, aliases=("disable-fastapi-docs",),
           help="serve no /openapi.json and no /docs"),
    Option(name="root-path", group=HTTP, default="", parse=values.root_path, metavar="PREFIX",
           help="prefix under which a proxy shows this server; paths are answered with it and without it"),
    Option(name="ssl-certfile", group=HTTP, metavar="FILE", help="serve HTTPS with this certificate chain (PEM)"),
    Option(name="ssl-keyfile", group=HTTP, metavar="FILE", help="its private key, where --ssl-certfile does not hold it"),
    Option(name="ssl-ca-certs", group=HTTP, metavar="FILE", help="authorities of client certificates (PEM)"),
    Option(name="ssl-cert-reqs", group=HTTP, default=0, parse=integer(0, 2), metavar="N",
           help="client certificates: 0 not asked for, 1 optional, 2 required"),
    Option(name="enable-ssl-refresh", group=HTTP, flag=True, default=False,
           help="notice by itself that the certificate's files have changed; SIGHUP reads them again in any case"),
    Option(name="allowed-origins", group=HTTP, many=True, words=True, default=(), metavar="ORIGIN",
           parse=values.origin, help="web origins whose pages may call this server (CORS); * is all; none by default"),
    Option(name="allowed-methods", group=HTTP, many=True, words=True, default=("*",), metavar="METHOD",
           parse=values.header_word, help="methods that such pages may use"),
    Option(name="allowed-headers", group=HTTP, many=True, words=True, default=("*",), metavar="HEADER",
           parse=values.header_word, help="request headers that such pages may send"),
    Option(name="allow-credentials", group=HTTP, flag=True, default=False,
           help="such pages may send cookies and keys that the browser holds"),
    Option(name="max-header-bytes", group=HTTP, default=8192, parse=integer(1024, 2**24, values.count), metavar="N",
           aliases=("h11-max-incomplete-event-size",), help="size of a request's head; more is refused"),
    Option(name="response-role", group=HTTP, default="assistant", parse=values.name, metavar="ROLE",
           help="role of a chat answer, where the request adds a generation prompt"),
    Option(name="enable-force-include-usage", group=HTTP, flag=True, default=False,
           help="end every stream with usage, as if stream_options asked for include_usage"),
    Option(name="return-tokens-as-token-ids", group=HTTP, flag=True, default=False,
           help="log-probabilities name tokens token_id:N, unless the request says otherwise"),
    Option(name="enable-tokenizer-info-endpoint", group=HTTP, flag=True, default=False,
           help="serve /tokenizer_info: the tokenizer's configuration and chat template"),
    Option(name="request-timeout", group=HTTP, default=3600.0, parse=seconds(0.1), metavar="S",
           help="deadline of a request, in seconds"),
    Option(name="keep-alive-interval", group=HTTP, default=10.0, parse=values.interval, metavar="S",
           aliases=("sse-keep-alive-interval",), help="seconds between comment lines in a quiet stream; 0: none"),
    Option(name="stream-interval", group=HTTP, default=1, parse=integer(1, 2**20), metavar="N",
           help="least tokens of one streamed chunk, the first and the last excepted"),
    Option(name="slow-client-timeout", group=HTTP, default=60.0, parse=seconds(1.0), metavar="S",
           help="a client that reads nothing for this long is dropped"),

    Option(name="zmq-endpoint", group=HTTP, parse=values.zmq_endpoint, metavar="ENDPOINT",
           help="serve in-cluster clients here, too: ipc:///path or tcp://host:port (docs/client.md)"),
    Option(name="zmq-keys", group=HTTP, metavar="DIR",
           help="CURVE keys made by `quartet keys DIR`, needed for TCP that is not loopback"),

    Option(name="served-model-name", group=MODEL, many=True, words=True, default=(), parse=values.name, metavar="NAME",
           help="names in the API, the first one is in answers (default: the directory, file or hub name)"),
    Option(name="tokenizer", group=MODEL, metavar="DIR", help="take the tokenizer from this directory"),
    Option(name="trust-remote-code", group=MODEL, flag=True, default=False,
           help="run Python code that comes with the model: only for models that you trust like your own programs"),
    Option(name="max-model-len", group=MODEL, parse=values.max_model_len, metavar="N",
           help="context length in tokens: 4096, 32k (32000), 32K (32768) or auto (default: what the model has)"),
    Option(name="chat-template", group=MODEL, metavar="NAME|FILE|TEXT",
           help="chat template in place of the tokenizer's own: " + ", ".join(values.TEMPLATE_NAMES) +
                ", a file, or the template itself"),
    Option(name="chat-template-content-format", group=MODEL, default="auto", choices=("auto", "string", "openai"),
           help="how the template takes message contents: as a string or as a list of parts (openai)"),
    Option(name="default-chat-template-kwargs", group=MODEL, parse=values.json_object, metavar="JSON",
           help="variables for the chat template, which a request's chat_template_kwargs override"),
    Option(name="tool-call-parser", group=MODEL, default="auto", parse=families.tool_parser, metavar="NAME",
           help="how the model writes tool calls: auto (as its chat template says), none, or one of "
                + ", ".join(families.FAMILIES)),
    Option(name="reasoning-parser", group=MODEL, default="auto", parse=families.reasoning_parser, metavar="NAME",
           help="how the model marks its reasoning: auto (as its chat template says), none, or one of "
                + ", ".join(families.REASONINGS)),
    Option(name="trust-request-chat-template", group=MODEL, flag=True, default=False, server_wide=True,
           help="requests may bring a chat template of their own"),
    Option(name="enable-prompt-embeds", group=MODEL, flag=True, default=False,
           help="completions may bring embeddings as numbers in base64 in place of a prompt"),
    Option(name="generation-config", group=MODEL, default="auto", metavar="auto|vllm|DIR",
           help="where sampling defaults come from: the model, nowhere (vllm), or a directory"),
    Option(name="override-generation-config", group=MODEL, parse=values.json_object, metavar="JSON",
           help='sampling defaults on top, such as \'{"temperature": 0.6}\''),
    Option(name="seed", group=MODEL, server_wide=True, parse=integer(0, 2**63 - 1), metavar="N",
           help="fix the random numbers of requests that name no seed"),

    Option(name="dtype", group=ENGINE, default="auto", parse=values.dtype, metavar="TYPE",
           help="auto, bfloat16, float16 (half) or float32 (float)"),
    Option(name="quantization", group=ENGINE, choices=("int8",), help="quantise the weights at load"),
    Option(name="backend", group=ENGINE, default="auto", choices=("auto", "own", "transformers"),
           help="model code: our own layers, or transformers with our attention"),
    Option(name="device", group=ENGINE, default="auto", choices=("auto", "cpu", "cuda"), help="where the model runs"),
    Option(name="threads", group=ENGINE, parse=integer(1, 1024), metavar="N", help="CPU threads (default: the cores)"),
    Option(name="block-size", group=ENGINE, default=16, parse=integer(1, 256), metavar="N",
           help="tokens in one KV-cache block"),
    Option(name="kv-cache-memory-bytes", group=ENGINE, parse=integer(2**16, 2**50, values.count), metavar="N",
           help="size of the KV cache, such as 2G (default: from the free memory)"),
    Option(name="num-kv-blocks", group=ENGINE, parse=integer(2, 2**31), metavar="N",
           aliases=("num-gpu-blocks-override",), help="size of the KV cache in blocks"),
    Option(name="max-num-seqs", group=ENGINE, default=64, parse=integer(1, 65536), metavar="N",
           help="sequences in one step"),
    Option(name="max-num-batched-tokens", group=ENGINE, default=512, parse=integer(1, 2**24, values.count), metavar="N",
           help="token budget of one step"),
    Option(name="max-prefill-chunk", group=ENGINE, default=512, parse=integer(1, 2**24, values.count), metavar="N",
           help="tokens of one prompt in one step at most, so that it does not hold up the others"),
    Option(name="max-mixed-prefill", group=ENGINE, default=192, parse=integer(1, 2**24, values.count), metavar="N",
           help="prompt tokens at most in a step in which others decode (fewer behind a long context): bounds their gaps"),
    Option(name="enable-prefix-caching", group=ENGINE, flag=True, default=True,
           help="reuse the KV cache of equal beginnings"),
    Option(name="scheduling-policy", group=ENGINE, default="fcfs", choices=("fcfs", "priority"),
           help="order of waiting requests"),
    Option(name="logprobs-mode", group=ENGINE, default="raw_logprobs",
           choices=("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"),
           help="what answers call log-probabilities: before or after penalties, temperature and cuts; or the logits"),
    Option(name="enable-kernels", group=ENGINE, flag=True, default=True,
           help="use our own CPU kernels where a C compiler is found"),

    Option(name="frontends", group=PROCESSES, default=1, parse=integer(1, MAX_STAGES), metavar="N",
           aliases=("api-server-count",), help="HTTP processes"),
    Option(name="tokenizers", group=PROCESSES, default=1, parse=integer(1, MAX_STAGES), metavar="N",
           help="tokenizer processes"),
    Option(name="detokenizers", group=PROCESSES, default=1, parse=integer(1, MAX_STAGES), metavar="N",
           help="detokenizer processes"),
    Option(name="data-parallel-size", group=PROCESSES, per_model=True, default=1, parse=integer(1, MAX_STAGES), metavar="N",
           help="engine processes, each with the whole model"),
    Option(name="tensor-parallel-size", group=PROCESSES, per_model=True, default=1, parse=integer(1, 64), metavar="N",
           help="processes that each model is split over: one per GPU"),
    Option(name="shutdown-timeout", group=PROCESSES, default=30.0, parse=seconds(0.0, 86400), metavar="S",
           help="seconds that a stop waits for running requests"),
    Option(name="hang-timeout", group=PROCESSES, default=60.0, parse=seconds(1.0, 86400), metavar="S",
           help="a process that makes no progress for this long is replaced"),
    Option(name="start-timeout", group=PROCESSES, default=1800.0, parse=seconds(1.0, 86400), metavar="S",
           help="a process that is not ready after this long is replaced"),

    Option(name="crash-limit", group=PROCESSES, default=5, parse=integer(1, 10**6), metavar="N",
           help="deaths of one process within 60 seconds that end the server"),

    Option(name="max-requests", group=LIMITS, default=512, parse=integer(1, 10**6), metavar="N",
           help="requests in flight; more get 429"),
    Option(name="max-inflight-tokens", group=LIMITS, default=2_000_000, parse=integer(1, 2**40, values.count),
           metavar="N", help="estimated prompt and output tokens in flight; more get 429"),
    Option(name="max-inflight-bytes", group=LIMITS, default=256 * 2**20, parse=integer(1024, 2**40, values.count),
           metavar="N", help="bytes of request bodies in flight; more get 429"),
    Option(name="max-request-bytes", group=LIMITS, default=32 * 2**20, parse=integer(1024, 2**31, values.count),
           metavar="N", help="size of one request body; more gets 413"),
    Option(name="max-audio-clip-filesize-mb", group=LIMITS, default=25, parse=integer(1, 2048), metavar="MB",
           help="size of an uploaded recording in MiB; more gets 413"),
    Option(name="max-audio-seconds", group=LIMITS, default=4 * 3600.0, parse=seconds(1.0), metavar="S",
           help="length of an uploaded recording; more is refused while it is decoded"),
    Option(name="max-num-queued-reqs", group=LIMITS, per_model=True, default=1024, parse=integer(1, 10**6), metavar="N",
           help="requests that wait in one engine"),
    Option(name="max-logprobs", group=LIMITS, default=20, parse=integer(-1, 2**31 - 1), metavar="N",
           help="log-probabilities per token that a request may ask for; -1: the whole vocabulary"),

    Option(name="log-level", group=LOGS, default="INFO", choices=("DEBUG", "INFO", "WARNING", "ERROR"),
           help="prompts are logged at DEBUG only"),
    Option(name="disable-access-log", group=LOGS, flag=True, default=False, aliases=("disable-uvicorn-access-log",),
           help="no line per HTTP request in the frontends' logs"),
    Option(name="disable-access-log-for-endpoints", group=LOGS, many=True, words=True, default=(),
           commas=True, parse=values.url_path, metavar="PATH",
           help="no such line for these paths, such as /v1/models,/tokenize"),
    Option(name="enable-log-requests", group=LOGS, flag=True, default=False,
           help="log each request's prompt and parameters: the logs then hold what users wrote"),
    Option(name="enable-log-outputs", group=LOGS, flag=True, default=False,
           help="log answers, too; needs --enable-log-requests"),
    Option(name="max-log-len", group=LOGS, parse=integer(0, 2**31), metavar="N",
           help="characters of a prompt or answer, or ids of a prompt, in the log (default: 16384)"),
    Option(name="log-dir", group=LOGS, metavar="DIR",
           help="keep log files here (default: the run directory, which is removed at the end)"),
    Option(name="run-dir", group=LOGS, metavar="DIR",
           help="parent of the private run directory (default: XDG_RUNTIME_DIR, or TMPDIR, or /tmp)"),

    Option(name="null-engine", group=TEST, per_model=True, metavar="SCRIPT",
           help="answer from a script, without weights: MODEL needs a tokenizer only"),
    Option(name="null-step", group=TEST, per_model=True, default=0.0, parse=seconds(0.0, 60.0), metavar="S",
           help="least duration of a step of the null engine"),
)
BY_KEY = {option.key: option for option in OPTIONS}
BY_NAME = {name: option for option in OPTIONS for name in (option.name, *option.aliases)}


# ---- the parser --------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """argparse whose errors are a StartError: one sentence, no usage text."""

    def error(self, message: str) -> NoReturn:
        raise StartError(CONFIG, message[:1].upper() + message[1:].rstrip(".") + ".")


def nearest(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or nothing."""
    import difflib
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "."


def parser() -> Parser:
    """The parser of ``quartet serve``. Values stay text; options that were not given are absent from the result."""
    made = Parser(prog="quartet serve", allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False,
                  formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
                  description="Serve a model over the OpenAI API.",
                  epilog="Each option may also be set as QUARTET_NAME in the environment (lists: separated by commas) "
                         "or as a key of the YAML file; flags come first, then the environment, then the file. "
                         "Exit codes: 0 clean stop, 2 configuration, 3 model load, 4 memory, 5 crash loop, "
                         "6 port in use.")
    general = made.add_argument_group("General")
    general.add_argument("-h", "--help", action="help", help="show this text and exit")
    general.add_argument("--config", metavar="FILE", help="YAML file with these options (keys are the option names)")
    general.add_argument("--print-config", action="store_true",
                         help="print every value and where it comes from, and exit")
    general.add_argument("--check", action="store_true", help="check configuration and model, and exit without serving")
    for title in GROUPS:
        group = made.add_argument_group(title)
        for option in OPTIONS:
            if option.group == title:
                _add(made if option.positional else group, option)
    return made


def _add(group: argparse._ActionsContainer, option: Option) -> None:
    flags = [f"--{name}" for name in (option.spelling or option.name, *option.aliases)]
    shown = option.help
    if option.flag:
        shown += " (default: on)" if option.default else ""
    elif option.default not in (None, ()):
        shown += f" (default: {option.default:g})" if type(option.default) is float else f" (default: {option.default})"
    shown = shown.replace("%", "%%")
    if option.positional:
        group.add_argument(option.key, nargs="?", metavar=option.metavar, help=shown)
    elif option.flag:
        group.add_argument(*flags, action=argparse.BooleanOptionalAction, dest=option.key, help=shown)
    elif option.many:
        group.add_argument(*flags, action="extend", nargs="+" if option.words else 1, dest=option.key,
                           metavar=option.metavar, help=shown)
    else:
        group.add_argument(*flags, dest=option.key, help=shown,
                           metavar=option.metavar or (f"{{{','.join(option.choices)}}}" if option.choices else "VALUE"))

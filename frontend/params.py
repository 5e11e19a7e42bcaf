"""Validated bodies to what the table computes and the answer shows: defaults, limits that depend on the model, rules.

Defaults: the request over the model's generation defaults over this table's. Everything that one field means for
another is checked here, after the defaults are filled in. Run by the frontend; pure functions.
"""
from __future__ import annotations

import json
import secrets
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frontend.choose import check_length, choose, named
from frontend.constraints import grammar_of
from frontend.embeds import rows_of
from frontend.fields import MAX_PROMPTS
from frontend.request import Prompt, Spec
from frontend.schema import TEXT_PARTS, ChatBody, CompletionBody, Message, Part, Sampling, Templated
from frontend.tools import CallIds, calls_in, for_template, plan
from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import QuartetError, invalid
from pipeline.families.reasoning import REASONINGS
from pipeline.families.table import FAMILIES
from pipeline.messages import Chat, pack_ids
from pipeline.params import (
    MAX_BEAMS,
    MAX_LOGPROB_CELLS,
    MAX_LOGPROBS,
    Beam,
    DetokSpec,
    Grammar,
    Repetition,
    SamplingParams,
    Thinking,
)

COMPLETION_MAX_TOKENS = 16
U64 = 2**64 - 1


@dataclass(slots=True, kw_only=True)
class Ask:
    """A request as its handler sees it: what to compute, and how the answer is to look."""

    spec: Spec
    model: str                               # the served name that answers carry
    max_tokens: int | None                   # None: the rest of the context
    logprobs: int | None = None              # show this many alternatives; None: no log-probabilities
    prompt_logprobs: bool = False            # show them as a field of their own
    prompt_text: bool = False                # show the rendered prompt
    keep: int = 0                            # show so many of each prompt's choices, the likeliest; 0: all
    echo: str = ""                           # chat: what the answer continues
    include_usage: bool = False
    continuous_usage: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False              # log-probabilities name tokens "token_id:N"
    role: str = "assistant"                  # chat: of the answer
    include_reasoning: bool = True
    call_ids: CallIds = field(default_factory=lambda: CallIds("call"))


def find_model(config: ServerConfig, name: str | None) -> int:
    """The number of the model that `name` asks for, whatever its kind; without a name the only one there is."""
    if name:
        return named(config, name)
    if len(config.models) == 1:
        return 0
    raise invalid("The parameter 'model' is required: this server has several models.", "model")


def generating_model(config: ServerConfig, name: str | None) -> tuple[int, ModelConfig]:
    number = choose(config, name, ("generate",), "generate text")
    return number, config.models[number]


def completion(body: CompletionBody, config: ServerConfig, now_ns: int) -> Ask:
    number, model = generating_model(config, body.model)
    asked = body.max_tokens if body.max_tokens is not None else _default(model, "max_new_tokens", COMPLETION_MAX_TOKENS)
    max_tokens = min(int(asked), model.max_model_len) if body.max_tokens is None else body.max_tokens
    echo = bool(body.echo)
    logprobs = _num_logprobs(body.logprobs, "logprobs", config, model)
    if max_tokens == 0 and not echo:
        raise invalid("'max_tokens' must be at least 1, or 0 together with 'echo'.", "max_tokens")
    if body.prompt is None and not body.prompt_embeds:
        raise QuartetError("invalid_request", "The parameter 'prompt' is required.", "prompt")
    prompts = [Prompt(embeds=rows) for rows in _embeds(body, config, model)]
    prompts += [Prompt(text=p) if isinstance(p, str) else Prompt(ids=_prompt_ids(p, model)) for p in body.prompt or ()]
    if body.suffix is not None:
        _add_suffix(body, prompts)
    spec = _spec(body, config, model, number, prompts, max_tokens, logprobs, True, now_ns)
    if body.prompt_embeds:
        spec.sampling.repetition_penalty = 1.0               # the model's own default looks at the prompt, too
    spec.detok.echo = echo
    if echo and logprobs is not None and body.prompt_logprobs is None:
        spec.sampling.prompt_logprobs, spec.want_prompt_ids = logprobs, True
    return _ask(body, spec, config, model, max_tokens, logprobs)


def _embeds(body: CompletionBody, config: ServerConfig, model: ModelConfig) -> list[np.ndarray]:
    if not body.prompt_embeds:
        return []
    if not config.http.prompt_embeds:
        raise QuartetError("unsupported_parameter", "The parameter 'prompt_embeds' is only taken by a server that was "
                                                    "started with --enable-prompt-embeds.", "prompt_embeds")
    for name in ("echo", "suffix", "truncate_prompt_tokens", "prompt_logprobs"):
        if getattr(body, name) not in (None, False):
            raise invalid(f"'prompt_embeds' cannot be used together with '{name}': it has no tokens.", name)
    if body.repetition_penalty not in (None, 1):
        raise invalid("'repetition_penalty' looks at the prompt's tokens, and 'prompt_embeds' has none.",
                      "repetition_penalty")
    return [rows_of(embeds, model.max_model_len) for embeds in body.prompt_embeds]


def _add_suffix(body: CompletionBody, prompts: list[Prompt]) -> None:
    for name, given in (("echo", body.echo), ("truncate_prompt_tokens", body.truncate_prompt_tokens is not None)):
        if given:
            raise invalid(f"'suffix' cannot be used together with '{name}'.", "suffix")
    for prompt in prompts:
        if prompt.text is None:
            raise invalid("'suffix' needs a prompt that is a text.", "suffix")
        prompt.suffix = body.suffix


def chat(body: ChatBody, raw: dict[str, Any], config: ServerConfig, now_ns: int) -> Ask:
    """`raw`: the parsed body, whose messages go to the template as they are."""
    number, model = generating_model(config, body.model)
    if body.max_tokens is not None and body.max_completion_tokens is not None \
            and body.max_tokens != body.max_completion_tokens:
        raise invalid("'max_tokens' and 'max_completion_tokens' contradict each other.", "max_tokens")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if max_tokens == 0:
        raise invalid(f"'{_cap(body)}' must be at least 1.", _cap(body))
    if max_tokens is None:
        default = _default(model, "max_new_tokens", None)
        max_tokens = None if default is None else min(int(default), model.max_model_len)
    if body.top_logprobs and not body.logprobs:
        raise invalid("'top_logprobs' needs 'logprobs' to be true.", "top_logprobs")
    top = _num_logprobs(body.top_logprobs, "top_logprobs", config, model) or 0
    logprobs = top if body.logprobs else None
    tools = plan(body.tools, body.tool_choice, body.parallel_tool_calls is not False, model)
    prompt = Prompt(chat=template_input(body, raw, config, tools.tools_json))
    spec = _spec(body, config, model, number, [prompt], max_tokens, logprobs, False, now_ns)
    tools.apply(spec.sampling, spec.detok)
    spec.detok.reasoning_parser = model.reasoning_parser
    ask = _ask(body, spec, config, model, max_tokens, logprobs)
    ask.include_reasoning = body.include_reasoning is not False
    ask.call_ids = CallIds(FAMILIES[tools.parser].ids if tools.parser else "call", calls_in(raw["messages"]))
    if body.return_prompt_text:
        ask.prompt_text = spec.detok.echo = spec.detok.echo_special = True
    last = body.messages[-1]
    ask.role = config.http.response_role if body.add_generation_prompt is not False else last.role
    if body.echo and last.role == ask.role:
        ask.echo = _text_of(last)
    return ask


def template_input(body: Templated, raw: dict[str, Any], config: ServerConfig, tools_json: bytes | None = None) -> Chat:
    """What a tokenizer needs to render a chat; QuartetError for content that it could not.

    `tools_json`: what the template is to see of the tools; None: all of them.
    """
    if body.chat_template is not None and not config.trust_request_chat_template:
        raise QuartetError("unsupported_parameter", "The parameter 'chat_template' is only taken by a server that "
                                                    "was started with --trust-request-chat-template.", "chat_template")
    continues = bool(body.continue_final_message)
    generates = body.add_generation_prompt if body.add_generation_prompt is not None else not continues
    if continues and generates:
        raise invalid("'continue_final_message' and 'add_generation_prompt' cannot both be true.",
                      "continue_final_message")
    for i, message in enumerate(body.messages):
        _check_message(message, f"messages[{i}]")
    kwargs = dict(body.chat_template_kwargs or {})
    effort = getattr(body, "reasoning_effort", None)
    if effort is not None:
        kwargs.setdefault("reasoning_effort", effort)
        if effort == "none":
            kwargs.setdefault("enable_thinking", False)
    return Chat(
        messages_json=_dump(raw["messages"]), tools_json=for_template(body.tools) if tools_json is None else tools_json,
        kwargs_json=_dump(kwargs) if kwargs else b"",
        template=body.chat_template, add_generation_prompt=generates, continue_final_message=continues,
        documents_json=_dump(body.documents) if body.documents else b"")


def _check_message(message: Message, where: str) -> None:
    if message.content is None:
        extra = message.model_extra or {}
        if message.role != "assistant" or not (message.tool_calls or extra.get("reasoning_content")
                                               or extra.get("reasoning")):
            raise invalid(f"'{where}.content' must be a string or a list of parts.", f"{where}.content")
        return
    for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
        if isinstance(part, str):
            continue
        if part.type not in TEXT_PARTS:
            raise QuartetError("unsupported_parameter", f"Content parts of type '{part.type[:40]}' are not supported "
                                                        "by this model.", f"{where}.content[{j}].type")
        if _part_text(part) is None:
            raise invalid(f"'{where}.content[{j}]' has no text.", f"{where}.content[{j}]")


def _part_text(part: Part) -> str | None:
    value = getattr(part, part.type if part.type in ("refusal", "thinking") else "text", None)
    return value if isinstance(value, str) else None


def _text_of(message: Message) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    return "\n".join(p if isinstance(p, str) else _part_text(p) or "" for p in message.content)


def _spec(body: Sampling, config: ServerConfig, model: ModelConfig, number: int, prompts: list[Prompt],
          max_tokens: int | None, logprobs: int | None, add_special: bool, now_ns: int) -> Spec:
    n, best_of = body.n or 1, body.best_of or body.n or 1
    if best_of < n:
        raise invalid(f"'best_of' must be at least 'n' ({n}).", "best_of")
    if best_of > n and body.stream:
        raise invalid("'best_of' above 'n' cannot be streamed.", "best_of")
    if body.use_beam_search:
        _check_beams(body)
    else:
        n = best_of
    if len(prompts) * n > MAX_PROMPTS:
        raise invalid(f"The number of prompts times 'n' may not exceed {MAX_PROMPTS}.", "n")
    if body.stream_options is not None and not body.stream:
        raise invalid("'stream_options' needs 'stream' to be true.", "stream_options")
    if body.prompt_logprobs and body.stream:
        raise invalid("'prompt_logprobs' cannot be streamed.", "prompt_logprobs")
    if body.logprob_token_ids and logprobs is None:
        raise invalid("'logprob_token_ids' needs 'logprobs'.", "logprob_token_ids")
    cells = (logprobs or 0) * len(prompts) * n * (model.max_model_len if max_tokens is None else max_tokens)
    if (logprobs or 0) > MAX_LOGPROBS and cells > MAX_LOGPROB_CELLS:
        raise invalid(f"So many log-probabilities for so many tokens are {cells}, more than {MAX_LOGPROB_CELLS}; "
                      "lower 'max_tokens'.", "top_logprobs" if isinstance(body, ChatBody) else "logprobs")
    if body.priority and model.engine.scheduling_policy != "priority":
        raise QuartetError("unsupported_parameter", "The parameter 'priority' needs a server that was started with "
                                                    "--scheduling-policy priority.", "priority")
    check_length(model, body.truncate_prompt_tokens)
    detok = DetokSpec(
        model=number, stop=list(body.stop or ()), include_stop=bool(body.include_stop_str_in_output),
        min_tokens=body.min_tokens or 0, skip_special=body.skip_special_tokens is not False,
        spaces_between_special=body.spaces_between_special_tokens is not False)
    return Spec(
        model=number, prompts=prompts, n=n, sampling=_sampling(body, config, model, max_tokens, logprobs), detok=detok,
        add_special=add_special if body.add_special_tokens is None else body.add_special_tokens,
        truncate=body.truncate_prompt_tokens, truncate_right=body.truncation_side == "right",
        stream_interval=max(body.stream_interval or 1, config.http.stream_interval),
        deadline_ns=now_ns + int(config.http.request_timeout_s * 1e9),
        priority=body.priority or 0, salt=(body.cache_salt or "").encode(), stream=bool(body.stream),
        want_prompt_ids=bool(body.return_token_ids) or body.prompt_logprobs is not None)


def _num_logprobs(value: int | None, param: str, config: ServerConfig, model: ModelConfig) -> int | None:
    """A number of log-probabilities within the server's limit; -1 is the vocabulary."""
    limit = config.http.max_logprobs
    if value is None:
        return None
    if value == -1 or limit == -1:
        if not model.vocab_size:
            raise invalid(f"'{param}' cannot be -1: the size of this model's vocabulary is not known.", param)
        value, limit = (model.vocab_size if value == -1 else value), (model.vocab_size if limit == -1 else limit)
    if value > limit:
        raise invalid(f"'{param}' may be at most {limit}.", param)
    return value


def _check_beams(body: Sampling) -> None:
    """Beam search looks for the likeliest text: what shapes a random draw, or needs text as it comes, is refused."""
    if body.stream:
        raise invalid("'use_beam_search' cannot be streamed.", "use_beam_search")
    width = body.best_of or body.n or 1
    if width > MAX_BEAMS:
        raise invalid(f"'use_beam_search' takes at most {MAX_BEAMS} beams.", "n" if body.best_of is None else "best_of")
    for name, neutral in (("temperature", (0, 1)), ("top_p", (1,)), ("top_k", (0,)), ("min_p", (0,))):
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise QuartetError("unsupported_parameter", f"The parameter '{name}' has no meaning for 'use_beam_search'.",
                               name)
    for name in ("repetition_detection", "logprob_token_ids", "thinking_token_budget"):
        if getattr(body, name) not in (None, [], -1):
            raise QuartetError("unsupported_parameter", f"The parameter '{name}' is not supported together with "
                               "'use_beam_search'.", name)


def _cap(body: Sampling) -> str:
    """The name under which the request gave its largest number of tokens."""
    return "max_tokens" if getattr(body, "max_completion_tokens", None) is None else "max_completion_tokens"


def _sampling(body: Sampling, config: ServerConfig, model: ModelConfig, max_tokens: int | None,
              logprobs: int | None) -> SamplingParams:
    limit = model.max_model_len
    if max_tokens is not None and max_tokens > limit:
        raise invalid(f"'{_cap(body)}' may be at most {limit}, the context length of the model.", _cap(body))
    budget = limit if max_tokens is None else max_tokens
    if (body.min_tokens or 0) > budget:
        raise invalid(f"'min_tokens' may not exceed '{_cap(body)}' ({budget}).", "min_tokens")
    if not body.use_beam_search:
        for name in ("length_penalty", "early_stopping"):
            if getattr(body, name) not in (None, 1.0 if name == "length_penalty" else False):
                raise invalid(f"'{name}' needs 'use_beam_search' to be true.", name)
    bias = {int(key): value for key, value in (body.logit_bias or {}).items()}
    _check_ids(list(bias), model, "logit_bias")
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        _check_ids(getattr(body, name) or [], model, name)
    extra = list(dict.fromkeys(body.logprob_token_ids or ()))
    return SamplingParams(
        temperature=_real(body.temperature, model, "temperature", 1.0), top_p=_real(body.top_p, model, "top_p", 1.0),
        top_k=max(0, int(_real(body.top_k, model, "top_k", 0))), min_p=_real(body.min_p, model, "min_p", 0.0),
        seed=_seed(body.seed, config), max_tokens=budget, min_tokens=body.min_tokens or 0,
        presence_penalty=_real(body.presence_penalty, model, "presence_penalty", 0.0),
        frequency_penalty=_real(body.frequency_penalty, model, "frequency_penalty", 0.0),
        repetition_penalty=_real(body.repetition_penalty, model, "repetition_penalty", 1.0),
        ignore_eos=bool(body.ignore_eos), stop_ids=pack_ids(body.stop_token_ids or ()), bias_ids=pack_ids(bias),
        bias_values=array("f", bias.values()).tobytes(), logprobs=logprobs,
        prompt_logprobs=_num_logprobs(body.prompt_logprobs, "prompt_logprobs", config, model),
        allowed_ids=pack_ids(dict.fromkeys(body.allowed_token_ids or ())), bad_words=list(body.bad_words or ()),
        logprob_ids=pack_ids(extra), repetition=_repetition(body), thinking=_thinking(body, model), beam=_beam(body),
        grammar=_constraint(body))


def _constraint(body: Sampling) -> Grammar | None:
    grammar = grammar_of(body)
    if grammar is not None and body.use_beam_search:
        raise QuartetError("unsupported_parameter", f"The parameter '{grammar.param}' is not supported together with "
                                                    "'use_beam_search'.", grammar.param)
    return grammar


def _repetition(body: Sampling) -> Repetition | None:
    rule = body.repetition_detection
    if rule is None or not rule.max_pattern_size:
        return None
    if rule.min_pattern_size > rule.max_pattern_size:
        raise invalid("'min_pattern_size' may not exceed 'max_pattern_size'.", "repetition_detection.min_pattern_size")
    return Repetition(rule.max_pattern_size, max(1, rule.min_pattern_size), rule.min_count)


def _thinking(body: Sampling, model: ModelConfig) -> Thinking | None:
    budget = body.thinking_token_budget
    if budget is None or budget == -1:
        return None
    reasoning = REASONINGS.get(model.reasoning_parser)
    if reasoning is None or not reasoning.openers:
        raise QuartetError("unsupported_parameter", "The parameter 'thinking_token_budget' needs a model that reasons "
                           "between tags, and --reasoning-parser to tell which.", "thinking_token_budget")
    return Thinking(budget, reasoning.openers[0], reasoning.closers[0], reasoning.implied)


def _beam(body: Sampling) -> Beam | None:
    if not body.use_beam_search:
        return None
    return Beam(width=body.best_of or body.n or 1,
                length_penalty=1.0 if body.length_penalty is None else body.length_penalty,
                early="never" if body.early_stopping == "never" else "true" if body.early_stopping else "false")


def _ask(body: Sampling, spec: Spec, config: ServerConfig, model: ModelConfig, max_tokens: int | None,
         logprobs: int | None) -> Ask:
    options = body.stream_options
    usage = config.http.force_usage or bool(options and options.include_usage)
    as_ids = body.return_tokens_as_token_ids
    continuous = bool(options and options.continuous_usage_stats)
    if continuous and not usage:
        raise invalid("'continuous_usage_stats' needs 'include_usage' to be true.", "stream_options")
    n, best_of = body.n or 1, body.best_of or body.n or 1
    keep = 0
    if best_of > n and not body.use_beam_search:
        keep, spec.sampling.logprobs = n, spec.sampling.logprobs or 0
    return Ask(
        spec=spec, keep=keep, model=model.names[0], max_tokens=max_tokens, logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs is not None, include_usage=usage, continuous_usage=continuous,
        token_ids=bool(body.return_token_ids), tokens_as_ids=config.http.tokens_as_ids if as_ids is None else as_ids)


def _default(model: ModelConfig, name: str, otherwise: Any) -> Any:
    value = model.generation_defaults.get(name)
    return otherwise if value is None else value


def _real(value: float | None, model: ModelConfig, name: str, otherwise: float) -> float:
    return float(value if value is not None else _default(model, name, otherwise))


def _seed(seed: int | None, config: ServerConfig) -> int:
    if seed is not None and seed != -1:
        return seed & U64
    return secrets.randbits(64) if config.seed is None else config.seed & U64


def _prompt_ids(ids: list[int], model: ModelConfig) -> bytes:
    _check_ids(ids, model, "prompt")
    return pack_ids(ids)


def _check_ids(ids: list[int], model: ModelConfig, param: str) -> None:
    """The width of the logits bounds every id; the engine checks again."""
    if ids and max(ids) >= (model.vocab_size or 2**32):
        raise invalid(f"'{param}' holds a token id that the model does not have.", param)


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

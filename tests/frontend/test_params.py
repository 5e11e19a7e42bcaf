"""Bodies to specifications: every parameter honoured, refused by range, or refused by name."""
from __future__ import annotations

import dataclasses
import json
from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend import params
from frontend.bodies import parse_object, validate
from frontend.fields import NO_EFFECT, REFUSED
from frontend.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from pipeline.config import EngineConfig, HttpConfig, ModelConfig, ServerConfig
from pipeline.errors import QuartetError
from pipeline.messages import pack_ids
from pipeline.params import DetokSpec, SamplingParams
from tests.frontend.world import config

NOW = 10**12
HELLO = [{"role": "user", "content": "hi"}]


def complete(server: ServerConfig | None = None, **body: Any) -> params.Ask:
    body = {"prompt": "hi", **body}
    return params.completion(validate(CompletionBody, body), server or config(), NOW)


def chat(server: ServerConfig | None = None, **body: Any) -> params.Ask:
    body = {"messages": HELLO, **body}
    return params.chat(validate(ChatBody, body), body, server or config(), NOW)


def refused(call: Any, **body: Any) -> QuartetError:
    with pytest.raises(QuartetError) as error:
        call(**body)
    assert 400 <= error.value.status < 500
    return error.value


def with_model(**changes: Any) -> ServerConfig:
    return config(models=(dataclasses.replace(config().models[0], **changes),))


# ---- defaults ----

def test_completion_defaults() -> None:
    ask = complete(seed=3)
    assert ask.spec.sampling == SamplingParams(seed=3, max_tokens=16)
    assert ask.spec.detok == DetokSpec() and ask.spec.add_special and ask.spec.truncate is None
    assert ask.spec.deadline_ns == NOW + 3600 * 10**9 and ask.model == "tiny" and not ask.spec.stream


def test_chat_defaults_to_the_rest_of_the_context_and_no_special_tokens() -> None:
    ask = chat(seed=3)
    assert ask.spec.sampling.max_tokens == 256 and ask.max_tokens is None and not ask.spec.add_special
    prompt = ask.spec.prompts[0].chat
    assert prompt is not None and json.loads(prompt.messages_json) == HELLO
    assert prompt.add_generation_prompt and not prompt.continue_final_message and prompt.kwargs_json == b""


def test_generation_defaults_fill_what_the_request_leaves_out() -> None:
    server = with_model(generation_defaults={
        "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "max_new_tokens": 99})
    sampling = chat(server, temperature=0).spec.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.repetition_penalty,
            sampling.max_tokens) == (0.0, 0.9, 40, 0.1, 1.1, 99)
    assert complete(server).spec.sampling.max_tokens == 99
    assert complete(server, max_tokens=5).spec.sampling.max_tokens == 5


def test_seeds_are_fixed_here() -> None:
    assert complete(seed=-2).spec.sampling.seed == 2**64 - 2
    assert complete(seed=2**64 - 1).spec.sampling.seed == 2**64 - 1
    assert complete(config(seed=11), seed=-1).spec.sampling.seed == 11
    assert complete(config(seed=11)).spec.sampling.seed == 11
    assert complete().spec.sampling.seed != complete().spec.sampling.seed


# ---- each parameter ----

def test_everything_is_carried() -> None:
    ask = complete(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.5, seed=1, max_tokens=20, min_tokens=2, presence_penalty=-1,
        frequency_penalty=2, repetition_penalty=1.5, ignore_eos=True, stop_token_ids=[5, 6],
        logit_bias={"7": 1.5, "8": -100}, logprobs=3, prompt_logprobs=0, stop=["a", "b"],
        include_stop_str_in_output=True, skip_special_tokens=False, spaces_between_special_tokens=False,
        add_special_tokens=False,
        truncate_prompt_tokens=9, n=2, best_of=2, cache_salt="salt", return_token_ids=True,
        return_tokens_as_token_ids=True, echo=True)
    assert ask.spec.sampling == SamplingParams(
        temperature=0.5, top_p=0.25, top_k=7, min_p=0.5, seed=1, max_tokens=20, min_tokens=2, presence_penalty=-1.0,
        frequency_penalty=2.0, repetition_penalty=1.5, ignore_eos=True, stop_ids=pack_ids([5, 6]),
        bias_ids=pack_ids([7, 8]), bias_values=array("f", [1.5, -100]).tobytes(), logprobs=3, prompt_logprobs=0)
    assert ask.spec.detok == DetokSpec(stop=["a", "b"], include_stop=True, min_tokens=2, skip_special=False,
                                       spaces_between_special=False, echo=True)
    assert (ask.spec.n, ask.spec.add_special, ask.spec.truncate, ask.spec.salt) == (2, False, 9, b"salt")
    assert ask.token_ids and ask.tokens_as_ids and ask.prompt_logprobs and ask.spec.want_prompt_ids


def test_streaming_options() -> None:
    ask = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert ask.spec.stream and ask.include_usage and ask.continuous_usage
    assert not chat(stream=True, stream_options={}).include_usage
    assert refused(chat, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(chat, stream=True, stream_options={"continuous_usage_stats": True}).param == "stream_options"


@pytest.mark.parametrize("prompt, expected", [
    ("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [pack_ids([1, 2])]), ("", [""]),
    ([[1], [2, 3]], [pack_ids([1]), pack_ids([2, 3])])])
def test_prompt_forms(prompt: Any, expected: list[Any]) -> None:
    prompts = complete(prompt=prompt).spec.prompts
    assert [p.ids if p.text is None else p.text for p in prompts] == expected


@pytest.mark.parametrize("prompt", [None, 5, [], [[]], [[1], []], ["a", 1], [1, "a"], [1.0], [True], [-1], [[1], "a"],
                                    {}, [[[1]]], ["a"] * 1025])
def test_bad_prompts(prompt: Any) -> None:
    assert refused(complete, prompt=prompt).param == "prompt"


def test_prompts_times_n_is_bounded() -> None:
    assert len(complete(prompt=["a"] * 8, n=128).spec.prompts) == 8
    assert refused(complete, prompt=["a"] * 9, n=128).param == "n"


def test_missing_prompt_and_messages() -> None:
    error = refused(complete, prompt=None)
    assert (error.code, error.param) == ("invalid_request", "prompt")
    with pytest.raises(QuartetError) as caught:
        validate(ChatBody, {"model": "tiny"})
    assert caught.value.param == "messages"


@pytest.mark.parametrize("name, good, bad", [
    ("temperature", [0, 0.7, 2], [-0.1, 2.1, "1", True, [1]]),
    ("top_p", [0.001, 1], [0, 1.1, "1", -1]),
    ("top_k", [-1, 0, 1, 2**31 - 1], [-2, 1.5, "5", True, 2**31]),
    ("min_p", [0, 1], [-0.1, 1.1]),
    ("presence_penalty", [-2, 2], [-2.1, 2.1]),
    ("frequency_penalty", [-2, 2], [-2.1, 2.1]),
    ("repetition_penalty", [0.01, 100], [0, -1, 1e-300, 1e300]),
    ("seed", [-2**63, -1, 0, 2**64 - 1], [2**64, -2**63 - 1, "5", 1.5]),
    ("n", [1, 128], [0, -1, 129, 10**9, "2", True, 1.0]),
    ("max_tokens", [1, 256], [0, -1, 257, 2**63, "16", True, 1.5]),
    ("min_tokens", [0, 16], [-1, 17, "1"]),
    ("stop", ["x", ["x"] * 16, "y" * 1024, []], ["", ["x", ""], ["x"] * 17, "y" * 1025, 5, [5]]),
    ("stop_token_ids", [[], [0, 999], [1] * 256], [[-1], [1000], [1] * 257, ["5"], 5, [True]]),
    ("logit_bias", [{}, {"0": 1, "999": -1.5}], [{"1000": 1}, {"x": 1}, {"-1": 1}, {"1": 101}, {"1": "1"}, [1],
                                                 {"9999999999": 1}, {str(i): 1 for i in range(1025)}]),
    ("logprobs", [0, 20], [-1, 21, "5", True]),
    ("prompt_logprobs", [0, 20], [-1, 21, True]),
    ("truncate_prompt_tokens", [-1, 1, 256], [-2, 0, 257]),
    ("cache_salt", ["s"], ["", "x" * 129, 5]),
    ("request_id", ["a.b-c:d_1"], ["", "a b", "x" * 129, "a\n"]),
    ("best_of", [1, 3, 128], [0, 129, "1"]),
    ("allowed_token_ids", [[0], [999, 5]], [[], [1000], [-1], ["5"], 5]),
    ("bad_words", [[], ["x"], ["y"] * 128], ["x", [""], ["x"] * 129, ["y" * 257], [5]]),
    ("repetition_detection", [{"max_pattern_size": 0, "min_count": 2}, {"max_pattern_size": 1024, "min_count": 2}],
     [{}, {"max_pattern_size": 3}, {"max_pattern_size": 3, "min_count": 1}, {"max_pattern_size": 1025, "min_count": 2},
      {"max_pattern_size": 3, "min_pattern_size": 4, "min_count": 2}, 5]),
    ("stream_interval", [1, 50], [0, "1"]),
    ("truncation_side", ["left", "right"], ["middle", 1]),
    ("priority", [0], [1, "0", 2**63]),
    ("echo", [True, False], ["true", 1]),
    ("stream", [False], ["false", 0]),
    ("ignore_eos", [True], [1]),
    ("model", ["tiny", "alias", ""], [5]),
])
def test_ranges(name: str, good: list[Any], bad: list[Any]) -> None:
    for value in [*good, None]:
        complete(**{name: value})
    for value in bad:
        error = refused(complete, **{name: value})
        assert error.param is not None and error.param.split(".")[0].split("[")[0] == name, (value, error)


def test_priority_where_the_engine_schedules_by_it() -> None:
    server = with_model(engine=EngineConfig(scheduling_policy="priority"))
    assert complete(server, priority=-5).spec.priority == -5


def test_max_tokens_zero_only_with_echo() -> None:
    assert complete(max_tokens=0, echo=True).spec.sampling.max_tokens == 0
    assert refused(complete, max_tokens=0).param == "max_tokens"
    assert refused(chat, max_tokens=0, echo=True).param == "max_tokens"


def test_echo_with_logprobs_takes_those_of_the_prompt() -> None:
    ask = complete(echo=True, logprobs=2)
    assert ask.spec.sampling.prompt_logprobs == 2 and not ask.prompt_logprobs
    assert complete(echo=True, logprobs=2, stream=True).spec.sampling.prompt_logprobs == 2
    assert refused(complete, prompt_logprobs=1, stream=True).param == "prompt_logprobs"


def test_chat_logprobs() -> None:
    assert chat(logprobs=True).spec.sampling.logprobs == 0
    assert chat(logprobs=True, top_logprobs=5).logprobs == 5
    assert chat(logprobs=False).spec.sampling.logprobs is None
    assert refused(chat, top_logprobs=1).param == "top_logprobs"
    assert refused(chat, logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refused(chat, logprobs=1).param == "logprobs"


def test_max_completion_tokens() -> None:
    assert chat(max_completion_tokens=7).spec.sampling.max_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).spec.sampling.max_tokens == 7
    refused(chat, max_completion_tokens=7, max_tokens=8)
    for wrong in ({"max_completion_tokens": 0}, {"max_completion_tokens": 10**6}):
        assert refused(chat, **wrong).param == "max_completion_tokens"
    assert refused(chat, max_tokens=0).param == "max_tokens"


def test_min_tokens_is_checked_after_the_defaults() -> None:
    assert chat(min_tokens=256).spec.sampling.min_tokens == 256
    assert refused(chat, min_tokens=257).param == "min_tokens"
    assert refused(complete, min_tokens=17).param == "min_tokens"


def test_n_with_greedy_is_fine() -> None:
    assert complete(n=3, temperature=0).spec.sampling.greedy


# ---- chat ----

def test_template_arguments() -> None:
    ask = chat(chat_template_kwargs={"a": 1}, reasoning_effort="none", documents=[{"title": "t", "text": "x"}])
    prompt = ask.spec.prompts[0].chat
    assert prompt is not None
    assert json.loads(prompt.kwargs_json) == {"a": 1, "reasoning_effort": "none", "enable_thinking": False}
    assert json.loads(prompt.documents_json) == [{"title": "t", "text": "x"}]


def test_continue_final_message() -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The answer"}]
    ask = chat(messages=messages, continue_final_message=True, echo=True)
    prompt = ask.spec.prompts[0].chat
    assert prompt is not None and prompt.continue_final_message and not prompt.add_generation_prompt
    assert ask.echo == "The answer"
    assert refused(chat, messages=messages, continue_final_message=True, add_generation_prompt=True).param \
        == "continue_final_message"


def test_request_templates_only_where_trusted() -> None:
    assert refused(chat, chat_template="x").param == "chat_template"
    prompt = chat(config(trust_request_chat_template=True), chat_template="x").spec.prompts[0].chat
    assert prompt is not None and prompt.template == "x"


@pytest.mark.parametrize("messages, param", [
    ([], "messages"), ("hi", "messages"), ([5], "messages[0]"), ([{"content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"), ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "assistant", "content": None}], "messages[0].content"),
    ([*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "messages[1].content[0].type"),
    ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
])
def test_bad_messages(messages: Any, param: str) -> None:
    assert refused(chat, messages=messages).param == param


@pytest.mark.parametrize("message", [
    {"role": "user", "content": [{"type": "text", "text": "x"}, "y", {"text": "z"}]},
    {"role": "developer", "content": "x", "name": "dev", "extra": {"kept": [1]}},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "content": [{"type": "text", "text": "x"}], "tool_call_id": "1"},
])
def test_good_messages_go_to_the_template_as_they_are(message: dict[str, Any]) -> None:
    prompt = chat(messages=[message]).spec.prompts[0].chat
    assert prompt is not None and json.loads(prompt.messages_json) == [message]


# ---- refused by name, accepted without effect ----

@pytest.mark.parametrize("name", sorted(n for n in REFUSED if "." not in n))
def test_unsupported_fields_are_refused_by_name_unless_they_ask_for_nothing(name: str) -> None:
    for call, body in ((complete, CompletionBody), (chat, ChatBody)):
        if name in body.HONOURS:
            continue
        error = refused(call, **{name: {"some": "value"}})
        assert (error.code, error.param) == ("unsupported_parameter", name)
        for value in (None, *REFUSED[name]):
            call(**{name: value})


def test_unsupported_template_arguments() -> None:
    assert refused(chat, chat_template_kwargs={"chat_template": "x"}).param == "chat_template_kwargs.chat_template"
    assert refused(complete, tool_choice="auto").param == "tool_choice"


def test_fields_without_effect_and_unknown_fields_change_nothing() -> None:
    plain = chat(seed=1).spec
    body = {name: {"any": ["thing"]} for name in NO_EFFECT if "." not in name}
    assert chat(seed=1, **body, something_new=5).spec == plain


# ---- models ----

def test_models() -> None:
    assert refused(complete, model="gpt-4").code == "model_not_found"
    two = config(models=(config().models[0], ModelConfig(names=("other",), path="/", task="embed")))
    assert complete(two, model="alias").model == "tiny"
    assert complete(two).model == "tiny"                                      # the only one that generates
    wrong = refused(complete, server=two, model="other")
    assert wrong.param == "model" and wrong.status == 400 and "'tiny'" in wrong.message
    twins = config(models=(config().models[0], ModelConfig(names=("other",), path="/")))
    unnamed = refused(complete, server=twins)
    assert unnamed.param == "model" and "'tiny', 'other'" in unnamed.message


def test_limits_of_the_server() -> None:
    server = config(http=HttpConfig(max_logprobs=5, request_timeout_s=10))
    assert refused(complete, server=server, logprobs=6).param == "logprobs"
    assert complete(server).spec.deadline_ns == NOW + 10 * 10**9


def test_tokenize_and_detokenize_bodies() -> None:
    assert validate(TokenizeBody, {"prompt": "x"}).prompt == "x"
    assert validate(DetokenizeBody, {"tokens": [1, 2]}).tokens == [1, 2]
    for tokens in ([-1], [2**32], ["1"], [True], [1.5], "x"):
        with pytest.raises(QuartetError) as error:
            validate(DetokenizeBody, {"tokens": tokens})
        assert str(error.value.param).startswith("tokens")


# ---- JSON ----

@pytest.mark.parametrize("data", [
    b"", b"{", b"nonsense", b"[]", b"5", b"null", b'"x"', b'{"a":1}x', b"\xff", b'{"a":"\xff"}', b'{"a":NaN}',
    b'{"a":Infinity}', b'{"a":1e999}', b'{"a":"\\ud800"}', b"[" * 10**6, b'{"a":' * 65 + b"1" + b"}" * 65,
    b"\xef\xbb\xbf{}", b'{"a":' + b"9" * 10**5 + b"}"])
def test_bad_json(data: bytes) -> None:
    with pytest.raises(QuartetError) as error:
        parse_object(data)
    assert error.value.code == "invalid_request" and len(error.value.message) < 120


def test_good_json() -> None:
    assert parse_object(b'{"a": [1, {"b": "\\u00e9\\u0000"}], "a": 2}') == {"a": 2}
    depth_64 = b'{"a":' * 64 + b"1" + b"}" * 64
    assert parse_object(depth_64)


json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70)
                           | st.floats(allow_nan=False, allow_infinity=False)
                           | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                           | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted({*CompletionBody.model_fields, *ChatBody.model_fields, *REFUSED})),
       value=json_values)
def test_no_value_of_any_field_is_more_than_a_refusal(name: str, value: Any) -> None:
    for call in (complete, chat):
        try:
            call(**{name: value})
        except QuartetError as error:
            assert 400 <= error.status < 500

"""Golden bytes: every event of a stream, and the bodies of plain answers, exactly as strict clients want them."""
from __future__ import annotations

import json
import math
from array import array
from typing import Any

import pytest

from frontend import answers, logprobs
from frontend.collector import Update
from frontend.params import Ask
from frontend.request import Prompt, Request, Spec
from frontend.sse import ChatStream, CompletionStream
from frontend.wire import error_event
from pipeline.errors import QuartetError
from pipeline.messages import Finish, Logprobs, pack_ids
from pipeline.params import DetokSpec, SamplingParams
from tests.frontend.served import logprobs as made

IDENTITY = {"id": "cmpl-1", "created": 7, "system_fingerprint": "fp_0"}
CHAT = ('data: {"id":"cmpl-1","object":"chat.completion.chunk","created":7,"model":"tiny","system_fingerprint":"fp_0",'
        '"choices":')
TEXT = ('data: {"id":"cmpl-1","object":"text_completion","created":7,"model":"tiny","system_fingerprint":"fp_0",'
        '"choices":')


def ask(n: int = 1, **changes: Any) -> tuple[Ask, Request]:
    prompt = Prompt(ids=pack_ids([4, 5]), admitted=True, prompt_tokens=2, cached_tokens=1)
    spec = Spec(model=0, prompts=[prompt], n=n, sampling=SamplingParams(), detok=DetokSpec(), stream=True)
    return (Ask(spec=spec, model="tiny", max_tokens=None, **changes), Request(spec, lambda: None, None, 0))


def update(text: str = "", ids: list[int] | None = None, index: int = 0, **changes: Any) -> Update:
    return Update(index, text, array("I", ids or []), **changes)


def test_chat_stream() -> None:
    stream = ChatStream(*ask(), IDENTITY)
    assert stream.events([update("Hi", [1])]).decode() == (
        CHAT + '[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]}\n\n'
        + CHAT + '[{"index":0,"delta":{"content":"Hi"},"logprobs":null,"finish_reason":null}]}\n\n')
    assert stream.events([update("", [2])]) == b""           # nothing to show: the text is held back
    assert stream.events([update("!", [3], finish=Finish.STOP_STRING, stop="END")]).decode() == (
        CHAT + '[{"index":0,"delta":{"content":"!"},"logprobs":null,"finish_reason":null}]}\n\n'
        + CHAT + '[{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":"END"}]}\n\n')
    assert stream.end() == b"data: [DONE]\n\n"


def test_chat_stream_with_usage() -> None:
    asked, request = ask(include_usage=True)
    stream = ChatStream(asked, request, IDENTITY)
    for event in stream.events([update("Hi", [1], finish=Finish.LENGTH)]).decode().strip().split("\n\n"):
        assert event.endswith(',"usage":null}')
    request.choices[0].ids.extend([1, 2, 3])
    assert stream.end().decode() == (
        CHAT + '[],"usage":{"prompt_tokens":2,"total_tokens":5,"completion_tokens":3,'
        '"prompt_tokens_details":{"cached_tokens":1}}}\n\ndata: [DONE]\n\n')


def test_continuous_usage_counts_per_chunk() -> None:
    stream = ChatStream(*ask(include_usage=True, continuous_usage=True), IDENTITY)
    events = stream.events([update("Hi", [1], completion_tokens=1)]).decode().strip().split("\n\n")
    counts = [json.loads(e[6:])["usage"]["completion_tokens"] for e in events]
    assert counts == [0, 1]


def test_choices_interleave_and_begin_with_their_own_role() -> None:
    stream = ChatStream(*ask(n=2), IDENTITY)
    events = [json.loads(e[6:])["choices"][0] for e in stream.events(
        [update("b", [1], index=1), update("a", [1])]).decode().strip().split("\n\n")]
    assert [(e["index"], e["delta"].get("role"), e["delta"]["content"]) for e in events] == [
        (1, "assistant", ""), (1, None, "b"), (0, "assistant", ""), (0, None, "a")]


def test_chat_echo_ids_and_logprobs() -> None:
    stream = ChatStream(*ask(echo="So", token_ids=True, logprobs=1), IDENTITY)
    found = made([9], 1, ["x"])
    events = [json.loads(e[6:]) for e in stream.events(
        [update("x", [9], logprobs=found)]).decode().strip().split("\n\n")]
    assert events[0]["prompt_token_ids"] == [4, 5]
    assert events[1]["choices"][0]["delta"] == {"content": "So"}
    assert events[2]["choices"][0]["token_ids"] == [9]
    assert events[2]["choices"][0]["logprobs"] == {"refusal": None, "content": [
        {"token": "x", "logprob": -0.25, "bytes": [120], "top_logprobs": [
            {"token": "x", "logprob": -1.0, "bytes": [120]}]}]}


def test_ids_without_text_are_sent_where_they_were_asked_for() -> None:
    stream = ChatStream(*ask(token_ids=True), IDENTITY)
    events = stream.events([update("", [1])]).decode().strip().split("\n\n")
    assert json.loads(events[1][6:])["choices"][0] == {
        "index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": None, "token_ids": [1]}


def test_completion_stream() -> None:
    stream = CompletionStream(*ask(), IDENTITY)
    assert stream.events([update("Hi", [1])]).decode() == (
        TEXT + '[{"index":0,"text":"Hi","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n')
    assert stream.events([update("!", [2], finish=Finish.STOP_ID, stop=42)]).decode() == (
        TEXT + '[{"index":0,"text":"!","logprobs":null,"finish_reason":"stop","stop_reason":42}]}\n\n')


def test_completion_echo_rides_in_the_first_chunk_of_each_choice() -> None:
    asked, request = ask(n=2, logprobs=0, token_ids=True)
    prompt = request.spec.prompts[0]
    prompt.echo, prompt.logprobs, prompt.num_logprobs = "ab", [made([4, 5], 0, ["a", "b"], first_unknown=True)], 2
    stream = CompletionStream(asked, request, IDENTITY)
    for index in (0, 1):
        (event,) = stream.events([update("x", [9], index=index, logprobs=made([9], 0, ["x"]))]).decode().split(
            "\n\n")[:-1]
        choice = json.loads(event[6:])["choices"][0]
        assert (choice["text"], choice["prompt_token_ids"], choice["token_ids"]) == ("abx", [4, 5], [9])
        assert choice["logprobs"] == {
            "text_offset": [0, 1, 2], "token_logprobs": [None, -0.5, -0.25], "tokens": ["a", "b", "x"],
            "top_logprobs": [None, {"b": -0.5}, {"x": -0.25}]}
    later = stream.events([update("yz", [1], logprobs=made([1], 0, ["yz"]))]).decode()
    choice = json.loads(later[6:])["choices"][0]
    assert choice["text"] == "yz" and choice["logprobs"]["text_offset"] == [3] and "prompt_token_ids" not in choice


@pytest.mark.parametrize("text", ['"quote"\\\n\r\t\0', "\u2028\u2029\x85", "é中😀", "</script>", "data: [DONE]\n\n"])
def test_any_text_survives_and_stays_on_one_line(text: str) -> None:
    event = ChatStream(*ask(), IDENTITY).events([update(text, [1])]).decode()
    lines = event.splitlines()
    assert len(lines) == 4 and lines[1] == lines[3] == ""
    assert json.loads(lines[2][6:])["choices"][0]["delta"]["content"] == text


def test_error_event() -> None:
    assert error_event(QuartetError("timeout", 'too "late"')) == (
        b'data: {"error":{"message":"too \\"late\\"","type":"server_error","param":null,"code":"timeout"}}\n\n')


# ---- plain answers ----

def finished(asked: Ask, request: Request, *outputs: tuple[str, list[int], Finish]) -> None:
    for choice, (text, ids, finish) in zip(request.choices, outputs):
        choice.ids.extend(ids)
        found = made(ids, asked.logprobs, [text] * len(ids)) if asked.logprobs is not None else None
        choice.buffer.add(text, found)
        choice.buffer.end(finish, None)
        request.unfinished -= 1
        request.touched(choice)


def test_chat_body() -> None:
    asked, request = ask(n=2, token_ids=True)
    finished(asked, request, ("a", [1], Finish.EOS), ("b", [2, 3], Finish.LENGTH))
    assert answers.chat(asked, request, IDENTITY) == {
        "id": "cmpl-1", "object": "chat.completion", "created": 7, "model": "tiny", "system_fingerprint": "fp_0",
        "prompt_token_ids": [4, 5], "usage": {"prompt_tokens": 2, "total_tokens": 5, "completion_tokens": 3,
                                              "prompt_tokens_details": {"cached_tokens": 1}},
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "a", "refusal": None}, "logprobs": None,
             "finish_reason": "stop", "stop_reason": None, "token_ids": [1]},
            {"index": 1, "message": {"role": "assistant", "content": "b", "refusal": None}, "logprobs": None,
             "finish_reason": "length", "stop_reason": None, "token_ids": [2, 3]}]}


def test_completion_body_with_prompt_logprobs() -> None:
    asked, request = ask(prompt_logprobs=True, logprobs=1)
    prompt = request.spec.prompts[0]
    prompt.logprobs, prompt.num_logprobs = [made([4, 5], 2, ["p", "q"], first_unknown=True)], 2
    finished(asked, request, ("a", [1], Finish.EOS))
    (choice,) = answers.completion(asked, request, IDENTITY)["choices"]
    assert choice["prompt_logprobs"] == [None, {
        "5": {"logprob": -0.5, "rank": 1, "decoded_token": "q"},
        "100": {"logprob": -2.0, "rank": 2, "decoded_token": "alt1"}}]
    assert choice["text"] == "a" and choice["logprobs"]["tokens"] == ["a"]    # without echo nothing of the prompt


def test_no_not_a_number_reaches_json() -> None:
    odd = Logprobs(1, array("f", [-math.inf, math.nan]).tobytes(), pack_ids([1, 1]), pack_ids([1, 2]),
                   array("f", [-math.inf, math.nan]).tobytes(), [b"a", b"\xff"], [b"a", b"b"])
    content = logprobs.chat_content(odd, [1, 2], False)
    assert [e["logprob"] for e in content] == [-9999.0, -9999.0] == [e["top_logprobs"][0]["logprob"] for e in content]
    assert content[1]["token"] == "\ufffd" and content[1]["bytes"] == [255]
    json.dumps([content, logprobs.CompletionLogprobs(False).piece([(odd, [1, 2])]),
                logprobs.prompt_tokens(odd, [1, 2], False)], allow_nan=False)


def test_tokens_as_ids() -> None:
    found = made([7], 2, ["x"])
    assert logprobs.chat_content(found, [7], True)[0]["token"] == "token_id:7"
    assert logprobs.CompletionLogprobs(True).piece([(found, [7])])["top_logprobs"] == [
        {"token_id:7": -0.25, "token_id:100": -2.0}]

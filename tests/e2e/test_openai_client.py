"""The official OpenAI client against a real model, unmodified."""
from __future__ import annotations

import concurrent.futures

import openai
import pytest
from openai import OpenAI

MODEL = "smollm2"
ALIAS = "smollm2-135m-instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time, in a small village by the sea,"


def test_it_answers_the_question(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.role == "assistant"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens >= 0


def test_streaming_gives_the_same_text(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "The capital of France is Paris."
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0 and all(c.usage is None for c in chunks[:-1])
    assert len({(c.id, c.created, c.model) for c in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_a_second_request_finds_the_prompt_in_the_cache(client: OpenAI) -> None:
    prompt = STORY * 8
    usages = [client.completions.create(model=MODEL, prompt=prompt, max_tokens=2, temperature=0).usage for _ in range(2)]
    assert usages[1].prompt_tokens_details.cached_tokens >= usages[1].prompt_tokens // 16 * 16 - 16 > 0


def test_completions_with_logprobs(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=STORY, max_tokens=8, temperature=0, logprobs=3).choices[0]
    lp = answer.logprobs
    assert "".join(lp.tokens) == answer.text and answer.finish_reason == "length"
    assert len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == len(lp.text_offset) == 8
    for token, value, top in zip(lp.tokens, lp.token_logprobs, lp.top_logprobs):
        assert value == max(top.values()) == top[token] and value <= 0


def test_chat_with_logprobs(client: OpenAI) -> None:
    choice = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2).choices[0]
    content = choice.logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode().removesuffix("<|im_end|>") == choice.message.content
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob >= t.top_logprobs[1].logprob for t in content)


def test_echo_with_logprobs_scores_the_prompt(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=STORY, max_tokens=0, temperature=0, echo=True, logprobs=1).choices[0]
    assert answer.text == STORY and "".join(answer.logprobs.tokens) == STORY
    assert answer.logprobs.token_logprobs[0] is None and all(v < 0 for v in answer.logprobs.token_logprobs[1:])


def test_stop_strings_end_the_text_before_them(client: OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt=STORY, max_tokens=30, temperature=0).choices[0].text
    stop = free.split()[4]
    cut = client.completions.create(model=MODEL, prompt=STORY, max_tokens=30, temperature=0, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop" and cut.text == free[:free.index(stop)]
    kept = client.completions.create(model=MODEL, prompt=STORY, max_tokens=30, temperature=0, stop=stop,
                                     extra_body={"include_stop_str_in_output": True}).choices[0]
    assert kept.text == free[:free.index(stop)] + stop
    streamed = client.completions.create(model=MODEL, prompt=STORY, max_tokens=30, temperature=0, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == cut.text


def test_n_choices_with_a_seed_are_different_and_repeatable(client: OpenAI) -> None:
    def ask() -> list[str]:
        answer = client.completions.create(model=MODEL, prompt=STORY, max_tokens=12, temperature=1.0, n=3, seed=11)
        assert [c.index for c in answer.choices] == [0, 1, 2] and answer.usage.completion_tokens == 36
        return [c.text for c in answer.choices]
    first = ask()
    assert first == ask() and len(set(first)) == 3


def test_a_seeded_request_gives_the_same_text_alone_and_among_others(client: OpenAI) -> None:
    def ask(seed: int) -> str:
        return client.completions.create(model=MODEL, prompt=STORY, max_tokens=24, temperature=0.9, seed=seed
                                         ).choices[0].text
    alone = ask(5)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(ask, [5, *range(100, 115)]))
    assert crowd[0] == alone and len(set(crowd)) == 16


def test_prompts_in_a_batch_are_answered_in_order(client: OpenAI) -> None:
    prompts = [STORY, "The sky is", "def add(a, b):"]
    together = client.completions.create(model=MODEL, prompt=prompts, max_tokens=8, temperature=0).choices
    alone = [client.completions.create(model=MODEL, prompt=p, max_tokens=8, temperature=0).choices[0].text for p in prompts]
    assert [c.text for c in together] == alone


def test_tokens_in_and_out(client: OpenAI, smollm) -> None:
    import httpx
    ids = httpx.post(smollm.url + "/tokenize", json={"model": MODEL, "prompt": STORY}).json()
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 8192
    assert httpx.post(smollm.url + "/detokenize", json={"model": MODEL, "tokens": ids["tokens"]}).json() == {"prompt": STORY}
    by_ids = client.completions.create(model=MODEL, prompt=ids["tokens"], max_tokens=8, temperature=0,
                                       extra_body={"return_token_ids": True}).choices[0]
    by_text = client.completions.create(model=MODEL, prompt=STORY, max_tokens=8, temperature=0).choices[0]
    assert by_ids.text == by_text.text and len(by_ids.token_ids) == 8 and by_ids.prompt_token_ids == ids["tokens"]


def test_models_are_listed_with_their_context(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [m.id for m in listed] == [MODEL, ALIAS] and listed[0].max_model_len == 8192
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_logit_bias_and_penalties_are_real(client: OpenAI) -> None:
    plain = client.completions.create(model=MODEL, prompt="a b a b a b a b", max_tokens=12, temperature=0,
                                      extra_body={"return_token_ids": True}).choices[0]
    banned = client.completions.create(model=MODEL, prompt="a b a b a b a b", max_tokens=12, temperature=0,
                                       logit_bias={str(plain.token_ids[0]): -100},
                                       extra_body={"return_token_ids": True}).choices[0]
    assert plain.token_ids[0] not in banned.token_ids
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"extra_body": {"repetition_penalty": 1.8}}):
        changed = client.completions.create(model=MODEL, prompt="a b a b a b a b", max_tokens=12, temperature=0, **penalty)
        assert changed.choices[0].text != plain.text, penalty


def test_errors_reach_the_client_as_openai_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-17", messages=QUESTION)
    assert unknown.value.code == "model_not_found" and unknown.value.param == "model"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="word " * 9000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=QUESTION,
                                       tools=[{"type": "function", "function": {"name": "f f"}}])
    assert refused.value.param == "tools[0].function.name"

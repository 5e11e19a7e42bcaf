"""Encoding: special tokens as configured, characters checked before tokens, truncation from the left, bounded work."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from tokenizers import Tokenizer, processors

from pipeline.config import ModelConfig
from pipeline.errors import QuartetError, StartError
from pipeline.exits import MODEL_LOAD
from pipeline.messages import Chat, Route, Submit, TokenizeQuery, pack_ids
from pipeline.params import DetokSpec, SamplingParams
from tests.detok_proc import zoo
from tokenizer_proc.load import TextModel
from tokenizer_proc.prompt import MAX_QUERY_CHARS, PromptMaker

BOS, EOS = (zoo.token(zoo.byte_level(), text) for text in ("<s>", "</s>"))


def model(tmp_path: Path, tokenizer: Tokenizer | None = None, max_model_len: int = 50, vocab_size: int = 0,
          **config: Any) -> TextModel:
    zoo.save(tokenizer or zoo.byte_level(), tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **config})
    return TextModel(ModelConfig(names=("m",), path=str(tmp_path), max_model_len=max_model_len, vocab_size=vocab_size))


def submit(text: str | None = None, ids: list[int] | None = None, chat: Chat | None = None, add_special: bool = False,
           truncate: int | None = None) -> Submit:
    return Submit(256, Route(0, 1, 0, 1, 0, 1), 0, 1, 0, text, chat, pack_ids(ids or []), b"", add_special, truncate,
                  SamplingParams(), DetokSpec(), 0)


def ids_of(m: TextModel, **prompt: Any) -> list[int]:
    return PromptMaker(False, CollectorRegistry()).prompt_ids(m, submit(**prompt)).tolist()


def error(m: TextModel, **prompt: Any) -> QuartetError:
    with pytest.raises(QuartetError) as caught:
        ids_of(m, **prompt)
    return caught.value


# ---- special tokens ----------------------------------------------------------------------------------------------

def with_post_processor() -> Tokenizer:
    tokenizer = Tokenizer.from_str(zoo.byte_level().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)])
    return tokenizer


@pytest.mark.parametrize(("processor", "config", "before", "after"), [
    (False, {}, [], []), (True, {}, [BOS], [EOS]),
    (False, {"add_bos_token": True}, [BOS], []), (False, {"add_bos_token": True, "add_eos_token": True}, [BOS], [EOS]),
    (True, {"add_bos_token": False}, [], [EOS]), (True, {"add_bos_token": True, "add_eos_token": False}, [BOS], []),
])
def test_the_configurations_flags_win_over_the_post_processor(
        tmp_path: Path, processor: bool, config: dict[str, bool], before: list[int], after: list[int]) -> None:
    m = model(tmp_path, with_post_processor() if processor else None, **config)
    inner = zoo.byte_level().encode("The dog", add_special_tokens=False).ids
    assert ids_of(m, text="The dog", add_special=True) == [*before, *inner, *after]
    assert ids_of(m, text="The dog", add_special=False) == inner


def test_truncation_and_padding_of_the_file_are_taken_off(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(zoo.byte_level().to_str())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=20)
    assert ids_of(model(tmp_path, tokenizer), text="The quick brown fox") == zoo.byte_level().encode(
        "The quick brown fox").ids


def test_a_completion_prompt_may_spell_control_tokens(tmp_path: Path) -> None:
    assert ids_of(model(tmp_path), text="<s>dog")[0] == BOS


# ---- limits ------------------------------------------------------------------------------------------------------

def test_a_prompt_that_leaves_no_room_for_a_token_is_refused_with_the_numbers(tmp_path: Path) -> None:
    m = model(tmp_path)
    fits = [5] * 49
    assert ids_of(m, ids=fits) == fits
    caught = error(m, ids=[5] * 50)
    assert (caught.status, caught.code, caught.param) == (400, "context_length_exceeded", "prompt")
    assert caught.message == ("This model's maximum context length is 50 tokens. However, your prompt has 50 tokens. "
                              "Please reduce the length of the prompt.")


class Forbidden:
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the tokenizer was asked to {name}")


def test_hopeless_texts_are_refused_by_their_characters_without_tokenizing(tmp_path: Path) -> None:
    m = model(tmp_path)
    m.tokenizer = Forbidden()  # type: ignore[assignment]
    chars = m.max_model_len * m.chars_per_token + 1
    assert error(m, text="a" * chars).code == "context_length_exceeded"
    messages = json.dumps([{"role": "user", "content": "a" * chars}]).encode()
    m._sources = {"default": "{{ messages[0].content }}"}
    caught = error(m, chat=Chat(messages))
    assert (caught.code, caught.param) == ("context_length_exceeded", "messages") and str(chars) in caught.message


class Counting:
    """Counts the characters that the tokenizer is given."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner, self.chars = inner, 0

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> Any:
        self.chars += sum(map(len, texts))
        return self._inner.encode_batch_fast(texts, add_special_tokens=add_special_tokens)


def test_texts_that_turn_out_too_long_cost_little_more_than_a_full_context(tmp_path: Path) -> None:
    m = model(tmp_path, max_model_len=20_000)
    m.tokenizer = counting = Counting(m.tokenizer)  # type: ignore[assignment]
    text = "日本" * 100_000
    assert error(m, text=text).code == "context_length_exceeded" and counting.chars <= 20_000


def test_long_texts_that_fit_are_encoded_as_a_whole(tmp_path: Path) -> None:
    m = model(tmp_path, max_model_len=60_000)
    text = "The quick brown fox. " * 4_000
    assert ids_of(m, text=text) == zoo.byte_level().encode(text).ids


@pytest.mark.parametrize("text", ["A wholly unknown sentence!", "😀 dog" * 3])
def test_truncation_keeps_the_last_tokens(tmp_path: Path, text: str) -> None:
    m, ids = model(tmp_path, max_model_len=9), zoo.byte_level().encode(text).ids
    assert len(ids) > 8
    assert ids_of(m, text=text, truncate=3) == ids[-3:] == ids_of(m, ids=ids, truncate=3)
    assert ids_of(m, text=text, truncate=-1) == ids[-8:]
    assert ids_of(m, text="dog", truncate=8) == zoo.byte_level().encode("dog").ids
    assert error(m, text=text, truncate=9).code == "context_length_exceeded"


def test_truncating_a_huge_text_reads_only_its_end(tmp_path: Path) -> None:
    m = model(tmp_path)
    text = "The quick brown fox. " * 100_000
    expected = zoo.byte_level().encode(text[-21 * 100:]).ids[-10:]
    m.tokenizer = counting = Counting(m.tokenizer)  # type: ignore[assignment]
    assert ids_of(m, text=text, truncate=10) == expected and counting.chars <= 40_000


@pytest.mark.parametrize(("prompt", "code", "says"), [
    ({"text": ""}, "invalid_value", "empty"), ({"ids": []}, "invalid_value", "empty"),
    ({"text": "dog", "truncate": 0}, "invalid_value", "empty"), ({"text": "a\ud83d"}, "invalid_value", "surrogate"),
    ({"ids": [3, 10**6]}, "invalid_value", "1000000"), ({"ids": [2**32 - 1]}, "invalid_value", "vocabulary"),
])
def test_prompts_that_are_none_are_refused(tmp_path: Path, prompt: dict[str, Any], code: str, says: str) -> None:
    caught = error(model(tmp_path), **prompt)
    assert (caught.code, caught.param, caught.status) == (code, "prompt", 400) and says in caught.message


def test_ids_up_to_the_rows_of_the_model_are_allowed(tmp_path: Path) -> None:
    m = model(tmp_path, vocab_size=1000)
    assert ids_of(m, ids=[999]) == [999] and error(m, ids=[1000]).param == "prompt"


def test_odd_characters_reach_the_model(tmp_path: Path) -> None:
    m = model(tmp_path, max_model_len=100)
    for text in ("\0", "\ufeffBOM", "שלום", "\u202eabc", "😀"):
        assert m.tokenizer.decode(ids_of(m, text=text)) == text


def test_tokenize_queries_have_no_context_but_a_size(tmp_path: Path) -> None:
    m, maker = model(tmp_path, max_model_len=3), PromptMaker(False, CollectorRegistry())

    def query(text: str) -> list[int]:
        return maker.query_ids(m, TokenizeQuery(256, 1, 0, text, None, False, False)).tolist()
    assert len(query("The quick brown fox " * 100)) > 300 and query("") == []
    with pytest.raises(QuartetError, match="characters"):
        query("a" * (MAX_QUERY_CHARS + 1))


# ---- files -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("file", "content"), [
    ("tokenizer.json", None), ("tokenizer.json", "{}"), ("tokenizer.json", "not json"), ("tokenizer_config.json", "["),
    ("tokenizer_config.json", "[]"), ("special_tokens_map.json", "\xff"), ("chat_template.jinja", b"\xff\xfe")])
def test_missing_and_broken_files_are_one_sentence_and_the_load_exit_code(
        tmp_path: Path, file: str, content: str | bytes | None) -> None:
    zoo.save(zoo.byte_level(), tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode("latin-1"))
    with pytest.raises(StartError) as caught:
        TextModel(ModelConfig(names=("m",), path=str(tmp_path)))
    assert caught.value.exit_code == MODEL_LOAD and str(tmp_path) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_broken_template_override_ends_the_start_but_a_models_own_ends_only_chats(tmp_path: Path) -> None:
    zoo.save(zoo.byte_level(), tmp_path, {"chat_template": "{% if %}"})
    with pytest.raises(StartError, match="line 1"):
        TextModel(ModelConfig(names=("m",), path=str(tmp_path), chat_template="{{ "))
    m = TextModel(ModelConfig(names=("m",), path=str(tmp_path)))
    assert ids_of(m, text="dog") and error(m, chat=Chat(b'[{"role": "user", "content": "x"}]')).status == 400


def test_the_tokenizer_may_lie_in_another_directory(tmp_path: Path) -> None:
    zoo.save(zoo.byte_level(), tmp_path / "other")
    assert TextModel(ModelConfig(names=("m",), path="/nowhere", tokenizer=str(tmp_path / "other"))).num_ids > 256

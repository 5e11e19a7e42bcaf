"""Text is a pure, append-only, linear function of the ids, and the library's text wherever that is possible."""
from __future__ import annotations

import codecs
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detok_proc.stream import LibraryText, Text, open_text, whole_text
from detok_proc.vocab import Rules, Unsupported, Vocab
from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD
from tests.detok_proc import zoo

VOCABS = {name: Vocab(make(), zoo.special_ids(make())) for name, make in zoo.ZOO.items()}
SAMPLES = ["Hello wörld!", "She didn't stop, they've been there.", "日本語のテキスト。", "😀👍🏽👨‍👩‍👧‍👦🇩🇪 e\u0301",
           "  two  spaces\n\tand a tab ", "def f(x):\n    return {'a': 1}"]
names = st.sampled_from(sorted(VOCABS))


def ids_of(name: str) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, len(VOCABS[name].raw) + 2), max_size=60)


def opened(name: str, left: list[int] | None = None, skip: bool = True, spaces: bool = True) -> Text:
    return open_text(VOCABS[name], left or [], skip_special=skip, spaces=spaces)


def everything(text: Text, ids: list[int]) -> str:
    return "".join(text.push(number) for number in ids) + text.end()


def test_every_decoder_that_treats_tokens_by_themselves_gets_a_table() -> None:
    assert {name for name, vocab in VOCABS.items() if vocab.exact} == set(zoo.EXACT)


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
@pytest.mark.parametrize("sample", SAMPLES)
def test_ordinary_text_equals_the_library(name: str, sample: str) -> None:
    """What follows a prompt is the library's text of both less its text of the prompt."""
    tokenizer = zoo.ZOO[name]()
    prompt, output = tokenizer.encode("The dog").ids, tokenizer.encode(sample, add_special_tokens=False).ids
    if name == "suffixed":                    # its last token decodes differently: compare what can be streamed
        prompt = prompt[:-1]
    whole = tokenizer.decode(prompt + output)
    assert everything(opened(name, prompt), output) == whole[len(tokenizer.decode(prompt)):]


@pytest.mark.parametrize("name", sorted(zoo.EXACT))
@pytest.mark.parametrize("sample", SAMPLES)
def test_an_echoed_prompt_equals_the_library(name: str, sample: str) -> None:
    tokenizer = zoo.ZOO[name]()
    ids = tokenizer.encode("<s>" + sample).ids
    for skip in (True, False):
        assert whole_text(VOCABS[name], ids, skip_special=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(st.data(), names, st.booleans(), st.booleans())
def test_any_grouping_of_the_ids_gives_the_same_text(data: st.DataObject, name: str, skip: bool, spaces: bool) -> None:
    ids, left = data.draw(ids_of(name)), data.draw(ids_of(name))
    one = opened(name, left, skip, spaces)
    singly = [one.push(number) for number in ids]
    cuts = sorted({0, len(ids), *data.draw(st.lists(st.integers(0, len(ids)), max_size=8))})
    grouped = opened(name, left, skip, spaces)
    for begin, end in pairwise(cuts):
        assert grouped.push_all(ids[begin:end]) == "".join(singly[begin:end])
    assert one.end() == grouped.end()


@settings(max_examples=150, deadline=None)
@given(st.data(), st.booleans())
def test_any_ids_at_all_decode_as_the_library_does_for_byte_level(data: st.DataObject, skip: bool) -> None:
    ids = data.draw(ids_of("byte_level"))
    assert everything(opened("byte_level", [], skip), ids) == zoo.byte_level().decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["byte_level", "byte_fallback"]))
def test_any_text_survives_encoding_and_decoding(text: str, name: str) -> None:
    """Emoji, CJK, combining marks, controls, right-to-left: no U+FFFD appears that was not there."""
    tokenizer = zoo.ZOO[name]()
    if name == "byte_fallback":
        text = text.replace("▁", "_")         # its alphabet cannot tell ▁ from a space
    for marker in (*zoo.SPECIAL, "<tool_call>"):
        text = text.replace(marker, "")
    assert everything(opened(name), tokenizer.encode(text, add_special_tokens=False).ids) == text


@settings(deadline=None)
@given(st.binary(max_size=30))
def test_byte_fallback_tokens_decode_as_the_bytes_that_they_are(data: bytes) -> None:
    tokenizer = zoo.byte_fallback()
    ids = [zoo.token(tokenizer, zoo.BYTES[byte]) for byte in data]
    assert everything(opened("byte_fallback"), ids) == codecs.decode(data, "utf-8", "replace")


def test_a_character_is_shown_when_its_last_byte_arrives_and_not_before() -> None:
    tokenizer = zoo.byte_fallback()
    text = opened("byte_fallback")
    shown = [text.push(zoo.token(tokenizer, zoo.BYTES[byte])) for byte in "😀!".encode()]
    assert shown == ["", "", "", "😀", "!"]


def test_invalid_bytes_never_wait_for_more_than_three() -> None:
    """20,000 invalid bytes: each is shown at once, so the work per id is constant."""
    tokenizer, text = zoo.byte_fallback(), opened("byte_fallback")
    stray = zoo.token(tokenizer, "<0x80>")
    assert all(text.push(stray) == "\ufffd" for _ in range(20_000))
    starts = opened("byte_fallback")
    start = zoo.token(tokenizer, "<0xF0>")
    assert [starts.push(start) for _ in range(4)] == ["", "\ufffd", "\ufffd", "\ufffd"]


def test_a_character_that_the_prompt_began_is_completed_by_the_output() -> None:
    tokenizer = zoo.byte_fallback()
    ids = [zoo.token(tokenizer, zoo.BYTES[byte]) for byte in "😀".encode()]
    assert everything(opened("byte_fallback", ids[:2]), ids[2:]) == "😀"
    assert whole_text(VOCABS["byte_fallback"], ids[:2], skip_special=True) == ""


@pytest.mark.parametrize(("name", "shown"), [("byte_level", "<|im_end|>"), ("word_piece", " <|im_end|>")])
def test_special_tokens_are_hidden_only_when_asked(name: str, shown: str) -> None:
    end = zoo.token(zoo.ZOO[name](), "<|im_end|>")
    assert everything(opened(name, skip=True), [end]) == ""
    assert everything(opened(name, skip=False), [end]) == shown


def test_spaces_between_special_tokens_can_be_left_out() -> None:
    tokenizer = zoo.word_piece()
    ids = [zoo.token(tokenizer, token) for token in ("<s>", "</s>", "The", "<s>")]
    assert everything(opened("word_piece", skip=False), ids) == " <s> </s> The <s>"
    assert everything(opened("word_piece", skip=False, spaces=False), ids) == " <s></s> The <s>"


def test_hidden_special_tokens_do_not_break_a_character() -> None:
    tokenizer = zoo.byte_level()
    euro = tokenizer.encode("€", add_special_tokens=False).ids
    assert len(euro) > 1
    ids = [euro[0], zoo.token(tokenizer, "<s>"), *euro[1:]]
    assert everything(opened("byte_level"), ids) == "€"


def test_ids_outside_the_vocabulary_are_nothing() -> None:
    assert everything(opened("byte_level"), [10**6, 2**32 - 1]) == ""


# ---- the library where no table is possible ----------------------------------------------------------------------

class CountingDecoder:
    """Counts the ids handed to the library."""

    def __init__(self, inner: object) -> None:
        self._inner, self.ids = inner, 0

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.ids += len(ids)
        return self._inner.decode(ids, skip_special_tokens=skip_special_tokens)  # type: ignore[attr-defined]


def test_the_library_fallback_commits_after_eight_ids_and_stays_linear() -> None:
    vocab = Vocab(zoo.byte_level(), zoo.special_ids(zoo.byte_level()))
    counting = CountingDecoder(vocab.tokenizer)
    vocab.tokenizer = counting  # type: ignore[assignment]
    text = LibraryText(vocab, True, [])
    stray = zoo.byte_level().encode("€", add_special_tokens=False).ids[-1]
    shown = [text.push(stray) for _ in range(2_000)]
    assert max(len(list(run)) for run in "".join("x" if s else "." for s in shown).split("x")) < 8
    assert "".join(shown) == "\ufffd" * 2_000
    assert counting.ids <= 2_000 * 3 * 8


def test_the_library_fallback_streams_what_the_library_says() -> None:
    tokenizer = zoo.suffixed()
    ids = tokenizer.encode("the dog does not mind it").ids
    text = everything(opened("suffixed", ids[:2]), ids[2:])
    assert tokenizer.decode(ids).replace(" ", "").endswith(text.replace(" ", "")) and len(text) > 8


@pytest.mark.parametrize("decoder", [
    {"type": "CTC"}, {"type": "BPEDecoder", "suffix": "</w>"},
    {"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": ""}]},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
])
def test_decoders_that_look_across_tokens_are_left_to_the_library(decoder: dict[str, object]) -> None:
    with pytest.raises(Unsupported):
        Rules.of(decoder)


def test_a_table_that_the_library_contradicts_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Rules.of({"type": "ByteLevel"})
    monkeypatch.setattr(Rules, "of", lambda decoder: Rules(lambda t: right.piece(t).upper(), right.first))
    vocab = Vocab(zoo.byte_level(), zoo.special_ids(zoo.byte_level()))
    assert not vocab.exact and vocab.reason == "the byte table differs from the library"
    ids = zoo.byte_level().encode("The quick dog 😀").ids
    assert everything(open_text(vocab, [], skip_special=True, spaces=True), ids) == "The quick dog 😀"


# ---- files -------------------------------------------------------------------------------------------------------

def test_load_reads_a_directory_and_takes_special_tokens_from_the_configuration(tmp_path: Path) -> None:
    folder = zoo.save(zoo.byte_level(), tmp_path / "m", {"eos_token": "<tool_call>", "pad_token": "not a token"})
    vocab = Vocab.load(folder)
    call = zoo.token(zoo.byte_level(), "<tool_call>")
    assert vocab.exact and call in vocab.special and vocab.shown[call] == b"" and vocab.raw[call] == b"<tool_call>"
    assert len(vocab.raw) == zoo.byte_level().get_vocab_size()


@pytest.mark.parametrize("content", [None, "", "{", '{"model": 3}', "[]"])
def test_a_missing_or_broken_tokenizer_is_one_sentence_and_the_load_exit_code(
        tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StartError) as caught:
        Vocab.load(tmp_path)
    assert caught.value.exit_code == MODEL_LOAD and str(tmp_path) in caught.value.message

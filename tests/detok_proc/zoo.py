"""Small tokenizers of every kind that models use, made by the `tokenizers` library: no file, no network."""
from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog does not mind; it sleeps on.",
    "She said: \"Don't stop!\" and he didn't. They've been there, haven't they? I'm sure we're fine.",
    "Größe, façade, naïve, žluťoučký kůň, Ελληνικά, русский текст, עברית, العربية",
    "日本語のテキストです。中文字符测试。한국어 텍스트.",
    "Emoji: 😀 👍🏽 👨‍👩‍👧‍👦 🇩🇪 and combining: é ñ ḍ̇",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}\n\n\tif a != b:  # why\n",
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _special(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    return tokenizer


@cache
def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen, SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=600, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return _special(tokenizer)


def _with_bytes(strip: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.train_from_iterator(CORPUS[:4], trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=["<unk>", *BYTES]))
    made = json.loads(tokenizer.to_str())
    made["added_tokens"] = []
    made["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    if strip:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return _special(tokenizer)


@cache
def byte_fallback() -> Tokenizer:
    """As Gemma: spaces are ▁, unknown characters become byte tokens."""
    return _with_bytes(strip=False)


@cache
def byte_fallback_strip() -> Tokenizer:
    """As Llama 2 and Mistral: besides, a text starts with a space that decoding takes off."""
    return _with_bytes(strip=True)


@cache
def unigram() -> Tokenizer:
    """As T5: a Unigram model behind Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(CORPUS, trainers.UnigramTrainer(
        vocab_size=300, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"]))
    return _special(tokenizer)


@cache
def word_piece() -> Tokenizer:
    """As BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(
        vocab_size=400, show_progress=False, special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    return _special(tokenizer)


@cache
def suffixed() -> Tokenizer:
    """As GPT-1: a decoder that looks at the last token of a text, so that the library must decode."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=["<unk>"], end_of_word_suffix="</w>"))
    return _special(tokenizer)


@cache
def words() -> Tokenizer:
    """No decoder at all: tokens joined by spaces."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1, "world": 2, "!": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    return _special(tokenizer)


ZOO = {f.__name__: f for f in (
    byte_level, byte_fallback, byte_fallback_strip, unigram, word_piece, suffixed, words)}
EXACT = {name: make for name, make in ZOO.items() if name != "suffixed"}


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)


def token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a token that there is."""
    number = tokenizer.token_to_id(text)
    assert number is not None, text
    return number


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, object] | None = None) -> Path:
    """A model directory as far as tokenizer and detokenizer need one."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>"} if config is None else config))
    return folder

"""The bytes of every token id of one model, and the check that they give what the tokenizer library would give.

Run by the detokenizer, once per model. A table is possible where a decoder treats each token by itself (byte-level
BPE, byte fallback, Metaspace, WordPiece, plain joining); it makes text a pure function of the ids at the price of one
list index per token. Other decoders, and tables that the check refutes, are left to the library (stream.LibraryText).
"""
from __future__ import annotations

import codecs
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD
from pipeline.tokenizer_files import dress, read

CHECK_IDS = 48                      # ids in one string of the check
CHECK_STRINGS = 1500                # about 0.1 s
MAX_IDS = 4 * 2**20                 # a vocabulary larger than this is a broken file
log = logging.getLogger(__name__)


class Unsupported(Exception):
    """This decoder does not treat each token by itself."""


def _alphabet() -> dict[int, str]:
    """GPT-2's byte alphabet as a translation: the character that stands for a byte -> chr(byte).

    Printable Latin-1 characters stand for themselves, the other bytes for the code points from 256 on. Characters
    below 256 that stand for nothing map to one that Latin-1 cannot encode.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = dict.fromkeys(range(256), "\uffff")
    table.update({code: chr(code) for code in printable})
    rest = [byte for byte in range(256) if byte not in set(printable)]
    table.update({256 + n: chr(byte) for n, byte in enumerate(rest)})
    return table


_ALPHABET = _alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:                # a token outside the alphabet stands for itself
        return token.encode("utf-8", "replace")


def _fallback_byte(token: str) -> bytes | None:
    """The byte that a token like ``<0x0A>`` stands for."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _clean(text: str) -> str:
    """The contractions and punctuation that a WordPiece decoder with `cleanup` joins, in its order."""
    for old, new in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
                     (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):
        text = text.replace(old, new)
    return text


@dataclass(slots=True)
class Rules:
    """How one decoder turns a token into bytes: inside a text (`piece`) and at its start (`first`)."""

    piece: Callable[[str], bytes]
    first: Callable[[str], bytes]
    strip: int = 0                            # spaces taken off the start of a whole text
    byte_fallback: bool = False
    joined: bool = False                      # pieces carry the space that separates them from the one before

    @classmethod
    def of(cls, decoder: dict[str, Any] | None) -> Rules:
        """From the decoder of a tokenizer.json; Unsupported when it cannot be done token by token."""
        if decoder is None:
            return cls(lambda token: (" " + token).encode("utf-8", "replace"),
                       lambda token: token.encode("utf-8", "replace"), joined=True)
        steps = _flatten(decoder)
        kinds = [step["type"] for step in steps]
        if kinds == ["ByteLevel"]:
            return cls(_byte_level, _byte_level)
        if kinds == ["WordPiece"]:
            return cls._word_piece(steps[0])
        return cls._text(steps)

    @classmethod
    def _word_piece(cls, step: dict[str, Any]) -> Rules:
        prefix, cleanup = step.get("prefix", "##"), step.get("cleanup", True)
        clean = _clean if cleanup else str

        def piece(token: str) -> bytes:
            text = token[len(prefix):] if token.startswith(prefix) else " " + token
            return clean(text).encode("utf-8", "replace")
        return cls(piece, lambda token: clean(token).encode("utf-8", "replace"), joined=True)

    @classmethod
    def _text(cls, steps: list[dict[str, Any]]) -> Rules:
        """Replace, ByteFallback, Metaspace, Fuse and Strip in any order that stays within one token."""
        inner: list[tuple[str, str]] = []
        head: list[tuple[str, str]] = []
        strip, fused, fallback_after = 0, False, -1
        for step in steps:
            kind = step["type"]
            if kind == "Replace" and "String" in step["pattern"] and (not fused or len(step["pattern"]["String"]) == 1):
                pair = (step["pattern"]["String"], step["content"])
                inner.append(pair)
                head.append(pair)
            elif kind == "Metaspace" and not fused:
                mark = step.get("replacement", "\u2581")
                inner.append((mark, " "))
                head.append((mark, " " if step.get("prepend_scheme", "always") == "never" else ""))
            elif kind == "ByteFallback" and not fused and fallback_after < 0:
                fallback_after = len(inner)
            elif kind == "Fuse":
                fused = True
            elif kind == "Strip" and fused and step.get("content") == " " and not step.get("stop"):
                strip = step.get("start", 0)
            else:
                raise Unsupported(kind)

        def make(pairs: list[tuple[str, str]]) -> Callable[[str], bytes]:
            def convert(token: str) -> bytes:
                for number, (old, new) in enumerate(pairs):
                    if number == fallback_after and (byte := _fallback_byte(token)) is not None:
                        return byte
                    token = token.replace(old, new)
                if fallback_after == len(pairs) and (byte := _fallback_byte(token)) is not None:
                    return byte
                return token.encode("utf-8", "replace")
            return convert
        return cls(make(inner), make(head), strip=strip, byte_fallback=fallback_after >= 0)


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] == "Sequence":
        return [step for inner in decoder["decoders"] for step in _flatten(inner)]
    return [decoder]


class Vocab:
    """Token bytes of one model. `raw[id]`: always the token's bytes; `shown[id]`: b"" for special tokens."""

    __slots__ = ("raw", "shown", "special", "added", "tokenizer", "rules", "reason", "_marked")

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.added = frozenset(tokenizer.get_added_tokens_decoder())
        self.rules: Rules | None = None
        self.reason = ""                      # why there is no table
        tokens = _tokens(tokenizer)
        decoder = tokenizer.decoder
        try:
            self.rules = Rules.of(None if decoder is None else json.loads(decoder.__getstate__()))
            piece = self.rules.piece
            self.raw = [b"" if token is None else piece(token) for token in tokens]
        except (Unsupported, KeyError, TypeError, ValueError) as error:
            self.rules, self.reason = None, f"decoder {error}"
            self.raw = [b"" if token is None else token.encode("utf-8", "replace") for token in tokens]
        self.shown = self._hidden(special)
        self._marked: dict[frozenset[str], list[bytes]] = {}
        if self.rules is not None and not self._agrees(tokens):
            self.rules, self.reason = None, "the byte table differs from the library"

    @classmethod
    def load(cls, directory: str | Path) -> Vocab:
        """From a model directory; StartError when it holds no tokenizer that can be read."""
        files, started = read(directory), time.monotonic()
        try:
            tokenizer = Tokenizer.from_file(str(files.tokenizer_json))
            vocab = cls(tokenizer, dress(tokenizer, files))
        except StartError:
            raise
        except Exception as error:            # the library raises bare Exception for whatever it cannot parse
            raise StartError(MODEL_LOAD, f"The tokenizer {files.tokenizer_json} cannot be read: "
                                         f"{str(error)[:200]}.") from None
        how = "byte table" if vocab.exact else f"library, because {vocab.reason}"
        log.info("tokenizer %s: %d ids, decoded by %s, loaded in %.2f s", files.tokenizer_json, len(vocab.raw), how,
                 time.monotonic() - started)
        return vocab

    @property
    def exact(self) -> bool:
        """Whether the table decodes; False: the library does."""
        return self.rules is not None

    def markers(self, tokens: frozenset[str]) -> frozenset[int]:
        """The ids of those of `tokens` that are special."""
        return frozenset(number for token in tokens if (number := self.tokenizer.token_to_id(token)) in self.special)

    def marked(self, tokens: frozenset[str]) -> list[bytes]:
        """`shown` with the special tokens among `tokens`, which come from the closed set of families."""
        table = self._marked.get(tokens)
        if table is None:
            seen = self.markers(tokens)
            table = self._marked[tokens] = self._hidden(self.special - seen) if seen else self.shown
        return table

    def _hidden(self, numbers: frozenset[int]) -> list[bytes]:
        table = list(self.raw)
        for number in numbers:
            table[number] = b""
        return table

    def whole(self, ids: Sequence[int], skip_special: bool) -> bytes:
        """The bytes of a text that starts with `ids` (an echoed prompt): the start is treated as the library does."""
        assert self.rules is not None
        table, size = self.shown if skip_special else self.raw, len(self.raw)
        known = [i for i in ids if i < size and (not skip_special or i not in self.special)]
        if not known:
            return b""
        token = self.tokenizer.id_to_token(known[0])
        data = b"".join([b"" if token is None else self.rules.first(token), *[table[i] for i in known[1:]]])
        for _ in range(self.rules.strip):
            data = data.removeprefix(b" ")
        return data

    def piece(self, number: int) -> bytes:
        """A token's own bytes, for logprobs; b"" for an id that the tokenizer does not know."""
        return self.raw[number] if number < len(self.raw) else b""

    def _agrees(self, tokens: list[str | None]) -> bool:
        """Whether the table gives the library's text for random id strings: all ids, or a sample of a large vocabulary.

        Byte-fallback tokens are left out: invalid runs of them are where our text, which must be append-only, is
        defined differently.
        """
        assert self.rules is not None
        ids = [number for number, token in enumerate(tokens) if token is not None
               and not (self.rules.byte_fallback and _fallback_byte(token) is not None)]
        chance = random.Random(0)
        if len(ids) > CHECK_IDS * CHECK_STRINGS:
            ids = chance.sample(ids, CHECK_IDS * CHECK_STRINGS) + [i for i in ids if i in self.added]
        chance.shuffle(ids)
        for begin in range(0, len(ids), CHECK_IDS):
            chunk = ids[begin:begin + CHECK_IDS]
            skip = begin // CHECK_IDS % 2 == 1
            ours = codecs.decode(self.whole(chunk, skip), "utf-8", "replace")
            if ours != self.tokenizer.decode(chunk, skip_special_tokens=skip):
                return False
        return True


def _tokens(tokenizer: Tokenizer) -> list[str | None]:
    """Token string by id; None for ids in a gap."""
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    size = max(vocab.values(), default=-1) + 1
    if size > MAX_IDS:
        raise ValueError(f"its vocabulary has an id above {MAX_IDS}")
    tokens: list[str | None] = [None] * size
    for token, number in vocab.items():
        tokens[number] = token
    return tokens

"""What a speech checkpoint says about its tokens: special ids, languages, suppressed ids, and its tokenizer.

Engine process, no torch. Read once at load from generation_config.json and tokenizer.json; StartError for a checkpoint
that lacks what transcription needs. Also turns ids into text, because the fallback judges texts.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine_proc.checkpoint import read_json, refuse

SECONDS_PER_TIMESTAMP = 0.02
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")
# Languages written without spaces: their words are found character by character.
SPACELESS = frozenset({"zh", "ja", "th", "lo", "my", "yue"})


@dataclass(slots=True, kw_only=True)
class Vocabulary:
    """Ids of one model. -1 stands for a token that the model does not have."""

    tokenizer: Tokenizer
    eot: int
    sot: int
    sot_prev: int = -1
    no_speech: int = -1
    no_timestamps: int = -1
    timestamp_begin: int = -1                       # <|0.00|>; -1: a model without timestamps
    transcribe: int = -1
    translate: int = -1
    languages: dict[str, int] = field(default_factory=dict)      # ISO code -> id; empty: one language only
    suppress: tuple[int, ...] = ()
    begin_suppress: tuple[int, ...] = ()
    max_initial_timestamp: int | None = None        # index of the latest first timestamp
    alignment_heads: tuple[tuple[int, int], ...] = ()            # (layer, head); empty: no word times
    max_length: int = 448                           # decoder positions
    first_special: int                              # ids from here on are no text
    lead: str = ""                                  # what goes ahead of a window's text, where its ids do not say it

    @property
    def multilingual(self) -> bool:
        return bool(self.languages)

    def language_of(self, token: int) -> str | None:
        return next((code for code, number in self.languages.items() if number == token), None)

    def prompt(self, previous: Sequence[int], language: str | None, translate: bool, timestamps: bool) -> list[int]:
        """The decoder's prompt: what was said before, then who speaks and what is to be done."""
        ids: list[int] = []
        if previous and self.sot_prev >= 0:
            ids = [self.sot_prev, *previous[-(self.max_length // 2 - 1):]]
        ids.append(self.sot)
        if self.languages and language is not None:
            ids.append(self.languages[language])
            if self.transcribe >= 0:
                ids.append(self.translate if translate else self.transcribe)
        if not timestamps and self.no_timestamps >= 0:
            ids.append(self.no_timestamps)
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text that conditions the decoder; no special token can come out of it."""
        if not text.strip():
            return []
        first = self.first_special
        ids = self.tokenizer.encode(" " + text.strip(), add_special_tokens=False).ids
        return [i for i in ids if i < first]

    def text(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens and timestamps left out."""
        first = self.first_special
        return str(self.tokenizer.decode([i for i in ids if i < first], skip_special_tokens=True))

    @classmethod
    def read(cls, directory: Path, config: dict[str, Any]) -> Vocabulary:
        """Of a Whisper checkpoint."""
        tokenizer = read_tokenizer(directory)
        path = directory / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}

        def named(*tokens: str) -> int:
            return next((i for t in tokens if (i := tokenizer.token_to_id(t)) is not None), -1)

        eot, sot = named("<|endoftext|>"), named("<|startoftranscript|>")
        if eot < 0 or sot < 0:
            raise refuse(f"The tokenizer of {directory} lacks <|endoftext|> or <|startoftranscript|>.")
        no_timestamps = named("<|notimestamps|>")
        languages = {token.strip("<|>"): number for token, number in generation.get("lang_to_id", {}).items()}
        multilingual = generation.get("is_multilingual", config["vocab_size"] >= 51865)
        if multilingual and not languages:
            # The languages stand between the start of the transcript and the tasks.
            names = ((tokenizer.id_to_token(i) or "", i) for i in range(sot + 1, named("<|translate|>")))
            languages = {name.strip("<|>"): number for name, number in names}
        heads = generation.get("alignment_heads")
        if heads is None:                       # as the authors': all heads of the upper half
            layers, count = config["decoder_layers"], config["decoder_attention_heads"]
            heads = [(layer, head) for layer in range(layers // 2, layers) for head in range(count)]
        try:
            return cls(
                tokenizer=tokenizer, eot=eot, sot=sot, sot_prev=named("<|startofprev|>"),
                first_special=min(eot, sot), no_speech=named(*NO_SPEECH),
                no_timestamps=no_timestamps, timestamp_begin=no_timestamps + 1 if no_timestamps >= 0 else -1,
                transcribe=named("<|transcribe|>"), translate=named("<|translate|>"),
                languages=languages if multilingual else {},
                suppress=tuple(int(i) for i in generation.get("suppress_tokens") or config.get("suppress_tokens") or ()),
                begin_suppress=tuple(int(i) for i in generation.get("begin_suppress_tokens")
                                     or config.get("begin_suppress_tokens") or ()),
                max_initial_timestamp=generation.get("max_initial_timestamp_index"),
                alignment_heads=tuple((int(a), int(b)) for a, b in heads),
                max_length=int(config["max_target_positions"]))
        except (TypeError, ValueError):
            raise refuse(f"The generation_config.json of {directory} cannot be used.") from None


def read_tokenizer(directory: Path) -> Tokenizer:
    """StartError when there is none that can be read."""
    try:
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:                  # the library raises bare Exception for whatever it cannot parse
        raise refuse(f"The tokenizer of {directory} cannot be read: {str(error)[:200]}.") from None

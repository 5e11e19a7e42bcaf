"""A submission or a /tokenize query -> prompt ids, or the error that its caller is to see.

Run by the tokenizer. The order of checks is the order of cost: characters before tokens, tokens before anything else.
"""
from __future__ import annotations

import time
from array import array
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Histogram

from pipeline.errors import QuartetError
from pipeline.messages import Chat, Submit, TokenizeQuery, unpack_ids
from tokenizer_proc.chat import render
from tokenizer_proc.fim import between
from tokenizer_proc.guard import Piece
from tokenizer_proc.load import TextModel

MAX_QUERY_CHARS = 4 * 2**20          # /tokenize has no context to fit, but it must not hold up its neighbours
BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class PromptMaker:
    """`trust_template`: requests may bring a chat template of their own."""

    def __init__(self, trust_template: bool, registry: CollectorRegistry) -> None:
        self._trust_template = trust_template
        self._render_s = Histogram("quartet:render_seconds", "Time to render a chat template.", buckets=BUCKETS,
                                   registry=registry)
        self._encode_s = Histogram("quartet:tokenize_seconds", "Time to turn a text into token ids.", buckets=BUCKETS,
                                   registry=registry)

    def prompt_ids(self, model: TextModel, submit: Submit) -> array[int]:
        """The ids of a new prompt, within the vocabulary and the context. QuartetError otherwise."""
        param = "messages" if submit.chat is not None else "prompt"
        keep = submit.truncate if submit.truncate is None or submit.truncate >= 0 else model.max_model_len - 1
        try:
            if submit.embeds is not None:
                param, ids = "prompt_embeds", array("I", bytes(4 * len(submit.embeds)))
            elif submit.chat is None and submit.text is None:
                ids = unpack_ids(submit.ids)
                model.check_ids(ids, param)
            elif submit.suffix is not None:
                with self._encode_s.time():
                    ids = between(model, submit.text or "", submit.suffix, submit.add_special)
            else:
                pieces = self.pieces(model, submit.chat, submit.text, keep is not None)
                with self._encode_s.time():
                    ids = model.encode(pieces, submit.add_special, keep=keep, keep_first=submit.truncate_right)
            if keep is not None and len(ids) > keep:
                ids = ids[:keep] if submit.truncate_right else ids[len(ids) - keep:]
            if len(ids) >= model.max_model_len:
                raise model.too_long(len(ids))
        except QuartetError as error:
            if error.code == "context_length_exceeded":
                error.param = param
            raise
        if not ids:
            raise QuartetError("invalid_value", "The prompt is empty: it has no token.", param)
        return ids

    def query_ids(self, model: TextModel, query: TokenizeQuery) -> array[int]:
        """The ids for /tokenize, whatever the context length."""
        pieces = self.pieces(model, query.chat, query.text, True)
        chars = sum(len(text) for text, _ in pieces)
        if chars > MAX_QUERY_CHARS:
            raise QuartetError("invalid_value", f"The text has {chars} characters; at most {MAX_QUERY_CHARS} are "
                               "tokenized in one request.", "prompt")
        with self._encode_s.time():
            return model.encode(pieces, query.add_special, unlimited=True)

    def encode_timer(self) -> AbstractContextManager[object]:
        """Times what it encloses as encoding."""
        return self._encode_s.time()

    def pieces(self, model: TextModel, chat: Chat | None, text: str | None, may_be_long: bool) -> list[Piece]:
        """What is to be encoded, a rendered chat or a text; `may_be_long`: it is going to be cut."""
        if chat is None:
            return [(text or "", False)]
        started = time.monotonic()
        try:
            return render(model, chat, trust_template=self._trust_template, may_be_long=may_be_long)
        finally:
            self._render_s.observe(time.monotonic() - started)

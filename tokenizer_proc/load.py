"""One model as the tokenizer stage knows it: tokenizer, templates, special tokens, and the limits that follow.

Run by the tokenizer, loaded at first use. Only the `tokenizers` library: no transformers, no torch.
"""
from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterable, Sequence
from functools import cached_property

from tokenizers import Tokenizer

from pipeline.config import ModelConfig
from pipeline.errors import QuartetError, StartError
from pipeline.exits import MODEL_LOAD
from pipeline.tokenizer_files import TokenizerFiles, dress, read
from tokenizer_proc.guard import Guard, Piece
from tokenizer_proc.messages import is_reserved
from tokenizer_proc.pairs import PairShape
from tokenizer_proc.template import ChatTemplate

LEAST_TOKEN_CHARS = 16               # characters that one token may stand for, at least (unknown words, dropped marks)
OUTPUT_CHARS = 8                     # characters that a template may add, per token of the context
PARTIAL_CHARS = 16 * 1024            # longer texts are first encoded in part, so that hopeless ones cost little
RESYNC = 64                          # tokens after which the cut in front of a truncated text no longer shows
log = logging.getLogger(__name__)


class TextModel:
    """Satisfies chat.ChatModel."""

    def __init__(self, config: ModelConfig) -> None:
        """StartError when the directory holds no tokenizer that can be read, or a template override that is none."""
        started = time.monotonic()
        files = read(config.tokenizer or config.path)
        try:
            self.tokenizer = Tokenizer.from_file(str(files.tokenizer_json))
            special = dress(self.tokenizer, files)
            vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        except Exception as error:              # the library raises bare Exception for whatever it cannot parse
            raise StartError(MODEL_LOAD, f"The tokenizer {files.tokenizer_json} cannot be read: "
                                         f"{str(error)[:200]}.") from None
        self.max_model_len = config.max_model_len
        self.num_ids = max(config.vocab_size, max(vocab.values(), default=-1) + 1)
        self.chars_per_token = max(LEAST_TOKEN_CHARS, max(map(len, vocab), default=0))
        self.max_prompt_chars = self.max_model_len * self.chars_per_token
        self.max_output_chars = self.max_model_len * OUTPUT_CHARS
        self.named_tokens = dict(files.named)
        self.guard = Guard([token for token, number in vocab.items() if number in special])
        self.before, self._after = self._specials(files)
        self.num_type_ids = config.num_type_ids
        self._sources = dict(files.templates)
        self._compiled: dict[str, ChatTemplate] = {}
        self.content_format = config.content_format
        self.template_defaults = dict(config.chat_template_kwargs)
        wrong = next((name for name in self.template_defaults if is_reserved(name)), None)
        if wrong is not None:
            raise StartError(MODEL_LOAD, f"--default-chat-template-kwargs must not set '{wrong}'.")
        if config.chat_template is not None:
            self._sources = {"default": config.chat_template}
            try:
                self.template()
            except QuartetError as error:
                raise StartError(MODEL_LOAD, f"The chat template given for {config.names[0]} cannot be used: "
                                             f"{error.message}") from None
        self._pair_source = config.pair_template
        log.info("tokenizer %s: %d ids, templates: %s, loaded in %.2f s", files.tokenizer_json, len(vocab),
                 ", ".join(self._sources) or "none", time.monotonic() - started)

    # ---- templates -----------------------------------------------------------------------------------------------

    def template(self, has_tools: bool = False, has_documents: bool = False) -> ChatTemplate:
        """The chat template: the variant for tools or documents where there is one. QuartetError for no template."""
        wanted = [name for name, asked in (("tool_use", has_tools), ("rag", has_documents)) if asked]
        name = next((n for n in (*wanted, "default") if n in self._sources), None)
        if name is None and len(self._sources) == 1:
            name = next(iter(self._sources))
        if name is None:
            raise QuartetError("invalid_request", "This model has no chat template: send a text in place of 'messages', or "
                               "start the server with --chat-template (chatml, for instance).", "messages")
        template = self._compiled.get(name)
        if template is None:
            template = self._compiled[name] = ChatTemplate(self._sources[name], content_format=self.content_format)
            self._tell_format(name, template)
        return template

    def _tell_format(self, name: str, template: ChatTemplate) -> None:
        if self.content_format == "auto":
            log.info("Detected the chat template content format to be '%s' (template %s). "
                     "You can set --chat-template-content-format to override this.", template.detected, name)
        elif self.content_format != template.detected:
            log.warning("The chat template %s looks as if it took contents as '%s'; --chat-template-content-format "
                        "says '%s'.", name, template.detected, self.content_format)

    @cached_property
    def pair_template(self) -> ChatTemplate:
        """What joins two texts into one chat; for a model that is configured to score so."""
        return ChatTemplate(self._pair_source, content_format="string")

    @property
    def specials(self) -> tuple[list[int], list[int]]:
        """Ids before and after a text."""
        return self.before, self._after

    @cached_property
    def pair(self) -> PairShape:
        """How two texts are joined."""
        return PairShape.of(self.tokenizer)

    # ---- encoding ------------------------------------------------------------------------------------------------

    def check_chars(self, chars: int) -> None:
        if chars > self.max_prompt_chars:
            raise self.too_long(-(-chars // self.chars_per_token), f"at least %d tokens ({chars} characters)")

    def too_long(self, tokens: int, amount: str = "%d tokens") -> QuartetError:
        return QuartetError(
            "context_length_exceeded", f"This model's maximum context length is {self.max_model_len} tokens. However, "
            f"your prompt has {amount % tokens}. Please reduce the length of the prompt.", "prompt")

    def encode(self, pieces: Iterable[Piece], add_special: bool, *, keep: int | None = None, keep_first: bool = False,
               unlimited: bool = False) -> array[int]:
        """Ids of a prompt; with `keep`, of as much of its end as gives that many, and perhaps more; with `keep_first`
        of its beginning.

        context_length_exceeded as soon as the text is known to be too long, unless `unlimited`; invalid_value for what
        no tokenizer takes.
        """
        ids = array("I", self.before if add_special else ())
        for text, plain in pieces:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise QuartetError("invalid_value", "The prompt holds an unpaired surrogate, which is no character.",
                                   "prompt") from None
            if plain:
                ids.extend(self._plain(text))
            elif unlimited:
                ids.extend(self._encode(text))
            else:
                ids.extend(self._whole(text) if keep is None else self._part(text, keep, keep_first))
        ids.extend(self._after if add_special else ())
        return ids

    def check_ids(self, ids: Sequence[int], param: str) -> None:
        """QuartetError for an id that the model does not have."""
        highest = max(ids, default=0)
        if highest >= self.num_ids:
            raise QuartetError("invalid_value", f"The token id {highest} is outside of the vocabulary "
                               f"(0 to {self.num_ids - 1}).", param)

    def _whole(self, text: str) -> list[int]:
        self.check_chars(len(text))
        size = max(PARTIAL_CHARS, self.max_model_len)
        while size < len(text):               # a part's tokens, less those at its end, are no more than the whole's
            count = len(self._encode(text[:size])) - RESYNC
            if count >= self.max_model_len:
                raise self.too_long(count, "more than %d tokens")
            size *= 4
        return self._encode(text)

    def _part(self, text: str, keep: int, first: bool) -> list[int]:
        """`keep` ids and more of the end of a text, or of its beginning, without encoding all of a long one."""
        size = max(PARTIAL_CHARS, 8 * keep)
        while size < len(text) and size < self.max_prompt_chars:
            ids = self._encode(text[:size] if first else text[-size:])
            if len(ids) >= keep + RESYNC:
                return ids
            size *= 4
        return self._encode(text[:self.max_prompt_chars] if first else text[-self.max_prompt_chars:])

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _plain(self, text: str) -> list[int]:
        """Ids of text none of which becomes a special token."""
        self.tokenizer.encode_special_tokens = True
        try:
            return self._encode(text)
        finally:
            self.tokenizer.encode_special_tokens = False

    def _specials(self, files: TokenizerFiles) -> tuple[list[int], list[int]]:
        """Ids before and after a text: the post-processor's, corrected by add_bos_token and add_eos_token."""
        encoding = self.tokenizer.encode("a", add_special_tokens=True)
        mask = [*encoding.special_tokens_mask, 0]
        lead = mask.index(0)
        trail = len(encoding.ids) - next((n for n, m in enumerate(mask[-2::-1]) if not m), 0)
        before, after = list(encoding.ids[:lead]), list(encoding.ids[max(trail, lead):])
        bos, eos = (self.tokenizer.token_to_id(files.named[name]) if name in files.named else None
                    for name in ("bos_token", "eos_token"))
        if bos is not None and files.add_bos is not None:
            before = [bos, *[i for i in before if i != bos]] if files.add_bos else [i for i in before if i != bos]
        if eos is not None and files.add_eos is not None:
            after = [*[i for i in after if i != eos], eos] if files.add_eos else [i for i in after if i != eos]
        return before, after

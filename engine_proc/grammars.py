"""Compiles grammars beside the engine's loop: one thread, a bounded cache, and what is ready for the loop to take.

Engine process, no torch. The loop hands over sequences and goes on; a request waits (held by the scheduler) until its
matcher is there, or fails alone. The tokenizer has checked each grammar before; the same limits hold here, because a
grammar may grow with the model's own vocabulary. `llguidance` releases the interpreter's lock while it compiles.
"""
from __future__ import annotations

import hashlib
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from engine_proc.constraint import Constraint, Vocabulary, failure
from engine_proc.request import Sequence
from pipeline import tokenizer_files
from pipeline.config import ModelConfig
from pipeline.errors import QuartetError, StartError
from pipeline.grammars import LIMITS
from pipeline.messages import unpack_ids

CACHE_ENTRIES = 256
CACHE_BYTES = 8 * 2**20          # of the cached grammars' texts; what they compile to is a small multiple of it
STACK_BYTES = 256 * 2**20        # address space; many times what the tokenizer's check had
log = logging.getLogger(__name__)


def load_vocabulary(model: ModelConfig, width: int) -> Vocabulary:
    """The vocabulary of `model`, whose logits are `width` wide. StartError when there is no tokenizer to be read."""
    from llguidance import LLTokenizer
    from tokenizers import Tokenizer
    files = tokenizer_files.read(model.tokenizer or model.path)
    tokenizer = Tokenizer.from_file(str(files.tokenizer_json))
    tokenizer_files.dress(tokenizer, files)
    size = max(width, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0))
    ends = [number for number in model.eos_ids if number < size]
    return Vocabulary(LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=ends or None))


class Grammars:
    """`load` is called once, by `prepare` or by the first request. With `threaded` False everything happens at once."""

    def __init__(self, load: Callable[[], Vocabulary], threaded: bool = True) -> None:
        self._load, self._threaded = load, threaded
        self._vocabulary: Vocabulary | QuartetError | None = None
        self._loading = threading.Lock()
        self._cache: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()     # digest -> pristine matcher, text's bytes
        self._cache_bytes = 0
        self._todo: queue.SimpleQueue[list[Sequence]] = queue.SimpleQueue()
        self._done: deque[tuple[list[Sequence], QuartetError | None]] = deque()
        self._thread: threading.Thread | None = None
        self.num_pending = 0                              # groups handed over and not taken back

    def prepare(self) -> None:
        """Load the vocabulary now. It holds the interpreter's lock for a while: best done before the loop turns."""
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._loaded()

    def submit(self, group: list[Sequence]) -> None:
        """Sequences of one request, to be given their constraints."""
        self.num_pending += 1
        if not self._threaded:
            self._work(group)
            return
        if self._thread is None:
            usual = threading.stack_size(STACK_BYTES)
            self._thread = threading.Thread(target=self._run, name="grammars", daemon=True)
            self._thread.start()
            threading.stack_size(usual)
        self._todo.put(group)

    @property
    def ready(self) -> bool:
        return bool(self._done)

    def take(self) -> list[tuple[list[Sequence], QuartetError | None]]:
        """The groups that are done since the last call, and what is wrong with each."""
        taken = []
        while self._done:
            taken.append(self._done.popleft())
        self.num_pending -= len(taken)
        return taken

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            self._work(self._todo.get())

    def _work(self, group: list[Sequence]) -> None:
        error: QuartetError | None = None
        try:
            self._constrain(group)
        except QuartetError as known:
            error = known
        except BaseException as unknown:                  # the library turns a panic into a BaseException
            log.error("a grammar failed: %s", type(unknown).__name__)
            error = QuartetError("internal_error", "The grammar of this request could not be compiled.")
        self._done.append((group, error))

    def _constrain(self, group: list[Sequence]) -> None:
        """Give each of `group` its constraint, advanced over its history."""
        group = [seq for seq in group if not seq.finish and not seq.mark]
        if not group:
            return
        self.prepare()
        vocabulary = self._vocabulary
        if isinstance(vocabulary, QuartetError):
            raise vocabulary
        assert vocabulary is not None
        grammar = group[0].sampling.grammar
        assert grammar is not None
        matcher = self._matcher(vocabulary, grammar.text, grammar.param)
        for seq in group:
            constraint = Constraint(vocabulary, matcher.deep_copy(), grammar.after, unpack_ids(grammar.after_ids),
                                    grammar.param)
            for token in seq.tokens[seq.num_prompt:]:
                constraint.advance(token)
            if constraint.error is not None:
                raise constraint.error
            seq.constraint = constraint

    def _matcher(self, vocabulary: Vocabulary, text: str, param: str) -> Any:
        """A matcher at its beginning, not to be changed."""
        from llguidance import LLMatcher, LLParserLimits
        key = hashlib.sha256(text.encode()).digest()
        found = self._cache.get(key)
        if found is not None:
            self._cache.move_to_end(key)
            return found[0]
        matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=LLParserLimits(**dict[str, Any](LIMITS)))
        if matcher.is_error():
            raise failure("The grammar of this request cannot be used with this model: "
                          + matcher.get_error().splitlines()[0][:200], param)
        self._cache[key] = matcher, len(text)
        self._cache_bytes += len(text)
        while len(self._cache) > CACHE_ENTRIES or self._cache_bytes > CACHE_BYTES:
            _, (_, size) = self._cache.popitem(last=False)
            self._cache_bytes -= size
        return matcher

    def _loaded(self) -> Vocabulary | QuartetError:
        try:
            return self._load()
        except StartError as error:
            reason = error.message
        except Exception as error:                        # a kind of tokenizer that the library does not know
            reason = type(error).__name__
        log.warning("answers cannot be constrained: %s", reason)
        return QuartetError("unsupported_parameter", "The tokenizer of this model cannot be used for structured outputs.",
                            "response_format")

"""One choice of one request: its decoder, its stop strings, and what was not yet sent to its frontend.

Run by the detokenizer; DetokWorker owns the choices. Output that waits is merged, so that its memory is bounded by
the text of the choice. Nothing here looks at a clock or at a socket.
"""
from __future__ import annotations

from array import array
from collections.abc import Sequence

from detok_proc.answer import Answer
from detok_proc.stops import Stops
from detok_proc.stream import open_text, whole_text
from detok_proc.vocab import Vocab
from pipeline.families.parts import append_span
from pipeline.ids import frontend_index
from pipeline.logprobs import cut_logprobs, join_logprobs
from pipeline.messages import TEXT_ROW, Finish, Logprobs, Open, Span, TextDelta, TokenOut, Usage, unpack_ids

REPEATED = "repetition_detected"        # the stop reason of Finish.REPETITION
ENDS = (Finish.EOS, Finish.STOP_ID)     # the last id is what ended the text, not part of it


class Gap(Exception):
    """Ids are missing between what the choice has and what arrived: a message of its engine was lost."""


class Choice:
    """`have` output ids were decoded and `chars` characters of their text released; `sent_*` of them left the stage."""

    __slots__ = (
        "rid", "frontend", "engine", "engine_epoch", "have", "chars", "sent_have", "sent_chars", "stopped", "waiting", "more",
        "finish", "_vocab", "_text", "_stops", "_min_tokens", "_include_stop", "_left", "_left_done", "_usage", "_texts",
        "_ids", "_stop", "_logprobs", "_prompt_text", "_prompt_logprobs", "_new_usage", "_answer", "_spans", "_simple")

    def __init__(self, opened: Open, vocab: Vocab, engine: int, engine_epoch: int) -> None:
        """Replays `opened.history` silently: the first delta follows what an undisturbed run would have sent."""
        spec, left, history = opened.spec, unpack_ids(opened.left), unpack_ids(opened.history)
        self.rid, self.frontend = opened.rid, frontend_index(opened.rid)
        self.engine, self.engine_epoch = engine, engine_epoch
        self.have = self.chars = 0
        self.stopped = False                  # by a stop string; the engine's closing record is still to come
        self.waiting = False                  # in the worker's list of choices with output
        self.more = True                      # something waits that is neither text nor ids
        self._vocab = vocab
        self._answer = Answer.open(spec, vocab, left)
        self._text = open_text(
            vocab, left, skip_special=spec.skip_special, spaces=spec.spaces_between_special or spec.skip_special,
            markers=self._answer.markers if self._answer is not None else frozenset())
        self._stops = Stops(spec.stop, spec.include_stop) if spec.stop else None
        self._simple = self._answer is None and self._stops is None
        self._min_tokens, self._include_stop = spec.min_tokens, spec.include_stop
        self._left, self._left_done = left, 0
        self._usage: Usage | None = None
        self._texts: list[str] = []
        self._spans: list[tuple[int, int]] = []
        self._ids = array("I")
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: list[Logprobs] = []
        self._prompt_text: str | None = None
        self._new_usage: Usage | None = None
        self.finish, self._stop = Finish.RUNNING, None  # type: int, str | int | None
        if history:
            self._replay(history)
        elif spec.echo:
            self._prompt_text = whole_text(vocab, left, skip_special=spec.skip_special and not spec.echo_special)
        self.sent_have, self.sent_chars = self.have, self.chars
        self.more = self._answer is not None or self._prompt_text is not None or self.stopped
        if self.stopped:
            self._say(self._last_words(""))

    def _replay(self, history: Sequence[int]) -> None:
        text, self.have = self._decode(history)
        self.chars = len(text)
        self._spans.clear()
        if self._cut:
            # The predecessor found the end of the text, but its last words were lost: say them again.
            self.finish, self.stopped = Finish.STOP_STRING, True
            self._stop = None if self._stops is None else self._stops.hit
            self._new_usage = Usage(0, 0, self.have)

    def push(self, start: int, number: int) -> bool:
        """Decode one id that came with nothing else, nearly always; False where it takes `apply`."""
        if start != self.have or not self._simple:
            return False
        self.have = start + 1
        self._ids.append(number)
        text = self._text.push(number)
        if text:
            self.chars += len(text)
            self._texts.append(text)
        return True

    def apply(self, out: TokenOut) -> int | None:
        """Decode what one step gave; the number of output tokens up to a stop string that this completed.

        Raises Gap when ids before these are missing. Ids that were seen before are skipped.
        """
        if out.start != self.have:
            out = self._rest(out)
        packed, finish, logprobs = out.ids, out.finish, out.logprobs
        numbers: Sequence[int] = (int.from_bytes(packed, "little"),) if len(packed) == 4 else unpack_ids(packed)
        if logprobs is not None:
            self._name(logprobs, numbers)
        if out.prompt_logprobs is not None:
            prompt = out.prompt_logprobs
            count = len(prompt.values) // 4
            self._name(prompt, self._left[self._left_done:self._left_done + count])
            self._left_done += count
            self._prompt_logprobs.append(prompt)
            self.more = True
        if out.usage is not None:
            self._usage = self._new_usage = out.usage
        if finish and finish in ENDS and not self._include_stop:
            text, count = self._decode(numbers[:-1])
        else:
            text, count = self._decode(numbers)
        if self._cut:
            packed, finish, self.stopped = packed[:4 * count], Finish.STOP_STRING, True
            self._stop = None if self._stops is None else self._stops.hit
            logprobs = None if logprobs is None else cut_logprobs(logprobs, 0, count)
            text += self._last_words("")
        else:
            count = len(numbers)
            if finish:
                text += self._last_words((self._stops.end() if self._stops is not None else "") + self._text.end())
                self._stop = (out.stop_id if finish == Finish.STOP_ID
                              else REPEATED if finish == Finish.REPETITION else None)
        self.have += count
        self.finish = finish
        self.more |= bool(finish) or logprobs is not None or self._new_usage is not None
        self._ids.frombytes(packed)
        self._say(text)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if not self.stopped:
            return None
        usage = self._usage or Usage(0, 0, 0)
        self._new_usage = Usage(usage.prompt_tokens, usage.cached_tokens, self.have)
        return self.have

    def put_into(self, rows: bytearray, ids: array[int], texts: list[str], chars: int) -> int:
        """Add the text and ids that wait to the rows of a message that has so many characters; how many it has then.

        Call `sent` when it was taken.
        """
        ids += self._ids
        texts += self._texts
        chars += self.chars - self.sent_chars
        rows += TEXT_ROW.pack(self.rid, self.sent_chars, self.sent_have, len(ids), chars)
        return chars

    def delta(self) -> TextDelta:
        """Everything that waits, as one delta: where there is `more`. Call `sent` when it was taken."""
        made = TextDelta(
            self.rid, self.sent_chars, "".join(self._texts), self.sent_have, self._ids.tobytes(), self.finish, self._stop,
            join_logprobs(self._logprobs) if self._logprobs else None, self._prompt_text,
            join_logprobs(self._prompt_logprobs) if self._prompt_logprobs else None, self._new_usage)
        if self._answer is not None:
            made.spans = [Span(kind, chars) for kind, chars in self._spans]
            made.reasoning_tokens, made.open_call = self._answer.reasoning_tokens, self._answer.in_call
        return made

    def sent(self) -> None:
        self.sent_have, self.sent_chars, self.waiting = self.have, self.chars, False
        self._texts.clear()
        del self._ids[:]
        if self.more:
            self.more = self._answer is not None or self.stopped
            self._spans.clear()
            self._logprobs.clear()
            self._prompt_logprobs.clear()
            self._prompt_text = self._new_usage = None

    @property
    def size(self) -> int:
        """About how many bytes `delta` takes on the wire."""
        size = 100 + 2 * (self.chars - self.sent_chars) + 4 * (self.have - self.sent_have)
        if self._logprobs or self._prompt_logprobs:
            size += sum([len(part.values) * (8 + 4 * part.k) for part in (*self._logprobs, *self._prompt_logprobs)])
        return size

    def assert_invariants(self) -> None:
        assert 0 <= self.sent_chars <= self.chars and 0 <= self.sent_have <= self.have
        assert sum(map(len, self._texts)) == self.chars - self.sent_chars
        assert self._answer is None or sum(n for _, n in self._spans) == self.chars - self.sent_chars
        assert len(self._ids) == self.have - self.sent_have
        assert not self.stopped or self.finish == Finish.STOP_STRING
        assert self.more or not (self.finish or self._answer or self._logprobs or self._prompt_logprobs or self._new_usage
                                 or self._prompt_text)

    def _decode(self, numbers: Sequence[int]) -> tuple[str, int]:
        """(text released by the next ids, how many of the ids were used: fewer than all where the text is cut)."""
        if self._answer is not None:
            return self._decode_answer(self._answer, numbers)
        if self._stops is None:
            return (self._text.push(numbers[0]) if len(numbers) == 1 else self._text.push_all(numbers)), len(numbers)
        parts, push, stops = [], self._text.push, self._stops
        for count, number in enumerate(numbers, 1):
            piece = push(number)
            if piece:
                parts.append(stops.push(piece, self.have + count > self._min_tokens))
                if stops.hit is not None:
                    return "".join(parts), count
        return "".join(parts), len(numbers)

    def _decode_answer(self, answer: Answer, numbers: Sequence[int]) -> tuple[str, int]:
        """The same, with stop strings looked for in what the model wrote, and the parser behind them."""
        push, stops, used = self._text.push, self._stops, len(numbers)
        for count, number in enumerate(numbers, 1):
            piece = push(number)
            if stops is not None and piece:
                piece = stops.push(piece, self.have + count > self._min_tokens)
            answer.push(piece)
            if self._cut:
                used = count
                break
        return self._taken(answer), used

    @property
    def _cut(self) -> bool:
        """A stop string, or a parser that has all it may take, has ended the text."""
        return (self._stops is not None and self._stops.hit is not None) or (
            self._answer is not None and self._answer.done)

    def _last_words(self, text: str) -> str:
        """What is released when no text follows `text`."""
        if self._answer is None:
            return text
        self._answer.end(text)
        return self._taken(self._answer)

    def _taken(self, answer: Answer) -> str:
        text, spans = answer.take()
        for kind, chars in spans:
            append_span(self._spans, kind, chars)
        return text

    def _say(self, text: str) -> None:
        if text:
            self.chars += len(text)
            self._texts.append(text)

    def _rest(self, out: TokenOut) -> TokenOut:
        """`out` without the ids that the choice already has."""
        if out.start > self.have:
            raise Gap
        seen = min(self.have - out.start, len(out.ids) // 4)
        logprobs = None if out.logprobs is None else cut_logprobs(out.logprobs, seen, len(out.ids) // 4)
        return TokenOut(out.rid, self.have, out.ids[4 * seen:], out.finish, out.stop_id, logprobs, None, out.usage)

    def _name(self, logprobs: Logprobs, numbers: Sequence[int]) -> None:
        """Fill in the bytes of the tokens."""
        piece = self._vocab.piece
        logprobs.tokens = [piece(number) for number in numbers]
        logprobs.top_tokens = [piece(number) for number in unpack_ids(logprobs.top_ids)]

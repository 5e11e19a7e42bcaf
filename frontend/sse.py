"""Streamed answers as server-sent events, formatted by hand: constant parts are serialised once per stream.

Chunks have OpenAI's exact form: `choices` always there, `delta.content` always there, the first chunk of a chat choice
has the role and no text, the last one has the finish reason and no text; `usage: null` before the usage chunk only
where usage was asked for; `[DONE]` only after a complete answer. Run by the frontend; no input or output here.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from frontend import logprobs
from frontend.answers import shown_prompt_logprobs
from frontend.collector import Update
from frontend.params import Ask
from frontend.request import Choice, Request
from frontend.turn import Turn
from frontend.wire import dump_ascii, finish_reason, prompt_ids, prompt_logprobs, quote, usage, usage_of
from pipeline.messages import Logprobs

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


News = TypeVar("News", contravariant=True)


class Events(Protocol[News]):
    """What a stream sends."""

    def events(self, updates: Sequence[News]) -> bytes:
        """The events for these updates; empty where there is nothing to show yet."""

    def end(self) -> bytes:
        """What follows the last chunk of a complete answer."""


class _Stream:
    """What both kinds of stream have in common."""

    TEXT = BEHIND = ""                       # of a chunk in the middle of a choice: what is ahead of its text and behind it

    def __init__(self, kind: str, ask: Ask, request: Request, identity: dict[str, Any]) -> None:
        self._ask, self._request = ask, request
        head = {"id": identity["id"], "object": kind, "created": identity["created"], "model": ask.model,
                "system_fingerprint": identity["system_fingerprint"]}
        self._prefix = "data: " + dump_ascii(head)[:-1]
        self._begun: set[int] = set()
        self._completion_tokens = [0] * len(request.choices)
        self._reasoning_tokens = [0] * len(request.choices)
        # Whether a chunk in the middle of a choice is its text between two constants (`_open`, `_close`).
        self._bare = ask.logprobs is None and not (ask.token_ids or ask.prompt_logprobs or ask.continuous_usage)
        self._tail: Callable[[Choice], str] = self._plain_tail
        if ask.continuous_usage:
            self._tail = self._usage_tail
        elif ask.include_usage:
            self._tail = self._null_tail
        first = request.choices[0]
        self._open = [f'{self._prefix},"choices":[{{"index":{c.index},{self.TEXT}' for c in request.choices]
        self._close = f'{self.BEHIND}{self._tail(first)}' if self._bare else ""

    def end(self) -> bytes:
        if not self._ask.include_usage:
            return DONE
        return f'{self._prefix},"choices":[],"usage":{dump_ascii(usage_of(self._request))}}}\n\n'.encode() + DONE

    def _plain_tail(self, choice: Choice) -> str:
        return "}\n\n"

    def _null_tail(self, choice: Choice) -> str:
        return ',"usage":null}\n\n'

    def _usage_tail(self, choice: Choice) -> str:
        prompt = choice.prompt
        reasoning = self._reasoning_tokens[choice.index] if self._request.reasoning_tokens is not None else None
        now = usage(prompt.prompt_tokens, self._completion_tokens[choice.index], prompt.cached_tokens, reasoning)
        return f',"usage":{dump_ascii(now)}}}\n\n'

    def _first(self, update: Update) -> bool:
        first = update.index not in self._begun
        self._begun.add(update.index)
        return first

    def _middle(self, update: Update) -> str | None:
        """The chunk of an update that is text and nothing else, "" where there is no text; None of any other update."""
        if (not self._bare or update.finish or update.spans or update.logprobs is not None
                or update.index not in self._begun):
            return None
        return f'{self._open[update.index]}{quote(update.text)}{self._close}' if update.text else ""

    def _shows(self, update: Update) -> bool:
        """Whether an update without text is worth a chunk."""
        return bool(update.ids) and (self._ask.token_ids or update.logprobs is not None)


class ChatStream(_Stream):
    """Chunks of a chat completion."""

    TEXT, BEHIND = '"delta":{"content":', '},"logprobs":null,"finish_reason":null}]'

    def __init__(self, ask: Ask, request: Request, identity: dict[str, Any]) -> None:
        super().__init__("chat.completion.chunk", ask, request, identity)
        self._role_name = dump_ascii(ask.role)
        self._turns = [Turn(ask, choice.index) for choice in request.choices]

    def events(self, updates: Sequence[Update]) -> bytes:
        parts: list[str] = []
        for update in updates:
            middle = self._middle(update)
            if middle is not None:
                parts.append(middle)
                continue
            choice = self._request.choices[update.index]
            if self._first(update):
                parts.append(self._role(choice))
                if self._ask.echo:
                    parts.append(self._chunk(choice, f'{{"content":{quote(self._ask.echo)}}}', "null", ""))
            self._completion_tokens[update.index] = update.completion_tokens
            self._reasoning_tokens[update.index] = update.reasoning_tokens
            parts.extend(self._deltas(choice, update))
            if update.finish:
                parts.append(self._last(choice, update))
        return "".join(parts).encode()

    def _role(self, choice: Choice) -> str:
        prompt = choice.prompt
        ids = f',"prompt_token_ids":{dump_ascii(prompt_ids(prompt))}' if self._ask.token_ids else ""
        if self._ask.prompt_text:
            ids += f',"prompt_text":{dump_ascii(prompt.echo)}'
        if self._ask.prompt_logprobs:
            ids += f',"prompt_logprobs":{dump_ascii(shown_prompt_logprobs(self._ask, prompt))}'
        return (f'{self._prefix},"choices":[{{"index":{choice.index},"delta":{{"role":{self._role_name},"content":""}},'
                f'"logprobs":null,"finish_reason":null}}]{ids}{self._tail(choice)}')

    def _deltas(self, choice: Choice, update: Update) -> Iterator[str]:
        """A chunk for each piece of the update; what is told of its tokens rides with the first."""
        turn, found, ids = self._turns[update.index], "null", ""
        deltas = turn.deltas(update)
        numbers, told = turn.tokens(update)
        if self._ask.logprobs is not None and told is not None and numbers:
            content = logprobs.chat_content(told, numbers, self._ask.tokens_as_ids)
            found = dump_ascii({"content": content, "refusal": None})
        if self._ask.token_ids:
            ids = f',"token_ids":{dump_ascii(list(numbers))}'
        if not deltas and numbers and (ids or told is not None):
            deltas = ['{"content":""}']
        for delta in deltas:
            yield self._chunk(choice, delta, found, ids)
            found, ids = "null", ids and ',"token_ids":[]'

    def _chunk(self, choice: Choice, delta: str, found: str, ids: str) -> str:
        return (f'{self._prefix},"choices":[{{"index":{choice.index},"delta":{delta},'
                f'"logprobs":{found},"finish_reason":null{ids}}}]{self._tail(choice)}')

    def _last(self, choice: Choice, update: Update) -> str:
        return (f'{self._prefix},"choices":[{{"index":{choice.index},"delta":{{"content":""}},"logprobs":null,'
                f'"finish_reason":"{self._turns[update.index].reason(update)}","stop_reason":{dump_ascii(update.stop)}}}]'
                f'{self._tail(choice)}')


class CompletionStream(_Stream):
    """Chunks of a text completion."""

    TEXT, BEHIND = '"text":', ',"logprobs":null,"finish_reason":null,"stop_reason":null}]'

    def __init__(self, ask: Ask, request: Request, identity: dict[str, Any]) -> None:
        super().__init__("text_completion", ask, request, identity)
        self._logprobs = [logprobs.CompletionLogprobs(ask.tokens_as_ids) for _ in request.choices]

    def events(self, updates: Sequence[Update]) -> bytes:
        parts = []
        for update in updates:
            middle = self._middle(update)
            if middle is not None:
                parts.append(middle)
                continue
            choice, first = self._request.choices[update.index], self._first(update)
            self._completion_tokens[update.index] = update.completion_tokens
            if update.text or update.finish or self._shows(update) or (first and choice.prompt.echo):
                parts.append(self._chunk(choice, update, first))
            elif first:
                self._begun.discard(update.index)
        return "".join(parts).encode()

    def _chunk(self, choice: Choice, update: Update, first: bool) -> str:
        ask, prompt = self._ask, choice.prompt
        found, ids, text = "null", "", update.text
        pieces: list[tuple[Logprobs, Sequence[int]]] = []
        if first and prompt.echo is not None:
            text = prompt.echo + text
            told = prompt_logprobs(prompt)
            if told is not None:
                pieces.append(told)
        if update.logprobs is not None:
            pieces.append((update.logprobs, update.ids))
        if ask.logprobs is not None and pieces:
            found = dump_ascii(self._logprobs[choice.index].piece(pieces))
        if ask.token_ids:
            ids = f',"token_ids":{dump_ascii(list(update.ids))}'
            if first:
                ids = f',"prompt_token_ids":{dump_ascii(prompt_ids(prompt))}' + ids
        if ask.prompt_logprobs and first:
            ids += f',"prompt_logprobs":{dump_ascii(shown_prompt_logprobs(ask, prompt))}'
        reason = finish_reason(update.finish)
        return (f'{self._prefix},"choices":[{{"index":{choice.index},"text":{quote(text)},"logprobs":{found},'
                f'"finish_reason":{dump_ascii(reason)},"stop_reason":{dump_ascii(update.stop)}{ids}}}]'
                f'{self._tail(choice)}')

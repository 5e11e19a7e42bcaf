"""What one update of a chat choice shows: content, reasoning and tool calls, in OpenAI's form.

The same spans make the deltas of a stream and the message of a plain answer, so that both say the same. Run by the
frontend; no input or output here.
"""
from __future__ import annotations

from array import array
from typing import Any

from frontend.collector import Update
from frontend.params import Ask
from frontend.wire import finish_reason, quote
from pipeline.families.parts import Part, cut
from pipeline.logprobs import cut_logprobs
from pipeline.messages import Finish, Logprobs


class Turn:
    """One choice of a chat answer, update by update."""

    __slots__ = ("_ask", "_index", "num_calls")

    def __init__(self, ask: Ask, index: int) -> None:
        self._ask, self._index = ask, index
        self.num_calls = 0

    def deltas(self, update: Update) -> list[str]:
        """The JSON of the deltas that an update's text makes."""
        return [self._delta(kind, text) for kind, text in self._pieces(update)]

    def _pieces(self, update: Update) -> list[tuple[int, str]]:
        if not update.spans:
            return [(Part.CONTENT, update.text)] if update.text else []
        return [piece for piece in cut(update.text, update.spans)
                if piece[0] != Part.REASONING or self._ask.include_reasoning]

    def _delta(self, kind: int, text: str) -> str:
        if kind == Part.CONTENT:
            return f'{{"content":{quote(text)}}}'
        if kind == Part.REASONING:
            return f'{{"content":null,"reasoning":{quote(text)},"reasoning_content":{quote(text)}}}'
        if kind == Part.CALL:
            identity = quote(self._id(text))
            call = f'"id":{identity},"type":"function","function":{{"name":{quote(text)},"arguments":""}}'
        else:
            call = f'"function":{{"arguments":{quote(text)}}}'
        return f'{{"content":null,"tool_calls":[{{"index":{self.num_calls - 1},{call}}}]}}'

    def message(self, update: Update) -> dict[str, Any]:
        """The message that the one update of a plain answer makes."""
        content, reasoning, calls = [self._ask.echo], "", list[dict[str, Any]]()
        for kind, text in self._pieces(update):
            if kind == Part.CONTENT:
                content.append(text)
            elif kind == Part.REASONING:
                reasoning += text
            elif kind == Part.CALL:
                calls.append({"id": self._id(text), "type": "function", "function": {"name": text, "arguments": ""}})
            else:
                calls[-1]["function"]["arguments"] += text
        joined = "".join(content)
        message: dict[str, Any] = {
            "role": self._ask.role, "content": None if calls and not joined else joined, "refusal": None}
        if reasoning:
            message["reasoning"] = message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def reason(self, update: Update) -> str | None:
        """The finish reason: tool_calls where there are any, unless the last one was cut off by a limit."""
        if self.num_calls and update.finish and not (update.finish == Finish.LENGTH and update.open_call):
            return "tool_calls"
        return finish_reason(update.finish)

    def tokens(self, update: Update) -> tuple[array[int], Logprobs | None]:
        """The ids and log-probabilities to show: without those of reasoning that is not shown."""
        if self._ask.include_reasoning or not update.reasoning_tokens:
            return update.ids, update.logprobs
        start = update.completion_tokens - len(update.ids)
        hidden = min(len(update.ids), max(0, update.reasoning_tokens - start))
        return update.ids[hidden:], None if update.logprobs is None else cut_logprobs(update.logprobs, hidden)

    def _id(self, name: str) -> str:
        self.num_calls += 1
        return self._ask.call_ids.of(self._index, self.num_calls - 1, name)

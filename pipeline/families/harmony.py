"""OpenAI's harmony format (gpt-oss): a message per channel, each with a header of control tokens.

    <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
    <|constrain|>json<|message|>ARGUMENTS<|call|>        <|channel|>final<|message|>CONTENT<|return|>

Run by the detokenizer. The prompt ends with ``<|start|>assistant``, so that an answer begins within a header.
"""
from __future__ import annotations

from pipeline.families.calls import CallParser, Signatures, is_name
from pipeline.families.parts import Part, Parts
from pipeline.families.reader import SPACE, Malformed, Steps

CHANNEL, MESSAGE, START, END, CALL, RETURN, CONSTRAIN = (
    f"<|{word}|>" for word in ("channel", "message", "start", "end", "call", "return", "constrain"))
TOKENS = (CHANNEL, MESSAGE, START, END, CALL, RETURN, CONSTRAIN)
MAX_HEADER = 400                             # characters; longer ones are no headers
_ENDS = (END, CALL, RETURN, START, CHANNEL)


class Harmony(CallParser):
    """analysis: reasoning; a recipient functions.NAME: a call; everything else: content."""

    def __init__(self, parts: Parts, signatures: Signatures, max_calls: int = 0, tools: bool = True,
                 reasoning: bool = True) -> None:
        """`tools` False: calls are content; `reasoning` False: so is the analysis."""
        self._tools, self._reasoning = tools, reasoning
        self.thinking = False
        super().__init__(parts, signatures, max_calls)

    def message(self) -> Steps[None]:
        reader, before = self.reader, ""
        while (yield from reader.more()):
            reader.mark(before)
            try:
                header = yield from self._header(before)
            except Malformed:
                self.content(reader.give_back())
                end = yield from reader.until(_ENDS, self.content)
            else:
                reader.forget()
                end = yield from self._body(header)
            before = end if end in (START, CHANNEL) else ""

    def _header(self, before: str) -> Steps[str]:
        """The text of a header up to its ``<|message|>``, which is read. `before`: what of it was read already."""
        reader, header = self.reader, before
        while not header.endswith(MESSAGE):
            char = yield from reader.peek()
            if not char and (before or CHANNEL in header or START in header):
                reader.forget()              # the answer was cut within a header: nothing of it is content
                return ""
            if not char or len(header) == MAX_HEADER:
                raise Malformed
            header += char
            reader.pos += 1
        return header.removesuffix(MESSAGE)

    def _body(self, header: str) -> Steps[str]:
        """Read a message; the token that ends it."""
        channel = _word_after(header, CHANNEL)
        recipient = _word_after(header, "to=")
        reader = self.reader
        if recipient.startswith("functions.") and is_name(recipient[10:]) and self._tools:
            return (yield from self._call(recipient[10:]))
        if channel == "analysis" and self._reasoning:
            self.thinking = True
            end = yield from reader.until(_ENDS, lambda text: self.parts.add(Part.REASONING, text))
            self.thinking = False
            return end
        return (yield from reader.until(_ENDS, self.content))

    def _call(self, name: str) -> Steps[str]:
        self.announce(name)
        yield from self.reader.skip()
        if (yield from self.reader.peek()) == "<":
            self.arguments("{}")
        end = yield from self.reader.until(_ENDS, self.arguments)
        if end:
            self.close()
        return end


def _word_after(header: str, mark: str) -> str:
    """The word that follows `mark` in a header."""
    _, found, rest = header.partition(mark)
    for end, char in enumerate(rest if found else ""):
        if char in SPACE or char == "<":
            return rest[:end]
    return rest if found else ""

"""The rows of step outputs and deltas as the records that they stand for, and back, so that tests see one kind of thing."""
from __future__ import annotations

from pipeline.messages import TEXT_ROW, TOKEN_ROW, Deltas, StepOut, TextDelta, TokenOut, pack_ids, unpack_ids


def tokens(message: StepOut) -> list[TokenOut]:
    """All that a step gave, in the order in which it counts."""
    return [*(TokenOut(rid, start, pack_ids([number])) for rid, start, number in TOKEN_ROW.iter_unpack(message.rows)),
            *message.items]


def step(message: StepOut) -> StepOut:
    """`message` as an engine would send it: what can be a row is one."""
    rows, items = b"", []
    for out in message.items:
        if len(out.ids) == 4 and out == TokenOut(out.rid, out.start, out.ids):
            rows += TOKEN_ROW.pack(out.rid, out.start, *unpack_ids(out.ids))
        else:
            items.append(out)
    message.rows, message.items = rows, items
    return message


def deltas(message: Deltas) -> list[TextDelta]:
    """All deltas of a message."""
    found, ids, text = list[TextDelta](), unpack_ids(message.ids), message.text
    at = char = 0
    for rid, offset, start, ids_end, text_end in TEXT_ROW.iter_unpack(message.rows):
        found.append(TextDelta(rid, offset, text[char:text_end], start, pack_ids(ids[at:ids_end])))
        at, char = ids_end, text_end
    assert (at, char) == (len(ids), len(text))
    return found + message.items


def texts(message: Deltas) -> Deltas:
    """`message` as a detokenizer would send it: what can be a row is one."""
    items = []
    for delta in message.items:
        if len(delta.ids) % 4 == 0 and delta == TextDelta(delta.rid, delta.offset, delta.text, delta.start, delta.ids):
            message.ids += delta.ids
            message.text += delta.text
            message.rows += TEXT_ROW.pack(delta.rid, delta.offset, delta.start, len(message.ids) // 4, len(message.text))
        else:
            items.append(delta)
    message.items = items
    return message

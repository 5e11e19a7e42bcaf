"""Two texts that a model scores as one chat, through a template, as Qwen3-Reranker does: ids of the whole.

Run by the tokenizer. What users wrote never becomes a control token, and truncation never cuts the template's own text.
"""
from __future__ import annotations

from pipeline.errors import QuartetError
from pipeline.messages import PoolInput, PoolText, pack_ids
from tokenizer_proc.chat import render_pair
from tokenizer_proc.load import TextModel
from tokenizer_proc.pool_errors import renamed, too_long


def joined(text: PoolText, model: TextModel, limit: int, cuts: bool, left: bool) -> PoolInput:
    """`cuts`: what is beyond `limit` tokens is cut out of the second text, its beginning where `left`; else an error."""
    assert text.chat is not None and text.text is not None and text.pair is not None
    try:
        first, second = _shortened(model, text.text, text.keep), _shortened(model, text.pair, text.keep_pair)
        room = model.max_prompt_chars
        if cuts:
            first, second = first[:room], second[-room:] if left else second[:room]
        else:
            model.check_chars(len(first) + len(second))
        front, back = render_pair(model, text.chat.kwargs_json, first, second)
        ids, rest = (list(model.encode(pieces, False, unlimited=True)) for pieces in (front, back))
        over = len(ids) + len(rest) - limit
        if over > 0:
            size = len(model.encode([(second, True)], False, unlimited=True))
            if not cuts or over > size:
                raise too_long(text.index, len(ids) + len(rest), limit)
            start = len(ids) - size                      # of the second text, which is the end of `ids`
            ids = ids[:start] + ids[start + over:] if left else ids[:-over]
    except QuartetError as error:
        raise renamed(error, text.index) from None
    return PoolInput(text.index, pack_ids([*ids, *rest]))


def _shortened(model: TextModel, text: str, keep: int) -> str:
    """As much of a text as its first `keep` tokens stand for; 0: all of it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise QuartetError("invalid_value", "The prompt holds an unpaired surrogate, which is no character.") from None
    if not keep:
        return text
    offsets = model.tokenizer.encode(text[:keep * model.chars_per_token], add_special_tokens=False).offsets
    return text if len(offsets) <= keep else text[:offsets[keep - 1][1]]

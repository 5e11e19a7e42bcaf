"""Fill-in-the-middle: a text before and a text after the answer, in the form that a code model was trained on.

Which form is a matter of the tokens that the model's tokenizer has; without any, `suffix` is refused. Run by the
tokenizer.
"""
from __future__ import annotations

from array import array

from pipeline.errors import QuartetError
from tokenizer_proc.load import TextModel

PREFIX, SUFFIX = object(), object()
# Marks and texts in the order in which a prompt has them; what is generated next is the middle.
FORMS: tuple[tuple[object, ...], ...] = (
    ("<|fim_prefix|>", PREFIX, "<|fim_suffix|>", SUFFIX, "<|fim_middle|>"),     # Qwen2.5-Coder, CodeGemma, Granite 4
    ("<fim_prefix>", PREFIX, "<fim_suffix>", SUFFIX, "<fim_middle>"),           # StarCoder, StableCode, Granite
    ("<fim-prefix>", PREFIX, "<fim-suffix>", SUFFIX, "<fim-middle>"),           # SantaCoder
    ("<\uff5cfim\u2581begin\uff5c>", PREFIX, "<\uff5cfim\u2581hole\uff5c>", SUFFIX,
     "<\uff5cfim\u2581end\uff5c>"),                                             # DeepSeek-Coder
    ("\u2581<PRE>", PREFIX, "\u2581<SUF>", SUFFIX, "\u2581<MID>"),              # CodeLlama
    ("[SUFFIX]", SUFFIX, "[PREFIX]", PREFIX),                                   # Codestral
)


def between(model: TextModel, prefix: str, suffix: str, add_special: bool) -> array[int]:
    """Prompt ids that ask for what stands between the two texts; unsupported_parameter for other models, unless nothing
    has to follow."""
    for form in FORMS:
        known = {part: model.tokenizer.token_to_id(part) for part in form if isinstance(part, str)}
        marks = {part: number for part, number in known.items() if number is not None}
        if len(marks) < len(known):
            continue
        ids = array("I", model.before if add_special else ())
        for part in form:
            if isinstance(part, str):
                ids.append(marks[part])
            else:
                ids.extend(model.encode([(prefix if part is PREFIX else suffix, False)], False))
        return ids
    if not suffix:
        return model.encode([(prefix, False)], add_special)
    raise QuartetError("unsupported_parameter", "The parameter 'suffix' needs a model that was trained to fill in the "
                       "middle: the tokenizer of this one has no tokens for it.", "suffix")

"""What a caller is told about an input that cannot be served. Inputs are called ``input[i]`` here; run by the tokenizer."""
from __future__ import annotations

from pipeline.errors import QuartetError


def too_long(index: int, count: int, limit: int) -> QuartetError:
    return QuartetError(
        "context_length_exceeded", f"This model takes inputs of at most {limit} tokens, but 'input[{index}]' "
        f"has {count}. Shorten it, or set 'truncate_prompt_tokens' to -1.", f"input[{index}]")


def invalid_input(index: int, what: str) -> QuartetError:
    return QuartetError("invalid_value", f"'input[{index}]' {what}.", f"input[{index}]")


def renamed(error: QuartetError, index: int) -> QuartetError:
    """The error of a prompt as that of an input."""
    return QuartetError(error.code, error.message.replace("your prompt", f"'input[{index}]'").replace(
        "the prompt", f"'input[{index}]'").replace("The prompt", f"'input[{index}]'"), f"input[{index}]")

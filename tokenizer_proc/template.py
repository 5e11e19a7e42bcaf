"""One chat template: compiled once, asked how it wants message contents, rendered under limits of time and size.

Run by the tokenizer. A template comes with a model or from its operator, and with an option from a request, so that it
is somebody else's program: whatever it does ends as a 400 for its own request.
"""
from __future__ import annotations

import logging
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from pipeline.errors import QuartetError
from tokenizer_proc.analysis import wants_argument_text, wants_parts
from tokenizer_proc.dialect import TemplateRaised
from tokenizer_proc.limits import DeadlinePassed, TooLarge, weigh, within
from tokenizer_proc.sandbox import VALUE_LIMIT, BoundedEnvironment

RENDER_S = 2.0
SLACK = 64 * 1024                    # characters that a template may add whatever its messages
MAX_TEMPLATE = 2**20
MAX_INPUT = 64 * 2**20
log = logging.getLogger(__name__)


def failed(message: str) -> QuartetError:
    return QuartetError("invalid_request", message, "messages")


class ChatTemplate:
    """`wants_parts`: message contents are lists of parts ("openai" format), not plain strings.

    `detected`: the format that the template's text suggests, openai or string. `wants_argument_text`: arguments of tool
    calls are JSON text, not objects.
    """

    __slots__ = ("source", "detected", "wants_parts", "wants_argument_text", "_environment", "_template", "_seconds")

    def __init__(self, source: str, seconds: float = RENDER_S, content_format: str = "auto") -> None:
        """QuartetError when the text is no template. `content_format`: string or openai, or auto to find out."""
        if len(source) > MAX_TEMPLATE:
            raise failed(f"The chat template is longer than {MAX_TEMPLATE} characters.")
        self.source, self._seconds = source, seconds
        self._environment = BoundedEnvironment()
        try:
            tree = self._environment.parse(source)
            self.detected = "openai" if wants_parts(tree) else "string"
            self.wants_parts = (self.detected if content_format == "auto" else content_format) == "openai"
            self.wants_argument_text = wants_argument_text(tree)
            self._template = within(seconds, lambda: self._environment.from_string(source))
        except TemplateSyntaxError as error:
            raise failed(f"The chat template has a syntax error in line {error.lineno}.") from None
        except DeadlinePassed:
            raise failed("The chat template takes too long to compile.") from None
        except (Exception, RecursionError) as error:
            log.warning("a chat template does not compile: %s", type(error).__name__)
            raise failed("The chat template cannot be compiled.") from None

    def mentions(self, word: str) -> bool:
        return word in self.source

    def render(self, variables: dict[str, Any], max_chars: int) -> str:
        """The text, at most `max_chars` + SLACK + twice the characters of the variables long."""
        try:
            size = weigh(variables, MAX_INPUT)
            self._environment.limit = max(VALUE_LIMIT, 4 * size)
            return within(self._seconds, lambda: self._collect(variables, max_chars + SLACK + 2 * size))
        except TemplateRaised as error:
            raise failed(str(error.message) or "The chat template refuses these messages.") from None
        except DeadlinePassed:
            raise failed(f"The chat template took longer than {self._seconds:g} s.") from None
        except TooLarge:
            raise failed("The chat template makes more text than it may.") from None
        except Exception as error:               # whatever Python can raise, from TypeError to RecursionError
            log.info("a chat template failed: %s", type(error).__name__)
            raise failed("The chat template of this model cannot render these messages.") from None

    def _collect(self, variables: dict[str, Any], limit: int) -> str:
        parts, size = [], 0
        for part in self._template.root_render_func(self._template.new_context(variables)):
            size += len(part)
            if size > limit:
                raise TooLarge
            parts.append(part)
        return "".join(parts)

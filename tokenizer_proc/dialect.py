"""What chat templates may use beyond plain Jinja: their globals, the generation tag, and code that weighs values.

Run by the tokenizer, inside sandbox.BoundedEnvironment only.
"""
from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.utils import Namespace

from tokenizer_proc.limits import TooLarge

MAX_TIME_FORMAT = 100
MAX_MESSAGE = 300


class TemplateRaised(TemplateError):
    """The template called raise_exception: its message is meant for the user."""


def raise_exception(message: object = "") -> None:
    raise TemplateRaised(str(message)[:MAX_MESSAGE])


def strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_TIME_FORMAT:
        raise TooLarge
    return datetime.now().strftime(pattern)


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """The global `dict`, without the attributes of a class."""
    return dict(*args, **kwargs)


class TemplateNamespace(Namespace):
    """`namespace()` that keeps no private names and prints as nothing else."""

    def __init__(*args: Any, **kwargs: Any) -> None:          # `self` is a name that a template may set
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError("a namespace keeps no private names")


class GenerationTag(Extension):
    """``{% generation %}...{% endgeneration %}``, which marks an assistant's text for training, is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedCodeGenerator(CodeGenerator):
    """Weighs literals and `~` at run time."""

    def _bounded(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.bound(")
        visit(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._bounded(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._bounded(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._bounded(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_values((")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write("))")

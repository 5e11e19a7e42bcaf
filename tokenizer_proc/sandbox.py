"""The Jinja environment in which chat templates run: no reach beyond their data, no value beyond a size.

Run by the tokenizer. Built on jinja2's immutable sandbox, which guards attributes; this adds what it leaves open. Every
string and container that a template can make is weighed where it is made (literals, concatenation, captured blocks,
arithmetic, methods, filters), so that each single operation is short and a deadline can interrupt what lies between.
Only the filters and methods that are listed here exist. There is no loader: nothing can be included.
"""
from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable
from string import Formatter
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.ext import LoopControlExtension
from jinja2.filters import FILTERS
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import pass_environment

from tokenizer_proc.dialect import (
    BoundedCodeGenerator,
    GenerationTag,
    TemplateNamespace,
    make_dict,
    raise_exception,
    strftime_now,
)
from tokenizer_proc.guard import MARKS
from tokenizer_proc.limits import ELEMENT, TooLarge, gathered, weigh

VALUE_LIMIT = 4 * 2**20              # characters of one value; more where the messages themselves are larger
SPLIT_FACTOR = 4                     # a list of words weighs more than the text that it was
MAX_WIDTH = 1000                     # of padding, indentation and format fields
MAX_BITS = 4096                      # of an integer
MAX_PRECISION = 20

_PLAIN_METHODS: dict[type, frozenset[str]] = {
    str: frozenset((
        "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower "
        "isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper "
        "center expandtabs join ljust replace rjust zfill format format_map").split()),
    list: frozenset(("count", "index")), tuple: frozenset(("count", "index")),
    dict: frozenset(("get", "items", "keys", "values")), range: frozenset(("count", "index")),
    bytes: frozenset(), int: frozenset(), float: frozenset(("is_integer",)),
}
# Filters whose result is about as large as their input; those that can multiply it are defined below.
_PLAIN_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "striptags", "title", "trim", "truncate", "unique", "upper", "urlencode",
    "wordcount")
_LAZY = {"map", "select", "selectattr", "reject", "rejectattr", "default", "d", "first", "last", "length", "count"}
_FIELD = re.compile(r"%(?:\([^)]*\))?[-+ #0]*(\*|\d+)?(?:\.(\*|\d+))?")


# What ensure_ascii escapes: not the characters that stand for guard's marks, which must stay single.
_NOT_ASCII = re.compile(f"[^\\x00-\\x7f{''.join(map(chr, MARKS))}]")


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1]


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """One per model. `limit`: characters that a value may have; set before each rendering."""

    code_generator_class = BoundedCodeGenerator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, optimized=False, autoescape=False, cache_size=0,
                         extensions=[LoopControlExtension, GenerationTag], finalize=self.printable)
        self.limit = VALUE_LIMIT
        self.globals = {"range": safe_range, "dict": make_dict, "namespace": TemplateNamespace,
                        "raise_exception": raise_exception, "strftime_now": strftime_now}
        self.filters = {name: self._checked(name, FILTERS[name]) for name in _PLAIN_FILTERS}
        self.filters.update({
            "center": lambda value, width=80: self._pad(str(value), "center", width),
            "format": self._format_filter, "indent": self._checked("indent", self._indent), "join": self._join_filter,
            "replace": lambda value, old, new, count=-1: self._replace(self.text(value), str(old), str(new), count),
            "round": self._round, "sum": self._sum, "tojson": self.tojson})

    # ---- weighing ------------------------------------------------------------------------------------------------

    def bound(self, value: Any) -> Any:
        """`value`, if it is within the limit."""
        weigh(value, self.limit)
        return value

    def text(self, value: Any) -> str:
        """str(value), if that is within the limit."""
        weigh(value, self.limit)
        return value if isinstance(value, str) else str(value)

    def concat_values(self, values: Iterable[Any]) -> str:
        return self.concat(map(self.text, values))

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """What captured blocks, macros and whole templates are joined with."""
        kept, size = [], 0
        for part in parts:
            size += len(part)
            if size > self.limit:
                raise TooLarge
            kept.append(part)
        return "".join(kept)

    def printable(self, value: Any) -> Any:
        """What ``{{ }}`` may print: data, nothing that would show an address or grow without bound."""
        if isinstance(value, (str, int, float, Undefined)) or value is None:
            return value
        if isinstance(value, (list, tuple, dict)):
            return self.bound(value)
        raise SecurityError(f"{type(value).__name__} cannot be printed")

    # ---- operators, attributes and calls -------------------------------------------------------------------------

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right if isinstance(right, tuple) else (right,), right)
        if operator == "*":
            self._check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int) \
                and abs(right) * left.bit_length() > MAX_BITS:
            raise TooLarge
        result = super().call_binop(context, operator, left, right)
        return self.bound(result) if isinstance(result, (str, list, tuple)) else result

    def _check_product(self, left: Any, right: Any) -> None:
        if isinstance(left, int) and isinstance(right, int):
            if left.bit_length() + right.bit_length() > MAX_BITS:
                raise TooLarge
        else:
            value, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(value, (str, list, tuple)) and isinstance(times, int) \
                    and weigh(value, self.limit) * times > self.limit:
                raise TooLarge

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        for kind, names in _PLAIN_METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return not isinstance(obj, type)      # what else there is: undefined values, loops, macros, namespaces

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        """A forbidden attribute is an error, even where it is only printed."""
        raise SecurityError(f"{type(obj).__name__}.{attribute} is not for templates")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def bounded(*args: Any, **kwargs: Any) -> str:
            values = [*args, *kwargs.values()]
            if len(args) == 1 and isinstance(args[0], dict):  # format_map
                values += args[0].values()
            self._check_fields(value.__self__, values)
            return str(self.bound(wrapped(*args, **kwargs)))
        return bounded

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        target = getattr(__obj, "__self__", None)
        if isinstance(target, str):
            for name in ("_block_vars", "_loop_vars"):        # compiled code adds them inside blocks and loops
                kwargs.pop(name, None)
            result = __self._call_text(target, __obj, args, kwargs)
            weigh(result, SPLIT_FACTOR * __self.limit if isinstance(result, list) else __self.limit)
            return result
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.bound(result) if isinstance(result, (str, list, tuple, dict)) else result

    def _call_text(self, target: str, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method of a string, its result's size known beforehand."""
        name = method.__name__
        if name == "join":
            return self._join(target, *args)
        if name == "replace":
            return self._replace(target, *args, **kwargs)
        if name in ("center", "ljust", "rjust", "zfill"):
            return self._pad(target, name, *args)
        if name == "expandtabs" and len(target) + target.count("\t") * max([*args, *kwargs.values(), 8]) > self.limit:
            raise TooLarge
        if name in ("split", "rsplit", "splitlines"):
            by = kwargs.get("sep", args[0] if args else None)
            pieces = target.count(by) if isinstance(by, str) and by else len(target) // 2
            if len(target) + ELEMENT * pieces > SPLIT_FACTOR * self.limit:
                raise TooLarge
        return method(*args, **kwargs)

    # ---- what could multiply a size ------------------------------------------------------------------------------

    def _pad(self, value: str, how: str, width: Any, *fill: str) -> str:
        if not isinstance(width, int) or width > MAX_WIDTH:
            raise TooLarge
        return str(getattr(value, how)(width, *fill))

    def _replace(self, value: str, old: Any, new: Any, count: Any = -1) -> str:
        times = value.count(old) if old else len(value) + 1
        times = times if count is None or count < 0 else min(times, count)
        if len(value) + times * (len(new) - len(old)) > self.limit:
            raise TooLarge
        return value.replace(old, new, -1 if count is None else count)

    def _join(self, glue: str, values: Any) -> str:
        texts, size = [], 0
        for value in gathered(values, self.limit):
            text = self.text(value)
            size += len(text) + len(glue)
            if size > self.limit + len(glue):
                raise TooLarge
            texts.append(text)
        return glue.join(texts)

    @property
    def _join_filter(self) -> Callable[..., str]:
        def join(value: Any, d: str = "", attribute: str | int | None = None) -> str:
            items = gathered(value, self.limit)
            return self._join(str(d), items if attribute is None else [self.getitem(v, attribute) for v in items])
        return join

    def _indent(self, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(width, MAX_WIDTH)
        text = self.text(value)
        if len(pad) > MAX_WIDTH or len(text) + (text.count("\n") + 2) * len(pad) > self.limit:
            raise TooLarge
        return str(FILTERS["indent"](text, pad, first, blank))

    def _round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        if abs(precision) > MAX_PRECISION:
            raise TooLarge
        return FILTERS["round"](value, precision, method)

    @property
    def _sum(self) -> Callable[..., Any]:
        @pass_environment
        def total(environment: BoundedEnvironment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
            for item in gathered(value, self.limit):
                start = environment.call_binop(None, "+", start,  # type: ignore[arg-type]
                                               item if attribute is None else self.getitem(item, attribute))
            return start
        return total

    def _format_filter(self, value: Any, *args: Any, **kwargs: Any) -> str:
        return self._percent(self.text(value), args or tuple(kwargs.values()), kwargs or args)

    def _percent(self, pattern: str, values: tuple[Any, ...], args: Any) -> str:
        """``pattern % args``, whose fields are neither wide nor so many that they multiply a value."""
        fields = _FIELD.findall(pattern)
        for numbers in fields:
            if any(n == "*" or n and (len(n) > 4 or int(n) > MAX_WIDTH) for n in numbers):
                raise TooLarge
        self._check_repetition(len(pattern), len(fields), values)
        return str(self.bound(pattern % args))

    def _check_fields(self, pattern: str, values: list[Any]) -> None:
        """As _percent, for str.format."""
        fields = 0
        for _, name, spec, _ in Formatter().parse(pattern):
            if name is not None:
                fields += 1
                if spec and ("{" in spec or any(int(n) > MAX_WIDTH for n in re.findall(r"\d{1,9}", spec))):
                    raise TooLarge
        self._check_repetition(len(pattern), fields, values)

    def _check_repetition(self, size: int, fields: int, values: Iterable[Any]) -> None:
        heaviest = max([weigh(value, self.limit) for value in values], default=0)
        if size + fields * MAX_WIDTH + fields * heaviest > 16 * self.limit:
            raise TooLarge

    def tojson(self, value: Any, ensure_ascii: bool = False, indent: int | str | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        """JSON as transformers makes it: no HTML escapes, no ASCII escapes unless asked for."""
        self.bound(value)
        if (len(indent) if isinstance(indent, str) else indent or 0) > 16:
            raise TooLarge
        encoder = json.JSONEncoder(ensure_ascii=False, indent=indent, sort_keys=sort_keys,
                                   separators=separators)  # type: ignore[arg-type]
        text = encoder.encode(value) if indent is None else self.concat(encoder.iterencode(value))
        return self.text(_NOT_ASCII.sub(_escaped, text)) if ensure_ascii else text

    def _checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter whose result is weighed, and whose generators are gathered within the limit first."""
        if name in _LAZY:
            return function

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            values = [gathered(value, self.limit) for value in args]
            for value in values:
                if isinstance(value, (list, tuple, dict)):
                    weigh(value, self.limit)
            result = gathered(function(*values, **kwargs), self.limit)
            return self.bound(result) if isinstance(result, (str, list, tuple, dict)) else result
        return checked

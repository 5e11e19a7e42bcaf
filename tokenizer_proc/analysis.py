"""What the text of a chat template says about the values that it expects, found in its syntax tree.

Run by the tokenizer when a template is compiled. Guesses from the ways in which templates are written; pure functions.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

from jinja2 import nodes


def wants_parts(tree: nodes.Template) -> bool:
    """Whether a template loops over the content of a message, directly, through a variable or through a macro."""
    names = _names_of(tree, "content", _is_field)
    if any(_is_field(loop.iter, names, "content") for loop in tree.find_all(nodes.For)):
        return True
    inside = {id(loop) for macro in tree.find_all(nodes.Macro) for loop in macro.find_all(nodes.For)}
    return any(id(loop) not in inside and _is_field(loop.iter, {"content"}, "content") for loop in tree.find_all(nodes.For))


def wants_argument_text(tree: nodes.Template) -> bool:
    """Whether a template puts the arguments of a tool call into its text as they are, without asking what they are.

    DeepSeek's do: an object there would be an error, or printed as Python prints it.
    """
    names = _names_of(tree, "arguments", _is_bare)
    tested = {test.name for test in tree.find_all(nodes.Test) if _is_field(test.node, names, "arguments")}
    if tested & {"string", "mapping"}:
        return False
    return any(_is_bare(child, names, "arguments") for kind in (nodes.Add, nodes.Concat, nodes.Output)
               for node in tree.find_all(kind) for child in node.iter_child_nodes())


def _is_bare(node: nodes.Node | None, names: set[str], field: str) -> bool:
    """As `_is_field`, with no filter around it."""
    return not isinstance(node, (nodes.Filter, nodes.Test)) and _is_field(node, names, field)


def _names_of(tree: nodes.Template, field: str, holds: Callable[[nodes.Node | None, set[str], str], bool]) -> set[str]:
    """Variables and macro parameters that hold what is a `field` of something."""
    macros = {macro.name: [arg.name for arg in macro.args] for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        found = set(names)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and holds(assign.node, names, field):
                found.add(assign.target.name)
        for call in tree.find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name in macros:
                found.update(name for name, arg in _arguments(call, macros[call.node.name]) if holds(arg, names, field))
        if found == names:
            return names
        names = found


def _arguments(call: nodes.Call, parameters: list[str]) -> Iterator[tuple[str, nodes.Expr]]:
    yield from zip(parameters, call.args)
    yield from ((keyword.key, keyword.value) for keyword in call.kwargs)


def _is_field(node: nodes.Node | None, names: set[str], field: str) -> bool:
    """Whether an expression is a `field` (or one of the names of such), looked at through filters, tests and slices."""
    while True:
        if isinstance(node, (nodes.Filter, nodes.Test)):
            node = node.node
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node = node.node
        elif isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == field
        elif isinstance(node, nodes.Getattr):
            return bool(node.attr == field)
        else:
            return isinstance(node, nodes.Name) and node.name in names

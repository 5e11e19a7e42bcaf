"""Grammars before they reach the engine: what is taken, what is refused by name, and how little a hostile one costs."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from frontend.bodies import validate
from frontend.constraints import grammar_of
from frontend.schema import ChatBody
from pipeline import grammars
from pipeline.errors import QuartetError
from pipeline.messages import unpack_ids
from pipeline.params import Grammar
from tests.detok_proc import zoo
from tests.tokenizer_proc import broken
from tests.waiting import until
from tokenizer_proc.checker import CheckProcess, GrammarChecker
from tokenizer_proc.grammar import compiled
from tokenizer_proc.grammar_check import check

TOKENIZER = zoo.byte_level()
TAG = zoo.token(TOKENIZER, "<tool_call>")
CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    return LLTokenizer(TOKENIZER.to_str(), eos_token=[zoo.token(TOKENIZER, "</s>")])


def refusal(fields: dict[str, Any]) -> QuartetError | None:
    """What a request with `fields` is refused with, on its way through frontend and tokenizer."""
    try:
        grammar = grammar_of(validate(ChatBody, {**CHAT, **fields}))
        assert grammar is not None
        made = compiled(grammar, TOKENIZER, [5])
    except QuartetError as error:
        return error
    complaint = check(made.text)
    return QuartetError("invalid_value", complaint, grammar.param) if complaint else None


def accepts(vocabulary: Any, grammar: Grammar, text: str, reasoning: str = "", prompt: Sequence[int] = (5,)) -> bool:
    """Whether an answer may be exactly `text`."""
    made = compiled(grammar, TOKENIZER, prompt, reasoning)
    assert made.kind == grammars.COMPILED and check(made.text) == ""
    matcher = LLMatcher(vocabulary, made.text)
    assert not matcher.is_error(), matcher.get_error()
    ids = TOKENIZER.encode(text).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


# ---- refusals ----------------------------------------------------------------------------------------------------

def test_the_corpus_is_large() -> None:
    assert len(list(broken.bodies())) + len(broken.SHAPES) > 250


def test_everything_broken_is_a_400_that_names_its_parameter() -> None:
    taken = []
    for param, fields in (*broken.bodies(), *broken.SHAPES):
        error = refusal(fields)
        if error is None:
            taken.append(str(fields)[:200])
        else:
            assert error.status == 400 and (error.param or "").startswith(param), (fields, error.param, error.message)
            assert error.message.isprintable() and len(error.message) < 400
    assert taken == []


# ---- what is taken -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("fields", "good", "bad"), [
    ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}}}}, '{"a": 5}', '{"a": "x"}'),
    ({"structured_outputs": {"json": '{"enum": ["x", 2]}'}}, "2", "3"),
    ({"structured_outputs": {"regex": "a+/b?"}}, "aa/", "b"),
    ({"structured_outputs": {"choice": ["positive", "negativ \"\u00e9\U0001f600\n"]}}, "negativ \"\u00e9\U0001f600\n", "pos"),
    ({"structured_outputs": {"grammar": 'start: "a" B*\nB: /[0-9]/'}}, "a12", "b"),
    ({"structured_outputs": {"grammar": 'root ::= "a" num{1,2} # or two\nnum ::= [0-9] | [^\\x00-\\x7f]'}}, "a7\u00e9", "a"),
    ({"structured_outputs": {"json_object": True, "disable_any_whitespace": True}}, '{"a":1}', '{"a": 1}'),
    ({"structured_outputs": {"json": {"type": "array"}, "whitespace_pattern": " {1,3}"}}, "[1,   2]", "[1,\n2]"),
    ({"structured_outputs": {"json": {"type": "object", "properties": {"a": {}}}, "disable_additional_properties": True}},
     '{"a":1}', '{"b":1}'),
    ({"structured_outputs": {"json": {"type": "object", "properties": {"a": {}}}, "disable_additional_properties": False}},
     '{"b":1}', "[]"),
    ({"structured_outputs": {"json": {"type": "object", "properties": {"a": {}}}}}, '{"a":1}', '{"b":1}'),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "strict": False, "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}}}}}, '{"b": 5}', '{"a": "x"}'),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {
        "type": "object", "properties": {"a": {"type": "integer"}}}}}}, '{"a": 5}', '{"b": 5}'),
    ({"guided_json": {"anyOf": [{"type": "object", "properties": {"a": {}}}, {"type": "null"}]}}, '{"a": 1}', '{"b": 1}'),
    ({"guided_json": {"allOf": [{"type": "object", "properties": {"a": {}}, "required": ["a"]},
                                {"type": "object", "properties": {"b": {}}, "required": ["b"]}]}},
     '{"a": 1, "b": 2}', '{"a": 1}'),
    ({"guided_json": {"type": "object", "properties": {"a": {}}, "required": ["a", "b"]}}, '{"a": 1, "b": 2}', '{"a": 1}'),
    ({"guided_json": {"const": 5}}, "5", "6"), ({"guided_regex": "x|y"}, "y", "z"), ({"guided_choice": ["q"]}, "q", "r"),
    ({"guided_grammar": 'root ::= "q"'}, "q", "r"),
    ({"structured_outputs": {"structural_tag": {"type": "structural_tag", "format": {
        "type": "const_string", "value": "hi"}}}}, "hi", "ho"),
    ({"response_format": {"type": "structural_tag", "triggers": ["<f="], "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "null"}, "end": "</f>"}]}}, "so: <f=a>5</f> and <f=b>null</f>.", "so: <f=c>"),
    ({"response_format": {"type": "structural_tag", "format": {"type": "sequence", "elements": [
        {"type": "tag", "begin": "<q>", "content": {"type": "any_text"}, "end": "</q>"},
        {"type": "or", "elements": [{"type": "regex", "pattern": "[0-9]+"}, {"type": "const_string", "value": "none"}]},
        {"type": "optional", "content": {"type": "grammar", "grammar": 'root ::= "!" "?"*'}}]}}},
     "<q>any\n<b></q>17!??", "<q></q>x")])
def test_constraints_mean_what_they_say(vocabulary: Any, fields: dict[str, Any], good: str, bad: str) -> None:
    grammar = grammar_of(validate(ChatBody, {**CHAT, **fields}))
    assert grammar is not None
    assert accepts(vocabulary, grammar, good) and not accepts(vocabulary, grammar, bad)


def test_text_asks_for_nothing() -> None:
    assert grammar_of(validate(ChatBody, {**CHAT, "response_format": {"type": "text"}})) is None
    assert grammar_of(validate(ChatBody, CHAT)) is None


def test_one_of_is_taken_where_no_two_branches_can_hold(vocabulary: Any) -> None:
    schema = {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}, {"type": "null"}], "$defs": {
        kind: {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]} for kind in ("cat", "dog")}}
    assert accepts(vocabulary, grammars.json_schema(schema), "null")
    nested = {"oneOf": [schema["$defs"]["cat"], schema["$defs"]["dog"]]}
    assert accepts(vocabulary, grammars.json_schema(nested), '{"kind": "dog"}')
    assert not accepts(vocabulary, grammars.json_schema(nested), '{"kind": "cow"}')


# ---- tools and reasoning -----------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}


def calls(*names: str, parallel: bool = True) -> Grammar:
    """Calls of functions `names`, as the hermes family writes them."""
    return grammars.structural_tag({
        "type": "tags_with_separator", "separator": "\n", "at_least_one": True, "stop_after_first": not parallel, "tags": [
            {"type": "tag", "begin": f'<tool_call>\n{{"name": "{name}", "arguments": ', "end": "}\n</tool_call>",
             "content": {"type": "json_schema", "json_schema": SCHEMA}} for name in names]})


def test_tool_calls_of_a_family(vocabulary: Any) -> None:
    call = '<tool_call>\n{"name": "%s", "arguments": {"x": 1}}\n</tool_call>'
    several = calls("f", "g")
    assert TAG in TOKENIZER.encode(call).ids, "the tag is a token of this model"
    assert accepts(vocabulary, several, call % "f") and accepts(vocabulary, several, call % "g" + "\n" + call % "f")
    for bad in ("", "hello", call % "h", (call % "f").replace("1", '"1"')):
        assert not accepts(vocabulary, several, bad)
    single = calls("f", parallel=False)
    assert accepts(vocabulary, single, call % "f") and not accepts(vocabulary, single, call % "f" + call % "f")


def test_arguments_as_tags(vocabulary: Any) -> None:
    schema = {"type": "object", "required": ["s"], "properties": {
        "s": {"type": "string"}, "n": {"type": "integer"}, "e": {"type": "string", "enum": ["a", "b"]}}}
    form = grammars.structural_tag({"type": "tag", "begin": "<function=f>\n", "end": "</function>", "content": {
        "type": "qwen_xml_parameter", "json_schema": schema}})
    text = "<function=f>\n<parameter=s>\nany <x>\ntext\n</parameter>\n<parameter=n>\n5\n</parameter>\n" \
           "<parameter=e>\nb\n</parameter>\n</function>"
    assert accepts(vocabulary, form, text)
    assert not accepts(vocabulary, form, text.replace("\n5\n", "\nfive\n")) and not accepts(
        vocabulary, form, "<function=f>\n</function>")


@pytest.mark.parametrize(("family", "prompt", "good", "bad"), [
    ("qwen3", "x", ("{}", "<think>\nhm {\n</think>\n\n{}"), ("hm", "<think>hm")),
    ("qwen3", "<think>\n\n</think>\n\n", ("{}",), ("<think></think>{}",)),
    ("deepseek_r1", "x", ("{}", "\n\n{}"), ("x{}",))])
def test_the_constraint_begins_behind_the_reasoning(
        vocabulary: Any, family: str, prompt: str, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    ids = TOKENIZER.encode(prompt).ids
    assert all(accepts(vocabulary, grammars.json_object(), text, family, ids) for text in good)
    assert not any(accepts(vocabulary, grammars.json_object(), text, family, ids) for text in bad)
    made = compiled(grammars.json_object(), TOKENIZER, ids, family)
    assert made.after == ("</think>" if family == "deepseek_r1" else "")
    assert list(unpack_ids(made.after_ids)) == TOKENIZER.encode(made.after).ids


# ---- hostile ones ------------------------------------------------------------------------------------------------

HOSTILE: dict[str, dict[str, Any]] = {
    "nested repetitions": {"guided_regex": "((a{0,100}){0,100}){0,100}"},
    "exponential automaton": {"guided_regex": "(a|b)*a(a|b){2000}"},
    "many alternatives": {"guided_regex": "|".join(f"word{i}" for i in range(20_000))},
    "a long pattern": {"guided_regex": "ab" * 120_000},
    "many properties": {"guided_json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}},
    "a product of choices": {"guided_json": {"allOf": [{"anyOf": [
        {"properties": {f"a{i}": {}}}, {"properties": {f"b{i}": {}}}]} for i in range(20)]}},
    "a cycle": {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}},
    "doubling references": {"guided_json": {"$ref": "#/$defs/a0", "$defs": {
        **{f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}, "a30": {"type": "string"}}}},
    "left recursion": {"guided_grammar": "start: start start start | \"a\" |"},
    "a large repetition": {"guided_grammar": "start: a{100000}\na: (b{1000}){1000}\nb: \"x\""},
    "many rules": {"guided_grammar": "root ::= r0\n" + "".join(f"r{i} ::= \"a\" r{i + 1} | \"b\"\n" for i in range(4000))
                   + "r4000 ::= \"c\"\n"}}


@pytest.fixture
def process() -> Iterator[CheckProcess]:
    made = CheckProcess()
    yield made
    made.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_answered(process: CheckProcess, name: str) -> None:
    """Taken or refused, even where it kills the process that checks it: what each costs is in the page."""
    grammar = grammar_of(validate(ChatBody, {**CHAT, **HOSTILE[name]}))
    assert grammar is not None
    complaint = process.check(compiled(grammar, TOKENIZER, [5]).text, seconds=60)
    assert "too long" not in complaint
    assert process.check("start: \"a\"\n", seconds=60) == ""


def test_a_check_that_does_not_end_is_cut_short(process: CheckProcess) -> None:
    assert process.check("start: \"a\"\n", seconds=60) == ""
    assert "too long" in process.check("start: \"a\"\n" + "x: \"b\"\n" * 20_000, seconds=0.0)
    assert process.check("start: \"a\"\n", seconds=60) == ""


class Inline:
    """Checks without a process."""

    def check(self, text: str) -> str:
        return check(text)


def test_what_was_found_good_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer_proc.checker.KNOWN", 3)
    checker = GrammarChecker(Inline)
    found: dict[int, bool] = {}
    for i in range(6):
        checker.submit(i, f'start: "{i}"\n' if i < 5 else "start: nothing\n")
        until(lambda i=i: found.update((rid, error is None) for rid, error in checker.take()) or i in found, 60, "a check")
    assert [found[i] for i in range(6)] == [True] * 5 + [False]
    assert [checker.knows(f'start: "{i}"\n') for i in range(5)] == [False, False, True, True, True]
    assert not checker.knows("start: nothing\n")

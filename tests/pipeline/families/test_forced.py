"""Required, named and strict calls: whatever a model wants to say, it says calls that its parser reads and that fit."""
from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from llguidance import LLMatcher, LLParserLimits

from engine_proc.constraint import Constraint, Vocabulary
from engine_proc.grammars import load_vocabulary
from pipeline import grammars
from pipeline.config import ModelConfig
from pipeline.families import forced
from pipeline.families.forced import FORMS, ForcedTool, optional, required
from pipeline.families.table import FAMILIES, HARMONY, HARMONY_REASONING, AnswerParser
from pipeline.messages import unpack_ids
from pipeline.params import Grammar
from tests.detok_proc import zoo
from tests.detok_proc.test_answer import vocab
from tests.pipeline.families.samples import Answer, answer
from tokenizer_proc.grammar import compiled

TOKENIZER = vocab("byte_level").tokenizer
END = zoo.token(TOKENIZER, "</s>")
SIZE = TOKENIZER.get_vocab_size(with_added_tokens=True)
TOOLS = [
    ForcedTool("get_weather", {"type": "object", "properties": {
        "city": {"type": "string", "enum": ["Rome", "Paris"]}, "days": {"type": "integer"}}, "required": ["city", "days"]},
        strict=True),
    ForcedTool("now", {"properties": {}}, strict=True),
    ForcedTool("pick", {"type": "object", "required": ["mode"], "properties": {
        "mode": {"enum": ["fast", 3]}, "text": {"type": "string", "minLength": 2}, "on": {"type": "boolean"}}}, strict=True)]
SCHEMAS = {tool.name: forced.arguments_schema(tool.schema) for tool in TOOLS}
SIGNATURES = {"get_weather": {"city": "string", "days": "integer"}, "now": {},
              "pick": {"mode": "integer|string", "text": "string", "on": "boolean"}}
CLOSERS = [TOKENIZER.token_to_id(text) for text in ('"', "}", "]", "</s>", "1", ">", "<", "</think>", "<|end|>")]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = zoo.save(TOKENIZER, tmp_path_factory.mktemp("forced"))
    return load_vocabulary(ModelConfig(names=("tiny",), path=str(folder), eos_ids=(END,)), SIZE)


def say(vocabulary: Vocabulary, grammar: Grammar, seed: int, reasoning: str = "", prompt: str = "x",
        want: tuple[str, ...] = ()) -> str | None:
    """What a random model says under `grammar`; None where it did not come to an end. `want`: what it likes to begin."""
    made = compiled(grammar, TOKENIZER, TOKENIZER.encode(prompt).ids, reasoning)
    matcher = LLMatcher(vocabulary.tokenizer, made.text, log_level=0, limits=LLParserLimits(**grammars.LIMITS))
    assert not matcher.is_error(), matcher.get_error()
    rule, chance = Constraint(vocabulary, matcher, made.after, unpack_ids(made.after_ids), None), random.Random(seed)
    liked = [TOKENIZER.token_to_id(text) for text in want]
    ids: list[int] = []
    while len(ids) < 600:
        if rule.rules:
            allowed = rule.allowed(SIZE).tolist()
        else:
            allowed = unpack_ids(made.after_ids).tolist() if chance.random() < 0.2 else [chance.randrange(100, 400)]
        assert rule.error is None, rule.error
        good = [i for i in liked if i in allowed and i not in ids] or [i for i in CLOSERS if i in allowed]
        token = chance.choice(good) if good and chance.random() < 0.6 else chance.choice(allowed)
        if token == END:
            return str(TOKENIZER.decode(ids, skip_special_tokens=False))
        ids.append(token)
        rule.advance(token)
        if rule.complete:
            return str(TOKENIZER.decode(ids, skip_special_tokens=False))
    return None


def parse(family: str, text: str, reasoning: str = "", tail: str = "") -> Answer:
    if family == HARMONY:
        reasoning = HARMONY_REASONING
    parser = AnswerParser(family, reasoning, SIGNATURES, 0, tail)
    parser.push(text)
    parser.end()
    return answer(*parser.parts.take())


def check(found: Answer) -> None:
    for name, arguments in found.calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


def test_every_family_has_a_form_but_the_one_that_writes_python() -> None:
    assert set(FAMILIES) - set(FORMS) == {"pythonic"}


@pytest.mark.parametrize("family", [*FORMS])
def test_required_calls_are_calls_that_fit_their_schemas(vocabulary: Vocabulary, family: str) -> None:
    ended = 0
    for seed in range(6):
        text = say(vocabulary, required(family, TOOLS, parallel=seed % 2 == 0), seed,
                   HARMONY_REASONING if family == HARMONY else "")
        if text is not None:
            ended += 1
            found = parse(family, text)
            check(found)
            assert found.calls and (family == HARMONY or not found.content.strip()), text    # harmony has preambles
            assert len(found.calls) == 1 or seed % 2 == 0
    assert ended >= 3


@pytest.mark.parametrize("family", [*FORMS])
def test_a_named_tool_is_the_one_that_is_called(vocabulary: Vocabulary, family: str) -> None:
    text = next(filter(None, (say(vocabulary, required(family, TOOLS[:1], parallel=False), seed) for seed in range(9))))
    [(name, arguments)] = parse(family, text).calls
    assert name == "get_weather" and set(json.loads(arguments)) == {"city", "days"}


@pytest.mark.parametrize("family", [*FORMS])
def test_strict_tools_fit_their_schemas_wherever_they_are_called(vocabulary: Vocabulary, family: str) -> None:
    """The model may answer with text; where it calls, the arguments fit."""
    called = 0
    wanted = {"hermes": ("<tool_call>",), "qwen3_coder": ("<tool_call>",), "glm45": ("<tool_call>",),
              "mistral": ("[TOOL_CALLS]",), "granite": ("<|tool_call|>",), "openai": ("<|channel|>",)}
    for seed in range(8):
        text = say(vocabulary, optional(family, TOOLS, parallel=True), seed,
                   HARMONY_REASONING if family == HARMONY else "", want=wanted.get(family, ("{",)))
        if text is not None:
            found = parse(family, text)
            check(found)
            called += bool(found.calls)
    assert called or family not in wanted, family


def test_an_answer_in_a_format_or_a_call(vocabulary: Vocabulary) -> None:
    form = forced.answer_format(grammars.json_schema({"type": "object", "properties": {"a": {"type": "integer"}},
                                                      "required": ["a"], "additionalProperties": False}))
    seen = set()
    for seed in range(12):
        text = say(vocabulary, optional("hermes", TOOLS, True, form), seed, want=("<tool_call>",) if seed % 2 else ("{",))
        if text is not None:
            found = parse("hermes", text)
            check(found)
            seen.add(bool(found.calls))
            if not found.calls:
                assert set(json.loads(found.content)) == {"a"}
    assert seen == {True, False}


@pytest.mark.parametrize(("reasoning", "prompt"), [
    ("qwen3", "x"), ("qwen3", "x<think>\n"), ("qwen3", "<think>\n\n</think>\n\n"), ("deepseek_r1", "x")])
def test_reasoning_may_come_ahead_of_a_required_call(vocabulary: Vocabulary, reasoning: str, prompt: str) -> None:
    ended = 0
    for seed in range(6):
        text = say(vocabulary, required("hermes", TOOLS, False), seed, reasoning, prompt, want=("<think>", "</think>"))
        if text is not None:
            ended += 1
            found = parse("hermes", text, reasoning, prompt)
            check(found)
            assert len(found.calls) == 1 and not found.content.strip()
    assert ended


@pytest.mark.parametrize(("grammar", "form"), [
    (grammars.json_object(), {"type": "json_schema", "json_schema": {"type": "object"}}),
    (grammars.choice(["a", "b"]), {"type": "or", "elements": [
        {"type": "const_string", "value": "a"}, {"type": "const_string", "value": "b"}]}),
    (Grammar(grammars.REGEX, "a+"), {"type": "regex", "pattern": "a+"}),
    (grammars.context_free('root ::= "a"'), {"type": "grammar", "grammar": 'root ::= "a"'}),
    (grammars.structural_tag({"type": "any_text"}), {"type": "any_text"})])
def test_every_constraint_of_an_answer_can_stand_beside_calls(grammar: Grammar, form: Any) -> None:
    assert forced.answer_format(grammar) == form

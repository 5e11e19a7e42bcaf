"""Constrained sampling in the engine: whatever the model wants, the output is valid or cut by its length."""
from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from engine_proc.constraint import Vocabulary
from engine_proc.grammars import Grammars, load_vocabulary
from engine_proc.request import Sequence
from engine_proc.runner import ModelRunner
from pipeline import grammars
from pipeline.config import ModelConfig
from pipeline.messages import Finish, pack_ids
from pipeline.params import Grammar
from tests.detok_proc import zoo
from tests.engine_proc.schemas import Schemas, recursive
from tests.engine_proc.tiny import Driver, floats, load, make_checkpoint, sequence, uints
from tokenizer_proc.grammar import compiled

TOKENIZER = zoo.byte_level()
VOCAB = 640                              # the logits are wider than the vocabulary
END = zoo.token(TOKENIZER, "</s>")
PROMPT = TOKENIZER.encode("The quick brown fox").ids
NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = make_checkpoint(tmp_path_factory.mktemp("constraints") / "llama", "llama", vocab_size=VOCAB,
                             num_hidden_layers=2, max_position_embeddings=2048)
    return load(folder, max_model_len=2048, num_kv_blocks=1200, max_num_seqs=32)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = zoo.save(TOKENIZER, tmp_path_factory.mktemp("constraints") / "tokenizer")
    return load_vocabulary(ModelConfig(names=("tiny",), path=str(folder), eos_ids=(END,)), VOCAB)


@pytest.fixture
def source(vocabulary: Vocabulary) -> Grammars:
    return Grammars(lambda: vocabulary, threaded=False)


def constrain(source: Grammars, seq: Sequence, grammar: Grammar, after: str = "") -> Sequence:
    """`seq` with the constraint that tokenizer and engine make of `grammar`."""
    grammar.after = after
    seq.sampling.grammar = compiled(grammar, TOKENIZER, PROMPT)
    source.submit([seq])
    ((_, error),) = source.take()
    assert error is None, error
    seq.stops, seq.eos_id = frozenset([END]), END
    return seq


def request(source: Grammars, grammar: Grammar, *, max_tokens: int = 200, after: str = "", **sampling: Any) -> Sequence:
    values = {"temperature": 1.5, "ignore_eos": False, **sampling}
    seq = sequence(next(NUMBERS), PROMPT, max_tokens, **{"seed": next(NUMBERS), **values})
    return constrain(source, seq, grammar, after)


def text_of(seq: Sequence) -> str:
    ids = list(seq.tokens[seq.num_prompt:])
    return str(TOKENIZER.decode(ids[:-1] if ids and ids[-1] == END else ids, skip_special_tokens=False))


def drive(runner: ModelRunner, *seqs: Sequence, **options: Any) -> Driver:
    driver = Driver(runner, max_num_seqs=32)
    driver.run(*seqs, **options)
    return driver


# ---- the adversary -----------------------------------------------------------------------------------------------

def answer_schemas(runner: ModelRunner, source: Grammars, count: int, seed: int) -> tuple[int, int]:
    """Let the model answer `count` schemas, with free neighbours. (valid answers, answers cut by length)"""
    made = Schemas(seed)
    valid = cut = 0
    for first in range(0, count, 16):
        schemas = [made.schema() if (first + i) % 29 else recursive() for i in range(min(16, count - first))]
        seqs = [request(source, grammars.json_schema(schema, whitespace="" if i % 3 else None), max_tokens=300)
                for i, schema in enumerate(schemas)]
        free = [sequence(next(NUMBERS), PROMPT, 20, temperature=1.0, seed=i) for i in range(4)]
        drive(runner, *seqs, *free)
        for schema, seq in zip(schemas, seqs):
            assert seq.finish in (Finish.COMPLETE, Finish.EOS, Finish.LENGTH), (schema, seq.finish, seq.error)
            if seq.finish is Finish.LENGTH:
                cut += 1
                continue
            valid += 1
            jsonschema.validate(json.loads(text_of(seq)), schema,
                                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    return valid, cut


def test_what_a_random_model_says_is_valid_json_of_the_schema(runner: ModelRunner, source: Grammars) -> None:
    valid, cut = answer_schemas(runner, source, 64, seed=1)
    assert valid > 40 and valid + cut == 64


@pytest.mark.slow
def test_a_thousand_schemas(runner: ModelRunner, source: Grammars) -> None:
    valid, cut = answer_schemas(runner, source, 1000, seed=2)
    print(f"{valid} valid, {cut} cut by length")
    assert valid > 650


# ---- with everything else ----------------------------------------------------------------------------------------

DIGITS = Grammar(grammars.REGEX, "[0-9]{1,30}(,[0-9]{1,30}){0,20}")


def test_neighbours_preemption_and_history_change_nothing(runner: ModelRunner, source: Grammars) -> None:
    """The same request alone, in a batch with free ones, after a pre-emption, and continued from the middle."""
    options: dict[str, Any] = {"temperature": 1.0, "seed": 11, "presence_penalty": 0.4,
                               "repetition_penalty": 1.1, "top_p": 0.9}
    one, two, three = (request(source, DIGITS, max_tokens=40, **options) for _ in range(3))
    drive(runner, one)
    free = [sequence(next(NUMBERS), PROMPT, 30, temperature=1.0, seed=i) for i in range(3)]
    drive(runner, free[0], two, *free[1:])
    drive(runner, three, preempt_at=9)
    ids = list(one.tokens[one.num_prompt:])
    assert len(ids) > 8 and ids == list(two.tokens[two.num_prompt:]) == list(three.tokens[three.num_prompt:])
    continued = sequence(next(NUMBERS), PROMPT, 40, ids[:6], **options, ignore_eos=False)
    drive(runner, constrain(source, continued, DIGITS))
    assert list(continued.tokens[continued.num_prompt:]) == ids and continued.finish == one.finish


def test_free_rows_are_what_they_are_without_constrained_neighbours(runner: ModelRunner, source: Grammars) -> None:
    def free() -> list[Sequence]:
        return [sequence(next(NUMBERS), PROMPT, 25, temperature=t, seed=5) for t in (0.0, 1.0)]
    alone, mixed = free(), free()
    drive(runner, *alone)
    drive(runner, *mixed, *(request(source, DIGITS, max_tokens=30) for _ in range(3)))
    assert [list(a.tokens) for a in alone] == [list(m.tokens) for m in mixed]


def test_siblings_have_matchers_of_their_own(runner: ModelRunner, source: Grammars) -> None:
    group = [request(source, grammars.choice(["yes", "no", "maybe so"]), seed=3) for _ in range(1)]
    twins = [sequence(next(NUMBERS), PROMPT, 50, choice=j, temperature=1.5, seed=3) for j in range(6)]
    for twin in twins:
        twin.sampling.grammar = group[0].sampling.grammar
        twin.stops, twin.eos_id = frozenset([END]), END
    source.submit(twins)
    source.take()
    drive(runner, *twins)
    texts = [text_of(twin) for twin in twins]
    assert set(texts) <= {"yes", "no", "maybe so"} and len(set(texts)) > 1


def test_a_complete_grammar_ends_the_output_whatever_else_is_asked(runner: ModelRunner, source: Grammars) -> None:
    for options in ({}, {"ignore_eos": True}, {"min_tokens": 30}, {"temperature": 0.0}):
        seq = request(source, grammars.choice(["abc"]), **options)
        drive(runner, seq)
        assert (text_of(seq), seq.finish) == ("abc", Finish.COMPLETE), options


def test_a_grammar_that_may_end_goes_on_while_the_request_wants_more(runner: ModelRunner, source: Grammars) -> None:
    anything = Grammar(grammars.REGEX, "[a-z]+")
    for options in ({"ignore_eos": True}, {"min_tokens": 40}):
        seq = request(source, anything, max_tokens=40, bias_ids=pack_ids([END]),
                      bias_values=np.float32([100.0]).tobytes(), **options)
        drive(runner, seq)
        assert seq.num_output == 40 and seq.finish is Finish.LENGTH, options
    seq = request(source, anything, max_tokens=40, bias_ids=pack_ids([END]), bias_values=np.float32([100.0]).tobytes())
    drive(runner, seq)
    assert seq.finish is Finish.EOS and seq.num_output == 2          # one letter at least, then its end


def test_log_probabilities_are_of_what_the_grammar_leaves(runner: ModelRunner, source: Grammars) -> None:
    seq = request(source, grammars.choice(["a", "b"]), logprobs=4, temperature=0.0)
    driver = drive(runner, seq)
    (found, *_) = driver.sampled_logprobs(seq)
    likely = floats(found.top_values)[:2]
    assert np.isclose(np.exp(likely).sum(), 1.0, atol=1e-5) and uints(found.ranks)[0] == 1
    assert {TOKENIZER.decode([int(i)]) for i in uints(found.top_ids)[:2]} == {"a", "b"}


def test_a_contradiction_ends_its_own_request_only(runner: ModelRunner, source: Grammars) -> None:
    bad = request(source, grammars.choice(["xyz"]), allowed_ids=pack_ids([END]))
    good = request(source, grammars.choice(["xyz"]))
    driver = drive(runner, bad, good)
    assert driver.errors(bad) is not None and bad.num_output == 0
    assert text_of(good) == "xyz"


def test_a_grammar_that_gets_too_complex_ends_its_own_request_only(runner: ModelRunner, source: Grammars) -> None:
    bad = request(source, Grammar(grammars.LARK, 'start: a{100000}\na: "x"{100000}\n'))
    good = request(source, grammars.choice(["xyz"]))
    driver = drive(runner, bad, good)
    assert driver.errors(bad) == "invalid_value" and bad.error is not None and bad.error.param == "response_format"
    assert text_of(good) == "xyz"


def test_the_constraint_begins_behind_a_tag(runner: ModelRunner, source: Grammars) -> None:
    """The tag comes after some free tokens (they are forced here by a bias), as tokens or as text."""
    grammar = grammars.choice(["42"])
    seq = request(source, grammar, after="<tool_call>", max_tokens=30, temperature=0.0)
    tag = zoo.token(TOKENIZER, "<tool_call>")
    constraint = seq.constraint
    assert constraint is not None and not constraint.active
    for token in TOKENIZER.encode("thinking ").ids:
        constraint.advance(token)
    assert not constraint.active and END in constraint.unwelcome(seq.sampling, seq.stops, 3)
    constraint.advance(tag)
    assert constraint.active
    biased = request(source, grammars.choice(["42"]), after="<tool_call>", max_tokens=30, temperature=0.0,
                     bias_ids=pack_ids([tag]), bias_values=np.float32([100.0]).tobytes())
    drive(runner, biased)
    assert text_of(biased) == "<tool_call>42"
    spelled = request(source, grammars.choice(["42"]), after="dog", max_tokens=5).constraint
    assert spelled is not None
    for piece in ("the ", "d", "og"):
        for token in TOKENIZER.encode(piece).ids:
            spelled.advance(token)
    assert spelled.active


def test_output_waits_for_its_tag_and_cannot_end_before(runner: ModelRunner, source: Grammars) -> None:
    seq = request(source, grammars.choice(["42"]), after="never said by chance", max_tokens=20,
                  bias_ids=pack_ids([END]), bias_values=np.float32([100.0]).tobytes())
    drive(runner, seq)
    assert seq.finish is Finish.LENGTH and END not in seq.tokens[seq.num_prompt:]


def test_white_space_cannot_run_on(runner: ModelRunner, source: Grammars) -> None:
    spaces = [id_ for id_ in range(TOKENIZER.get_vocab_size()) if TOKENIZER.decode([id_]).isspace()]
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    seq = request(source, grammars.json_schema(schema), bias_ids=pack_ids(spaces), temperature=0.0,
                  bias_values=np.full(len(spaces), 100, np.float32).tobytes())
    drive(runner, seq)
    assert seq.finish is Finish.COMPLETE and list(json.loads(text_of(seq))) == ["a"]
    assert any(space.isspace() for space in text_of(seq)) and len(text_of(seq)) < 300


# ---- compiling beside the loop -----------------------------------------------------------------------------------

def test_the_cache_is_bounded(source: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_proc.grammars.CACHE_ENTRIES", 8)
    for i in range(30):
        request(source, grammars.choice([f"word {i}"]))
    assert len(source._cache) == 8
    monkeypatch.setattr("engine_proc.grammars.CACHE_BYTES", 2000)
    request(source, grammars.choice(["x" * 1500]))
    request(source, grammars.choice(["y" * 1500]))
    assert source._cache_bytes <= 2000 and len(source._cache) == 1


def test_a_grammar_that_the_library_refuses_is_one_sentence(source: Grammars) -> None:
    seq = sequence(next(NUMBERS), PROMPT, grammar=Grammar(grammars.COMPILED, "start: nothing", param="guided_grammar"))
    source.submit([seq])
    ((_, error),) = source.take()
    assert error is not None and (error.status, error.param) == (400, "guided_grammar")


def test_without_a_tokenizer_constrained_requests_are_refused(tmp_path: Any) -> None:
    source = Grammars(lambda: load_vocabulary(ModelConfig(names=("x",), path=str(tmp_path)), VOCAB), threaded=False)
    source.submit([sequence(next(NUMBERS), PROMPT, grammar=Grammar(grammars.COMPILED, "start: \"a\""))])
    ((_, error),) = source.take()
    assert error is not None and error.code == "unsupported_parameter"

"""Constrained sampling in the engine: whatever the model wants, the output is valid or cut by its length."""
from __future__ import annotations

import itertools
import json
from typing import Any

import jsonschema
import pytest

from engine_proc.constraint import Vocabulary
from engine_proc.grammars import Grammars, load_vocabulary
from engine_proc.request import Sequence
from engine_proc.runner import ModelRunner
from pipeline import grammars
from pipeline.config import ModelConfig
from pipeline.messages import Finish
from pipeline.params import Grammar
from tests.detok_proc import zoo
from tests.engine_proc.schemas import Schemas, recursive
from tests.engine_proc.tiny import Driver, load, make_checkpoint, sequence
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

"""Inputs of pooling models to ids: as transformers' tokenizer makes them, cut where asked, refused by name before any work."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerFast

from pipeline import codec
from pipeline.config import ModelConfig, ServerConfig
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    Adds,
    Chat,
    Failed,
    Kind,
    PoolAdds,
    PoolHanded,
    PoolInput,
    PoolText,
    Route,
    Submit,
    SubmitPool,
    pack_ids,
    pack_rids,
    unpack_ids,
)
from pipeline.params import DetokSpec, PoolParams, SamplingParams
from pipeline.transport import Address
from tests.serving import ROOT
from tokenizer_proc.chat import render_pair
from tokenizer_proc.pool import SLICE_INPUTS
from tokenizer_proc.worker import POOL_TURN, TokenizerWorker

BERT = ROOT / "examples/models/bert-tiny-sentiment"
ENGINE, FRONTEND = Address(Kind.ENGINE, 0), Address(Kind.FRONTEND, 0)
TEXTS = ["The capital of France is Paris.", "x", "", "Ünïcode — and 漢字, too!", "[SEP] is special", "word " * 20]
LENGTH = 24


class World:
    """A tokenizer stage with one model, and what it sends."""

    def __init__(self, path: Path = BERT, length: int = LENGTH, types: int = 2, **model: Any) -> None:
        served = ModelConfig(names=("m",), path=str(path), task="embed", max_model_len=length, num_type_ids=types, **model)
        config = ServerConfig(run_dir="/r", log_dir="/l", models=(served,))
        self.sent: list[tuple[Address, Any]] = []
        self.full: set[Address] = set()
        self.rids = RidMaker(0, 1)
        self.worker = TokenizerWorker(config, 0, 1, self, CollectorRegistry())

    def send(self, to: Address, message: Any) -> bool:
        if to in self.full:
            return False
        self.sent.append((to, codec.decode(codec.encode(message))))
        return True

    def pressure(self, to: Address) -> float:
        return 0.0

    def submit(self, *inputs: PoolText, truncate: int | None = None, left: bool = False, special: bool = True,
               epoch: int = 1, deadline_ns: int = 0, longest: int = 0) -> SubmitPool:
        made = SubmitPool(self.rids.next(), Route(0, epoch, 0, 7, 0, 0), 0, list(inputs), PoolParams("embed"), special,
                          truncate, left, deadline_ns, longest=longest)
        self.worker.handle(made)
        self.worker.assert_invariants()
        return made

    def run(self) -> None:
        while self.worker.has_work():
            self.worker.turn()
            self.worker.assert_invariants()

    def results(self, rid: int) -> list[PoolInput]:
        """Everything that went to the engine for one submission, which was then handed over."""
        adds = [m.items[0] for to, m in self.sent if to == ENGINE and m.items[0].rid == rid]
        assert PoolHanded(0, 1, rid) in [m for to, m in self.sent if to == FRONTEND]
        found = [given for add in adds for given in add.inputs]
        assert all(add.total == len(found) for add in adds)
        return found

    def ids(self, *texts: str, **options: Any) -> list[list[int]]:
        made = self.submit(*[PoolText(i, text=text) for i, text in enumerate(texts)], **options)
        self.run()
        return [list(unpack_ids(given.ids)) for given in self.results(made.rid)]

    def refused(self, *inputs: PoolText, **options: Any) -> Any:
        made = self.submit(*inputs, **options)
        self.run()
        ((to, message),) = [(to, m) for to, m in self.sent if isinstance(m, Failed)]
        assert to == FRONTEND and message.items[0].rid == made.rid
        assert not any(to == ENGINE for to, _ in self.sent), "nothing may reach the engine"
        return message.items[0]


@pytest.fixture(scope="module")
def referee() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(BERT))


def test_texts_are_encoded_as_transformers_does(referee: PreTrainedTokenizerFast) -> None:
    world = World()
    assert world.ids(*TEXTS) == [referee(text)["input_ids"] for text in TEXTS]
    assert world.ids(*TEXTS[:2], special=False) == [referee(t, add_special_tokens=False)["input_ids"] for t in TEXTS[:2]]


@pytest.mark.parametrize("limit", [3, 5, 12])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cuts_are_those_of_transformers(referee: PreTrainedTokenizerFast, limit: int, side: str) -> None:
    referee.truncation_side = side
    expected = [referee(text, truncation=True, max_length=limit)["input_ids"] for text in TEXTS]
    assert World().ids(*TEXTS, truncate=limit, left=side == "left") == expected
    assert World(length=limit).ids(*TEXTS, truncate=-1, left=side == "left") == expected


@pytest.mark.parametrize("limit", [7, 8, 13, 24])
def test_pairs_and_their_types_are_those_of_transformers(referee: PreTrainedTokenizerFast, limit: int) -> None:
    referee.truncation_side = "right"
    pairs = [(a, b) for a in TEXTS for b in TEXTS]
    world = World()
    made = world.submit(*[PoolText(i, text=a, pair=b) for i, (a, b) in enumerate(pairs)], truncate=limit)
    world.run()
    for (a, b), given in zip(pairs, world.results(made.rid)):
        expected = referee([(a, b)], truncation="longest_first", max_length=limit, return_token_type_ids=True)
        assert list(unpack_ids(given.ids)) == expected["input_ids"][0]
        assert list(given.type_ids or bytes(len(given.ids) // 4)) == expected["token_type_ids"][0]


def test_types_are_left_out_for_models_without_them() -> None:
    world = World(types=1)
    made = world.submit(PoolText(0, text="a", pair="b"))
    world.run()
    assert world.results(made.rid)[0].type_ids == b""


def test_query_and_document_have_limits_of_their_own(referee: PreTrainedTokenizerFast) -> None:
    world = World()
    made = world.submit(PoolText(0, text="one two three", pair="four five six", keep=1, keep_pair=2))
    world.run()
    assert list(unpack_ids(world.results(made.rid)[0].ids)) == referee("one", "four five")["input_ids"]


def test_long_texts_are_cut_without_being_encoded_whole(referee: PreTrainedTokenizerFast) -> None:
    text = "".join(f"word{i} " for i in range(20_000))
    for side in ("left", "right"):
        referee.truncation_side = side
        expected = referee(text, truncation=True, max_length=LENGTH)["input_ids"]
        assert World().ids(text, truncate=-1, left=side == "left") == [expected]


def test_ids_and_chats() -> None:
    world = World(chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    made = world.submit(PoolText(0, ids=pack_ids([5, 6, 7])), PoolText(1, chat=Chat(
        b'[{"role": "user", "content": "paris [SEP]"}]', add_generation_prompt=False)), special=False)
    world.run()
    given, chat = world.results(made.rid)
    assert list(unpack_ids(given.ids)) == [5, 6, 7]
    assert len(unpack_ids(chat.ids)) == 4 and 102 not in unpack_ids(chat.ids), "a message cannot spell [SEP]"
    for left, kept in ((False, [5, 6]), (True, [6, 7])):
        cut = world.submit(PoolText(0, ids=pack_ids([5, 6, 7])), special=False, truncate=2, left=left)
        world.run()
        assert list(unpack_ids(world.results(cut.rid)[0].ids)) == kept


def test_one_bad_input_refuses_all_by_name_before_any_reaches_the_engine() -> None:
    good = [PoolText(i, text="fine") for i in range(2 * SLICE_INPUTS)]
    n = len(good)
    item = World().refused(*good, PoolText(n, text="word " * 40))
    assert (item.code, item.param) == ("context_length_exceeded", f"input[{n}]")
    assert f"'input[{n}]' has 42" in item.message and "24 tokens" in item.message
    long = World().refused(PoolText(0, text="word " * 200_000))
    assert long.code == "context_length_exceeded" and "'input[0]'" in long.message
    pair = World().refused(PoolText(0, text="word " * 20, pair="word " * 20))
    assert pair.code == "context_length_exceeded" and "has 43" in pair.message
    assert World().refused(PoolText(0, text="\ud800")).code == "invalid_value"
    assert World().refused(PoolText(0, text=""), special=False).code == "invalid_value"
    assert World().refused(PoolText(0, ids=pack_ids([30522]))).param == "input[0]"
    assert World().refused(PoolText(0, ids=pack_ids(range(1, 30)))).code == "context_length_exceeded"
    assert World().refused(PoolText(0, text="late"), deadline_ns=1).code == "timeout"


def test_a_large_request_does_not_hold_up_others_and_is_not_held_up_for_ever() -> None:
    world = World()
    large = world.submit(*[PoolText(i, text="x") for i in range(4 * SLICE_INPUTS)])
    small = world.submit(PoolText(0, text="x"))
    for _ in range(20):
        world.worker.handle(Submit(world.rids.next(), large.route, 0, 1, 0, "chat", None, b"", b"", True, None,
                                   SamplingParams(), DetokSpec(), 0))
    order = []
    while world.worker.has_work():
        count = len(world.sent)
        world.worker.turn()
        order += [("chat" if isinstance(m, Adds) else m.items[0].rid) for to, m in world.sent[count:] if to == ENGINE]
    assert order.index(large.rid) == max(i for i, o in enumerate(order) if o == large.rid) or order[-1] != "chat"
    assert order[:POOL_TURN] == ["chat"] * POOL_TURN                            # a chat goes ahead of slices
    assert order.index(small.rid) < order.index(large.rid)                      # and a query of the rest of 1,024 inputs
    assert order.index(small.rid) < len(order) - 4
    assert len(world.results(large.rid)) == 4 * SLICE_INPUTS


def test_aborts_epochs_and_restarts_between_slices() -> None:
    world = World()
    texts = [PoolText(i, text="x") for i in range(2 * SLICE_INPUTS)]
    aborted = world.submit(*texts)
    world.worker.turn()
    world.worker.handle(Abort(pack_rids([aborted.rid]), 0))
    assert not world.worker.has_work() and world.sent == []
    world.submit(*texts, epoch=2)                                               # for a successor
    assert not world.worker.has_work()
    world.submit(*texts)
    world.worker.turn()
    world.worker.peer_restarted(Kind.ENGINE, 0, 8)
    assert not world.worker.has_work()
    world.submit(*texts)
    world.worker.peer_restarted(Kind.FRONTEND, 0, 2)
    assert not world.worker.has_work() and world.worker.load().outstanding_bytes == 0
    world.worker.assert_invariants()


def test_what_the_engine_does_not_take_waits_in_order() -> None:
    world = World()
    world.full.add(ENGINE)
    made = world.submit(PoolText(0, text="x"))
    world.run()
    assert not any(isinstance(m, PoolAdds) for _, m in world.sent)
    world.full.clear()
    world.worker.turn()
    assert len(world.results(made.rid)) == 1


# ---- long inputs in parts ------------------------------------------------------------------------------------------

def test_a_long_input_comes_in_parts_that_look_like_inputs(referee: PreTrainedTokenizerFast) -> None:
    world, text = World(), " ".join(f"word{n}" for n in range(40))
    whole = referee(text, add_special_tokens=False)["input_ids"]
    made = world.submit(PoolText(0, text=text), PoolText(1, text="short"), PoolText(2, ids=pack_ids(whole)), longest=2000)
    world.run()
    long, short, ids = world.results(made.rid)
    sizes, first, last = list(unpack_ids(long.parts)), referee.cls_token_id, referee.sep_token_id
    found, rest = list(unpack_ids(long.ids)), []
    for size in sizes:
        assert found[0] == first and found[size - 1] == last and size <= LENGTH
        rest += found[1:size - 1]
        found = found[size:]
    assert rest == whole and set(sizes[:-1]) == {LENGTH} and not found
    assert not short.parts and list(unpack_ids(short.ids)) == referee("short")["input_ids"]
    assert list(unpack_ids(ids.ids)) == whole and sum(unpack_ids(ids.parts)) == len(whole)
    assert max(unpack_ids(ids.parts)) == LENGTH


def test_a_part_is_never_asked_for_beyond_the_longest_input_or_where_the_request_cuts() -> None:
    text = "word " * 200
    for longest, special in ((120, True), (199, False), (5, True)):
        failed = World().refused(PoolText(0, text=text), longest=longest, special=special)
        assert (failed.code, failed.param) == ("context_length_exceeded", "input[0]") and f"at most {longest}" in failed.message
    world = World()
    made = world.submit(PoolText(0, text=text), truncate=10, longest=1000)
    world.run()
    assert not world.results(made.rid)[0].parts and len(world.results(made.rid)[0].ids) == 40


def test_a_prompt_that_is_not_pooled_is_counted(referee: PreTrainedTokenizerFast) -> None:
    world, prompt = World(), "search query: "
    made = world.submit(PoolText(0, text=prompt + "capital", lead=len(prompt)), PoolText(1, text="capital"))
    world.run()
    ahead = len(referee(prompt)["input_ids"]) - 1                      # sentence-transformers leaves out the end token
    assert [given.skip for given in world.results(made.rid)] == [ahead, 0]


# ---- two texts through a template ----------------------------------------------------------------------------------

JOIN = "[CLS]{{ instruction | default('judge') }}: {{ query }} / {{ document }}[SEP]yes or no [SEP]"


def join(*inputs: PoolText, **options: Any) -> tuple[World, list[PoolInput]]:
    world = World(length=64, pair_template=JOIN)
    made = world.submit(*inputs, **options)
    world.run()
    return world, world.results(made.rid)


def test_a_template_joins_two_texts(referee: PreTrainedTokenizerFast) -> None:
    _, found = join(PoolText(0, text="good food", pair="the soup", chat=Chat(b"")),
                    PoolText(1, text="good food", pair="the soup", chat=Chat(b"", kwargs_json=b'{"instruction": "find"}')),
                    PoolText(2, text="good food", pair="a [SEP] b", chat=Chat(b"")))
    texts = ["judge: good food / the soup", "find: good food / the soup"]
    for given, text in zip(found, texts):
        expected = referee(f"[CLS]{text}[SEP]yes or no [SEP]", add_special_tokens=False)["input_ids"]
        assert list(unpack_ids(given.ids)) == expected and not given.type_ids
    assert list(unpack_ids(found[2].ids)).count(referee.sep_token_id) == 2, "a user's text is never a control token"


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_too_long_for_a_template_is_cut_out_of_the_second_text(referee: PreTrainedTokenizerFast, side: str) -> None:
    words = [f"w{n}" for n in range(60)]
    _, (given,) = join(PoolText(0, text="q", pair=" ".join(words), chat=Chat(b"")), truncate=30, left=side == "left")
    ids = list(unpack_ids(given.ids))
    front = referee("[CLS]judge: q /", add_special_tokens=False)["input_ids"]
    back = referee("[SEP]yes or no [SEP]", add_special_tokens=False)["input_ids"]
    document = referee(" ".join(words), add_special_tokens=False)["input_ids"]
    room = 30 - len(front) - len(back)
    assert ids == front + (document[-room:] if side == "left" else document[:room]) + back
    failed = World(length=64, pair_template=JOIN).refused(PoolText(0, text="q", pair=" ".join(words), chat=Chat(b"")))
    assert (failed.code, failed.param) == ("context_length_exceeded", "input[0]")
    failed = World(length=64, pair_template=JOIN).refused(
        PoolText(0, text=" ".join(words), pair="d", chat=Chat(b"")), truncate=10)
    assert failed.code == "context_length_exceeded", "the query and the template do not fit: nothing is left to cut"


def test_each_text_of_a_template_may_be_cut_by_itself(referee: PreTrainedTokenizerFast) -> None:
    _, (given,) = join(PoolText(0, text="one two three", pair="four five six", chat=Chat(b""), keep=2, keep_pair=1))
    expected = referee("[CLS]judge: one two / four[SEP]yes or no [SEP]", add_special_tokens=False)["input_ids"]
    assert list(unpack_ids(given.ids)) == expected


def test_qwen3_rerankers_template_is_the_one_of_its_authors() -> None:
    source = (ROOT / "pipeline/templates/qwen3-reranker.jinja").read_text()
    model = World(pair_template=source).worker._models.get(0)
    for kwargs, instruction in ((b"", "Given a web search query, retrieve relevant passages that answer the query"),
                                (b'{"instruction": "Find jokes"}', "Find jokes")):
        front, back = render_pair(model, kwargs, "What is\nthis?", " A text. ")
        assert "".join(text for text, _ in (*front, *back)) == (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            f"<Instruct>: {instruction}\n<Query>: What is\nthis?\n<Document>:  A text. <|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n")

"""Graph bookkeeping on a device whose graphs leave nonsense in their inputs: every replay must find all of them anew."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine_proc.graphs import GraphedModel, Inputs, pick, rows_of, sizes
from engine_proc.runner import ModelRunner
from pipeline.config import EngineConfig
from tests.engine_proc.late import Late
from tests.engine_proc.tiny import LONGEST, load, make_checkpoint, prompts
from tests.engine_proc.whole import Engine


@pytest.mark.parametrize("most", [1, 2, 3, 16, 17, 64, 100, 256, 1000])
def test_sizes_waste_little_and_are_few(most: int) -> None:
    made = sizes(most)
    assert made == sorted(set(made)) and made[-1] == most and len(made) <= 18
    for rows in range(1, most + 1):
        size = pick(made, rows)
        assert size is not None and size >= rows
        assert size - rows <= (rows / 2 if rows > 16 else rows)
    assert pick(made, most + 1) is None


def test_the_sizes_of_64() -> None:
    assert sizes(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]


class FakeGraph:
    """Runs its work again at each replay, into memory of its own, and spoils the inputs afterwards."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        self.work, self.replays = work, 0
        self.out = work().clone()

    def replay(self) -> torch.Tensor:
        self.replays += 1
        self.out.copy_(self.work())
        batch = self.work.args[0]                                           # type: ignore[attr-defined]
        attention = batch.attention
        for tensor in (batch.ids, batch.positions, attention.slots, attention.context_len, attention.block_tables):
            tensor.fill_(-(2**30))
        attention.host_context_len.fill(-(2**30))
        return self.out


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return load(make_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", "llama", seed=3, num_hidden_layers=2))


@pytest.mark.parametrize("seed", range(2))
def test_answers_are_those_without_graphs(runner: ModelRunner, seed: int) -> None:
    """Prompts of many lengths come and go, so that decode steps have all numbers of rows up to 12; two more than the
    graphs hold are computed as they are. A step is in flight while the next is launched."""
    graphs: list[FakeGraph] = []

    def capture(work: Callable[[], torch.Tensor]) -> FakeGraph:
        graphs.append(FakeGraph(work))
        return graphs[-1]
    with torch.inference_mode():
        model = GraphedModel(runner.model, runner.cache, capture, 10, LONGEST // 16, torch.device("cpu"))
    runner.cache.k[0][0].fill_(1e3)                         # whatever is in block 0 must not matter
    device = Late(seed)
    graphed = ModelRunner(model, runner.cache, device, EngineConfig(block_size=16, max_num_seqs=12), runner.num_blocks,
                          LONGEST, runner.facts)
    plain, ahead = Engine(runner, max_num_seqs=12), Engine(graphed, max_num_seqs=12)
    given = prompts([1 + 7 * i % 50 for i in range(20)], seed=4)
    for engine in (plain, ahead):
        for i, prompt in enumerate(given):
            engine.add(prompt, max_tokens=5 + 3 * (i % 7), **({"temperature": 1.0, "seed": i} if i % 3 else {}))
        engine.run()
    assert [told.ids for told in ahead.told.values()] == [told.ids for told in plain.told.values()]
    assert [graph.out.shape[0] for graph in graphs] == [10, 8, 4, 2, 1]     # captured from the largest on
    assert all(graph.replays for graph in graphs[:3]) and sum(graph.replays for graph in graphs) > 8


def test_padding_rows_are_nobodys(runner: ModelRunner) -> None:
    """Three rows in a graph of four: the fourth is token 0 at the beginning of block 0."""
    inputs = Inputs(4, 6, torch.device("cpu"))
    for tensor in (inputs.ids, inputs.positions, inputs.slots, inputs.context_len, inputs.tables):
        tensor.fill_(99)
    step = Inputs(3, 2, torch.device("cpu")).batch(3)
    step.ids[:], step.positions[:] = torch.tensor([7, 8, 9]), torch.tensor([17, 4, 30])
    step.attention.slots[:], step.attention.context_len[:] = torch.tensor([33, 52, 78]), torch.tensor([18, 5, 31])
    step.attention.host_context_len[:] = [18, 5, 31]
    step.attention.block_tables[:] = torch.tensor([[1, 2], [3, 0], [5, 4]])

    inputs.fill(step, 4)

    assert inputs.ids.tolist() == [7, 8, 9, 0] and inputs.positions.tolist() == [17, 4, 30, 0]
    assert inputs.slots.tolist() == [33, 52, 78, 0] and inputs.context_len.tolist() == [18, 5, 31, 1]
    assert inputs.tables.tolist() == [[1, 2, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0], [5, 4, 0, 0, 0, 0], [0] * 6]
    np.testing.assert_array_equal(inputs.host_context_len, [18, 5, 31, 1])
    assert inputs.batch(4).attention.host_query_start.tolist() == [0, 1, 2, 3, 4]


def test_only_steps_of_single_tokens_are_replayed() -> None:
    step = Inputs(3, 2, torch.device("cpu")).batch(3)
    assert rows_of(step) == 3
    step.embeds = torch.zeros(3, 4)
    assert rows_of(step) is None
    step = Inputs(3, 2, torch.device("cpu")).batch(3)
    step.attention.num_decodes = 2                          # the third row is a chunk
    assert rows_of(step) is None

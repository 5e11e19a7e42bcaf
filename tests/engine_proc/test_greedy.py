"""Greedy steps: the same tokens as the ordinary path gives, whoever joins, leaves, or loses its blocks meanwhile."""
from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine_proc.greedy import GreedySteps
from engine_proc.plan import StepPlan
from engine_proc.runner import ModelRunner
from pipeline.messages import Finish
from tests.engine_proc.tiny import Driver, load, make_checkpoint, prompts, sequence

LENGTHS = (14, 3, 31, 16, 1, 40)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    made = load(make_checkpoint(tmp_path_factory.mktemp("greedy") / "llama", "llama", num_hidden_layers=2))
    if made.greedy is None:
        pytest.skip("no compiler or an old processor: the kernels are not there")
    return made


@pytest.fixture
def runner(loaded: ModelRunner) -> Iterator[ModelRunner]:
    steps = loaded.greedy
    yield loaded
    loaded.greedy = steps


class Counting:
    """Greedy steps that note how many there were."""

    def __init__(self, steps: GreedySteps) -> None:
        self.steps, self.taken = steps, 0
        self.forget = steps.forget

    def prepare(self, plan: StepPlan) -> object:
        calls = self.steps.prepare(plan)
        self.taken += calls is not None
        return calls


def both(runner: ModelRunner, preempt_at: int = -1, **engine: int) -> tuple[list[list[int]], list[list[int]], int]:
    """Outputs of the ordinary path and of the greedy one, and how many steps the latter took."""
    outputs = []
    steps = runner.greedy
    assert steps is not None
    counting = Counting(steps)
    for chosen in (None, counting):
        runner.greedy = chosen  # type: ignore[assignment]
        seqs = [sequence(i + 1, prompt, max_tokens=20 + 7 * i) for i, prompt in enumerate(prompts(LENGTHS))]
        outputs.append(Driver(runner, **engine).run(*seqs, preempt_at=preempt_at))
    return outputs[0], outputs[1], counting.taken


def test_the_same_tokens_as_the_ordinary_path(runner: ModelRunner) -> None:
    ordinary, greedy, taken = both(runner, max_num_seqs=3)       # the others join as the first ones leave
    assert greedy == ordinary and taken > 40


def test_a_sequence_that_lost_its_blocks_is_taken_up_with_its_new_ones(runner: ModelRunner) -> None:
    ordinary, greedy, taken = both(runner, preempt_at=12)
    assert greedy == ordinary and taken > 20


@pytest.mark.parametrize("wish", [{"temperature": 1.0, "seed": 5}, {"logprobs": 2}, {"repetition_penalty": 1.5}])
def test_a_neighbour_who_wants_more_changes_nothing_for_the_others(runner: ModelRunner, wish: dict[str, float]) -> None:
    first, second = prompts((9, 12))
    [alone] = Driver(runner).run(sequence(1, first, max_tokens=30))
    [wished] = Driver(runner).run(sequence(1, second, max_tokens=12, **wish))
    together = Driver(runner).run(sequence(1, first, max_tokens=30), sequence(2, second, max_tokens=12, **wish))
    assert together == [alone, wished]


def test_a_row_that_is_no_number_ends_its_own_sequence_only(runner: ModelRunner) -> None:
    steps = runner.greedy
    assert steps is not None
    [alone] = Driver(runner).run(sequence(1, prompts((5,))[0], max_tokens=12))

    class Poisoned(Counting):
        def prepare(self, plan: StepPlan) -> object:
            calls = self.steps.prepare(plan)
            if calls is not None and len(plan.items) == 2 and not self.taken:
                self.taken = 1
                item = plan.items[1]
                runner.cache.v[0][item.seq.block_table[0], :5] = float("nan")
            return calls

    runner.greedy = Poisoned(steps)  # type: ignore[assignment]
    good, bad = (sequence(i + 1, prompt, max_tokens=12) for i, prompt in enumerate(prompts((5, 6))))
    driver = Driver(runner)
    first, _ = driver.run(good, bad)
    runner.cache.v[0].zero_()
    assert first == alone and bad.finish is Finish.ERROR and driver.errors(bad) == "numerical_error"

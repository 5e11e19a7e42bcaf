"""The beam searches of one engine: between the choices that callers wait for and the sequences that are computed.

The scheduler knows the computed sequences only, the core's tables the choices only; what happens to one is brought to
the other here. Engine process, no torch.
"""
from __future__ import annotations

from collections.abc import Iterable

from engine_proc.beams import BeamSearch
from engine_proc.failures import item_error
from engine_proc.plan import ItemResult
from engine_proc.request import Sequence
from engine_proc.scheduler import Scheduler
from pipeline.errors import QuartetError
from pipeline.messages import Finish, Logprobs

Done = tuple[Sequence, Logprobs | None]          # a choice that has ended, and the log-probabilities of its output


class Searches:
    """Every search with a choice that has not ended."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._open: set[BeamSearch] = set()
        self._marked: list[Sequence] = []
        self._next_rid = -1                      # of computed sequences: no rid of a choice is negative

    def open(self, choices: list[Sequence], arrival: int) -> None:
        """Begin a search for the choices of one Add. Its sequences take the places from `arrival` on."""
        search = BeamSearch(choices, arrival, self._rid)
        self._open.add(search)
        self._add(search.sequences)

    def collected(self, seq: Sequence, result: ItemResult) -> list[Done]:
        """A sequence of a search has ended, by its one step or otherwise. The choices that end with it."""
        search = seq.search
        assert search is not None
        if search not in self._open:
            return []
        if seq.finish is not Finish.LENGTH:
            for choice in search.choices:
                choice.finish, choice.error = Finish.ERROR, seq.error or item_error("internal_error")
            done: list[Done] = [(choice, None) for choice in search.choices]
            self._close(search)
            return done
        self._add(search.collected(seq, result))
        if not search.over:
            return []
        done = search.results()
        self._close(search)
        return done

    def mark(self, choice: Sequence, how: Finish, error: QuartetError | None) -> None:
        """`choice` is to end so, whatever was found."""
        if not (choice.finish or choice.mark):
            choice.mark, choice.error = how, error
            self._marked.append(choice)

    def reap(self) -> list[Sequence]:
        """End the marked choices. A search ends with its last one."""
        ended, self._marked = [choice for choice in self._marked if not choice.finish], []
        for choice in ended:
            search = choice.search
            assert search is not None
            choice.finish = choice.mark
            search.choices.remove(choice)
            if not search.choices:
                self._close(search)
        return ended

    @property
    def marked(self) -> bool:
        return bool(self._marked)

    def _close(self, search: BeamSearch) -> None:
        self._open.discard(search)
        search.choices = []
        for seq in search.sequences:
            self._scheduler.mark(seq, Finish.ABORT)
        self._scheduler.free_retired()

    def _add(self, sequences: Iterable[Sequence]) -> None:
        for seq in sequences:
            self._scheduler.add(seq)

    def _rid(self) -> int:
        self._next_rid -= 1
        return self._next_rid

    def assert_invariants(self, computed: list[Sequence]) -> list[Sequence]:
        """`computed`: the scheduler's sequences of searches. The choices that are waited for."""
        for seq in computed:
            assert seq.search in self._open or seq.mark
        assert all(search.choices and not search.over for search in self._open)
        return [choice for search in self._open for choice in search.choices]

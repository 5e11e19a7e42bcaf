"""The engine's loop: messages in, one step at a time through scheduler and runner, outputs out.

Engine process, main thread; implements `pipeline.transport.Logic`, so that tests drive it in one process. Imports no
torch: the runner is given. Aborts, stop strings and deadlines mark; a sequence changes only where a step is collected
or, if no step holds it, where the marked ones are reaped. Must never block on a peer.
"""
from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from engine_proc.admission import Limits, Tombstones, check, sequences
from engine_proc.blocks import BlockPool
from engine_proc.failures import failure_of
from engine_proc.frontends import aborted, by_frontend
from engine_proc.grammars import Grammars, load_vocabulary
from engine_proc.outputs import Outputs
from engine_proc.plan import ItemResult, Runner, StepPlan
from engine_proc.request import Sequence
from engine_proc.scheduler import Scheduler, order
from engine_proc.searches import Searches
from engine_proc.stats import Stats
from pipeline.config import ServerConfig
from pipeline.errors import QuartetError
from pipeline.ids import child, family, frontend_index, outlived
from pipeline.messages import Abort, Add, Adds, Finish, Kind, Load, StopHit
from pipeline.schema import BadFrame
from pipeline.transport import Sender

RETRY_NS = 5_000_000             # how soon to plan again when nothing that waits could start
GRAMMAR_NS = 1_000_000           # how soon to look whether a grammar is compiled
MAX_FAILED_STEPS = 3             # in a row; then the process ends and its successor starts afresh
MAX_BACKLOG = 4                  # times max_waiting: continuations are not refused, but left in the socket
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _LaunchFailed:
    """The handle of a step that was not launched: collected in its turn, after the steps ahead of it."""

    error: Exception


class EngineCore:
    """One engine process around one runner. `clock` gives monotonic nanoseconds."""

    def __init__(self, config: ServerConfig, index: int, epoch: int, runner: Runner, sender: Sender,
                 clock: Callable[[], int], registry: CollectorRegistry | None = None,
                 grammars: Grammars | None = None) -> None:
        model = config.models[config.engines()[index]]
        engine = model.engine
        self.index, self.epoch, self.runner, self._clock = index, epoch, runner, clock
        pool = BlockPool(runner.num_blocks, runner.block_size, engine.enable_prefix_caching)
        self.scheduler = Scheduler(engine, pool, self._start, runner.release, runner.context_cost)
        self.searches = Searches(self.scheduler)
        self.limits = Limits(
            max_model_len=model.max_model_len, capacity=pool.capacity, vocab_size=runner.vocab_size,
            eos_ids=model.eos_ids, max_waiting=engine.max_waiting)
        self.outputs = Outputs(index, epoch, sender)
        self.stats = Stats(registry or CollectorRegistry(), model.names[0], index, self.scheduler, model.max_model_len)
        self._aborted = Tombstones(65_536)                   # ids whose abort came and whose Add did not
        self._ended = Tombstones(4096)                       # families that ended lately: what repeats them is dropped
        self.families: dict[int, list[Sequence]] = {}        # family id -> its unfinished sequences
        self.sequences: dict[int, Sequence] = {}             # rid -> unfinished sequence
        self.grammars = grammars or Grammars(lambda: load_vocabulary(model, runner.vocab_size))
        self._in_flight: deque[tuple[StepPlan, object]] = deque()
        self._peers: dict[tuple[Kind, int], int] = {}        # newest epoch known
        self._num_frontends, self._num_detoks = config.frontends, config.detokenizers
        self._census_ns = int(config.timeouts.census_s * 1e9)
        self._next_census_ns = clock() + self._census_ns
        self._next_deadline_ns: int | None = None            # of the sequences held; may be that of one that ended
        self._retry_ns: int | None = None                    # nothing could be planned: try again then
        self._arrival = 0
        self._failed_steps = 0

    # ---- messages ------------------------------------------------------------------------------------------------

    def handle(self, message: Any) -> None:
        self._retry_ns = None
        if isinstance(message, Adds):
            for add in message.items:
                self._add(add)
        elif isinstance(message, Abort):
            for rid in aborted(message):
                self._abort(rid)
        elif isinstance(message, StopHit):
            seq = self.sequences.get(message.rid)
            if seq is None:
                self.stats.drop("unknown_stop")              # it ended meanwhile
            elif not seq.mark and seq.search is None:
                seq.num_kept = message.n_tokens
                self.scheduler.mark(seq, Finish.STOP_STRING)
        else:
            raise BadFrame(f"{type(message).__name__} is not for an engine")

    def _add(self, add: Add) -> None:
        route, rid, now = add.route, add.rid, self._clock()
        if ((route.engine, route.engine_epoch) != (self.index, self.epoch) or route.detok >= self._num_detoks
                or frontend_index(rid) >= self._num_frontends):
            return self.stats.drop("misrouted")              # meant for our predecessor
        if route.detok_epoch < self._peers.get((Kind.DETOKENIZER, route.detok), 0):
            return self.stats.drop("detokenizer_gone")       # its frontend sees that too, and submits it again
        if self._orphaned(rid):
            return self.stats.drop("frontend_gone")
        if family(rid) in self.families or self._ended.holds(family(rid), now):
            return self.stats.drop("duplicate")
        if self._aborted.holds(rid, now):
            return self.stats.drop("aborted")
        try:
            check(add, self.limits, self.scheduler.num_waiting)
        except QuartetError as error:
            self.stats.refused.inc()
            self._ended.add(family(rid), now)
            self.outputs.fail(rid, error)
            return None
        children = [0, *(j for j in range(1, add.n) if not self._aborted.holds(rid + j, now))]
        group = sequences(add, children, self.limits, self._arrival, now)
        self.outputs.admit(rid, add.ids)
        self.families[family(rid)] = list(group)
        beam = add.sampling.beam if not group[0].finish else None
        held = []
        for seq in group:
            self.sequences[seq.rid] = seq
            if seq.finish:
                self._finish(seq, now)
                self.outputs.emit(seq)
            elif add.sampling.grammar is not None and add.sampling.max_tokens:
                held.append(seq)
                self.scheduler.held[seq.rid] = seq
            elif beam is None:
                self.scheduler.add(seq)
        if held:
            self.grammars.submit(held)
        elif beam is not None:
            self.searches.open(group, self._arrival)
        self._arrival += add.n if beam is None else beam.width
        if add.deadline_ns:
            self._next_deadline_ns = min(add.deadline_ns, self._next_deadline_ns or add.deadline_ns)
        return None

    def _let_in(self) -> None:
        """Sequences whose grammars are compiled may start; those whose grammars failed end."""
        for group, error in self.grammars.take():
            leader: Sequence | None = None
            for seq in group:
                if error is not None:
                    self.scheduler.mark(seq, Finish.ERROR, error)
                elif seq.constraint is not None and seq.constraint.complete:
                    self.scheduler.mark(seq, Finish.COMPLETE)    # its end was all that was lost
                elif not seq.finish and not seq.mark:
                    del self.scheduler.held[seq.rid]
                    seq.leader = None if seq.unscored else leader
                    leader = leader or seq
                    self.scheduler.add(seq)

    def _abort(self, rid: int) -> None:
        """A family's id (child 0) covers its children."""
        group = self.families.get(family(rid))
        if group is None:
            self._aborted.add(rid, self._clock())            # it may have overtaken its Add
            self.stats.drop("unknown_abort")
        else:
            self._mark([seq for seq in group if child(rid) == 0 or seq.rid == rid])

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        if epoch <= self._peers.get((kind, index), 0):
            return
        self._peers[kind, index] = epoch
        self._retry_ns = None
        self.outputs.peer_restarted(kind, index, epoch)
        if kind is Kind.FRONTEND:
            self._mark(seq for seq in self.sequences.values() if self._orphaned(seq.rid))
        elif kind is Kind.DETOKENIZER:
            self._mark(seq for seq in self.sequences.values()
                       if seq.route.detok == index and seq.route.detok_epoch < epoch)

    def _orphaned(self, rid: int) -> bool:
        """Whether the frontend process that made `rid` is gone."""
        known = self._peers.get((Kind.FRONTEND, frontend_index(rid)))
        return known is not None and outlived(rid, known)

    def _mark(self, seqs: Iterable[Sequence], how: Finish = Finish.ABORT, error: QuartetError | None = None) -> None:
        for seq in seqs:
            (self.scheduler if seq.search is None else self.searches).mark(seq, how, error)

    # ---- the loop ------------------------------------------------------------------------------------------------

    def turn(self) -> None:
        """Plan and launch a step, or collect the oldest; then tell everyone."""
        now = self._clock()
        if self._next_deadline_ns is not None and now >= self._next_deadline_ns:
            self._expire(now)
        moved = False
        if self.grammars.ready:
            self._let_in()
        if self.scheduler.marked or self.searches.marked:
            moved = self._reap(now)
        plan = None
        if not (self._in_flight and isinstance(self._in_flight[-1][1], _LaunchFailed)):
            self.scheduler.stalled = self.outputs.stalled
            plan = self.scheduler.plan()
        if plan is not None:
            self._launch(plan)
        if self._in_flight and (plan is None or len(self._in_flight) > self.runner.depth):
            self._collect()
            moved = True
        now = self._clock()
        self._retry_ns = None if plan is not None or moved else now + RETRY_NS
        if now >= self._next_census_ns:
            self._census(now)
        for box in self.outputs.flush(now):
            self.stats.stuck_peers.inc()
            log.error("%s.%d does not take its output: its sequences end", box.to.kind.name.lower(), box.to.index)
            self._mark(seq for seq in self.sequences.values() if (
                frontend_index(seq.rid) == box.to.index if box.to.kind is Kind.FRONTEND
                else (seq.route.detok, seq.route.detok_epoch) == (box.to.index, box.epoch)))

    def _reap(self, now: int) -> bool:
        """End what is marked and in no step; whether there was any."""
        ended = (*self.searches.reap(), *self.scheduler.reap())
        for seq in ended:
            if seq.rid < 0:
                self._searched(seq, ItemResult(), now)
            else:
                self._finish(seq, now)
                self.outputs.emit(seq)
        return bool(ended)

    def _launch(self, plan: StepPlan) -> None:
        try:
            handle = self.runner.launch(plan)
        except Exception as error:
            handle = _LaunchFailed(error)
        self._in_flight.append((plan, handle))

    def _collect(self) -> None:
        plan, handle = self._in_flight.popleft()
        try:
            if isinstance(handle, _LaunchFailed):
                raise handle.error
            results = self.runner.collect(handle)
        except Exception as error:
            self._step_failed(plan, error)
            return
        self._failed_steps = 0
        now, emit = self._clock(), self.outputs.emit
        generated = prompt_tokens = 0
        for seq, result in self.scheduler.collect(plan, results):
            if seq.rid < 0:
                generated += self._searched(seq, result, now)
                continue
            if result.token is not None:
                generated += 1
                if not seq.first_token_ns:
                    seq.first_token_ns = now
                    if child(seq.rid) == 0 and not seq.num_history:
                        prompt_tokens += seq.num_prompt
            if seq.finish:
                self._finish(seq, now)
            emit(seq, result.logprobs)
        self.stats.step(plan.num_tokens, generated, prompt_tokens)

    def _searched(self, seq: Sequence, result: ItemResult, now: int) -> int:
        """A sequence of a beam search has ended; the output tokens of the choices that end with it."""
        generated = 0
        for choice, logprobs in self.searches.collected(seq, result):
            choice.first_token_ns = now
            generated += choice.num_output
            self._finish(choice, now)
            self.outputs.emit(choice, logprobs)
        return generated

    def _step_failed(self, plan: StepPlan, error: Exception) -> None:
        """The runner itself failed: end what the step held. The steps launched after it rest on it and go with it."""
        plans = [plan]
        while self._in_flight:
            later, handle = self._in_flight.popleft()
            plans.append(later)
            if not isinstance(handle, _LaunchFailed):
                with suppress(Exception):
                    self.runner.collect(handle)
        held = sorted({seq for each in plans for seq in self.scheduler.abandon(each)}, key=order)
        self._failed_steps += 1
        self.stats.step_errors.inc()
        log.error("step %d failed with %d sequences", plan.number, len(held), exc_info=error)
        if self._failed_steps >= MAX_FAILED_STEPS:
            raise error
        failure = failure_of(error)
        if failure.code == "out_of_memory":
            for seq in held[:-1]:
                self.scheduler.preempt(seq)
            held = held[-1:]
        for seq in held:
            self.scheduler.mark(seq, Finish.ERROR, failure)

    def _start(self, seq: Sequence) -> None:
        """The scheduler's hook: `seq` gets blocks now; the runner may refuse it."""
        self.runner.admit(seq)
        seq.started_ns = seq.started_ns or self._clock()

    def _finish(self, seq: Sequence, now: int) -> None:
        """Forget a sequence that has ended; its blocks are the scheduler's matter, its last record the outputs'."""
        del self.sequences[seq.rid]
        group = self.families[family(seq.rid)]
        group.remove(seq)
        if not group:
            del self.families[family(seq.rid)]
            self._ended.add(family(seq.rid), now)
        self.stats.finished(seq, now)
        if seq.finish is Finish.ERROR:
            assert seq.error is not None
            self.outputs.fail(seq.rid, seq.error)

    def _expire(self, now: int) -> None:
        error = QuartetError("timeout", "The request did not end within its time limit.")
        later = []
        for seq in self.sequences.values():
            if seq.deadline_ns and seq.deadline_ns <= now:
                self._mark([seq], Finish.ERROR, error)
            elif seq.deadline_ns:
                later.append(seq.deadline_ns)
        self._next_deadline_ns = min(later, default=None)

    def _census(self, now: int) -> None:
        self._next_census_ns = now + self._census_ns
        for frontend, rids in enumerate(by_frontend(self.sequences, self._num_frontends)):
            self.outputs.census(frontend, rids)

    # ---- for the stage -------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        scheduler = self.scheduler
        return bool(self._in_flight or scheduler.marked or self.searches.marked or self.grammars.ready
                    or (self._retry_ns is None and (scheduler.running or scheduler.waiting)))

    def accepting(self) -> bool:
        return self.scheduler.num_waiting < MAX_BACKLOG * self.limits.max_waiting

    def next_timer_ns(self) -> int | None:
        timers = [self._next_census_ns]
        if self._next_deadline_ns is not None:
            timers.append(self._next_deadline_ns)
        if self._retry_ns is not None and (self.scheduler.running or self.scheduler.waiting):
            timers.append(self._retry_ns)
        if self.outputs.retry_ns is not None:
            timers.append(self.outputs.retry_ns)
        if self.grammars.num_pending:
            timers.append(self._clock() + GRAMMAR_NS)
        return min(timers)

    def load(self) -> Load:
        scheduler, pool = self.scheduler, self.scheduler.pool
        return Load(
            running=len(scheduler.running), waiting=scheduler.num_waiting, waiting_tokens=scheduler.waiting_tokens,
            kv_used=pool.num_used, kv_total=pool.num_blocks - 1)

    def assert_invariants(self) -> None:
        """Called by tests after each turn."""
        dying = {item.seq for plan, _ in self._in_flight for item in plan.items if item.seq.finish}
        self.scheduler.assert_invariants(list(dying))
        held = [*self.scheduler.running, *self.scheduler.waiting,
                *(seq for group in self.scheduler.parked.values() for seq in group)]
        computed = [seq for seq in held if seq.search is not None]
        held = [seq for seq in held if seq.search is None] + self.searches.assert_invariants(computed)
        assert {seq.rid: seq for seq in held} == self.sequences
        assert sorted(seq.rid for group in self.families.values() for seq in group) == sorted(self.sequences)
        assert all(self.families.values()) and not any(seq.finish for seq in held)

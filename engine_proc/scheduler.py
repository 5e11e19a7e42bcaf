"""Decides what each step computes: which sequences run, how many tokens of each, and in which KV blocks.

Engine process, no torch. `plan` reserves blocks and advances `num_scheduled` by counts, never by token values;
`collect` is the only place where a step's tokens, finishes and released leases take effect, and `reap` does the same
for sequences that no step holds. Aborts, stop strings and deadlines only `mark`. Must never touch what is in flight.
"""
from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable

from engine_proc.blocks import BlockPool
from engine_proc.failures import item_error
from engine_proc.plan import ItemResult, PlanItem, StepPlan
from engine_proc.request import Sequence
from engine_proc.room import Room
from pipeline.config import EngineConfig
from pipeline.errors import QuartetError
from pipeline.messages import Finish

LOOK_AHEAD = 64               # waiting sequences passed over for one that may start
ENDS_AT_ONCE = (Finish.ABORT, Finish.STOP_STRING)      # marks that leave no room for the step's token
Hook = Callable[[Sequence], None]


def order(seq: Sequence) -> tuple[int, int]:
    """Who goes first; the newest of the lowest priority is pre-empted first."""
    return seq.priority, seq.arrival


class Scheduler:
    """Running, waiting and parked sequences over one block pool.

    `admit` gives a sequence its place in the runner's sampler and may raise; `release` takes it back. `context_cost`: see
    `plan.Runner`.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, admit: Hook = lambda seq: None,
                 release: Hook = lambda seq: None, context_cost: float = 0.0) -> None:
        self.pool = pool
        self.context_cost = context_cost
        self.by_priority = config.scheduling_policy == "priority"
        self.max_step_tokens = config.max_step_tokens
        self.max_num_seqs = min(config.max_num_seqs, config.max_step_tokens)    # every running one decodes each step
        self.max_prefill_chunk = config.max_prefill_chunk
        self.max_mixed_prefill = config.max_mixed_prefill
        self.running: list[Sequence] = []            # these hold blocks and a slot; in `order`
        self.waiting: list[Sequence] = []            # in `order`
        self.held: dict[int, Sequence] = {}          # rid -> one whose grammar is being compiled
        self.parked: dict[int, list[Sequence]] = {}  # leader's rid -> siblings that wait for its prompt
        self.marked: list[Sequence] = []
        self.retired: list[Sequence] = []            # ended, but those that continue them may share their blocks
        self.num_parked = 0
        self.num_dying = 0                           # finished, but a step in flight still holds their blocks
        self.num_steps_in_flight = 0
        self.num_steps = 0
        self.waiting_tokens = 0
        self.num_preemptions = 0
        self.cache_queries = self.cache_hits = 0     # prompt tokens looked up and found in the prefix cache
        self.stalled: frozenset[int] = frozenset()   # detokenizers that cannot keep up: their prompts do not start
        self._admit, self._release = admit, release

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + self.num_parked + len(self.held)

    # ---- coming and going ----------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue `seq`; a sibling (`seq.leader`) waits until its leader's prompt is computed."""
        assert len(seq.tokens) <= self.pool.capacity, "refused at admission"
        if not self.by_priority:
            seq.priority = 0
        if seq.leader is not None and seq.search is None:
            self.parked.setdefault(seq.leader.rid, []).append(seq)
            self.num_parked += 1
        else:
            self._enqueue(seq)

    def mark(self, seq: Sequence, how: Finish, error: QuartetError | None = None) -> None:
        """`seq` is to end so, as soon as no step holds it. An abort outranks the rest, else the first mark counts."""
        if seq.finish or (seq.mark and how is not Finish.ABORT):
            return
        if not seq.mark:
            self.marked.append(seq)
        seq.mark, seq.error = how, error

    def reap(self) -> list[Sequence]:
        """End the marked sequences that no step holds; `collect` ends the others."""
        ended, held = [], []
        for seq in reversed(self.marked):             # siblings ahead of their leader
            if seq.num_in_flight:
                held.append(seq)
            elif not seq.finish:
                self._end(seq, seq.mark)
                ended.append(seq)
        self.marked = held
        return ended

    # ---- planning ------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can be scheduled before a step in flight is collected."""
        preemptions, running, size = self.num_preemptions, self.running, self.pool.block_size
        singles: list[PlanItem] = []
        chunks: list[PlanItem] = []
        prefills = []
        index = 0
        while index < len(running):
            seq = running[index]
            known, scheduled = len(seq.tokens), seq.num_scheduled
            if seq.mark:
                pass                                  # in flight: ends when that is collected
            elif known - scheduled > 1:
                prefills.append(seq)
            elif scheduled < known or (seq.constraint is None and scheduled + 1 < seq.max_total):
                if scheduled == len(seq.block_table) * size:
                    if not self._make_room(index):
                        break                         # nobody newer goes on: they drain, then they can be pre-empted
                    seq.block_table += self.pool.allocate(1)
                singles.append(self._take(seq, 1))
            index += 1
        room = Room(self.max_step_tokens - len(singles))
        if singles:                                   # a prompt must not hold up the others' next token for long
            room.effort = self.max_mixed_prefill
        for seq in prefills:
            self._take_chunk(seq, room, singles, chunks)
        copies: list[tuple[int, int]] = []
        if self.num_preemptions == preemptions and self.waiting:
            self._start_waiting(room, singles, chunks, copies)
        if self.retired:
            self.free_retired()
            if self.waiting and not (singles or chunks):      # there may have been no room beside them
                self._start_waiting(room, singles, chunks, copies)
        if not singles and not chunks:
            return None
        self.num_steps += 1
        self.num_steps_in_flight += 1
        return StepPlan(number=self.num_steps, items=singles + chunks, copies=copies)

    def free_retired(self) -> None:
        """Whoever was to share their blocks has had the chance."""
        for seq in self.retired:
            self.pool.free(seq.block_table)
            seq.block_table = []
        self.retired = []

    def _take(self, seq: Sequence, count: int) -> PlanItem:
        start = seq.num_scheduled
        seq.num_scheduled = end = start + count
        seq.num_in_flight += 1
        return PlanItem(
            seq=seq, start=start, count=count, sample=end >= len(seq.tokens) and end < seq.max_total,
            prompt_logprobs=start < seq.num_prompt - 1 and seq.unscored and start >= seq.num_prompt_scored)

    def _take_chunk(self, seq: Sequence, room: Room, singles: list[PlanItem], chunks: list[PlanItem]) -> None:
        """Schedule a piece of a prompt."""
        count = min(len(seq.tokens) - seq.num_scheduled, self.max_prefill_chunk)
        if seq.unscored and seq.num_scheduled < seq.num_prompt_scored:   # pre-empted: score no position twice
            count = min(count, seq.num_prompt_scored - seq.num_scheduled)
        count = room.take(count, 1.0 + self.context_cost * seq.num_scheduled)
        if count > 0:
            (singles if count == 1 else chunks).append(self._take(seq, count))

    def _start_waiting(self, room: Room, singles: list[PlanItem], chunks: list[PlanItem],
                       copies: list[tuple[int, int]]) -> None:
        skipped = 0
        while (room.left and skipped < min(len(self.waiting), LOOK_AHEAD)
               and len(self.running) + self.num_dying < self.max_num_seqs
               and not (self.running and self.running[0].alone)):
            seq = self.waiting[skipped]
            if seq.mark or seq.route.detok in self.stalled:
                skipped += 1
                continue
            if seq.alone and (self.running or self.num_steps_in_flight):
                return                                # let the others finish first
            if not self._start(seq, copies):
                return
            if not seq.mark:                          # the runner took it
                self._take_chunk(seq, room, singles, chunks)

    def _start(self, seq: Sequence, copies: list[tuple[int, int]]) -> bool:
        """Move `seq` from waiting to running with blocks for all of its tokens; False when they are not there."""
        pool = self.pool
        shared, partial, computed = self._prefix(seq)
        total = pool.blocks_for(len(seq.tokens))
        spare = len(self.running)                     # each running one may soon need a block more
        if total - len(shared) + pool.num_idle(shared) + spare > pool.num_free:
            return False
        try:
            self._admit(seq)
        except Exception as error:                    # one request's boundary
            self.mark(seq, Finish.ERROR, error if isinstance(error, QuartetError) else item_error("internal_error"))
            return True
        pool.share(shared)
        seq.block_table = shared + pool.allocate(total - len(shared))
        if partial:
            copies.append((partial, seq.block_table[len(shared)]))
        self._dequeue(seq)
        insort(self.running, seq, key=order)
        seq.num_computed = seq.num_scheduled = computed
        if not seq.preemptions and not (seq.search is not None and seq.leader is not None):
            seq.num_cached = seq.leader.num_cached if seq.leader else min(computed, seq.num_prompt)
            self.cache_queries += seq.num_prompt
            self.cache_hits += seq.num_cached
        seq.leader = None
        return True

    def _prefix(self, seq: Sequence) -> tuple[list[int], int, int]:
        """Blocks that hold the beginning of `seq` already, one whose beginning is to be copied (0: none), and how many
        tokens they hold together."""
        if seq.unscored:
            return [], 0, 0
        pool, leader = self.pool, seq.leader
        reusable = (seq.num_prompt if seq.search is None else len(seq.tokens)) - 1
        if pool.caching:
            pool.extend_hashes(seq.block_hashes, seq.tokens, seq.salt)
        found = pool.lookup(seq.block_hashes, seq.tokens)
        if (leader is not None and leader.block_table
                and leader.num_computed >= reusable > len(found) * pool.block_size):
            full, rest = divmod(reusable, pool.block_size)
            return leader.block_table[:full], leader.block_table[full] if rest else 0, reusable
        return found, 0, len(found) * pool.block_size

    def _make_room(self, index: int) -> bool:
        """A free block for `running[index]`, pre-empting newer sequences; False when it has to wait or went itself."""
        running = self.running
        while not self.pool.num_free:
            victim = next((seq for seq in reversed(running[index + 1:]) if not seq.num_in_flight), None)
            if victim is None:
                if 0 < index == len(running) - 1 and not running[index].num_in_flight:
                    self.preempt(running[index])
                return False
            self.preempt(victim)
        return True

    def preempt(self, seq: Sequence) -> None:
        """Take the blocks of a running sequence; its tokens stay, their KV is computed again later."""
        assert not seq.num_in_flight
        self.running.remove(seq)
        self._give_back(seq)
        seq.num_computed = seq.num_scheduled = 0
        seq.preemptions += 1
        self.num_preemptions += 1
        self._enqueue(seq)

    # ---- collecting ----------------------------------------------------------------------------------------------

    def collect(self, plan: StepPlan, results: list[ItemResult]) -> list[tuple[Sequence, ItemResult]]:
        """Apply a step. Those that ended or got a token, with their results; surplus results are dropped."""
        size, events = self.pool.block_size, []
        self.num_steps_in_flight -= 1
        for item, result in zip(plan.items, results, strict=True):
            seq, end = item.seq, item.start + item.count
            seq.num_in_flight -= 1
            if seq.finish:
                self._let_go(seq)
                continue
            seq.num_computed = end
            if seq.mark in ENDS_AT_ONCE:
                self._end(seq, seq.mark)
                events.append((seq, ItemResult()))
                continue
            if result.error is not None or (item.sample and result.token is None):
                known = None if seq.constraint is None else seq.constraint.error
                seq.error = known or item_error(result.error or "internal_error")
                self._end(seq, Finish.ERROR)
                events.append((seq, ItemResult()))
                continue
            first, last = item.start // size, end // size
            if last > first:
                self._register(seq, first, last)
            if item.prompt_logprobs:
                seq.num_prompt_scored = end
                if result.prompt_logprobs is not None:
                    seq.prompt_logprobs.append(result.prompt_logprobs)
            if self.parked and end >= seq.num_prompt and seq.rid in self.parked:
                self._unpark(seq)
            finish = Finish.RUNNING
            if item.sample:
                assert result.token is not None
                seq.tokens.append(result.token)
                finish = seq.verdict()
            elif end >= seq.max_total:
                finish = Finish.LENGTH                # a prompt to which nothing is to be added
            if not finish:
                finish = seq.mark                     # the deadline
            if finish:
                self._end(seq, finish)
            if finish or item.sample:
                events.append((seq, result))
        return events

    def abandon(self, plan: StepPlan) -> list[Sequence]:
        """The step failed or followed one that did: take its leases back. The unfinished sequences it held, which
        the caller ends or pre-empts: their KV and sampler state are not to be trusted."""
        self.num_steps_in_flight -= 1
        left = []
        for item in plan.items:
            item.seq.num_in_flight -= 1
            if item.seq.finish:
                self._let_go(item.seq)
            else:
                item.seq.num_scheduled = item.seq.num_computed
                left.append(item.seq)
        return left

    def _register(self, seq: Sequence, first: int, last: int) -> None:
        """Blocks first .. last - 1 of `seq` are computed: others may find them."""
        pool, size = self.pool, self.pool.block_size
        if pool.caching:
            if len(seq.block_hashes) < last:
                pool.extend_hashes(seq.block_hashes, seq.tokens, seq.salt)
            for i in range(first, last):
                pool.register(seq.block_table[i], seq.block_hashes[i], seq.tokens[i * size:(i + 1) * size].tobytes())

    # ---- tables --------------------------------------------------------------------------------------------------

    def _enqueue(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=order)
        self.waiting_tokens += len(seq.tokens)

    def _dequeue(self, seq: Sequence) -> None:
        index = bisect_left(self.waiting, order(seq), key=order)
        assert self.waiting[index] is seq
        del self.waiting[index]
        self.waiting_tokens -= len(seq.tokens)

    def _unpark(self, leader: Sequence) -> None:
        """The leader's prompt is computed: its siblings may start. If it ended before, the first one leads the rest."""
        group = self.parked.pop(leader.rid)
        self.num_parked -= len(group)
        if not leader.finish:
            for seq in group:
                self._enqueue(seq)
            return
        first, *rest = group
        first.leader = None
        for seq in (first, *rest):
            seq.leader = first if seq is not first else None
            self.add(seq)

    def _end(self, seq: Sequence, finish: Finish) -> None:
        """The one way out, from whichever table holds `seq`."""
        seq.finish = finish
        leader = seq.leader
        if seq.rid in self.held:
            del self.held[seq.rid]
        elif seq.block_table:
            self.running.remove(seq)
            if seq.num_in_flight:
                self.num_dying += 1
            elif seq.search is not None and finish is Finish.LENGTH:
                self._release(seq)
                self.retired.append(seq)
            else:
                self._give_back(seq)
        elif leader is not None and seq in self.parked.get(leader.rid, ()):
            self.parked[leader.rid].remove(seq)
            self.num_parked -= 1
            if not self.parked[leader.rid]:
                del self.parked[leader.rid]
        else:
            self._dequeue(seq)
        seq.leader = None
        if seq.rid in self.parked:
            self._unpark(seq)

    def _let_go(self, seq: Sequence) -> None:
        """A step that held a finished sequence is over."""
        if not seq.num_in_flight:
            self.num_dying -= 1
            self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        self.pool.free(seq.block_table)
        seq.block_table = []
        self._release(seq)

    # ---- tests ---------------------------------------------------------------------------------------------------

    def assert_invariants(self, dying: list[Sequence] | None = None) -> None:
        """`dying`: finished sequences that steps in flight hold, for a caller that knows them."""
        size = self.pool.block_size
        assert self.running == sorted(self.running, key=order) and self.waiting == sorted(self.waiting, key=order)
        assert self.num_parked == sum(map(len, self.parked.values()))
        assert all(self.parked.values())
        assert self.waiting_tokens == sum(len(seq.tokens) for seq in self.waiting)
        assert len(self.running) + self.num_dying <= self.max_num_seqs
        assert all(seq.finish and seq.search is not None and seq.slot < 0 for seq in self.retired)
        assert len(self.running) == 1 or not any(seq.alone for seq in self.running)
        for seq in self.running:
            assert not seq.finish and seq.leader is None
            assert seq.num_computed <= seq.num_scheduled <= len(seq.block_table) * size
            assert seq.num_in_flight or seq.num_computed == seq.num_scheduled
            assert len(seq.tokens) <= seq.max_total
        queued = [*self.waiting, *self.held.values(), *(seq for group in self.parked.values() for seq in group)]
        for seq in queued:
            assert not seq.finish and not seq.block_table and not seq.num_in_flight and not seq.num_scheduled
        if dying is None:
            assert self.num_dying == 0 or self.num_steps_in_flight
        else:
            assert self.num_dying == len(dying)
        if dying is not None or not self.num_dying:
            self.pool.assert_invariants([seq.block_table for seq in (*self.running, *self.retired, *(dying or ()))])

"""Random interleavings of everything that can happen to an engine, judged by one oracle.

Requests, families, continuations, aborts (early, late, unknown, repeated), stop hits, deadlines, peers that restart or
stop reading, items and steps that fail, pools too small for their load. At the end every choice that was accepted has
ended exactly once, every text is what the sequence gives alone (or a beginning of it, where something cut it), and
nothing is held. The peers of `World` check the protocol at every message, `turn` the invariants of every table.
"""
from __future__ import annotations

import random

import pytest

from pipeline.ids import RidMaker, family, frontend_index
from pipeline.messages import Adds, Finish, Kind, StopHit, unpack_ids
from pipeline.transport import Address
from tests.engine_proc.world import DetokPeer, FrontendPeer, World

CUT = (Finish.ABORT, Finish.ERROR, Finish.STOP_STRING)


class Storm:
    """One random run."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.small_queues = rng.random() < 0.5
        self.world = World(
            rng.choice([0, 1]), num_kv_blocks=rng.choice([8, 14, 40]), max_num_seqs=rng.randint(1, 6),
            max_step_tokens=rng.randint(6, 24), max_prefill_chunk=rng.randint(1, 16),
            max_model_len=rng.choice([24, 64]),
            enable_prefix_caching=rng.random() < 0.8, scheduling_policy=rng.choice(["fcfs", "priority"]),
            max_waiting=rng.choice([3, 100]), null_script=rng.choice(["hash", "hash;eos_after=5", "count"]),
            max_pending=400 if self.small_queues else 1 << 20)
        self.origin: dict[int, int] = {}         # rid of a choice -> rid of the choice that it continues (or itself)
        self.spared: set[int] = set()            # rids to which nothing was done
        self.epochs = [1, 1]                     # of the frontends
        self.gone: list[DetokPeer] = []          # detokenizers that died
        self.allowed = {"invalid_value", "context_length_exceeded", "server_overloaded"}   # failures of the spared
        self.late = [self.world.make([3, 4]) for _ in range(2)]

    # ---- what can happen ---------------------------------------------------------------------------------------

    def submit(self) -> None:
        rng, world = self.rng, self.world
        prompt = list(range(rng.choice([0, 4, 9]))) + [rng.randrange(97) for _ in range(rng.randint(0, 12))]
        hurried, frontend, detok = rng.random() < 0.15, rng.randrange(2), rng.randrange(2)
        add = world.make(
            prompt, n=rng.choice([1, 1, 1, 2, 4]), frontend=frontend, detok=detok,
            max_tokens=rng.randint(0, 14), min_tokens=rng.choice([0, 0, 4]), seed=rng.randrange(4),
            stop_ids=[rng.randrange(97) for _ in range(rng.choice([0, 6]))], ignore_eos=rng.random() < 0.3,
            logprobs=rng.choice([None, 0, 2]), prompt_logprobs=rng.choice([None, None, None, 1]),
            deadline_ns=world.now + rng.randrange(4000) if hurried else 0, priority=rng.randint(-1, 1),
            salt=bytes([rng.randrange(2)]), alone=rng.random() < 0.05)
        if rng.random() < 0.1:
            world.abort(add.rid + rng.randrange(add.n))          # the abort is faster
            hurried = True
        world.post(add)
        for j in range(add.n):
            self.origin[add.rid + j] = add.rid + j
            if not hurried and not self.may_be_stuck(frontend, detok):
                self.spared.add(add.rid + j)
        if rng.random() < 0.1:
            world.engine.handle(Adds([add]))                     # replayed

    def abort(self) -> None:
        if self.origin:
            rid = self.rng.choice(list(self.origin))
            hit = {r for r in self.origin if r == rid or (rid == family(rid) and family(r) == rid)}
            self.spared -= hit
            self.world.abort(rid)

    def stop(self) -> None:
        live = [(rid, entry) for peer in self.world.detoks for rid, entry in peer.open.items()]
        if live:
            rid, entry = self.rng.choice(live)
            self.spared.discard(rid)
            self.world.engine.handle(StopHit(rid, self.rng.randint(0, len(entry.ids))))

    def lose_frontend(self) -> None:
        world, index = self.world, self.rng.randrange(2)
        self.epochs[index] += 1
        self.spared = {rid for rid in self.spared if frontend_index(rid) != index}
        world.frontends[index] = FrontendPeer()
        world.makers[index] = RidMaker(index, self.epochs[index])
        world.engine.peer_restarted(Kind.FRONTEND, index, self.epochs[index])

    def lose_detokenizer(self) -> None:
        """Its frontends see the new epoch too: they submit each choice again under a fresh id with what they have."""
        world, index = self.world, self.rng.randrange(2)
        old = world.detoks[index]
        self.gone.append(old)
        world.detoks[index] = DetokPeer(epoch=old.epoch + 1)
        world.engine.peer_restarted(Kind.DETOKENIZER, index, old.epoch + 1)
        for rid in [r for r in self.spared if not self.ended(r)]:
            add = world.adds[family(rid)]
            if add.route.detok == index and add.route.detok_epoch == old.epoch:
                self.spared.discard(rid)
                history = old.open[rid].output[0] if rid in old.open else list(unpack_ids(add.history))
                fresh = world.make([], frontend=frontend_index(rid), detok=index, choice=add.choice + rid - add.rid,
                                   history=history, priority=add.priority, salt=add.salt)
                fresh.ids, fresh.sampling = add.ids, add.sampling
                world.post(fresh)
                self.origin[fresh.rid] = self.origin[rid]
                self.spared.add(fresh.rid)

    def block(self) -> None:
        world = self.world
        kind = self.rng.choice([Kind.DETOKENIZER, Kind.DETOKENIZER, Kind.FRONTEND])
        world.refusing ^= {Address(kind, self.rng.randrange(2))}
        self.spared = {rid for rid in self.spared if self.ended(rid) or not self.may_be_stuck(
            frontend_index(rid), world.adds[family(rid)].route.detok)}

    def may_be_stuck(self, frontend: int, detok: int) -> bool:
        """Whether a choice of these may end because one of them takes nothing for too long."""
        return self.small_queues and bool(
            self.world.refusing & {Address(Kind.FRONTEND, frontend), Address(Kind.DETOKENIZER, detok)})

    def press(self) -> None:
        self.world.pressures = {Address(Kind.DETOKENIZER, i): self.rng.choice([0.0, 0.6]) for i in range(2)}

    def fail_item(self) -> None:
        if self.origin:
            rid = self.rng.choice(list(self.origin))
            self.spared.discard(rid)
            self.world.runner.errors[rid] = "numerical_error"

    def fail_step(self) -> None:
        """The next step fails, whatever is in it."""
        queue = self.rng.choice([self.world.runner.launch_errors, self.world.runner.collect_errors])
        if not queue:
            queue += [self.rng.choice([RuntimeError("lost"), MemoryError()]), None, None, None]
            self.allowed |= {"internal_error", "out_of_memory"}

    def wait(self) -> None:
        self.world.now += self.rng.choice([100, 1000, 6_000_000])

    def run(self, steps: int) -> None:
        actions = [self.submit] * 8 + [self.wait] * 3 + [
            self.abort, self.stop, self.lose_frontend, self.lose_detokenizer, self.block, self.press, self.fail_item,
            self.fail_step]
        for _ in range(steps):
            self.rng.choice(actions)()
            self.world.turn(self.rng.randrange(4))
        for add in self.late:
            self.world.engine.handle(Adds([add]))
        self.world.refusing.clear()
        self.world.pressures.clear()
        self.world.runner.launch_errors.clear()
        self.world.runner.collect_errors.clear()
        for _ in range(60):
            self.world.now += 6_000_000
            self.world.turn(2)
        self.world.run()

    # ---- the oracle ----------------------------------------------------------------------------------------------

    def ended(self, rid: int) -> bool:
        refused = family(rid) not in self.world.frontends[frontend_index(rid)].admitted
        return (any(rid in peer.closed for peer in [*self.world.detoks, *self.gone])
                or bool(self.world.failure(family(rid) if refused else rid)))

    def judge(self) -> None:
        world = self.world
        for rid in self.spared:
            assert self.ended(rid), f"{rid:x} was neither answered nor refused"
            assert world.failure(rid) is None or world.failure(rid) in self.allowed
        for peer in [*world.detoks, *self.gone]:
            for rid, entry in peer.closed.items():
                first = self.origin.get(rid)
                if first is None:
                    continue                     # one of `late`
                ids, finish = world.expected(family(first), first - family(first))
                failed = world.failure(rid)
                assert not failed or entry.finish is Finish.ERROR, "one terminal event"
                if entry.finish in CUT:
                    assert failed or rid not in self.spared
                    assert entry.output[0] == ids[:len(entry.output[0])]
                else:
                    assert entry.output == (ids, finish), f"{rid:x} differs from the same choice computed alone"


@pytest.mark.parametrize("seed", range(250))
def test_any_interleaving_ends_every_choice_once_with_its_own_text(seed: int) -> None:
    storm = Storm(seed)
    storm.run(60)
    storm.judge()

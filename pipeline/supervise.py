"""When a stage is restarted, given up or taken for hung: the launcher's policy as plain logic. No clock, no process.

All times are monotonic nanoseconds that the caller hands in, so that tests need no waiting.
"""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from pipeline.config import ServerConfig, TimeoutsConfig
from pipeline.messages import Beacon, Kind, State

S = 1_000_000_000                # nanoseconds in a second
CRASH_DEATHS = 5                 # so many deaths of one process (by default) ...
CRASH_WINDOW_NS = 60 * S         # ... within this are a crash loop
QUICK_NS = S                     # a death this soon after readiness counts as quick
FIRST_DELAY_NS = S // 10
MAX_DELAY_NS = 10 * S
GRACE_NS = 5 * S                 # after the launcher itself stood still, nobody is called hung before this


class Verdict(Enum):
    """What is wrong with a process that is alive."""

    FINE = "fine"
    HUNG = "has work and its loop has not turned"
    SILENT = "has given no sign of life"
    LATE = "was not ready in time"


@dataclass(slots=True)
class Life:
    """The runs of one stage process, one after the other; `epoch` counts them."""

    kind: Kind
    index: int
    epoch: int = 0
    started_ns: int = 0
    ready_ns: int | None = None          # when this run became ready
    restart_ns: int | None = None        # dead, and due to start again at this time
    condemned_ns: int | None = None      # when this run was told to die for a Verdict
    delay_ns: int = 0
    failed: bool = False                 # given up for good
    max_deaths: int = CRASH_DEATHS
    deaths: deque[int] = field(default_factory=deque)   # the last max_deaths of them

    @property
    def name(self) -> str:
        return f"{self.kind.name.lower()}.{self.index}"

    def started(self, now_ns: int) -> None:
        """A new run begins."""
        self.epoch += 1
        self.started_ns, self.ready_ns, self.restart_ns, self.condemned_ns = now_ns, None, None, None

    def died(self, now_ns: int) -> bool:
        """The run ended. Sets when the next one begins, or returns False: this is a crash loop."""
        quick = self.ready_ns is None or now_ns - self.ready_ns < QUICK_NS
        if not quick or not self.deaths:
            self.delay_ns = 0
        else:
            self.delay_ns = min(MAX_DELAY_NS, max(FIRST_DELAY_NS, 2 * self.delay_ns))
        self.deaths.append(now_ns)
        if len(self.deaths) > self.max_deaths:
            self.deaths.popleft()
        self.restart_ns = now_ns + self.delay_ns
        return len(self.deaths) < self.max_deaths or now_ns - self.deaths[0] > CRASH_WINDOW_NS

    def give_up(self) -> None:
        self.failed, self.restart_ns = True, None


def given_up_with(config: ServerConfig, kind: Kind, index: int) -> list[tuple[Kind, int]]:
    """Who is given up when (kind, index) is in a crash loop: everybody, but only the engines of its model where an
    engine loops and other models are served."""
    engines = config.engines()
    if kind is Kind.ENGINE and len(config.models) > 1:
        return [(Kind.ENGINE, i) for i, model in enumerate(engines) if model == engines[index]]
    return config.members()


def judge(life: Life, beacon: Beacon | None, heard_ns: int, now_ns: int, resumed_ns: int,
          timeouts: TimeoutsConfig) -> Verdict:
    """Whether a living process makes progress.

    beacon: its newest one, heard at `heard_ns`; None before the first. resumed_ns: when the launcher itself last came
    back from standing still (a stopped machine must not look like stopped stages).
    """
    hang_ns = int(timeouts.hang_s * S)
    if beacon is None or beacon.epoch != life.epoch or beacon.state == State.STARTING:
        return Verdict.LATE if now_ns - max(life.started_ns, resumed_ns) > timeouts.start_s * S else Verdict.FINE
    if now_ns - max(heard_ns, resumed_ns) > hang_ns:
        return Verdict.SILENT
    if beacon.pending and beacon.tick_age_ms * 1_000_000 > hang_ns and now_ns - resumed_ns > min(hang_ns, GRACE_NS):
        return Verdict.HUNG
    return Verdict.FINE

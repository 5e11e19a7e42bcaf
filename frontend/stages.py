"""What the frontend knows of the other stages, from their beacons: who is ready, who is healthy, whom to choose.

Reads the watcher's table of newest beacons and never changes it. Silence and old ticks affect routing and readiness
only; a death is a new epoch and nothing else (see frontend.table).
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.beacon import FRESH_S, Heard
from pipeline.config import DIRECT_TASKS, ServerConfig
from pipeline.messages import Kind, Load, Route, State

Latest = Mapping[tuple[Kind, int], Heard]
GONE_MARGIN_S = 30.0             # past hang_s: by then the launcher has replaced a stage, or given it up


class Stages:
    """The pipeline behind this frontend."""

    def __init__(self, config: ServerConfig, latest: Latest, now_ns: Callable[[], int]) -> None:
        self._config, self._latest, self._now_ns = config, latest, now_ns
        self._engine_model = config.engines()
        self._ever_ready: set[tuple[Kind, int]] = set()
        self._failed_models: frozenset[int] = frozenset()
        self._facts: dict[int, tuple[bytes, dict[str, Any]]] = {}    # engine -> facts as they came, and parsed
        self._started_ns = now_ns()

    def note(self) -> None:
        """The table of beacons may have changed."""
        for key, heard in self._latest.items():
            if heard.beacon.state == State.READY:
                self._ever_ready.add(key)
        launcher = self._latest.get((Kind.LAUNCHER, 0))
        if launcher is not None:
            self._failed_models = _failed_models(launcher.beacon.facts_json)

    # ---- one stage ----

    def ready(self, kind: Kind, index: int) -> bool:
        heard = self._latest.get((kind, index))
        return heard is not None and heard.beacon.state == State.READY

    def silent_s(self, kind: Kind, index: int) -> float:
        """Seconds since the last beacon (since our start where there was none)."""
        heard = self._latest.get((kind, index))
        return (self._now_ns() - (self._started_ns if heard is None else heard.at_ns)) / 1e9

    def healthy(self, kind: Kind, index: int) -> bool:
        """Ready, heard of lately, and turning where it has work."""
        heard = self._latest.get((kind, index))
        if heard is None or heard.beacon.state != State.READY or self.silent_s(kind, index) > FRESH_S:
            return False
        return not (heard.beacon.pending and heard.beacon.tick_age_ms > self._config.timeouts.hang_s * 1000)

    def gone(self, kind: Kind, index: int) -> bool:
        """Silent for so long that the launcher must have given it up."""
        return self.silent_s(kind, index) > self._config.timeouts.hang_s + GONE_MARGIN_S

    def all_ready(self) -> bool:
        """Whether every stage is ready, but for engines of models that were given up."""
        return all(self.ready(kind, index) or kind is Kind.ENGINE and self._engine_model[index] in self._failed_models
                   for kind, index in self._config.members() if kind is not Kind.FRONTEND)

    # ---- one model ----

    @property
    def num_engines(self) -> int:
        return len(self._engine_model)

    def engines_of(self, model: int) -> list[int]:
        return [index for index, number in enumerate(self._engine_model) if number == model]

    def loads_of(self, model: int) -> list[Load]:
        """What the model's engines told of their load last."""
        return [heard.beacon.load for i in self.engines_of(model) if (heard := self._latest.get((Kind.ENGINE, i)))]

    def failed(self, model: int) -> bool:
        """Whether nothing will answer for this model until somebody acts."""
        return model in self._failed_models or all(self.gone(Kind.ENGINE, i) for i in self.engines_of(model))

    def num_ready(self, model: int) -> int:
        """Engines of the model that would take work now."""
        return sum(self.ready(Kind.ENGINE, i) for i in self.engines_of(model))

    def facts(self, model: int) -> dict[str, Any]:
        """What an engine of this model said that it has loaded; {} until one has said anything."""
        for index in self.engines_of(model):
            heard = self._latest.get((Kind.ENGINE, index))
            if heard is not None and heard.beacon.facts_json:
                known = self._facts.get(index)
                if known is None or known[0] != heard.beacon.facts_json:
                    known = self._facts[index] = (heard.beacon.facts_json, _object(heard.beacon.facts_json))
                if known[1]:
                    return known[1]
        return {}

    def ever_ready(self, model: int) -> bool:
        return any((Kind.ENGINE, i) in self._ever_ready for i in self.engines_of(model))

    def missing(self) -> list[str]:
        """Names of the stages that are not healthy."""
        return [f"{kind.name.lower()}.{index}" for kind, index in self._config.members()
                if kind is not Kind.FRONTEND and not self.healthy(kind, index)]

    def can_answer(self, model: int) -> bool:
        """Whether a request for `model` would be computed now."""
        return (not self.failed(model)
                and any(self.healthy(Kind.ENGINE, i) for i in self.engines_of(model))
                and any(self.healthy(Kind.TOKENIZER, i) for i in range(self._config.tokenizers))
                and (self._config.models[model].task in DIRECT_TASKS
                     or any(self.healthy(Kind.DETOKENIZER, i) for i in range(self._config.detokenizers))))

    # ---- choosing ----

    def route(self, model: int, rid: int, engine_load: Mapping[int, int],
              tokenizer_load: Mapping[int, int]) -> Route | None:
        """The least loaded engine of the model and tokenizer, and the detokenizer by hash; None while one is missing.

        `engine_load`: choices of ours at each engine; `tokenizer_load`: bytes of ours at each tokenizer.
        """
        engines = self._candidates(Kind.ENGINE, self.engines_of(model))
        tokenizer = self.tokenizer(tokenizer_load)
        detoks = self._candidates(Kind.DETOKENIZER, range(self._config.detokenizers))
        if not engines or tokenizer is None or not detoks:
            return None
        engine = min(engines, key=lambda i: (engine_load.get(i, 0) + self._load(i), engine_load.get(i, 0)))
        detok = detoks[(rid >> 8) % len(detoks)]
        return Route(tokenizer, self._epoch(Kind.TOKENIZER, tokenizer), engine, self._epoch(Kind.ENGINE, engine),
                     detok, self._epoch(Kind.DETOKENIZER, detok))

    def pool_route(self, model: int, engine_load: Mapping[int, int], tokenizer_load: Mapping[int, int]) -> Route | None:
        """The same without a detokenizer, for models that give numbers."""
        engines, tokenizer = self._candidates(Kind.ENGINE, self.engines_of(model)), self.tokenizer(tokenizer_load)
        if not engines or tokenizer is None:
            return None
        engine = min(engines, key=lambda i: (engine_load.get(i, 0) + self._load(i), engine_load.get(i, 0)))
        return Route(tokenizer, self._epoch(Kind.TOKENIZER, tokenizer), engine, self._epoch(Kind.ENGINE, engine), 0, 0)

    def available(self, model: int) -> bool:
        """Whether a route exists."""
        if self._config.models[model].task in DIRECT_TASKS:
            return self.pool_route(model, {}, {}) is not None
        return self.route(model, 0, {}, {}) is not None

    def tokenizer(self, load: Mapping[int, int]) -> int | None:
        """The ready tokenizer with the fewest of our bytes."""
        found = self._candidates(Kind.TOKENIZER, range(self._config.tokenizers))
        return min(found, key=lambda i: load.get(i, 0)) if found else None

    def tokenizer_epoch(self, index: int) -> int:
        return self._epoch(Kind.TOKENIZER, index)

    def _candidates(self, kind: Kind, indices: list[int] | range) -> list[int]:
        """The healthy ones, or, where none is, all that are ready: their sockets keep what they are sent."""
        ready = [i for i in indices if self.ready(kind, i)]
        return [i for i in ready if self.healthy(kind, i)] or ready

    def _load(self, engine: int) -> int:
        load = self._latest[Kind.ENGINE, engine].beacon.load
        return load.running + load.waiting

    def _epoch(self, kind: Kind, index: int) -> int:
        return self._latest[kind, index].beacon.epoch


def _object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _failed_models(facts_json: bytes) -> frozenset[int]:
    """Model numbers that the launcher has given up, from its beacon: ``{"failed_models": [0, ...]}``."""
    if not facts_json:
        return frozenset()
    try:
        failed = json.loads(facts_json).get("failed_models", [])
        return frozenset(n for n in failed if type(n) is int)
    except (ValueError, AttributeError, TypeError):
        return frozenset()

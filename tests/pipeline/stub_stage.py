"""A stage that does nothing, for the launcher's tests: beacons, readiness, and a scripted way to fail.

STUB in the environment is JSON: {"engine.0": {"exit": 3, "say": "...", "epochs": 1, "mode": "hang"}}. `epochs`: only
the first so many runs misbehave. Ends are noted in the file STUB_ORDER. A frontend in mode "unaware" has not heard that
the others are ready until it gets a SIGHUP.
"""
from __future__ import annotations

import json
import os
import signal
import sys
import time

from pipeline import stage
from pipeline.beacon import SEES_ALL
from pipeline.errors import StartError
from pipeline.messages import Kind

FACTS = json.dumps({"dtype": "float32", "device": "cpu"}).encode()


def main() -> int:
    kind = Kind[sys.argv.pop(1)]
    context = stage.enter(kind, options=("listen-fd",))
    script = json.loads(os.environ.get("STUB", "{}")).get(context.name, {})
    if context.epoch > script.get("epochs", 10**9):
        script = {}
    signal.signal(signal.SIGTERM, lambda *_: end(context.name, script))
    mode = script.get("mode", "")

    def hangup(*_: object) -> None:
        note(f"{context.name} hangup")
        if mode == "unaware":
            context.ready(SEES_ALL)

    signal.signal(signal.SIGHUP, hangup)
    if kind is Kind.FRONTEND:
        assert os.fstat(int(context.extra["listen-fd"])), "the listening socket is open"
    if mode == "load":
        context.progress("loading weights", 10)
        signal.pause()
    if "exit" in script:
        if script["exit"] in (2, 3, 4):
            error = StartError(script["exit"], script.get("say", ""))
            print(error.message, file=sys.stderr)
        else:
            print(script.get("say", "boom"), file=sys.stderr)
        context.close()
        return int(script["exit"])
    context.progress("loading weights", 10)
    if mode == "unaware":
        context.ready()
    else:
        context.ready(SEES_ALL if kind is Kind.FRONTEND else FACTS)
    if mode == "hang":
        context.publisher.turned(True)
        while True:
            signal.pause()
    while True:
        context.publisher.turned(False)
        time.sleep(0.05)


def end(name: str, script: dict[str, object]) -> None:
    note(f"{name} stop")
    if script.get("mode") != "deaf":
        os._exit(0)


def note(text: str) -> None:
    with open(os.environ["STUB_ORDER"], "a") as stream:
        stream.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())

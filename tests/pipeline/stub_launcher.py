"""``quartet serve`` with stub stages: what pipeline.cli does after the model is prepared, without a model."""
from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

from pipeline import listen, rundir
from pipeline.config import ModelConfig, ServerConfig, TimeoutsConfig, save
from pipeline.errors import StartError
from pipeline.launcher import Launcher
from pipeline.messages import Kind
from pipeline.signals import Signals
from pipeline.terminal import Terminal


def command(kind: Kind, config: Path, index: int, epoch: int, fd: int | None) -> list[str]:
    listening = [] if fd is None else ["--listen-fd", str(fd)]
    return [sys.executable, "-m", "tests.pipeline.stub_stage", kind.name, "--config", str(config),
            "--index", str(index), "--epoch", str(epoch), *listening]


def main() -> int:
    root, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    models = tuple(ModelConfig(names=(name,), path="/nowhere") for name in options.get("models", ["stub"]))
    terminal = Terminal()
    try:
        with (Signals() as signals, listen.bind("127.0.0.1", 0, None, options.get("frontends", 1)) as listeners,
              rundir.RunDirectory(root, "quartet-") as run):
            config = ServerConfig(
                run_dir=str(run.path), log_dir=str(root), models=models, frontends=options.get("frontends", 1),
                launcher_pid=os.getpid(), started_ns=time.monotonic_ns(),
                timeouts=TimeoutsConfig(**{"shutdown_s": 5.0, **options.get("timeouts", {})}))
            save(config, run.path / "config.json")
            return Launcher(config, run.path / "config.json", listeners, terminal, signals, command,
                            lambda old: dataclasses.replace(old, log_level="DEBUG")).run()
    except StartError as error:
        terminal.line(f"quartet: {error.message}")
        return error.exit_code
    finally:
        terminal.close()


if __name__ == "__main__":
    sys.exit(main())

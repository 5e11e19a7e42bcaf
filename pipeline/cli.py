"""The command ``quartet``: picks the subcommand, and turns a StartError into one sentence and its exit code.

Imports stay inside the functions: ``quartet --help`` must answer at once, and a wrong flag within a second.
"""
from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import __version__, exits
from pipeline.errors import StartError

if TYPE_CHECKING:
    from pipeline.config import ServerConfig
    from pipeline.served import Served
    from pipeline.settings import Settings
    from pipeline.terminal import Terminal

USAGE = """\
usage: quartet COMMAND [options]

  serve [MODEL]   serve a model over the OpenAI API, in the foreground (quartet serve --help)
  up [...]        start the server as a daemon; takes the options of serve
  status          say whether the daemon's server is running and ready
  logs [-f]       show the daemon's log
  down            stop the daemon
  keys DIR        make CURVE keys for in-cluster clients over TCP
  version         print the version

Exit codes: """ + "; ".join(f"{code} {meaning}" for code, meaning in exits.MEANING.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. Never ends in a traceback for something that the user did."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else ""
    try:
        if command in ("-h", "--help", "help"):
            print(USAGE)
        elif command in ("-V", "--version", "version"):
            print(f"quartet {__version__}")
        elif command == "serve":
            return serve(arguments)
        elif command in ("up", "status", "logs", "down"):
            from pipeline import daemon
            return daemon.main(command, arguments)
        elif command == "keys":
            return make_keys(arguments)
        else:
            from pipeline.options import nearest
            known = ("serve", "up", "status", "logs", "down", "keys", "version", "help")
            hint = nearest(command, known) if command else "; see quartet --help."
            what = f"Unknown command '{command}'" if command else "A command is needed"
            raise StartError(exits.CONFIG, what + hint)
    except StartError as error:
        print(f"quartet: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return exits.OK
    except BrokenPipeError:              # `quartet --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.OK


def make_keys(arguments: Sequence[str]) -> int:
    """``quartet keys DIR``."""
    from pathlib import Path

    from pipeline import keys
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise StartError(exits.CONFIG, "quartet keys needs one directory to write the keys to.")
    for path in keys.make(Path(arguments[0]).expanduser()):
        print(path)
    return exits.OK


def serve(arguments: list[str]) -> int:
    """``quartet serve``: resolve the settings; then print them, check them, or serve."""
    import time
    started_ns = time.monotonic_ns()
    from pipeline.settings import resolve
    settings = resolve(arguments, os.environ)
    for warning in settings.warnings:
        print(f"quartet: {warning}", file=sys.stderr)
    from pipeline import argv, assemble
    assemble.check(settings)
    argv.hide(settings["api_key"])
    if settings.print_config:
        print(settings.show())
        return exits.OK
    from pipeline import served
    models = served.find(served.model_settings(settings))
    from pipeline.preparation import Stopped
    from pipeline.terminal import Terminal
    terminal = Terminal()
    try:
        return _run(settings, models, terminal, started_ns, arguments)
    except Stopped:
        return exits.OK
    finally:
        terminal.close()


def _run(settings: Settings, models: Sequence[Served], terminal: Terminal, started_ns: int,
         arguments: Sequence[str]) -> int:
    """Bind, prepare, and launch; or, with --check, prepare and describe without touching the port."""
    import dataclasses

    from pipeline import assemble, config, listen, preparation, rundir
    from pipeline.launcher import Launcher
    from pipeline.settings import resolve
    from pipeline.signals import Signals

    def reload(old: ServerConfig) -> ServerConfig:
        """On SIGHUP: the log level as the YAML file has it now. Keys are read by the frontends themselves."""
        return dataclasses.replace(old, log_level=resolve(arguments, os.environ)["log_level"])

    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        listeners = None
        if not settings.check:
            listeners = stack.enter_context(listen.bind(
                settings["host"], settings["port"], settings["uds"], settings["frontends"],
                "http" if settings["ssl_certfile"] is None else "https"))
            terminal.line(f"Starting {', '.join(m.names[0] for m in models)} (quartet {__version__}) ...")
        run = stack.enter_context(rundir.RunDirectory(*rundir.parent_of_runs(settings["run_dir"], os.environ)))
        log_dir = rundir.log_directory(settings["log_dir"], run.path)
        prepared = preparation.prepare_all(models, log_dir, signals, terminal)
        configs = [assemble.model_config(m.settings, m.source, *paths) for m, paths in zip(models, prepared)]
        if listeners is None:
            for model in configs:
                task = "" if model.task == "generate" else f"task {model.task}, "
                terminal.line(f"{model.names[0]}: the configuration and the model's files are good; {task}"
                              f"context {model.max_model_len} tokens, vocabulary {model.vocab_size}.")
            return exits.OK
        resolved = assemble.server_config(settings, configs, run_dir=run.path, log_dir=log_dir, port=listeners.port,
                                          started_ns=started_ns)
        config.save(resolved, run.path / "config.json")
        return Launcher(resolved, run.path / "config.json", listeners, terminal, signals, reload=reload).run()

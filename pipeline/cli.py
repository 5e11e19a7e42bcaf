"""The command ``quartet``: picks the subcommand, and turns a StartError into one sentence and its exit code.

Imports stay inside the functions: ``quartet --help`` must answer at once, and a wrong flag within a second.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pipeline import __version__, exits
from pipeline.errors import StartError

USAGE = """\
usage: quartet COMMAND [options]

  serve [MODEL]   serve a model over the OpenAI API, in the foreground (quartet serve --help)
  up [...]        start the server as a daemon; takes the options of serve
  status          say whether the daemon's server is running and ready
  logs [-f]       show the daemon's log
  down            stop the daemon
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
        else:
            from pipeline.options import nearest
            known = ("serve", "up", "status", "logs", "down", "version", "help")
            hint = nearest(command, known) if command else "; see quartet --help."
            raise StartError(exits.CONFIG, (f"Unknown command '{command}'" if command else "A command is needed") + hint)
    except StartError as error:
        print(f"quartet: {error.message}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return exits.OK
    except BrokenPipeError:              # `quartet --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return exits.OK


def serve(arguments: Sequence[str]) -> int:
    """``quartet serve``: resolve the settings; then print them, check them, or serve."""
    import time
    started_ns = time.monotonic_ns()
    from pipeline.settings import resolve
    settings = resolve(arguments, os.environ)
    for warning in settings.warnings:
        print(f"quartet: {warning}", file=sys.stderr)
    from pipeline import launcher
    from pipeline.assemble import check
    check(settings)
    if settings.print_config:
        print(settings.show())
        return exits.OK
    return launcher.check(settings) if settings.check else launcher.serve(settings, started_ns)

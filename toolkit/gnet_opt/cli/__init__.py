"""The command `gnet-opt`.

Only what `--help` needs is imported here; each command imports its own work when it runs.
"""

from __future__ import annotations

import errno
import io
import re
import signal
import sys
import threading
from types import TracebackType
from typing import Any, NoReturn

import click

from gnet_opt.cli import base, bench, commands, compare
from gnet_opt.cli.console import say
from gnet_opt.errors import ConfigError, GnetOptError

COMMANDS = (bench, commands, compare)
"""The modules whose commands join the group when they are imported."""

_INTERRUPTED = 130
"""128 + SIGINT, the exit code that shells expect of an interrupted command."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with the code of its error, or 0."""
    sys.excepthook = _show_traceback
    if hasattr(signal, "pthread_kill"):
        sys.unraisablehook = _interrupt_again
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run the command line; the one place where errors become messages and exit codes."""
    # So that a bundle in the making is removed, too, when a service manager stops the command or
    # its terminal goes away, unless `nohup` says that it goes on then.
    signal.signal(signal.SIGTERM, _interrupt)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)
    verbose = any(re.fullmatch(r"-[a-z]*v[a-z]*|--verbose", word) for word in arguments)
    try:
        base.gnet_opt.main(arguments, prog_name="gnet-opt", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _interrupted()
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip("\n"))
        return ConfigError.exit_code
    except GnetOptError as error:
        if verbose and error.__cause__ is not None:
            _show_traceback(type(error), error, error.__traceback__)
        say(f"gnet-opt: {error}")
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away, as `head` does.
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        if verbose:
            _show_traceback(type(error), error, error.__traceback__)
        where = f" ({error.filename})" if error.filename else ""
        say(
            f"gnet-opt: {error.strerror}{where}. Nothing half-written was left behind; free or "
            "choose another place with --output, then run the command again."
        )
        return GnetOptError.exit_code
    except RuntimeError as error:
        # What an interrupted start of a thread may end in: python/cpython#118433.
        if not _while_interrupted(error):
            raise
        return _interrupted()
    return 0


def _interrupted() -> int:
    say("Interrupted. Nothing half-written was left behind.")
    return _INTERRUPTED


def _while_interrupted(error: BaseException | None) -> bool:
    """Whether an error came up while an interruption was on its way out."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _interrupt_again(unraisable: sys.UnraisableHookArgs) -> None:
    """Where an interruption met a destructor, which nothing can leave: come back a moment later."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        # This one is `_interrupt` even where a shell lets its commands ignore Ctrl-C.
        signalled = (threading.main_thread().ident, signal.SIGTERM)
        again = threading.Timer(0.05, signal.pthread_kill, signalled)
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def _show_traceback(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    import traceback

    say("".join(traceback.format_exception(kind, error, where)).rstrip("\n"))

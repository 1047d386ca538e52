"""``cachectl``: the store from the shell. One file a command; what a command does is a function of the library.

Exit codes: 0 done, 2 a wrong argument, 3 the store or its place, 4 damaged data, 5 the model, 129 ended by SIGHUP,
130 interrupted (SIGINT), 143 ended by SIGTERM.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import Annotated

import typer

import actcache
from actcache.cli import (
    bench,
    compact,
    diff,
    doctor,
    du,
    export,
    fill,
    inspect,
    ls,
    migrate,
    pin,
    plan,
    prune,
    repair,
    shell,
    verify,
)
from actcache.cli.common import ExitCode
from actcache.cli.options import name_values
from actcache.errors import ActcacheError, DataError, ModelError, StoreError, UsageError
from actcache.io.metrics import JsonFormatter

EXIT_CODES = " ".join((__doc__ or "").partition("\n\n")[2].split())

app = typer.Typer(
    name="cachectl",
    help="Activation caches: compute a transformer's lower layers once, replay them for ever.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    *(fill.fill, ls.ls, inspect.inspect, du.du, verify.verify, repair.repair, compact.compact, migrate.migrate),
    *(export.export, export.import_, prune.prune, pin.pin, pin.unpin, plan.plan, diff.diff),
    *(bench.bench, doctor.doctor),
)
for _command in COMMANDS:
    name_values(_command)
    app.command()(_command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cachectl {actcache.__version__}")
        raise typer.Exit


@app.callback()
def _group(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and end.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Keeps the commands' names also where there is only one."""


_SIGNALLED = 128  # and a signal's number, as shells have it
_INTERRUPTED = _SIGNALLED + signal.SIGINT
_UNREAD = 0  # whoever read the output has gone (``| head``), which is no failure
_CODES = ((UsageError, 2), (StoreError, ExitCode.STORE), (DataError, ExitCode.DAMAGED), (ModelError, ExitCode.MODEL))


def main() -> None:
    """Run ``cachectl``: one line and an exit code for whatever goes wrong, never a traceback."""
    shell.escape_missing(sys.stdout)
    shell.escape_missing(sys.stderr)
    requests = shell.Requests()
    try:
        requests.heed()
        code = _run()
        requests.finish()
    except BaseException:
        if requests.number is None:
            raise
        code = 0  # whatever it is, the signal came first
    if requests.number is not None and code != ExitCode.STORE:
        code = _SIGNALLED + requests.number
    if code > _SIGNALLED:
        _fail(f"{shell.what(code - _SIGNALLED)}; what was flushed is safe, run it again to go on", code)
    shell.drop_unread()
    sys.exit(code)


def _run() -> int:
    """Run the command; return the exit code."""
    handler = logging.StreamHandler()
    as_json = os.environ.get("ACTCACHE_LOG", "") == "json"
    handler.setFormatter(JsonFormatter() if as_json else logging.Formatter("cachectl: %(message)s"))
    logger = logging.getLogger("actcache")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if as_json else logging.INFO)
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what fails here would otherwise fail in the interpreter's last moments
    except ActcacheError as error:
        code = _fail(shell.in_shell(str(error)), next((code for kind, code in _CODES if isinstance(error, kind)), 1))
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        code = _UNREAD
    except SystemExit as stop:  # rich and typer make one of a broken pipe
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        code = _UNREAD
    except OSError as error:
        code = _UNREAD if shell.hung_up(error) else _fail(str(error), ExitCode.STORE)
    except Exception as error:
        # Wrong usage. Some releases of typer bring click's exceptions, some have their own of the same form.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # empty where the help was shown instead
        code = _fail(f"{message.rstrip('.')}; see cachectl --help", 2) if message else 2
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):  # a terminal that is closed
            print(f"cachectl: error: {' '.join(message.split())}", file=sys.stderr)
    return code

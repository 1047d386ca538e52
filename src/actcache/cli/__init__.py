"""``cachectl``: the store from the shell. One file a command; what a command does is a function of the library.

Exit codes: 0 done, 2 a wrong argument, 3 the store or its place, 4 damaged data, 5 the model, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from actcache.cli.bench import bench
from actcache.cli.compact import compact
from actcache.cli.doctor import doctor
from actcache.cli.du import du
from actcache.cli.export import export, import_
from actcache.cli.fill import fill
from actcache.cli.inspect import inspect
from actcache.cli.ls import ls
from actcache.cli.migrate import migrate
from actcache.cli.pin import pin, unpin
from actcache.cli.plan import plan
from actcache.cli.prune import prune
from actcache.cli.repair import repair
from actcache.cli.streams import escaping
from actcache.cli.verify import verify
from actcache.errors import ActcacheError, DataError, ModelError, StoreError, UsageError

app = typer.Typer(
    name="cachectl",
    help="Activation caches: compute a transformer's lower layers once, replay them for ever.",
    epilog=(__doc__ or "").strip().rpartition("\n")[2],  # the exit codes
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    fill,
    ls,
    inspect,
    du,
    verify,
    repair,
    compact,
    migrate,
    export,
    import_,
    prune,
    pin,
    unpin,
    plan,
    bench,
    doctor,
)
for _command in COMMANDS:
    app.command()(_command)


@app.callback()
def _group() -> None:
    """Keeps the commands' names also where there is only one."""


_INTERRUPTED = 130
_CODES = ((UsageError, 2), (StoreError, 3), (DataError, 4), (ModelError, 5))


def main() -> None:
    """Run ``cachectl``: one line and an exit code for whatever goes wrong, never a traceback."""
    escaping(sys.stdout)
    escaping(sys.stderr)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("cachectl: %(message)s"))
    logger = logging.getLogger("actcache")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # what fails here would otherwise fail in the interpreter's last moments
    except ActcacheError as error:
        code = _fail(str(error), next((code for kind, code in _CODES if isinstance(error, kind)), 1))
    except (typer.Abort, KeyboardInterrupt):
        code = _INTERRUPTED
    except BrokenPipeError:
        code = _unread()
    except SystemExit as stop:  # rich and typer make one of a broken pipe
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        code = _unread()
    except OSError as error:
        code = _fail(str(error), 3)
    except Exception as error:
        # Wrong usage. Some releases of typer bring click's exceptions, some have their own of the same form.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # empty where the help was shown instead
        code = _fail(f"{message.rstrip('.')}; see cachectl --help", 2) if message else 2
    if code == _INTERRUPTED:  # some releases of typer return it, some raise
        _fail("interrupted; what was flushed is safe, run it again to go on", code)
    sys.exit(code if isinstance(code, int) else 0)


def _unread() -> int:
    """Whoever read our output has gone (``| head``), which is no failure."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter does not complain when it ends
    return 0


def _fail(message: str, code: int) -> int:
    print(f"cachectl: error: {' '.join(message.split())}", file=sys.stderr)
    return code

"""The `swift-kernels` command.

Exit codes: 0 done, 1 failed, 2 bad input (one line on stderr), 130 interrupted. Results go to stdout, progress to
stderr. `SWIFT_KERNELS_DEBUG=1` shows the traceback behind a one-line error.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        return _run(sys.argv[1:] if args is None else list(args))
    except KeyboardInterrupt as error:
        print(f"swift-kernels: interrupted{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of stdout has gone, as `head` does; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        _explain(error)
        # What the user named does not exist or may not be touched; anything else is the machine's trouble.
        named = error.filename is not None and error.errno in (errno.ENOENT, errno.EISDIR, errno.EACCES, errno.ENOTDIR)
        return 2 if named else 1
    except ValueError as error:
        _explain(error)
        return 2
    except Exception as error:
        _explain(error)
        return 1


def _run(args: list[str]) -> int:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        raise ImportError(f"the command line needs {error.name}: pip install 'swift_kernels[cli]'") from error
    # They add their subcommands.
    from swift_kernels.cli import evaluation, inspect, pairs, rewards, stores  # noqa: F401
    from swift_kernels.cli.app import app

    # Not through `app()`, which would print its own errors, over several lines, and turn Ctrl-C into an abort.
    command = typer.main.get_command(app)
    try:
        with command.make_context("swift-kernels", args) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    except Exception as error:
        # Recent versions of typer carry a copy of click, so usage errors have no class that all versions share.
        if not hasattr(error, "format_message"):
            raise
        print(f"swift-kernels: {error.format_message()} See swift-kernels --help", file=sys.stderr)
        return 2
    return 0


def _explain(error: Exception) -> None:
    if os.environ.get("SWIFT_KERNELS_DEBUG", "0") not in ("", "0"):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, ValueError | ImportError | OSError):
        text = f"{type(error).__name__}: {text} (SWIFT_KERNELS_DEBUG=1 shows where)"
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
        if error.errno == errno.ENOSPC:
            text += "; what was there before is intact"
    print(f"swift-kernels: {text}", file=sys.stderr)

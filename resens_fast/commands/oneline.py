"""What a user's mistake looks like: one line on standard error and exit code 2, never a traceback."""

from __future__ import annotations

import errno
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import ResensError

INTERRUPTED = 130


@dataclass
class State:
    """What a command leaves for its error messages: --debug, the folder in work, and how to go on with it."""

    debug: bool = False
    out: str = ""
    resume: str = ""


def complain(message: str) -> None:
    """One line on standard error, whatever line breaks the message has."""
    print("resens: " + " ".join(message.split()), file=sys.stderr, flush=True)


def explain(error: BaseException, state: State) -> str | None:
    """The sentence for an error that the user can do something about, or None for one that is ours."""
    if isinstance(error, ResensError):
        return str(error)
    if hasattr(error, "format_message") and hasattr(
        error, "exit_code"
    ):  # a usage error, of click or of typer's copy of it
        return f"{error.format_message().rstrip('.')}; --help shows what there is"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: try --dtype bfloat16, another --device, or fewer configurations at a time"
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        where = error.filename or state.out
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            at = f" to write {where}" if where else ""
            kept = ", finished parts are kept" if state.resume else ""
            return f"no space left{at}; free some and run the same command again{kept}"
        return f"{error.strerror or error}{f': {where}' if where else ''}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("resens_fast"):
        package = error.name.split(".")[0]
        return f"this command needs the Python package {package}, which is not installed: pip install {package}"
    return None


class Group(TyperGroup):
    """Commands whose known errors become one line; `--debug` before the command shows the traceback too."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; known errors end in exit code 2, Ctrl-C in 130, all others in their traceback."""
        state = ctx.ensure_object(State)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if state.debug:
                traceback.print_exc()
            print(file=sys.stderr)  # the terminal shows ^C on the line of the progress bar
            complain(f"interrupted; {state.resume or 'nothing was written'}")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            message = explain(error, state)
            if message is None or type(error).__name__ in ("Exit", "Abort", "NoArgsIsHelpError"):
                raise
            if state.debug:
                traceback.print_exc()
            complain(message)
            raise typer.Exit(2) from None

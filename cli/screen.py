"""What every verb prints with: results on standard output, everything else on standard error. Exit codes live here too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from ..core.errors import BatonError, InvalidRequest, TopologyError

FAILED = 1
BAD_USAGE = 2  # also a topology that cannot be deployed


def out() -> Console:
    """For results."""
    return Console(highlight=False)


def err() -> Console:
    """For progress and complaints."""
    return Console(stderr=True, highlight=False)


@contextmanager
def exits_on_error() -> Iterator[None]:
    """Turn Baton's errors into one message and an exit code: 2 for a bad topology or argument, 1 for the rest."""
    try:
        yield
    except (TopologyError, InvalidRequest) as error:
        complain(str(error))
        raise typer.Exit(BAD_USAGE) from error
    except BatonError as error:
        complain(str(error))
        raise typer.Exit(FAILED) from error


def complain(message: str) -> None:
    """Print an error."""
    err().print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)

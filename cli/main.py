"""The `baton` command: one file per verb, put together here and nowhere else."""

from __future__ import annotations

import typer

from .bench import bench
from .chat import chat
from .demo import demo
from .down import down
from .make_model import make_model
from .status import status
from .up import up

app = typer.Typer(
    name="baton",
    help="Serve a language model with prefill and decode on separate worker pools.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(up)
app.command()(down)
app.command()(status)
app.command()(chat)
app.command()(bench)
app.command()(demo)
app.command("make-model")(make_model)

if __name__ == "__main__":
    app()

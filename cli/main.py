"""The `baton` command: one file per verb, put together here and nowhere else.

A verb's module is imported when the verb is used: most verbs need a fraction of what all of them together import.
"""

from __future__ import annotations

import importlib

import typer
from typer.core import TyperCommand, TyperGroup

_VERBS = {
    "up": ("up", "up"),
    "down": ("down", "down"),
    "status": ("status", "status"),
    "chat": ("chat", "chat"),
    "bench": ("bench", "bench"),
    "profile": ("profile", "profile"),
    "demo": ("demo", "demo"),
    "simulate": ("simulate", "simulate"),
    "plan": ("plan", "plan"),
    "make-model": ("make_model", "make_model"),
}
"""The verbs in the order in which --help shows them, each with its module and function."""


class _Verbs(TyperGroup):
    """Knows the verbs by name, and imports the one that is asked for."""

    def get_command(self, ctx: object, cmd_name: str) -> TyperCommand | None:
        if cmd_name not in _VERBS:
            return None
        module, function = _VERBS[cmd_name]
        verb = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        verb.command(cmd_name)(getattr(importlib.import_module(f".{module}", __package__), function))
        command = typer.main.get_command(verb)
        assert isinstance(command, TyperCommand)  # one function makes a command, several a group
        return command


app = typer.Typer(
    name="baton",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def baton() -> None:
    """Serve a language model with prefill and decode on separate worker pools."""


def _not_imported() -> None:
    """In the place of every verb until `_Verbs` puts the real one there."""


for _verb in _VERBS:
    app.command(_verb)(_not_imported)

if __name__ == "__main__":
    app()

"""`baton make-model`: a random-weight model in Hugging Face format, for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..core.errors import InvalidRequest, ModelError
from .screen import err, exits_on_error


def make_model(
    target: Annotated[Path, typer.Option("--out", help="The folder to write.", show_default=False)],
    family: Annotated[str, typer.Option(help="The model's architecture.")] = "llama",
    params: Annotated[str, typer.Option(help="About how many parameters, such as 16M or 110M.")] = "110M",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    max_model_len: Annotated[int, typer.Option(min=2, help="Positions the model is made for.")] = 4096,
) -> None:
    """Write a model with random weights."""
    with exits_on_error():
        _check_target(target)
        from ..engine import random_model  # only here: torch takes seconds to import, and no other verb needs it

        try:
            config = random_model.make_model(target, params, family, seed, dtype, max_model_len)
        except ModelError as error:  # of the arguments: there is no model yet
            raise InvalidRequest(str(error)) from error
        except OSError as error:
            raise InvalidRequest(f"--out: {target} cannot be written: {error.strerror}") from error
    err().print(f"{target}: {family}, {config.num_layers} layers, hidden size {config.hidden_size}, {dtype}")


def _check_target(target: Path) -> None:
    """Refuse a file, and a folder of something else: a model among other people's files is a mistake."""
    if target.exists() and not target.is_dir():
        raise InvalidRequest(f"--out: {target} is a file; needed: a folder that is new, empty or a model already")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise InvalidRequest(f"--out: {target} holds something else than a model; needed: a folder that is new, empty or a model")

"""`baton make-model`: a random-weight model in Hugging Face format, for tests and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    from ..engine import random_model  # only here: torch takes seconds to import, and no other verb needs it

    with exits_on_error():
        config = random_model.make_model(target, params, family, seed, dtype, max_model_len)
    err().print(f"{target}: {family}, {config.num_layers} layers, hidden size {config.hidden_size}, {dtype}")

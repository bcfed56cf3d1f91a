"""`baton profile`: measure what steps of a model cost on this machine, for `baton simulate` and `baton plan`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..core.errors import InvalidRequest
from ..placement.profile import write_profile
from .screen import err, exits_on_error, out

if TYPE_CHECKING:
    from ..placement.measure import Measured, MeasureSpec

LARGE_SCATTER = 0.25  # of a step's time between rounds: more is a machine that does other things too
QUICK_SECONDS, QUICK_ROUNDS = 8.0, 3
SECONDS, ROUNDS = 45.0, 7


def profile(
    model: Annotated[str, typer.Argument(help="A model folder, or a hub id.", show_default=False)],
    target: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("profile.yaml"),
    threads: Annotated[int, typer.Option(min=1, help="Torch threads of a worker.")] = 1,
    dtype: Annotated[str, typer.Option(help="Type the weights are converted to.")] = "bfloat16",
    kernels: Annotated[str, typer.Option(help="As in a topology: auto, native, cpu or reference.")] = "auto",
    max_step_tokens: Annotated[int, typer.Option(min=16, help="Token budget of a step, as in the topology.")] = 2048,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a KV block, as in the topology.")] = 32,
    kv_memory: Annotated[int, typer.Option("--kv-memory-mib", min=16, help="KV pool, MiB: bounds batch times context.")] = 512,
    links: Annotated[bool, typer.Option(help="Measure how fast KV moves between two workers, too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, less often.")] = False,
) -> None:
    """Run prompts, decode batches and mixtures of both through a worker's engine, fit a cost to them, and write it down.

    Nothing else should run meanwhile: what disturbs the steps ends up in the profile.
    """
    with exits_on_error():
        _check_target(target)
        from ..placement.measure import MeasureSpec  # only here: torch takes seconds to import, and no other verb needs it

        spec = MeasureSpec(
            model,
            dtype=dtype,
            kernels=kernels,
            threads=threads,
            max_step_tokens=max_step_tokens,
            block_size=block_size,
            kv_memory_bytes=kv_memory << 20,
            seconds=QUICK_SECONDS if quick else SECONDS,
            rounds=QUICK_ROUNDS if quick else ROUNDS,
            quick=quick,
        )
        measured = _measure(spec, links)
        write_profile(measured.profile, target)
        _show(out(), measured)
        out().print(f"wrote {target}", markup=False)


def _measure(spec: MeasureSpec, links: bool) -> Measured:
    """The model's steps and, where they are asked for, the machine's links; behind a progress bar."""
    from ..placement.links import measure_links
    from ..placement.measure import measure

    with _bar() as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        measured = measure(spec, tell)
        if not links:
            return measured
        tell("links", 0, 1)
        return replace(measured, profile=replace(measured.profile, links=measure_links(2 if spec.quick else 5)))


def _check_target(target: Path) -> None:
    """Before a minute of measuring: can the file be written at the end?"""
    if target.is_dir():
        raise InvalidRequest(f"--out: {target} is a folder; needed: a file")
    if not target.absolute().parent.is_dir():
        raise InvalidRequest(f"--out: {target.absolute().parent} is no folder; make it first")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err(), transient=True)


def _show(console: Console, result: Measured) -> None:
    """The coefficients, and how well they explain what was measured."""
    profile = result.profile
    for measured in profile.costs:
        table = Table(title=f"{profile.model}, {profile.dtype}, {profile.threads} threads", title_justify="left")
        table.add_column("seconds per")
        table.add_column("", justify="right")
        for field in fields(measured.cost):
            if field.name != "stages":
                table.add_row(field.name.replace("_", " "), f"{getattr(measured.cost, field.name):.4g}")
        console.print(table)
        for kind, residual in measured.residuals.items():
            console.print(
                f"  {kind:8} {residual.samples:3} steps, off by {100 * residual.median:.1f} % in the median, "
                f"{100 * residual.largest:.1f} % at most"
            )
    console.print(f"  host overhead {1e6 * profile.host_overhead:.0f} us a step")
    for name, rate in profile.links.items():
        console.print(f"  {name:8} {rate / 1e9:.2f} GB/s")
    if result.scatter > LARGE_SCATTER:
        err().print(
            f"the same step took times {100 * result.scatter:.0f} % apart: something else ran on this machine; "
            "measure again when it is idle",
            style="yellow",
        )

"""Keep the losses of a training run in loss.csv and draw them in loss.png."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def read_log(folder: Path) -> list[dict[str, Any]]:
    with (folder / "loss.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [{k: float(v) if "loss" in k else int(v) for k, v in row.items()} for row in rows]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw both loss curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    millions = [row["tokens"] / 1e6 for row in rows]
    axes.plot(millions, [row["train_loss"] for row in rows], label="training")
    axes.plot(millions, [row["held_out_loss"] for row in rows], label="held out")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def write_log(rows: list[dict[str, Any]], folder: Path) -> None:
    with (folder / "loss.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, folder / "loss.png")

"""The figures of a folder of results as one table, beside what was asked of them: `python benchmarks/gpu/report.py FOLDER`.

Each part left a file PART.json whose text ends with one line of JSON. Writes FOLDER/README.md and prints it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wanted:
    """A figure that something was asked of. `floor` and `aim` are as written; less is better where they fall."""

    what: str
    part: str  # of the files, which may have a suffix
    figure: str
    floor: str
    aim: str


WANTED = (
    Wanted("decode step, batch 1, of the bytes' time", "engine", "decode_b1_fraction", "0.70", "0.88"),
    Wanted("decode step, batch 64", "engine", "decode_b64_fraction", "0.70", "0.88"),
    Wanted("decode step, batch 256", "engine", "decode_b256_fraction", "0.70", "0.88"),
    Wanted("prefill of 8k tokens, MFU", "engine", "prefill_mfu", "0.50", "0.70"),
    Wanted("offline 1000/1000, output tok/s", "engine", "offline_tok_s", "9000", "16000"),
    Wanted("device idle between decode steps, batch 64", "engine", "host_overhead_b64", "0.08", "0.02"),
    Wanted("handoff of a 4k prompt, exposed, ms", "transfer", "exposed_ms", "3", "1"),
    Wanted("gather of scattered blocks, of copy bandwidth", "blocks", "gather_whole_share", "0.80", "0.95"),
    Wanted("scatter of scattered blocks", "blocks", "scatter_whole_share", "0.80", "0.95"),
    Wanted("decode attention, batch 64, context 4k, of copy bandwidth", "kernels", "decode_b64_4k_share", "0.70", "0.90"),
    Wanted("prefill attention, 8k prompt, of the product rate", "kernels", "prefill_8k_share", "0.45", "0.65"),
    Wanted("served 1P1D on one GPU, goodput, requests/s", "served-1p1d", "goodput", "", ""),
    Wanted("served by one mixed worker, goodput, requests/s", "served-mixed", "goodput", "", ""),
)


def main(folder: Path) -> None:
    parts = {file.stem: json.loads(file.read_text().strip().splitlines()[-1]) for file in sorted(folder.glob("*.json"))}
    text = table(parts)
    (folder / "README.md").write_text(text)
    print(text)


def table(parts: dict[str, dict[str, float | str]]) -> str:
    """Markdown: the figures that something was asked of, then all of each part."""
    devices = sorted({str(figures["device"]) for figures in parts.values() if "device" in figures}) or ["no device"]
    lines = [f"# Figures of {', '.join(devices)}", "", "| what | floor | aim | measured |", "|---|---|---|---|"]
    for wanted in WANTED:
        found = [
            f"{figures[wanted.figure]}{f' ({model})' if (model := figures.get('model')) else ''}"
            for name, figures in parts.items()
            if (name == wanted.part or name.startswith(f"{wanted.part}-")) and wanted.figure in figures
        ]
        lines.append(f"| {wanted.what} | {wanted.floor} | {wanted.aim} | {', '.join(found) or 'unmeasured'} |")
    for name, figures in parts.items():
        lines += ["", f"## {name}", "", *(f"- `{figure}`: {value}" for figure, value in figures.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

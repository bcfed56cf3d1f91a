"""The benchmarks are scripts beside each other: what they import from one another is found in their folder."""

from __future__ import annotations

import sys
from pathlib import Path

FOLDER = str(Path(__file__).resolve().parents[2] / "benchmarks")
if FOLDER not in sys.path:
    sys.path.append(FOLDER)  # last: their short names must not hide a library's

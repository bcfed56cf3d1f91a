"""Compiles the C++ kernels of `csrc` for this machine's processor, once, and finds them again.

The library has a plain C interface and knows nothing of torch or Python, so it depends on the compiler and the
processor alone: both are part of its name, next to the sources. It is built by `make setup`, or when the first
worker starts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from ..core.errors import Unavailable

SOURCES = Path(__file__).parent / "csrc"
COMPILERS = ("g++", "clang++", "c++")
# -ffast-math is absent on purpose: it reorders sums and makes subnormal numbers zero in the whole process.
FLAGS = ("-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC", "-pthread")


def build_native(architecture: str = "native", options: tuple[str, ...] = ()) -> Path:
    """The path of the compiled library, compiled now unless that was done before.

    architecture  what the compiler is told by -march
    options       further ones of the compiler
    Raises Unavailable where there is no C++ compiler, where it fails, or where there is no place for the result.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise Unavailable(f"no C++ compiler: none of {', '.join(COMPILERS)} is on the path; install g++ 12 or newer")
    name = f"baton-{_fingerprint(compiler, architecture, options)}.so"
    folder = _folder()
    path = folder / name
    if path.exists():
        return path
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers that start together compile once
        if not path.exists():
            _compile(compiler, architecture, options, path)
    return path


def processor_flags() -> frozenset[str]:
    """The instruction sets of the processor as Linux names them; empty where that is unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    lines = [line.partition(":")[2] for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return frozenset(lines[0].split()) if lines else frozenset()


def _fingerprint(compiler: str, architecture: str, options: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    known = [version, architecture, platform.machine(), " ".join(FLAGS + options), " ".join(sorted(processor_flags()))]
    known += [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sorted(SOURCES.iterdir()) if path.is_file()]
    return hashlib.sha256("\0".join(known).encode()).hexdigest()[:16]


def _folder() -> Path:
    """Beside the sources where that can be written (a checkout), else in the user's cache."""
    tried = (SOURCES / "build", Path.home() / ".cache" / "baton")
    for folder in tried:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    raise Unavailable(f"no place for the compiled kernels: neither {tried[0]} nor {tried[1]} can be written")


def _compile(compiler: str, architecture: str, options: tuple[str, ...], path: Path) -> None:
    """All sources at once, under another name first: nobody may load half a library."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        command = [
            compiler,
            *FLAGS,
            f"-march={architecture}",
            *options,
            *map(str, sorted(SOURCES.glob("*.cpp"))),
            "-o",
            str(unfinished),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler} did not compile the kernels in {SOURCES}: {error}") from error
        if done.returncode:
            last = done.stderr.strip()[-2000:]
            raise Unavailable(f"{compiler} could not compile the kernels in {SOURCES} (g++ 12 or newer is needed): {last}")
        unfinished.replace(path)

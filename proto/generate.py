"""Generate the Python stubs from the .proto files: `python proto/generate.py [OUT]`.

The files are seen as `baton/proto/*.proto`, so that the stubs import `baton.proto`. A test generates them
again into a temporary folder and compares.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
NAMES = ("inference", "worker")


def generate(out: Path) -> list[Path]:
    """Write the stubs of every .proto file into `out`; return their paths."""
    with tempfile.TemporaryDirectory() as scratch:
        include = Path(grpc_tools.__file__).parent / "_proto"
        arguments = [
            "protoc",
            f"-Ibaton/proto={HERE}",
            f"-I{include}",
            f"--python_out={scratch}",
            f"--pyi_out={scratch}",
            f"--grpc_python_out={scratch}",
            *(f"baton/proto/{name}.proto" for name in NAMES),
        ]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed")
        written = []
        for path in sorted((Path(scratch) / "baton" / "proto").iterdir()):
            written.append(Path(shutil.copy(path, out / path.name)))
        return written


if __name__ == "__main__":
    for path in generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(path.name)

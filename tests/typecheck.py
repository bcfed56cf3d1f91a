"""Run mypy in strict mode over the package.

The repository root is the package `baton`. A checkout whose folder has another name is type-checked through
a link named `baton` in a temporary folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Return mypy's exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "baton"
        link.symlink_to(ROOT, target_is_directory=True)
        command = [sys.executable, "-m", "mypy", "--config-file", str(link / "pyproject.toml"), "-p", "baton"]
        command += ["--cache-dir", str(ROOT / ".mypy_cache"), *sys.argv[1:]]
        environment = os.environ | {"MYPYPATH": scratch}
        return subprocess.run(command, cwd=scratch, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())

"""How properties are searched: the same examples in every run, so that what passed once passes again.

`--hypothesis-profile=search` looks at others: put what it finds into an `@example`.

Without a CUDA device Triton's kernels run in its interpreter, which must be known before the first of them is defined.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from hypothesis import settings

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    from baton.kernels.triton.interpreter import mend

    mend()

settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("same")

"""How properties are searched: the same examples in every run, so that what passed once passes again.

`--hypothesis-profile=search` looks at others: put what it finds into an `@example`.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("same", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("same")

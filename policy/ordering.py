"""In which order waiting sequences are prefilled. An ordering is a pure function to a sort key; it never sees tokens or time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Waiting:
    """What an ordering may look at.

    num_tokens  tokens that have to be prefilled: the prompt, and the output of earlier attempts
    arrival     seconds on the worker's clock
    priority    larger goes first
    """

    num_tokens: int
    arrival: float
    priority: int = 0


SortKey = tuple[float, ...]
Ordering = Callable[[Waiting], SortKey]


def fcfs(waiting: Waiting) -> SortKey:
    """First come, first served, within each priority."""
    return (-waiting.priority, waiting.arrival)


def shortest_prompt_first(waiting: Waiting) -> SortKey:
    """The fewest tokens to prefill first, within each priority.

    Least mean TTFT when prompts differ much in length; long prompts may wait for as long as shorter ones keep coming.
    """
    return (-waiting.priority, waiting.num_tokens, waiting.arrival)


ORDERING: Mapping[str, Ordering] = MappingProxyType({"fcfs": fcfs, "shortest_prompt_first": shortest_prompt_first})

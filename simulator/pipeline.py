"""The stages of one worker's device in virtual time: when a step may enter, and when it is through."""

from __future__ import annotations


class Pipeline:
    """Steps pass all stages in the order in which they entered; none overtakes another."""

    def __init__(self, stages: int) -> None:
        self.stages = stages
        self._free_at = [0.0] * stages

    @property
    def enters_at(self) -> float:
        """When the first stage is free."""
        return self._free_at[0]

    def enter(self, now: float, seconds: float, overhead: float) -> float:
        """A step that takes `seconds` in every stage enters now, after `overhead` seconds of host work. Returns its end."""
        at = now + overhead
        for stage, free_at in enumerate(self._free_at):
            at = max(at, free_at) + seconds
            self._free_at[stage] = at
        return at

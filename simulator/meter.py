"""What one worker did over all its lives, as integrals over virtual time."""

from __future__ import annotations

from .records import WorkerUse


class Meter:
    """Between two moments at which something happens to a worker, its KV grows evenly and everything else stays as it is."""

    def __init__(self, worker: str, role: str, num_blocks: int) -> None:
        self._worker = worker
        self._role = role
        self._num_blocks = num_blocks
        self._since = 0.0
        self._used = 0
        self._waiting = 0
        self._block_seconds = 0.0
        self._waiting_seconds = 0.0
        self._peak = 0
        self._busy = 0.0
        self._steps = 0
        self._tokens = 0
        self._row_seconds = 0.0
        self.preemptions = 0

    def steps(self, count: int, seconds: float, tokens: int, decode_rows: int) -> None:
        """`count` equal steps ended that kept the first stage busy for `seconds` and fed `tokens`, all together."""
        self._steps += count
        self._busy += seconds
        self._tokens += tokens
        self._row_seconds += decode_rows * seconds

    def reached(self, now: float, used: int) -> None:
        """Just before something happens, `used` blocks hold something."""
        elapsed = now - self._since
        if elapsed > 0.0:
            self._block_seconds += 0.5 * (self._used + used) * elapsed
            self._waiting_seconds += self._waiting * elapsed
            self._since = now
        if used > self._peak:
            self._peak = used

    def goes_on(self, used: int, waiting: int) -> None:
        """It has happened."""
        self._used = used
        self._waiting = waiting
        if used > self._peak:
            self._peak = used

    @property
    def num_steps(self) -> int:
        return self._steps

    def use(self, now: float) -> WorkerUse:
        """Everything until now."""
        self.reached(now, self._used)
        return WorkerUse(
            worker=self._worker,
            role=self._role,
            busy=self._busy,
            steps=self._steps,
            tokens=self._tokens,
            decode_row_seconds=self._row_seconds,
            kv_token_seconds=self._block_seconds / self._num_blocks,
            peak_kv=self._peak / self._num_blocks,
            waiting_seconds=self._waiting_seconds,
            preemptions=self.preemptions,
        )

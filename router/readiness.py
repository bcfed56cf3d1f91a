"""Whether the router can serve: the right workers live, and a canary request has passed since they do."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ..core.errors import BatonError
from ..core.request import SamplingParams
from .service import RouterService
from .stream import Submission

CANARY_TIMEOUT = 30.0  # seconds
RETRY_PAUSE = 1.0  # seconds after a failed canary
CANARY_PRIORITY = 1 << 20  # before everybody's requests

logger = logging.getLogger("baton.router.readiness")


class Readiness:
    """Keeps `reason` up to date: empty when ready. `on_change` hears of every switch."""

    def __init__(self, service: RouterService, canary_prompt: tuple[int, ...], on_change: Callable[[bool], None]) -> None:
        self._service = service
        self._prompt = canary_prompt
        self._on_change = on_change
        self._ready = False
        self.reason = "starting"

    @property
    def ready(self) -> bool:
        return self._ready

    async def run(self) -> None:
        """Follow the membership, for ever."""
        changed = self._service.changed
        while True:
            changed.clear()
            missing = self._service.membership.unready_reason()
            if missing:
                self._set(False, missing)
            elif not self._ready and not await self._canary():
                await asyncio.sleep(RETRY_PAUSE)
                continue
            if self._ready or missing:
                await changed.wait()

    async def _canary(self) -> bool:
        """Send one tiny request through the cluster."""
        self._set(False, "the canary request has not passed yet")
        sampling = SamplingParams(temperature=0.0, max_tokens=2)
        submission = Submission(self._prompt, sampling, seed=0, timeout=CANARY_TIMEOUT, priority=CANARY_PRIORITY, internal=True)
        try:
            stream = self._service.submit(submission)
            try:
                async for _ in stream:
                    pass
            finally:
                stream.cancel()
        except BatonError as error:
            logger.warning("the canary failed: %s", error)
            self._set(False, f"the canary request failed: {error}")
            return False
        missing = self._service.membership.unready_reason()
        self._set(not missing, missing)
        return not missing

    def _set(self, ready: bool, reason: str) -> None:
        self.reason = reason
        if ready != self._ready:
            self._ready = ready
            logger.info("ready" if ready else f"not ready: {reason}")
            self._on_change(ready)

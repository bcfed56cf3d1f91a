"""A device that is really behind: work runs later, on a thread for each stream, and everything that happens is written down.

Nothing runs while `gate` is cleared, so what the host does meanwhile it does without results. Pinned memory is full of rubbish
until it is written. `log` holds "launch", "wait" (of a thread of the host, for an event), "replay" and "capture" as they happen.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch
from baton.kernels.device import DeviceMemory, Event, Graph, Stream
from torch import Tensor


class LaggingEvent:
    def __init__(self, device: LaggingDevice, stream: LaggingStream) -> None:
        self._device = device
        self._stream = stream
        self.reached = threading.Event()
        self.reached.set()
        self.at = 0.0

    def record(self) -> None:
        reached = self.reached = threading.Event()

        def reach() -> None:
            self.at = time.perf_counter()
            reached.set()

        self._stream.enqueue(reach)

    def wait(self) -> None:
        self._device.log.append(("wait", threading.current_thread().name.partition("_")[0]))
        assert self.reached.wait(60), "the event is never reached"
        if self._stream.error is not None:
            raise self._stream.error

    def is_reached(self) -> bool:
        return self.reached.is_set()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, LaggingEvent)
        return self.at - earlier.at


class LaggingStream:
    def __init__(self, device: LaggingDevice) -> None:
        self._device = device
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self.error: Exception | None = None
        threading.Thread(target=self._run, daemon=True, name="stream").start()

    def enqueue(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def launch(self, work: Callable[[], None]) -> None:
        self._device.log.append(("launch", threading.current_thread().name.partition("_")[0]))
        self.enqueue(work)

    def event(self) -> Event:
        return LaggingEvent(self._device, self)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, LaggingEvent)
        reached = event.reached
        self.enqueue(lambda: reached.wait(60))

    def _run(self) -> None:
        torch.set_num_threads(1)
        while True:
            work = self._work.get()
            self._device.gate.wait(60)
            try:
                work()
            except Exception as error:  # as on a GPU: whoever waits next is told
                self.error = error


@dataclass(frozen=True)
class LaggingGraph:
    device: LaggingDevice
    work: Callable[[], None]

    def replay(self) -> None:
        self.device.log.append(("replay", ""))
        self.work()


@dataclass
class LaggingDevice:
    gate: threading.Event = field(default_factory=threading.Event)
    log: list[tuple[str, str]] = field(default_factory=list)
    torch_device: torch.device = torch.device("cpu")
    name: str = "lagging"
    num_processors: int = 4

    def __post_init__(self) -> None:
        self.gate.set()

    def stream(self, urgent: bool = False) -> Stream:
        return LaggingStream(self)

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 0x5A, dtype=torch.uint8)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        self.log.append(("capture", ""))
        done = stream.event()
        stream.launch(work)
        done.record()
        done.wait()
        return LaggingGraph(self, work)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0, 0, 0)

    def reset_peak(self) -> None:
        """Nothing is counted."""

    def release(self) -> None:
        """Nothing is kept."""

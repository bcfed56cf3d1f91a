"""What a device offers besides arithmetic: streams, events, graphs, pinned memory. One small face, so that everything
built on it can be proven without a GPU.

Work is launched on a stream and runs later, in the order of that stream. Events order streams among each other and tell the
host how far a stream has come. `HostDevice` is the CPU's twin: there work has run when `launch` returns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import Unavailable


class Event(Protocol):
    """A place in a stream. One that was never recorded counts as reached."""

    def record(self) -> None:
        """Be the place behind everything launched on the event's stream so far."""
        ...

    def wait(self) -> None:
        """Block the calling thread until the place is reached, without holding the interpreter.

        Raises what went wrong on the device before it.
        """
        ...

    def is_reached(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        ...

    def seconds_since(self, earlier: Event) -> float:
        """Time between two places that were reached, as the device measured it."""
        ...


class Stream(Protocol):
    """Work in order."""

    def launch(self, work: Callable[[], None]) -> None:
        """Let `work` run behind what was launched before. Its operations must not wait for their own results."""
        ...

    def event(self) -> Event:
        """An event of this stream."""
        ...

    def wait_for(self, event: Event) -> None:
        """What is launched from now on runs after `event`'s last recorded place; the host does not wait."""
        ...


class Graph(Protocol):
    """Recorded operations over tensors that stay where they are."""

    def replay(self) -> None:
        """Run them again, on the stream whose `launch` this is called in."""
        ...


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. `held` is what this process keeps allocated, `peak` the most that it held since `reset_peak`."""

    total: int
    free: int
    held: int
    peak: int


class Device(Protocol):
    """One device. Streams may be used from any thread."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def name(self) -> str:
        """What its maker calls it."""
        ...

    @property
    def num_processors(self) -> int:
        """How many programs run at once, at the least."""
        ...

    def stream(self, urgent: bool = False) -> Stream:
        """A new stream; work of urgent ones goes first."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes] of host memory, not set to anything, that copies run to and from beside the host's own work.

        May be dropped as soon as the copies are launched.
        """
        ...

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """Run `work` once, then record it. It must take everything that changes from tensors, and read nothing back."""
        ...

    def memory(self) -> DeviceMemory: ...

    def reset_peak(self) -> None: ...

    def release(self) -> None:
        """Give memory back that is kept for later allocations and not in use."""
        ...


class HostEvent:
    """See `Event`: on the host every place is reached at once."""

    def __init__(self) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        """Reached already."""

    def is_reached(self) -> bool:
        return True

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, HostEvent)
        return self._at - earlier._at


class HostStream:
    """See `Stream`."""

    def launch(self, work: Callable[[], None]) -> None:
        work()

    def event(self) -> Event:
        return HostEvent()

    def wait_for(self, event: Event) -> None:
        """What was launched elsewhere has run."""


@dataclass(frozen=True, slots=True)
class HostGraph:
    """Runs its operations anew."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


@dataclass(frozen=True, slots=True)
class HostDevice:
    """The CPU in the role of a device: same calls, same results, nothing beside anything."""

    torch_device: torch.device = torch.device("cpu")
    name: str = "CPU"
    num_processors: int = 1

    def stream(self, urgent: bool = False) -> Stream:
        return HostStream()

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        stream.launch(work)
        return HostGraph(work)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(0, 0, 0, 0)

    def reset_peak(self) -> None:
        """Nothing is counted."""

    def release(self) -> None:
        """Nothing is kept."""


class CudaEvent:
    """See `Event`. Waiting sleeps instead of spinning: the thread that waits shares the interpreter with those that launch."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]

    def record(self) -> None:
        self.event.record(self._stream)

    def wait(self) -> None:
        self.event.synchronize()

    def is_reached(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        milliseconds: float = earlier.event.elapsed_time(self.event)
        return milliseconds / 1e3


class CudaStream:
    """See `Stream`."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def launch(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self.stream):
            work()

    def event(self) -> Event:
        return CudaEvent(self.stream)

    def wait_for(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.stream.wait_event(event.event)


class CudaDevice:
    """An NVIDIA GPU, by its number among those that this process sees. Raises Unavailable when it is not there.

    memory_fraction  of its memory that this process may allocate; more raises torch.cuda.OutOfMemoryError here instead of in
                     a process that shares the GPU
    """

    def __init__(self, index: int = 0, memory_fraction: float = 1.0) -> None:
        if not torch.cuda.is_available():
            raise Unavailable(f"GPU {index} was asked for, and torch {torch.__version__} finds no CUDA device on this machine")
        if index >= torch.cuda.device_count():
            raise Unavailable(f"GPU {index} was asked for, and this process sees {torch.cuda.device_count()}")
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        torch.cuda.set_per_process_memory_fraction(memory_fraction, self.torch_device)
        properties = torch.cuda.get_device_properties(self.torch_device)
        self.name: str = properties.name
        self.num_processors: int = properties.multi_processor_count
        self._graph_memory = torch.cuda.graph_pool_handle()

    def stream(self, urgent: bool = False) -> Stream:
        made: torch.cuda.Stream = torch.cuda.Stream(self.torch_device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]
        return CudaStream(made)

    def pinned(self, num_bytes: int) -> Tensor:
        # torch keeps pinned memory from reuse until the copies to and from it are done.
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def capture(self, stream: Stream, work: Callable[[], None]) -> Graph:
        """All graphs share one pool of memory: they never run at the same time."""
        assert isinstance(stream, CudaStream)
        stream.launch(work)  # kernels compile and libraries make their workspaces now
        stream.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Other threads (transfers, pinned allocations) may use CUDA meanwhile without spoiling the recording.
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=stream.stream, capture_error_mode="thread_local"):
            work()
        return graph

    def memory(self) -> DeviceMemory:
        free, total = torch.cuda.mem_get_info(self.torch_device)
        held = torch.cuda.memory_reserved(self.torch_device)
        return DeviceMemory(total, free, held, torch.cuda.max_memory_reserved(self.torch_device))

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def release(self) -> None:
        torch.cuda.empty_cache()

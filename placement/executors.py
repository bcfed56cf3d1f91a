"""Where the trials of a search run: in this process, on all cores of this machine, or on a Ray cluster.

All of them answer in the order of the questions, so that a search does not depend on how many run at a time. What they are
given must be picklable: functions of a module and frozen data.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

from ..core.errors import Unavailable

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Executor(Protocol):
    """Asks many questions at once."""

    def map(self, function: Callable[[Question], Answer], questions: Sequence[Question]) -> list[Answer]:
        """The answers in the order of `questions`. What a function raises, this raises."""
        ...


class Inline:
    """One after the other, here."""

    def map(self, function: Callable[[Question], Answer], questions: Sequence[Question]) -> list[Answer]:
        return [function(question) for question in questions]


class Processes:
    """On the cores of this machine. Fresh interpreters: a forked one would share threads and locks with its parent."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def map(self, function: Callable[[Question], Answer], questions: Sequence[Question]) -> list[Answer]:
        return list(self._pool.map(function, questions))


class RayCluster:
    """On the cores of all machines of a Ray cluster, which must have Baton installed. Ray must have been initialised."""

    def __init__(self) -> None:
        import ray

        # One remote function for all: Ray keeps every one that it was ever given.
        self._remote = ray.remote(_ask)
        self._get = ray.get
        self._resources = ray.cluster_resources
        self._lost = (ray.exceptions.RaySystemError, ray.exceptions.WorkerCrashedError, ray.exceptions.RuntimeEnvSetupError)

    @property
    def width(self) -> int:
        """How many simulations can run at a time."""
        return max(1, int(self._resources().get("CPU", 1)))

    def map(self, function: Callable[[Question], Answer], questions: Sequence[Question]) -> list[Answer]:
        try:
            answers: list[Answer] = self._get([self._remote.remote(function, question) for question in questions])
        except self._lost as error:
            raise Unavailable(f"--ray: a simulation was lost; is the same Baton installed on every node? {error}") from error
        return answers


def _ask(function: Callable[[Question], Answer], question: Question) -> Answer:
    return function(question)


@contextmanager
def executor(workers: int, use_ray: bool = False) -> Iterator[Executor]:
    """`workers` processes (1: this one), or the Ray cluster that runs here, else a new one. Raises Unavailable without Ray."""
    if use_ray:
        with _ray():
            yield RayCluster()
    elif workers == 1:
        yield Inline()
    else:
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        try:
            yield Processes(pool)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _ray() -> Iterator[None]:
    try:
        import ray
    except ImportError:
        raise Unavailable("--ray: Ray is not installed; install baton-serve[ray], or leave --ray away") from None
    started = not ray.is_initialized()
    if started:
        ray.init(log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        if started:
            ray.shutdown()

"""The hardware that a placement may use: how many devices of which kinds, and what joins them.

A node holds devices of one kind. Made from the words of a command line, or by hand; nothing here looks for hardware.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..core.errors import InvalidRequest
from .hardware import Accelerator, find_accelerator


@dataclass(frozen=True, slots=True)
class Fabric:
    """What KV moves over, in bytes/s, one direction. The two limits of DistServe's algorithms are two of its values.

    node_link     between the workers of one node together
    network       between one node and all others together; inf: every node is as near as the next (Algorithm 1), close to
                  0: only placements that keep the KV within a node are of use (Algorithm 2)
    latency       seconds of one transfer beyond its bytes
    control       seconds of a message between router and worker
    """

    node_link: float
    network: float
    latency: float = 1e-4
    control: float = 2e-4


@dataclass(frozen=True, slots=True)
class Supply:
    """`count` devices of one kind, `per_node` of them on a node (fewer on the last)."""

    accelerator: Accelerator
    count: int
    per_node: int
    fabric: Fabric

    @property
    def num_nodes(self) -> int:
        return -(-self.count // self.per_node)


@dataclass(frozen=True, slots=True)
class Cluster:
    """All that may be used."""

    supplies: tuple[Supply, ...]

    @property
    def num_devices(self) -> int:
        return sum(supply.count for supply in self.supplies)

    def supply(self, accelerator: str) -> Supply:
        """That of one kind."""
        return next(supply for supply in self.supplies if supply.accelerator.name == accelerator)

    def with_link(self, network: float | None = None, node_link: float | None = None) -> Cluster:
        """The same devices joined otherwise."""
        return Cluster(
            tuple(
                replace(
                    supply,
                    fabric=replace(
                        supply.fabric,
                        network=supply.fabric.network if network is None else network,
                        node_link=supply.fabric.node_link if node_link is None else node_link,
                    ),
                )
                for supply in self.supplies
            )
        )

    def __str__(self) -> str:
        return ", ".join(
            f"{supply.count} {supply.accelerator.name} on {supply.num_nodes} node{'s' * (supply.num_nodes > 1)}"
            for supply in self.supplies
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """How a cluster is built where its devices do not say: None takes what is usual for the device."""

    nodes: int | None = None
    per_node: int | None = None
    node_link: float | None = None
    network: float | None = None


def parse_cluster(kinds: Sequence[str], shape: Shape | None = None) -> Cluster:
    """From `A100-80GB:32` or `H100` (then nodes x devices per node of them), one text per kind.

    Raises InvalidRequest naming the option, the text and what is allowed.
    """
    shape = shape or Shape()
    for name, number in (("nodes", shape.nodes), ("gpus-per-node", shape.per_node)):
        if number is not None and number < 1:
            raise InvalidRequest(f"--{name}: {number}; it must be a whole number of at least 1", name)
    for name, rate in (("node-link", shape.node_link), ("network", shape.network)):
        if rate is not None and not rate > 0:
            raise InvalidRequest(f"--{name}: {rate}; it must be a number of bytes/s above 0", name)
    if not kinds:
        raise InvalidRequest("--gpu: no kind of GPU is given; needed: one such as A100-80GB:8", "gpu")
    supplies = tuple(_parse_supply(kind, shape, len(kinds)) for kind in kinds)
    names = [supply.accelerator.name for supply in supplies]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise InvalidRequest(f"--gpu: {', '.join(doubles)} is given twice; add the counts up", "gpu")
    return Cluster(supplies)


def _parse_supply(text: str, shape: Shape, num_kinds: int) -> Supply:
    name, colon, number = text.partition(":")
    try:
        accelerator = find_accelerator(name)
    except InvalidRequest as error:
        raise InvalidRequest(f"--gpu: {error}", "gpu") from error
    per_node = shape.per_node or accelerator.devices_per_node
    if not colon:
        count = (shape.nodes or 1) * per_node
    elif number.isascii() and number.isdigit() and int(number) >= 1:
        count = int(number)
    else:
        raise InvalidRequest(f"--gpu: {text!r}: {number!r} is no count; needed: a whole number >= 1, as in {name}:8", "gpu")
    if shape.nodes is not None and shape.per_node is None and colon and num_kinds == 1:
        per_node = -(-count // shape.nodes)
    if shape.nodes is not None and num_kinds == 1 and count > shape.nodes * per_node:
        raise InvalidRequest(
            f"--gpu: {text!r}: {count} do not fit on {shape.nodes} nodes of {per_node}; at most {shape.nodes * per_node}", "gpu"
        )
    on_node = min(per_node, count)
    # Half the devices of a node send to the other half; each has its own link, and its own share of the network cards.
    fabric = Fabric(
        shape.node_link or accelerator.link * max(1.0, on_node / 2),
        shape.network or accelerator.network * on_node,
    )
    return Supply(accelerator, count, per_node, fabric)


def narrower(first: Fabric, second: Fabric) -> Fabric:
    """What joins devices of two supplies."""
    return Fabric(
        min(first.node_link, second.node_link),
        min(first.network, second.network),
        max(first.latency, second.latency),
        max(first.control, second.control),
    )


def unlimited() -> Fabric:
    """Links that take no time: for tests and closed forms."""
    return Fabric(math.inf, math.inf, 0.0, 0.0)

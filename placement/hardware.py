"""The accelerators that placement knows: what they compute, move, hold, cost and draw, per device, as their makers state it.

Sources: dense (not sparse) tensor throughput, memory, NVLink and power from NVIDIA's data sheets of V100, T4, A10, A40, L4, L40S,
A100, A800, H100, H200, HGX B200 and AMD's of MI300X; a link's rate is one direction of all of a device's lanes (PCIe
generation 4 x16 where there is no NVLink); the network is one card per device as in DGX and HGX machines, or a cloud's share of
one. `price` is what large clouds listed on demand in 2025, rounded: a default to be edited, no quotation. How much of a peak is
reached stands in `efficiency`, not here. `cpu` is one core with AVX512-BF16 as measured for Baton.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from ..core.errors import InvalidRequest

_TERA = 1e12
_GIGA = 1e9
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One device.

    family          devices that share measured efficiencies
    flops_16, flops_8   FLOP/s in bfloat16 or float16 (V100 and T4 have float16 alone), and in fp8: that of 16 bits where
                    there is no fp8 and such weights are widened first
    memory_bytes, bandwidth   of its own memory; bandwidth in bytes/s
    link            bytes/s to another device of the same node, one direction
    network         bytes/s to another node, one direction, the device's share of its node's cards
    devices_per_node
    price           dollars per hour of one device
    watts           at full power
    """

    name: str
    family: str
    flops_16: float
    flops_8: float
    memory_bytes: int
    bandwidth: float
    link: float
    network: float
    devices_per_node: int
    price: float
    watts: float

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s of products whose weights have `dtype`. Integer weights are widened to 16 bits first."""
        if dtype in ("fp8", "float8_e4m3fn"):
            return self.flops_8
        return self.flops_16 / 2 if dtype == "float32" else self.flops_16


def find_accelerator(name: str, prices: Mapping[str, float] | None = None) -> Accelerator:
    """By name, whatever its case; `prices` (dollars per hour, by name) win over the catalogue's.

    Raises InvalidRequest naming what is known.
    """
    wanted = _key(name)
    found = next((device for device in ACCELERATORS.values() if _key(device.name) == wanted), None)
    if found is None:
        raise InvalidRequest(f"accelerator {name!r} is not known; use one of {', '.join(ACCELERATORS)}", "accelerator")
    if prices is None:
        return found
    by_key = {_key(other): price for other, price in prices.items()}
    price = by_key.get(wanted, found.price)
    if not price > 0:
        raise InvalidRequest(f"price of {found.name} is {price}; it must be above 0 dollars per hour", "price")
    return replace(found, price=price)


def _key(name: str) -> str:
    """Letters and digits, without what a full product name has beside them."""
    plain = "".join(character for character in name.lower() if character.isalnum())
    for word in ("nvidia", "amd", "tesla"):
        plain = plain.removeprefix(word)
    plain = plain.removesuffix("gb").removesuffix("sxm")
    return {"a100": "a10080", "h10080": "h100", "h100sxm80": "h100"}.get(plain, plain)


def _catalogue() -> Iterator[Accelerator]:
    """TFLOP/s at 16 and 8 bits, GiB, then GB/s of memory, link and network; devices a node, $/h, W."""
    yield _device("A100-40GB", "a100", 312, 312, 40, 1555, 300, 25, 8, 3.0, 400)
    yield _device("A100-80GB", "a100", 312, 312, 80, 2039, 300, 25, 8, 3.7, 400)
    yield _device("A800", "a100", 312, 312, 80, 2039, 200, 25, 8, 3.0, 400)
    yield _device("H100", "h100", 989, 1979, 80, 3350, 450, 50, 8, 6.9, 700)
    yield _device("H200", "h100", 989, 1979, 141, 4800, 450, 50, 8, 7.9, 700)
    yield _device("B200", "b200", 2250, 4500, 180, 7700, 900, 100, 8, 11.0, 1000)
    yield _device("L40S", "l40s", 362, 733, 48, 864, 32, 25, 8, 1.9, 350)
    yield _device("L4", "l40s", 121, 242, 24, 300, 32, 12.5, 8, 0.8, 72)
    yield _device("A40", "a40", 150, 150, 48, 696, 32, 25, 8, 1.3, 300)
    yield _device("A10G", "a40", 70, 70, 24, 600, 32, 12.5, 8, 1.2, 300)
    yield _device("T4", "v100", 65, 65, 16, 320, 16, 6.25, 8, 0.5, 70)
    yield _device("V100", "v100", 125, 125, 32, 900, 150, 12.5, 8, 3.1, 300)
    yield _device("MI300X", "mi300x", 1307, 2615, 192, 5300, 448, 50, 8, 6.0, 750)
    yield _device("cpu", "cpu", 0.7, 0.7, 24, 41, 20, 1.25, 1, 0.05, 15)


def _device(
    name: str,
    family: str,
    tera_16: float,
    tera_8: float,
    gib: int,
    bandwidth: float,
    link: float,
    network: float,
    devices_per_node: int,
    price: float,
    watts: float,
) -> Accelerator:
    """From the units of data sheets."""
    rates = (tera_16 * _TERA, tera_8 * _TERA, gib * _GIB, bandwidth * _GIGA, link * _GIGA, network * _GIGA)
    return Accelerator(name, family, *rates, devices_per_node, price, watts)


ACCELERATORS = {device.name: device for device in _catalogue()}

"""The catalogue of accelerators: whole, found by the names people use, prices to be edited."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest
from baton.core.errors import InvalidRequest
from baton.placement.hardware import ACCELERATORS, Accelerator, find_accelerator

WANTED = ["A100-40GB", "A100-80GB", "A800", "H100", "H200", "B200", "L40S", "L4", "A40", "A10G", "T4", "V100", "MI300X", "cpu"]


@pytest.mark.parametrize("name", WANTED)
def test_every_number_of_a_device_is_there(name: str):
    device = ACCELERATORS[name]
    for field in fields(Accelerator):
        value = getattr(device, field.name)
        assert value if isinstance(value, str) else math.isfinite(value) and value > 0, field.name
    assert device.flops("fp8") >= device.flops("bfloat16") > device.flops("float32")
    assert device.flops("int4") == device.flops("float16")


@pytest.mark.parametrize(
    ("name", "known"),
    [("h100", "H100"), ("A100", "A100-80GB"), ("a100-40gb", "A100-40GB"), ("NVIDIA H100 SXM", "H100"), ("H100-80GB", "H100"),
     ("NVIDIA L40S", "L40S"), ("Tesla V100", "V100"), ("AMD MI300X", "MI300X"), ("CPU", "cpu")],
)  # fmt: skip
def test_a_device_is_found_by_the_names_people_use(name: str, known: str):
    assert find_accelerator(name).name == known


@pytest.mark.parametrize("name", ["", "TPU", "H1000", "A100-60GB"])
def test_an_unknown_device_is_refused_naming_the_known_ones(name: str):
    with pytest.raises(InvalidRequest, match=r"is not known; use one of A100-40GB, .*, cpu") as refused:
        find_accelerator(name)
    assert refused.value.field == "accelerator"


def test_a_price_can_be_given():
    assert find_accelerator("H100", {"h100": 2.5, "A100": 1.0}).price == 2.5
    assert find_accelerator("H200", {"h100": 2.5}).price == ACCELERATORS["H200"].price
    with pytest.raises(InvalidRequest, match=r"price of H100 is -1; it must be above 0"):
        find_accelerator("H100", {"H100": -1})

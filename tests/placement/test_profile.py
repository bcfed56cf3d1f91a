"""Profile files: written and read again, refused with file, key, value and what is allowed, and for another model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from baton.core.errors import InvalidRequest
from baton.placement.model_shape import MODELS
from baton.placement.profile import MeasuredCost, Profile, Residual, dump_profile, read_profile, write_profile
from baton.simulator.cost import LinearCost
from hypothesis import given
from hypothesis import strategies as st

LLAMA = MODELS["Llama-3.2-1B"]
COST = LinearCost(0.002, 1e-4, 8, 1e-8, 2e-7, 1e-5, 3e-7, 4e-5, 5e-5)
PROFILE = Profile(
    model=LLAMA.name,
    fingerprint=LLAMA.fingerprint,
    accelerator="cpu",
    dtype="bfloat16",
    kernels="auto",
    threads=1,
    block_size=32,
    host_overhead=2e-4,
    links={"shm": 9e9, "grpc": 1e9},
    costs=(
        MeasuredCost(1, 1, COST, {"prefill": Residual(0.01, 0.05, 9), "decode": Residual(0.02, 0.1, 20)}),
        MeasuredCost(2, 2, replace(COST, step=0.001, stages=2), {}),
    ),
)


def test_a_profile_is_read_as_it_was_written(tmp_path: Path):
    file = tmp_path / "profile.yaml"
    write_profile(PROFILE, file)
    assert read_profile(file) == PROFILE
    assert file.read_text().startswith("# Step times measured by `baton profile`")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.yaml"]


@given(st.floats(1e-9, 1e3), st.floats(0, 1e3))
def test_numbers_keep_six_digits(step: float, token: float):
    profile = replace(PROFILE, costs=(MeasuredCost(1, 1, LinearCost(step, token), {}),))
    read = yaml.safe_load(dump_profile(profile))["costs"][0]["coefficients"]
    assert read["step"] == pytest.approx(step, rel=1e-5)
    assert read["token"] == pytest.approx(token, rel=1e-5)


def test_the_cost_of_a_parallelism_is_found_or_refused_by_name():
    assert PROFILE.cost(LLAMA) == COST
    assert PROFILE.cost(LLAMA, 2, 2).stages == 2
    assert PROFILE.measured(2, 2)
    assert not PROFILE.measured(4, 1)
    with pytest.raises(InvalidRequest, match=r"no step times for tensor_parallel 4 x pipeline_parallel 1; it has 1 x 1, 2 x 2"):
        PROFILE.cost(LLAMA, 4)


def test_a_profile_of_another_model_is_refused_naming_both():
    other = MODELS["Llama-3.1-8B"]
    with pytest.raises(InvalidRequest, match=r"measured with Llama-3.2-1B .* says nothing of Llama-3.1-8B") as refused:
        PROFILE.cost(other)
    assert refused.value.field == "profile"
    assert PROFILE.cost(replace(LLAMA, name="the same under another name")) == COST


def changed(path: str, value: object) -> str:
    """The file with one key changed; None removes it."""
    document = yaml.safe_load(dump_profile(PROFILE))
    *parents, last = path.split(".")
    section = document
    for key in parents:
        section = section[int(key) if key.isdigit() else key]
    if value is None:
        del section[last]
    else:
        section[last] = value
    return yaml.safe_dump(document)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("profile", 2, "profile is 2; it must be 1, the version of this format"),
        ("accelerator", "", "accelerator is ''; it must be a non-empty text"),
        ("model.fingerprint", None, "model.fingerprint is missing; it must be a non-empty text"),
        ("threads", -1, "threads is -1; it must be a whole number of at least 0"),
        ("host_overhead", -1.0, "host_overhead is -1.0; it must be a number of seconds of at least 0"),
        ("links.shm", 0, "links.shm is 0; it must be a number of bytes per second above 0"),
        ("costs", [], r"costs is \[\]; it must be a list of at least one parallelism"),
        ("costs.0.tensor_parallel", 0, "costs.0.tensor_parallel is 0; it must be a whole number from 1 to 1024"),
        ("costs.0.coefficients.token", "fast", "costs.0.coefficients.token is 'fast'; it must be a number of seconds of at"),
        ("costs.0.coefficients.step", 0, "costs.0.coefficients.step is 0; it must be a number of seconds above 0"),
        ("costs.1.coefficients.pair", float("nan"), "costs.1.coefficients.pair is nan; it must be"),
        ("costs.0.coefficients.tokens", 1.0, "costs.0.coefficients.tokens is no key of a profile"),
        ("speed", 1, "speed is no key of a profile"),
    ],
)
def test_a_wrong_key_is_refused_with_file_key_value_and_what_is_allowed(tmp_path: Path, path: str, value: object, message: str):
    file = tmp_path / "wrong.yaml"
    file.write_text(changed(path, value))
    with pytest.raises(InvalidRequest, match=message) as refused:
        read_profile(file)
    assert str(file) in str(refused.value)


def test_all_wrong_keys_are_named_at_once(tmp_path: Path):
    file = tmp_path / "wrong.yaml"
    file.write_text(changed("threads", -1).replace("dtype: bfloat16", "dtype: ''"))
    with pytest.raises(InvalidRequest, match=r"(?s)dtype is ''.*threads is -1"):
        read_profile(file)


@pytest.mark.parametrize(("text", "message"), [("{", "is not YAML"), ("", "holds no keys"), ("- 1", "holds no keys")])
def test_what_is_no_profile_is_refused(tmp_path: Path, text: str, message: str):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_profile(file)
    with pytest.raises(InvalidRequest, match=r"cannot be read here: No such file"):
        read_profile(tmp_path / "none.yaml")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path):
    with pytest.raises(InvalidRequest, match=r"cannot be written"):
        write_profile(PROFILE, tmp_path / "no-such-folder" / "profile.yaml")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InvalidRequest, match=r"cannot be written"):
        write_profile(PROFILE, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]

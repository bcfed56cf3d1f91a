"""Topology files: every problem at once with its place, and a round trip that loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from baton.core.errors import TopologyError
from baton.core.slo import Slo
from baton.core.topology import KvTransferSpec, ModelSpec, PoolSpec, RouterSpec, Topology
from baton.core.view import Role
from baton.deploy.settings import (
    check_cluster_name,
    dump_topology,
    load_topology,
    parse_topology,
    prepare_ray_environment,
    state_folder,
)
from baton.kv_transfer.registry import TRANSPORTS
from baton.policy.admission import ADMISSION
from baton.policy.ordering import ORDERING
from baton.policy.routing import ROUTING
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
cluster: chat
model: {path: /models/m}
pools:
  prefill: {replicas: 2}
  decode: {kv_memory: 60GiB}
"""


def _problems(text: str) -> list[str]:
    with pytest.raises(TopologyError) as caught:
        parse_topology(text, "t.yaml", Path("/"))
    return str(caught.value).splitlines()


def _with(line: str) -> str:
    """GOOD with one more line at its end, which is line 6."""
    return GOOD + line + "\n"


def _names(table: dict[str, object]) -> str:
    return "one of " + ", ".join(sorted(table))


def test_defaults_fill_what_is_left_out():
    topology = parse_topology(GOOD, "t.yaml", Path("/")).topology
    assert topology == Topology(
        "chat",
        ModelSpec("/models/m"),
        (PoolSpec(Role.PREFILL, replicas=2), PoolSpec(Role.DECODE, kv_memory_bytes=60 << 30)),
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("slo: {ttft: 0}", "slo.ttft: 0 is not allowed; allowed: a number of seconds above 0"),
        ("slo: {tpot: .inf}", "slo.tpot: inf is not allowed; allowed: a number of seconds above 0"),
        ("slo: {attainment: 1.5}", "slo.attainment: 1.5 is not allowed; allowed: a share above 0 and at most 1"),
        ("kv_transfer: {checksum: 1}", "kv_transfer.checksum: 1 is not allowed; allowed: true or false"),
        ("router: {max_queue: true}", "router.max_queue: true is not allowed; allowed: a whole number from 1 to 16777216"),
        ("router: {max_queue: 2.5}", "router.max_queue: 2.5 is not allowed; allowed: a whole number from 1 to 16777216"),
        ("router: {replicas: 0}", "router.replicas: 0 is not allowed; allowed: a whole number from 1 to 1024"),
        ("router: {grpc: localhost}", "router.grpc: 'localhost' is not allowed; allowed: \"host:port\", port 0 for any free one"),
        ("router: {http: 'h:65536'}", "router.http: 'h:65536' is not allowed; allowed: \"host:port\", port 0 for any free one"),
        ("router: {routing: best}", f"router.routing: 'best' is not allowed; allowed: {_names(ROUTING)}"),
        ("router: {admission: vip}", f"router.admission: 'vip' is not allowed; allowed: {_names(ADMISSION)}"),
        ("router:", "router: nothing is not allowed; allowed: a mapping of router settings"),
        ("launcher: k8s", "launcher: 'k8s' is not allowed; allowed: one of ray, subprocess"),
        (
            "ray: {placement: best}",
            "ray.placement: 'best' is not allowed; allowed: one of pack, strict_pack, spread, strict_spread",
        ),
        ("labels: {team: 7}", "labels.team: 7 is not allowed; allowed: a mapping of texts to texts"),
        (
            "lancher: ray",
            "lancher: unknown key; did you mean launcher? "
            "allowed here: cluster, kv_transfer, labels, launcher, model, pools, ray, router, slo",
        ),
        ("slo: {x_y_z: 1}", "slo.x_y_z: unknown key; allowed here: attainment, tpot, ttft"),
        ("cluster: other", "cluster: this key is already on line 1; keep one of them"),
        (
            "  mixed: {kv_memory: 60 potatoes}",
            "pools.mixed.kv_memory: '60 potatoes' is not allowed; "
            'allowed: a size of at least 4KiB, such as 268435456, "256MiB" or "60GiB"',
        ),
        ("  mixed: {ordering: lifo}", f"pools.mixed.ordering: 'lifo' is not allowed; allowed: {_names(ORDERING)}"),
        ("  mixed:", "pools.mixed: empty; allowed: a mapping of pool settings, {} for the defaults"),
        ("  mixd: {}", "pools.mixd: unknown key; did you mean mixed? allowed here: decode, mixed, prefill"),
    ],
)
def test_a_problem_names_line_key_value_and_what_is_allowed(line: str, problem: str):
    assert _problems(_with(line)) == [f"t.yaml:6: {problem}"]


def test_an_unknown_transport_is_told_the_known_ones():
    (problem,) = _problems(_with("kv_transfer: {transport: pigeon}"))
    assert problem.startswith("t.yaml:6: kv_transfer.transport: 'pigeon' is not allowed; allowed: one of auto, ")
    assert all(name in problem for name in TRANSPORTS)


def test_all_problems_come_at_once_in_the_order_of_the_file():
    problems = _problems("cluster: A B\nmodel:\n  dtype: int8\npools:\n  prefill:\n    replicas: 0\n    threads: two\n")
    assert [problem.split(" ")[:2] for problem in problems] == [
        ["t.yaml:1:", "cluster:"],
        ["t.yaml:2:", "model.path:"],
        ["t.yaml:3:", "model.dtype:"],
        ["t.yaml:4:", "pools:"],
        ["t.yaml:6:", "pools.prefill.replicas:"],
        ["t.yaml:7:", "pools.prefill.threads:"],
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "t.yaml:1: a topology is a mapping with at least cluster, model, pools; this file holds nothing"),
        ("- 1", "t.yaml:1: a topology is a mapping with at least cluster, model, pools; this file holds [1]"),
        ("a: [1,\n", "t.yaml:2: this is not YAML: expected the node content, but found '<stream end>'"),
        (
            "cluster: a\nmodel: {path: /m}\npools: {decode: {}}\n",
            "t.yaml:3: pools: a decode pool needs a prefill pool beside it; add pools.prefill or pools.mixed",
        ),
        ("cluster: a\nmodel: {path: /m}\npools: {}\n", "t.yaml:3: pools: no pool; needed: prefill and decode, or mixed"),
        (
            "cluster: a\nmodel: {path: /m}\n",
            "t.yaml:1: pools: missing; needed: a mapping with `prefill` and `decode`, or `mixed`, or all three",
        ),
    ],
)
def test_whole_files_that_are_wrong(text: str, problem: str):
    assert _problems(text) == [problem]


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("256MiB", 256 << 20), ("1.5GiB", 3 << 29), ("2GB", 2 * 10**9), ("64 KiB", 64 << 10), ("8192", 8192), ("9000B", 9000)],
)
def test_sizes(text: str, num_bytes: int):
    topology = parse_topology(GOOD.replace("60GiB", f'"{text}"'), "t.yaml", Path("/")).topology
    assert topology.pools[1].kv_memory_bytes == num_bytes


def test_numbers_may_be_written_with_an_exponent():
    assert parse_topology(_with("slo: {ttft: 1e-1}"), "t.yaml", Path("/")).topology.slo.ttft == 0.1


def test_model_paths_start_at_the_file(tmp_path: Path):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "conf").mkdir()
    file = tmp_path / "conf" / "t.yaml"
    for written, path in [
        ("../models/tiny", str(tmp_path / "models" / "tiny")),
        ("./missing", str(tmp_path / "conf" / "missing")),
        ("org/name", "org/name"),
    ]:
        file.write_text(GOOD.replace("/models/m", written))
        assert load_topology(file).model.path == path


def test_a_file_that_is_not_there_says_so(tmp_path: Path):
    with pytest.raises(TopologyError, match=r"nowhere\.yaml: there is no such file"):
        load_topology(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_are_valid(example: Path):
    topology = load_topology(example)
    assert topology.model.path == str(ROOT / "examples" / "model" / "pydoc-llama")
    assert (topology.model.max_model_len or 0) <= 1024


_seconds = st.floats(1e-6, 1e6)
_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
_addresses = st.builds("{}:{}".format, st.sampled_from(["127.0.0.1", "0.0.0.0", "example.org", "[::1]"]), st.integers(0, 65535))


def _pools(role: Role) -> st.SearchStrategy[PoolSpec]:
    return st.builds(
        PoolSpec,
        role=st.just(role),
        replicas=st.integers(1, 64),
        tensor_parallel=st.integers(1, 8),
        pipeline_parallel=st.integers(1, 8),
        accelerator=_texts,
        max_step_tokens=st.integers(1, 1 << 20),
        max_num_seqs=st.integers(1, 4096),
        block_size=st.integers(1, 256),
        kv_memory_bytes=st.integers(1 << 12, 1 << 40),
        threads=st.integers(1, 64),
        prefix_cache=st.booleans(),
        ordering=st.sampled_from(sorted(ORDERING)),
        step_delay=st.floats(0, 10),
        gpu_memory_fraction=st.none() | st.floats(0.01, 1),
    )


_all_pools = st.tuples(_pools(Role.PREFILL), _pools(Role.DECODE), _pools(Role.MIXED))
_topologies = st.builds(
    Topology,
    cluster=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True),
    model=st.builds(
        ModelSpec,
        path=st.sampled_from(["/models/llama", "org/name", "/a b/ü"]),
        revision=st.none() | _texts,
        dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
        max_model_len=st.none() | st.integers(2, 1 << 20),
        name=st.none() | _texts,
    ),
    pools=_all_pools | _all_pools.map(lambda pools: pools[:2]) | _all_pools.map(lambda pools: pools[2:]),
    slo=st.builds(Slo, _seconds, _seconds, st.floats(0.001, 1)),
    kv_transfer=st.builds(KvTransferSpec, st.sampled_from(["auto", *TRANSPORTS]), _seconds, st.booleans()),
    router=st.builds(
        RouterSpec,
        grpc=_addresses,
        http=_addresses,
        routing=st.sampled_from(sorted(ROUTING)),
        admission=st.sampled_from(sorted(ADMISSION)),
        max_queue=st.integers(1, 1 << 20),
        local_prefill_tokens=st.integers(0, 1 << 20),
        request_timeout=_seconds,
        seed=st.none() | st.integers(0, 2**63 - 1),
        replicas=st.integers(1, 8),
    ),
    launcher=st.sampled_from(["ray", "subprocess"]),
    ray_address=st.none() | _texts,
    ray_placement=st.sampled_from(["pack", "spread"]),
    labels=st.dictionaries(_texts | st.sampled_from(["1", "true", "1e-3"]), _texts | st.just("1e3")).map(
        lambda d: tuple(d.items())
    ),
)


@given(_topologies)
def test_a_topology_survives_the_way_to_yaml_and_back(topology: Topology):
    assert parse_topology(dump_topology(topology), "t.yaml", Path("/")).topology == topology


def test_cluster_names_are_checked_on_the_command_line_too():
    assert check_cluster_name("a-1") == "a-1"
    with pytest.raises(TopologyError, match="small letters"):
        check_cluster_name("../etc")


def test_the_state_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_folder() == tmp_path / "baton"
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert state_folder() == Path.home() / ".local" / "state" / "baton"


def test_rays_environment_is_settled_unless_the_user_has(monkeypatch: pytest.MonkeyPatch):
    import os

    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    prepare_ray_environment()
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    prepare_ray_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"

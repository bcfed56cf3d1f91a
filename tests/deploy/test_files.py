"""The deploy files that are not Python: each is checked against what it talks about."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from baton.deploy.settings import load_topology, prepare_ray_environment
from baton.observability.metrics import Metrics

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "baton.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Every series that a router has, with its labels."""
    metrics = Metrics()
    metrics.observe_cluster(lambda: 0, lambda: 0, lambda: True, tuple)
    labels = {name: set(collector._labelnames) for collector, names in metrics.registry._collector_to_names.items()
              if hasattr(collector, "_labelnames") for name in names}  # fmt: skip
    return {
        family.name + suffix: labels.get(family.name, {"pool", "worker"}) | {"le"}
        for family in metrics.registry.collect()
        for suffix in SUFFIXES[family.type]
    }


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_of_the_dashboard_names_what_exists(query: str, series: dict[str, set[str]]) -> None:
    names = re.findall(r"\bbaton_\w+", query)
    assert names
    assert set(names) <= set(series)
    for label in re.findall(r"by \(([^)]*)\)", query):
        assert {part.strip() for part in label.split(",")} <= series[names[0]]
    assert query.count("(") == query.count(")")


def test_panels_do_not_overlap() -> None:
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_prometheus_asks_the_router_of_the_example_whom_to_scrape() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]
    http = load_topology(ROOT / "examples" / "local.yaml").router.http
    assert [discovery["url"] for discovery in job["http_sd_configs"]] == [f"http://{http}/metrics/targets"]


def test_ray_takes_the_cluster_file() -> None:
    pytest.importorskip("ray")
    prepare_ray_environment()
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / "deploy" / "ray" / "cluster.yaml").read_text())))


def test_the_set_up_script_is_a_shell_script() -> None:
    subprocess.run(["sh", "-n", ROOT / "deploy" / "setup.sh"], check=True)

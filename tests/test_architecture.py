"""The rules of the house, checked on its source: who imports whom, what stays pure, what nobody may do.

Budgets are smoke alarms: what passes them is listed in the test's output and fails nothing.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS: dict[str, float] = {
    "core": 1, "proto": 1, "kernels": 1.5,
    "kv_transfer": 2, "policy": 2, "observability": 2,
    "engine": 3, "router": 3,
    "worker": 3.5,
    "prefill_worker": 4, "decode_worker": 4, "api": 4, "client": 4, "simulator": 4,
    "deploy": 5, "placement": 5, "bench": 5,
    "cli": 6,
}  # fmt: skip

PURE_FOLDERS = ("core", "policy", "simulator")
PURE_MODULES = (
    "router.events", "router.lifecycle",
    "engine.blocks", "engine.scheduler",
    "kv_transfer.ticket", "kv_transfer.handoff", "kv_transfer.plan",
)  # fmt: skip
BLOCKED = ("torch", "ray", "grpc")
BESIDE = {"tests", "benchmarks", "docs", "examples", "build", "dist"}
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_CONSTRUCTOR = 400, 300, 40, 8


@dataclass(frozen=True)
class Module:
    """One source file. `name` is dotted, without `baton`; `unit` is the component it belongs to."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def unit(self) -> str:
        return self.name.partition(".")[0]

    @property
    def imports(self) -> set[str]:
        """Dotted names of the house's own modules that this one imports."""
        found: set[str] = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found |= {alias.name.removeprefix("baton.") for alias in node.names if alias.name.startswith("baton.")}
            elif isinstance(node, ast.ImportFrom):
                base = self._base(node)
                if base is not None:
                    found |= {known(".".join(filter(None, (base, alias.name)))) for alias in node.names}
        return found - {""}

    def _base(self, node: ast.ImportFrom) -> str | None:
        """What a `from X import` starts from, None when it is not ours."""
        if node.level == 0:
            name = node.module or ""
            return name.removeprefix("baton").removeprefix(".") if name.split(".")[0] == "baton" else None
        package = self.name.split(".")[: -node.level]
        return ".".join([*package, *filter(None, [node.module])])


@cache
def modules() -> dict[str, Module]:
    found = {}
    for folder in sorted(ROOT.iterdir()):
        if folder.is_dir() and not folder.name.startswith(".") and folder.name not in BESIDE and folder.suffix != ".egg-info":
            for path in sorted(folder.rglob("*.py")):
                if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                    found[name] = Module(name, path, ast.parse(path.read_text()))
    return found


def known(name: str) -> str:
    """The module that an imported name belongs to: itself or its parent; "" for the package's own root."""
    while name and name not in modules() and not (ROOT / Path(*name.split("."))).is_dir() and not name.startswith("proto."):
        name = name.rpartition(".")[0]
    return name


def _unit(name: str) -> str:
    return name.partition(".")[0]


def test_every_folder_has_a_floor():
    assert {module.unit for module in modules().values()} <= set(FLOORS)


def test_imports_go_downwards_only():
    upwards = [
        f"{module.name} (floor {FLOORS[module.unit]:g}) imports {name} (floor {FLOORS[_unit(name)]:g})"
        for module in modules().values()
        for name in module.imports
        if _unit(name) != module.unit and FLOORS[_unit(name)] >= FLOORS[module.unit]
    ]
    assert upwards == []


def test_modules_do_not_import_in_circles():
    graph = {name: module.imports & set(modules()) - {name} for name, module in modules().items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_router_never_imports_the_engine_nor_workers_the_router():
    forbidden = {"router": ("engine", "worker", "prefill_worker", "decode_worker")} | dict.fromkeys(
        ("engine", "worker", "prefill_worker", "decode_worker"), ("router",)
    )
    found = [
        f"{module.name} imports {name}"
        for module in modules().values()
        for name in module.imports
        if name.partition(".")[0] in forbidden.get(module.name.partition(".")[0], ())
    ]
    assert found == []


def test_pure_modules_import_without_torch_ray_and_grpc():
    pure = [name for name, module in modules().items() if module.unit in PURE_FOLDERS or name in PURE_MODULES]
    assert set(PURE_MODULES) <= set(pure)  # they exist
    program = f"""
import importlib, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ImportError(name + " is blocked: a pure module must not need it")

sys.meta_path.insert(0, Blocker())
for name in {pure!r}:
    importlib.import_module("baton." + name)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pure_modules_have_no_clock_no_randomness_and_no_event_loop():
    # `core.clock` is the one door through which time comes in.
    forbidden = {"time", "random", "secrets", "asyncio", "threading", "socket", "datetime"}
    found = [
        f"{name} imports {imported}"
        for name, module in modules().items()
        if (module.unit in ("core", "policy") or name in PURE_MODULES) and name != "core.clock"
        for imported in sorted(forbidden & _top_level_names(module))
    ]
    assert found == []


def _top_level_names(module: Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_ray_is_imported_only_where_it_is_wanted():
    users = {name for name, module in modules().items() if "ray" in _top_level_names(module)}
    assert users == {"deploy.ray_controller", "deploy.ray_host", "deploy.ray_launcher", "placement.executors"}


def test_no_mutable_state_at_module_level():
    """Tables in capitals are constants that nobody may write to; everything else must be immutable."""
    found = [
        f"{module.path.relative_to(ROOT)}:{node.lineno}"
        for module in modules().values()
        for node in module.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and not _is_constant_table(node) and _is_mutable(node.value)
    ]
    found += [
        f"{module.path.relative_to(ROOT)}:{node.lineno}: global {', '.join(node.names)}"
        for module in modules().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Global)
    ]
    assert found == []


def test_nobody_writes_to_a_table():
    tables = {
        target.id
        for module in modules().values()
        for node in module.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and _is_constant_table(node) and _is_mutable(node.value)
        for target in _targets(node)
        if isinstance(target, ast.Name)
    }
    writers = ("append", "extend", "insert", "update", "setdefault", "pop", "popitem", "clear", "add", "discard", "remove")
    found = []
    for module in modules().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                name = _last_name(node.value)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in writers:
                name = _last_name(node.func.value)
            else:
                continue
            if name in tables:
                found.append(f"{module.path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert found == []


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _is_constant_table(node: ast.Assign | ast.AnnAssign) -> bool:
    names = [target.id for target in _targets(node) if isinstance(target, ast.Name)]
    return bool(names) and all(name == "__all__" or name.strip("_") == name.strip("_").upper() for name in names)


def _is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    makers = {"list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter", "WeakValueDictionary"}
    return isinstance(value, ast.Call) and _last_name(value.func) in makers


def test_the_environment_is_read_in_one_place():
    readers = {
        name
        for name, module in modules().items()
        for node in ast.walk(module.tree)
        if (isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv") and _last_name(node.value) == "os")
        or (isinstance(node, ast.ImportFrom) and node.module == "os" and {a.name for a in node.names} & {"environ", "getenv"})
    }
    assert readers == {"deploy.settings"}


def test_no_junk_drawers():
    names = {part for name in modules() for part in name.split(".")}
    assert not {name for name in names if name.strip("_") in ("util", "utils", "helper", "helpers", "common", "misc")}


def test_component_folders_are_namespaces():
    """A folder with `__init__.py` called `kernels` or `proto` would hide a real package of that name."""
    assert [str(module.path) for name, module in modules().items() if name.endswith("__init__")] == []


def test_pyproject_lists_every_component():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    packages = {"baton"} | {"baton." + name.rpartition(".")[0] for name in modules()} | {"baton.proto"}
    # A component may be listed before its first module is written.
    assert packages <= set(listed)
    assert [name for name in listed if not (ROOT / Path(*name.split(".")[1:])).is_dir()] == []
    assert len(listed) == len(set(listed))


def test_every_module_says_what_it_is_for():
    assert [name for name, module in modules().items() if not ast.get_docstring(module.tree)] == []


def test_budgets(capsys: pytest.CaptureFixture[str]):
    over = [line for module in modules().values() for line in _over_budget(module)]
    with capsys.disabled():
        if over:
            print("\nover budget (split by subject, or leave with a reason):\n  " + "\n  ".join(sorted(over)))


def _over_budget(module: Module) -> list[str]:
    path = module.path.relative_to(ROOT)
    over = []
    num_lines = len(module.path.read_text().splitlines())
    if num_lines > MAX_FILE:
        over.append(f"{path}: {num_lines} lines (file {MAX_FILE})")
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        size = (node.end_lineno or node.lineno) - node.lineno + 1
        limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
        if size > limit:
            over.append(f"{path}:{node.lineno}: {node.name} has {size} lines ({limit})")
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            num_parameters = len(node.args.args) + len(node.args.kwonlyargs) - 1
            if num_parameters > MAX_CONSTRUCTOR:
                over.append(f"{path}:{node.lineno}: {num_parameters} constructor parameters ({MAX_CONSTRUCTOR})")
    return over

"""YAML read together with the place of every key, so that an error can say where it is.

Duplicate keys are problems here, not silently the last one as in plain PyYAML.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from ..core.errors import TopologyError

KeyPath = tuple[str | int, ...]
YamlValue = None | bool | int | float | str | list["YamlValue"] | dict[str, "YamlValue"]


@dataclass(frozen=True, slots=True)
class Marks:
    """Where each key of one file stands. `lines` holds 1-based line numbers."""

    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def line(self, path: KeyPath) -> int:
        """Line of `path`, or of its nearest parent that is in the file."""
        while path not in self.lines and path:
            path = path[:-1]
        return self.lines.get(path, 1)

    def at(self, path: KeyPath) -> str:
        """`file:line: key.path`, the beginning of every message."""
        name = ".".join(str(part) for part in path)
        return f"{self.file}:{self.line(path)}: {name}" if name else f"{self.file}:{self.line(path)}"


@dataclass(frozen=True, slots=True)
class Document:
    """A file's data, the places of its keys, and what is wrong with it as YAML: (path, line, message)."""

    data: YamlValue
    marks: Marks
    duplicates: tuple[str, ...]


def read_document(text: str, file: str) -> Document:
    """Parse `text`. Raises TopologyError when it is not YAML at all."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        marks = Marks(file)
        duplicates: list[str] = []
        data = _value(loader, root, (), marks, duplicates) if root is not None else None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        hint = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        raise TopologyError(f"{where}: this is not YAML: {error.problem or error}{hint}") from error
    except yaml.YAMLError as error:
        raise TopologyError(f"{file}: this is not YAML: {error}") from error
    finally:
        loader.dispose()
    return Document(data, marks, tuple(duplicates))


def write_document(data: YamlValue) -> str:
    """`data` as YAML that `read_document` reads back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes a text that `_Loader` would take for a number."""


_FLOAT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(*_FLOAT)
_Dumper.add_implicit_resolver(*_FLOAT)


def _value(loader: _Loader, node: yaml.Node, path: KeyPath, marks: Marks, duplicates: list[str]) -> YamlValue:
    marks.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, YamlValue] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in mapping:
                first = marks.lines[(*path, key)]
                name = ".".join(str(part) for part in (*path, key))
                duplicates.append(f"{marks.file}:{line}: {name}: this key is already on line {first}; keep one of them")
                continue
            marks.lines[(*path, key)] = line
            mapping[key] = _value(loader, value_node, (*path, key), marks, duplicates)
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, index), marks, duplicates) for index, item in enumerate(node.value)]
    value: YamlValue = loader.construct_object(node)
    return value

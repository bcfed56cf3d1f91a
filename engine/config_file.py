"""Typed reading of a model folder's JSON files. Every refusal names the file, the key, its value and what would be right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ..core.errors import ModelError


class ConfigFile:
    """One JSON object of a file, or a section of it."""

    def __init__(self, file: Path, values: Mapping[str, object], prefix: str = "") -> None:
        self._file = file
        self._values = values
        self._prefix = prefix

    @classmethod
    def read(cls, file: Path) -> ConfigFile:
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ModelError(f"{file}: {error.strerror}; a model folder holds config.json and safetensors files") from error
        except ValueError as error:
            raise ModelError(f"{file} is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ModelError(f"{file} holds a JSON {type(values).__name__}, not an object")
        return cls(file, values)

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def wrong(self, key: str, right: str) -> ModelError:
        return ModelError(f"{self._file}: {self._prefix}{key} is {self._values.get(key)!r}; it must be {right}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.wrong(key, "a number above 0")
        return float(value)

    def optional_integer(self, key: str, absent: int | None) -> int | None:
        """As `integer`, but null is None; `absent` is what a file without the key means."""
        if key not in self._values:
            return absent
        return self.integer(key) if self.has(key) else None

    def optional_number(self, key: str, absent: float | None) -> float | None:
        """As `number`, but null is None; `absent` is what a file without the key means."""
        if key not in self._values:
            return absent
        return self.number(key) if self.has(key) else None

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return default if value is None else value

    def text(self, key: str, default: str) -> str:
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; empty when absent."""
        value = self._values.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def indices(self, key: str) -> tuple[int, ...]:
        """A list of places counted from 0; empty when absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in value):
            raise self.wrong(key, "a list of whole numbers of at least 0")
        return tuple(value)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def texts_or_text(self, key: str) -> tuple[str, ...]:
        """A list of strings, or one alone."""
        return (self.text(key, ""),) if isinstance(self._values.get(key), str) else self.texts(key)

    def is_exactly(self, key: str, value: int) -> bool:
        found = self._values.get(key)
        return found == value and not isinstance(found, bool)

    def keys(self) -> tuple[str, ...]:
        return tuple(self._values)

    def sections(self) -> tuple[str, ...]:
        """Keys that hold nested objects."""
        return tuple(key for key, value in self._values.items() if isinstance(value, dict))

    def section(self, key: str) -> ConfigFile:
        """A nested object; an empty one when absent."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return ConfigFile(self._file, value or {}, f"{self._prefix}{key}.")

"""Writing results: all files of a verb at once, at its end, or none."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from errno import EISDIR
from pathlib import Path

from ..core.errors import InvalidRequest


def write_all(texts: Mapping[Path, str]) -> None:
    """Replace every file by its text, making missing folders. A reader sees an old file or a new one, never half of one.

    Raises InvalidRequest, naming the file, when one of them cannot be written: then none has changed.
    """
    drafts = {path: path.with_name(f".{path.name}.new") for path in texts}
    path = Path()
    try:
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            drafts[path].write_text(text, encoding="utf-8")
            if path.is_dir():
                raise IsADirectoryError(EISDIR, "it is a folder")
        for path, draft in drafts.items():
            draft.replace(path)
    except OSError as error:
        for draft in drafts.values():
            with suppress(OSError):  # its folder may be what could not be made
                draft.unlink()
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}", "out") from error

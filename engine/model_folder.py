"""Where a model is: a folder here, or one fetched from the hub."""

from __future__ import annotations

from pathlib import Path

from ..core.errors import ModelError


def resolve_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The folder of a model: the path itself, or a snapshot of a hub id at `revision`.

    Raises ModelError when it is neither a folder nor a hub id that can be fetched (or was fetched before).
    """
    folder = Path(path_or_hub_id).expanduser()
    if path_or_hub_id and folder.is_dir():
        return folder
    looks_like_path = path_or_hub_id.startswith(("/", ".", "~")) or path_or_hub_id.count("/") > 1
    if folder.exists() or looks_like_path or not path_or_hub_id:
        raise ModelError(f"no model folder at {path_or_hub_id!r}; give a folder that holds config.json, or a hub id (owner/name)")
    # Imported here: a folder needs nothing of the hub's client.
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(snapshot_download(path_or_hub_id, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the client raises errors of a dozen unrelated classes
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"{path_or_hub_id!r} is not a folder here, and the model hub did not give it{at}: {error}. "
            "Give the path of a model folder, or check the id and the network"
        ) from error

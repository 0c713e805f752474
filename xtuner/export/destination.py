"""Where an export may be written, atomically: a folder that is new, empty, or an earlier export of the same kind."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, atomic_folder, read_json


@contextlib.contextmanager
def export_folder(target: Path, source: Path, kind: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target`. Both paths are resolved.

    Args:
        source: what is exported; neither it nor a folder in or around it may be the target.
        kind: recorded in the manifest: an earlier export of this kind is replaced, anything else is not.

    Raises: ConfigError for a target that may not be replaced, CheckpointError if writing fails.
    """
    try:
        _refuse_to_replace(target, source, kind)
        with atomic_folder(target, kind=kind) as folder:
            yield folder
    except BrokenPipeError:  # of the terminal, not of the disk
        raise
    except (OSError, SafetensorError) as e:
        raise CheckpointError(
            f"the export cannot be written: {e}", where=str(target), do="check the disk: space, quota, permissions"
        ) from None


def require_parent(target: Path) -> None:
    """Raises: CheckpointError if a file has the name of a folder above `target`."""
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        what = f"the export cannot be written: {above} is a file, not a folder"
        raise CheckpointError(what, where=str(target), do="give another path")


def _refuse_to_replace(target: Path, source: Path, kind: str) -> None:
    require_parent(target)
    if target == source or target in source.parents or source in target.parents:
        raise ConfigError(
            "the target is the source itself, inside it, or around it",
            where=str(target),
            why="the source would be replaced or damaged",
            do="give another folder",
        )
    if not target.exists() or (target.is_dir() and (not any(target.iterdir()) or _is_export(target, kind))):
        return
    raise ConfigError(
        "the target exists and is not an earlier export of this kind",
        where=str(target),
        why="it would be replaced as a whole",
        do="give another folder, or remove it",
    )


def _is_export(folder: Path, kind: str) -> bool:
    try:
        manifest = read_json(folder / MANIFEST)
    except CheckpointError:
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == kind and not (folder / "trainer.json").exists()

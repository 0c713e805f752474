"""The only place that writes files which must be whole: temporary name, sync, rename, sync of the folder.

A directory published here carries `manifest.json` (size and sha256 of each file). The manifest is written last,
so a directory with a manifest that verifies is complete, whatever happened to the process that wrote it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from xtuner.core.dist import note
from xtuner.core.errors import CheckpointError
from xtuner.core.inputs import open_regular, read_regular, short

MANIFEST = "manifest.json"
HASHERS = 4  # files hashed side by side; one core hashes about 1.5 GB/s
_UMASK = os.umask(0)  # can only be read by setting it; later, with threads that write, one could keep the other's 0
os.umask(_UMASK)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success it takes the name `path` in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.tmp-", dir=path.parent)
    try:
        os.fchmod(fd, 0o666 & ~_UMASK)
        with open(fd, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


class PendingFile:
    """A temporary file beside `path`, open as `file`, that takes the name by `commit`; by `drop` nothing is left."""

    def __init__(self, path: str | Path, mode: str = "w") -> None:
        self._stack = contextlib.ExitStack()
        self.file: IO[Any] = self._stack.enter_context(atomic_file(path, mode))

    def commit(self) -> None:
        """Raises: OSError."""
        self._stack.close()

    def drop(self) -> None:
        self._stack.__exit__(_Dropped, _Dropped(), None)


class _Dropped(Exception):
    pass


def user_cache() -> Path:
    """Our folder for what can be made again, in the user's cache. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xtuner"


def write_json(path: str | Path, value: Any) -> None:
    with atomic_file(path) as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def read_json(path: str | Path) -> Any:
    """Raises: CheckpointError if the file is absent, cannot be read or is not JSON."""
    try:
        return json.loads(read_regular(path).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{Path(path).name} is missing", where=str(path)) from None
    except OSError as e:
        raise CheckpointError(f"{Path(path).name} cannot be read: {e.strerror or e}", where=str(path)) from None
    except RecursionError:
        raise CheckpointError(f"{Path(path).name} is nested too deeply to be read", where=str(path)) from None
    except ValueError as e:  # not JSON, not UTF-8, or a number with thousands of digits
        raise CheckpointError(f"{Path(path).name} is not JSON: {e}", where=str(path)) from None


def sha256(path: Path) -> str:
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as the manifest records them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Seal a directory: `entries` maps relative names to `file_entry`s."""
    write_json(folder / MANIFEST, {**facts, "files": dict(sorted(entries.items()))})


def seal(folder: Path, **facts: Any) -> None:
    """Sync and hash every file below `folder`, then write its manifest."""
    entries = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        usual_permissions(file)
        sync_file(file)
        entries[file.relative_to(folder).as_posix()] = file_entry(file)
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    write_manifest(folder, entries, **facts)


def verify(folder: str | Path, rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """Check every file that the manifest names, size first, then contents.

    Of several `ranks` each compares the contents of its share of the files only.

    Returns the manifest. Raises: CheckpointError naming the first file that is missing, short or altered.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not all(
        isinstance(e, dict) and isinstance(e.get("bytes"), int) and "sha256" in e for e in files.values()
    ):
        raise CheckpointError("the manifest is no manifest", where=str(folder / MANIFEST))
    contents = sorted(files, key=lambda name: -files[name]["bytes"])[rank::ranks]
    for name, entry in files.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(f"the manifest names a file outside its directory: {short(name)}", where=str(folder))
        if not os.path.isfile(file):
            raise CheckpointError(f"{short(name)} is missing", where=str(folder))
        size = file.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes instead of {entry['bytes']}", where=str(file))
    with ThreadPoolExecutor(HASHERS) as pool:
        for name, found in zip(contents, pool.map(lambda name: sha256(folder / name), contents), strict=True):
            note(f"{name} read")
            if found != files[name]["sha256"]:
                raise CheckpointError(f"{name} is altered: its sha256 is not the manifest's", where=str(folder / name))
    unknown = [n for p in folder.rglob("*") if p.is_file() and (n := p.relative_to(folder).as_posix()) not in files]
    if set(unknown) - {MANIFEST}:
        raise CheckpointError(f"{min(set(unknown) - {MANIFEST})} is not in the manifest", where=str(folder))
    return dict(manifest)


def remove_tree(folder: Path) -> None:
    """Delete a directory so that a crash half-way never leaves something that looks whole: manifest first."""
    with contextlib.suppress(FileNotFoundError):
        (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def publish(temporary: Path, target: Path) -> None:
    """Give a finished directory its name. An older one of that name is moved aside first, then removed."""
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        os.rename(target, aside)
    os.rename(temporary, target)
    sync_folder(target.parent)
    if aside.exists():
        remove_tree(aside)


def recover(parent: Path, pattern: str) -> None:
    """Tidy up after a process that died while it published a directory named like `pattern` (a glob) in `parent`.

    What was moved aside gets its name back if nothing took it; unfinished ones are removed. Only for the one job that
    owns `parent`; names that do not fit the pattern are nobody's business.
    """
    for aside in parent.glob(f".{pattern}.old-*"):
        target = parent / aside.name[1:].rpartition(".old-")[0]
        if (aside / MANIFEST).is_file() and not target.exists():
            os.rename(aside, target)
        else:
            remove_tree(aside)
    for unfinished in parent.glob(f".{pattern}.tmp-*"):
        remove_tree(unfinished) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)


def usual_permissions(path: Path) -> None:
    """Those of an ordinarily made file or folder; temporary ones, and safetensors' files, are their owner's alone."""
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_UMASK)


@contextlib.contextmanager
def atomic_folder(target: str | Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary directory beside `target`; on success it is sealed and published as `target`."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        usual_permissions(temporary)
        yield temporary
        seal(temporary, **facts)
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

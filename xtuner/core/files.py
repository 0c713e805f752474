"""Atomic writes of files and folders: temporary name, fsync, rename, fsync of the parent folder. All files that must
not be seen half-written are written here.

A folder published here contains `manifest.json` (size and sha256 of each file, and of itself). The manifest is written
last, so a folder whose manifest verifies is complete, even if the process that wrote it was killed.

Next to a target NAME there may be, each with the tag of the process that made it (`core/file_owner.py`):

    .NAME.tmp-TAG         the new version while it is written
    .NAME.old-TAG         the old version, until the new one has taken the name
    .NAME.removing-TAG    an old version that is being deleted
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from xtuner.core.activity import record_progress
from xtuner.core.errors import DISK_ERRORS, CheckpointError, ConfigError, XTunerError
from xtuner.core.file_owner import is_owner_alive, owner_tag
from xtuner.core.foreign_inputs import open_regular, read_regular, short, short_repr
from xtuner.core.log import logger

MANIFEST = "manifest.json"
HASHERS = 4  # files hashed at a time; one core hashes about 1.5 GB/s
_UMASK = os.umask(0)  # reading it sets it, so it is read before threads that write files exist
os.umask(_UMASK)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    with open(path, "rb+") as f:
        os.fsync(f.fileno())


def require_utf8(path: Path, setting: str) -> None:
    """Raises: ConfigError if `path` is not UTF-8: safetensors could not read files below it."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(
            "the path is not UTF-8",
            where=f"{setting}: {path}",
            why="safetensors opens UTF-8 paths only; what is saved there could not be read",
            do="give another folder, or rename that part of the path",
        ) from None


def temporary_sibling(target: Path, purpose: str) -> Path:
    """A unique temporary name next to `target` (see the top of this file)."""
    return target.with_name(f".{target.name}.{purpose}-{owner_tag()}")


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file next to `path`; on success rename it to `path`.

    Text is UTF-8; bytes of file names that are not UTF-8 are kept. OSErrors of writing name `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(path, "tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as e:
        e.filename = str(path)  # not the temporary name, which the user did not choose
        raise
    try:
        os.fchmod(fd, 0o666 & ~_UMASK)
        coding = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
        with open(fd, mode, **coding) as f:  # type: ignore[call-overload]
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, OSError) and (e.filename == temporary or (e.filename is None and e.errno in DISK_ERRORS)):
            e.filename, e.filename2 = str(path), None  # errors of `write` have no file name
        raise


class PendingFile:
    """A temporary file next to `path`, open as `file`: `commit` renames it to `path`, `drop` deletes it."""

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


def user_cache_dir() -> Path:
    """xtuner's folder in the user's cache, for files that can be rebuilt. It may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xtuner"


def write_json(path: str | Path, value: Any) -> None:
    with atomic_file(path) as f:
        f.write(_text(value))


def _text(value: Any) -> str:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()  # file names that are not UTF-8 become JSON escapes


def read_json(path: str | Path) -> Any:
    """Raises: CheckpointError if the file is absent, cannot be read, or is not JSON."""
    return _parsed(Path(path), _read(Path(path)))


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing", where=str(path)) from None
    except UnicodeDecodeError as e:
        raise CheckpointError(f"{path.name} is not JSON: {e}", where=str(path)) from None
    except OSError as e:
        raise CheckpointError(f"{path.name} cannot be read: {e.strerror or e}", where=str(path)) from None


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise CheckpointError(f"{path.name} is nested too deeply", where=str(path)) from None
    except ValueError as e:  # also raised for numbers of thousands of digits
        raise CheckpointError(f"{path.name} is not JSON: {e}", where=str(path)) from None


def sha256(path: Path) -> str:
    with open_regular(path) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file, as the manifest records them."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_manifest(folder: Path, entries: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Write the manifest of a folder; `entries`: relative name → `file_entry`. Its own sha256 is the last entry."""
    manifest = {**facts, "files": dict(sorted(entries.items()))}
    write_json(folder / MANIFEST, {**manifest, "sha256": _manifest_digest(manifest)})


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_text(manifest).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, verified against its own sha256. No other file is read.

    Manifests of older versions have no sha256 of their own; their text must equal what would be written today.
    Raises: CheckpointError.
    """
    path = folder / MANIFEST
    text = _read(path)
    manifest = _parsed(path, text)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    plain = isinstance(manifest, dict) and all(isinstance(v, str | int) for k, v in manifest.items() if k != "files")
    if not plain or not isinstance(files, dict) or manifest.keys() - {"kind", "iteration", "files", "sha256"}:
        raise CheckpointError("the manifest was not written by xtuner", where=str(path))
    for name, entry in files.items():
        if not name or ".." in Path(name).parts or Path(name).is_absolute():
            raise CheckpointError(
                f"the manifest names a file outside its directory: {short_repr(name)}", where=str(path)
            )
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or size < 0 or not isinstance(digest, str):
            raise CheckpointError(f"the manifest has no size and sha256 of {short_repr(name)}", where=str(path))
    own = manifest.pop("sha256", None)
    sealed = {**manifest, "sha256": own} if own is not None else manifest
    if text != _text(sealed) or own not in (None, _manifest_digest(manifest)):
        raise CheckpointError("the manifest is altered: it differs from what was written", where=str(path))
    return dict(manifest)


def seal(folder: Path, **facts: Any) -> None:
    """Sync and hash every file below `folder`, then write its manifest."""
    entries = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        set_default_permissions(file)
        sync_file(file)
        entries[file.relative_to(folder).as_posix()] = file_entry(file)
    for inner in (p for p in folder.rglob("*") if p.is_dir()):
        sync_folder(inner)
    write_manifest(folder, entries, **facts)


def verify(folder: str | Path, rank: int = 0, ranks: int = 1, contents: bool = True) -> dict[str, Any]:
    """Check the size, then the contents, of every file in the manifest.

    Args:
        rank, ranks: this rank hashes only its share of the files.
        contents: False to check sizes only.

    Returns the manifest. Raises: CheckpointError naming the first file that is missing, short or altered.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = manifest["files"]
    hashed = sorted(files, key=lambda name: -files[name]["bytes"])[rank::ranks] if contents else []
    for name, entry in files.items():
        file = folder / name
        try:
            info = os.stat(file)
        except (OSError, ValueError):  # also names that no file can have
            info = None
        if info is None or not stat.S_ISREG(info.st_mode):
            raise CheckpointError(f"{short(name)} is missing", where=str(folder))
        size = info.st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{name} has {size} bytes instead of {entry['bytes']}", where=str(file))
    with ThreadPoolExecutor(HASHERS) as pool:
        for name, found in zip(hashed, pool.map(lambda name: sha256(folder / name), hashed), strict=True):
            record_progress(f"{name} read")
            if found != files[name]["sha256"]:
                what = f"{name} is altered: its sha256 differs from the manifest's"
                raise CheckpointError(what, where=str(folder / name))
    unknown = [n for p in folder.rglob("*") if p.is_file() and (n := p.relative_to(folder).as_posix()) not in files]
    if set(unknown) - {MANIFEST}:
        raise CheckpointError(f"{min(set(unknown) - {MANIFEST})} is not in the manifest", where=str(folder))
    return dict(manifest)


def remove_tree(path: Path) -> None:
    """Delete a file, or a folder with its manifest first, so that a crash never leaves a folder that looks complete.

    Only for temporary names; see `discard`.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    with contextlib.suppress(OSError):
        (path / MANIFEST).unlink()
    shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Rename a file or folder to a temporary name, then delete it. After a crash in between, `recover` or
    `remove_leftovers` deletes the rest."""
    aside = temporary_sibling(path, "removing")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        remove_tree(aside)


def publish(temporary: Path, target: Path) -> None:
    """Rename a finished folder to `target`. An older one of that name is moved aside first, then deleted."""
    aside = temporary_sibling(target, "old")
    if os.path.lexists(target):
        os.rename(target, aside)
    os.rename(temporary, target)
    sync_folder(target.parent)
    if os.path.lexists(aside):
        remove_tree(aside)


def recover(parent: Path, pattern: str) -> None:
    """Clean up after a process that was killed while it wrote, replaced or removed a folder named like `pattern` (a
    glob).

    A folder that was moved aside gets its name back if nothing has taken it; the rest is removed. Only for the job that
    owns `parent`, so that no living process uses these files.
    """
    for purpose in ("old", "tmp", "removing"):
        for path in parent.glob(f".{pattern}.{purpose}-*"):
            _clear(path, purpose)


def remove_leftovers(target: Path) -> None:
    """Remove temporary files that killed processes left next to `target`, which no lock protects.

    Only those of processes of this machine that no longer run. If the owner's state is unknown, a warning is logged.
    """
    for purpose in ("old", "tmp", "removing"):
        for path in target.parent.glob(f".{glob.escape(target.name)}.{purpose}-*"):
            if (living := is_owner_alive(path.name)) is False:
                logger.info(f"{path.name} was left by a process that ended: " + _clear(path, purpose))
            elif living is None:
                logger.warning(
                    f"{path} was left by a process of another machine or container, or by an older version of xtuner; "
                    f"remove it if no process is writing {target.name}"
                )


def _clear(path: Path, purpose: str) -> str:
    """Returns what was done, for the log."""
    target = path.with_name(path.name[1:].rpartition(f".{purpose}-")[0])
    if purpose == "old" and (path / MANIFEST).is_file() and not os.path.lexists(target):
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, target)
        return f"restored as {target.name}"
    remove_tree(path)
    return "removed"


def set_default_permissions(path: Path) -> None:
    """Permissions by the umask; temporary files, and those of safetensors, are readable by their owner only."""
    os.chmod(path, (0o777 if path.is_dir() else 0o666) & ~_UMASK)


def temporary_folder(target: Path) -> Path:
    """A new empty folder next to `target`, for `publish`."""
    folder = temporary_sibling(target, "tmp")
    folder.mkdir()
    return folder


def write_failure(error: OSError, what: str, path: Path, do: str) -> XTunerError:
    """The error for users if `path` cannot be written: CheckpointError (74) if the disk is full or fails, else
    ConfigError (2)."""
    what, where = f"{what} cannot be written: {error.strerror or error}", str(error.filename or path)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
        return CheckpointError(what, where=where, do="check the disk: space, quota, errors")
    return ConfigError(what, where=where, do=do)


@contextlib.contextmanager
def atomic_folder(target: str | Path, **facts: Any) -> Iterator[Path]:
    """Yield a temporary folder next to `target`; on success seal it and publish it as `target`."""
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary = temporary_folder(target)
    try:
        yield temporary
        seal(temporary, **facts)
        publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise

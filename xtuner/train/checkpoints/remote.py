"""Checkpoints in object storage: `upload_dir/iter_N.pth/`, complete where there is a manifest.json.

The manifest is uploaded last and deleted first, so that a checkpoint is never seen in part. A checkpoint that a resume
has made another run's past keeps its files; its manifest is renamed to manifest.json.superseded.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from xtuner.core import files
from xtuner.core.errors import CheckpointError, ConfigError, XTunerError
from xtuner.core.log import human_bytes, logger
from xtuner.core.remote.store import Entry, open_store
from xtuner.core.remote.transfer import cache_folder, download_files, list_names, upload_files
from xtuner.core.remote.url import Url, is_remote, parse_url
from xtuner.dist.collectives import Ranks
from xtuner.train.checkpoints.checkpoint import list_published

SUPERSEDED = f"{files.MANIFEST}.superseded"
_PROBE = ".xtuner-write-test"
_NAME = re.compile(r"iter_(\d{1,15})\.pth")


def list_remote(url: Url) -> dict[int, dict[str, Entry]]:
    """The folders `iter_N.pth` there: N → its objects by name, smallest N first."""
    found: dict[int, dict[str, Entry]] = {}
    for path, entry in list_names(url).items():
        folder, _, name = path.partition("/")
        if (number := _NAME.fullmatch(folder)) and name:
            found.setdefault(int(number[1]), {})[name] = entry
    return dict(sorted(found.items()))


def list_complete(url: Url) -> dict[int, dict[str, Entry]]:
    return {n: objects for n, objects in list_remote(url).items() if files.MANIFEST in objects}


def upload(folder: Path, url: Url, ranks: Ranks, keep: int = -1) -> None:
    """Upload a checkpoint together with all ranks, then delete all but the newest `keep` (if positive).

    Raises: CheckpointError, on all ranks; the older ones there stay.
    """
    target = url.join(folder.name)
    manifest = target.join(files.MANIFEST).key

    def send(names: list[str]) -> None:
        upload_files(folder, names, target)

    def share() -> None:
        entries = files.read_manifest(folder)["files"]
        send(sorted(entries, key=lambda name: -entries[name]["bytes"])[ranks.rank :: ranks.size])

    def begin() -> None:
        open_store(url).delete([manifest])  # of a checkpoint of that name, which is replaced

    try:
        ranks.run_on_main(lambda: _plain(begin))
        ranks.run_on_all(lambda: _plain(share))
        ranks.run_on_main(lambda: _plain(lambda: send([files.MANIFEST])))
        if keep > 0:
            ranks.run_on_main(lambda: _plain(lambda: _prune(url, keep)))
    except XTunerError as e:
        raise CheckpointError(
            f"{folder.name} is in the work dir, but cannot be uploaded: {e.what}",
            where=str(target),
            why="there it is absent or incomplete, and is not seen as a checkpoint; older ones are untouched",
            do=e.do,
        ) from None


def _plain(action: Callable[[], None]) -> None:
    """Errors of the disk in the user's words, which other ranks can receive."""
    try:
        action()
    except OSError as e:
        raise CheckpointError(
            f"a file cannot be read: {e.strerror or e}", where=str(e.filename or ""), do="check the disk"
        ) from None


def _prune(url: Url, keep: int) -> None:
    """Also deletes what uploads that were interrupted have left, except of the newest."""
    found = list_remote(url)
    kept = [n for n, objects in found.items() if files.MANIFEST in objects][-keep:]
    for number, objects in found.items():
        if number not in kept and number < kept[-1] and SUPERSEDED not in objects:
            names = sorted(objects, key=lambda name: name != files.MANIFEST)
            open_store(url).delete(objects[name].key for name in names)


def require_upload_dir(url: Url, begun_from: int | None) -> None:
    """Check that checkpoints can be uploaded, and hide those that the run does not continue.

    Args:
        begun_from: iteration of the checkpoint that is resumed; None for a fresh start, or one from elsewhere.
    Raises: ConfigError if it cannot be written, or has checkpoints of another run.
    """
    store, probe = open_store(url), url.join(_PROBE).key
    store.write(probe, b"")
    store.delete([probe])
    complete = list_complete(url)
    if complete and begun_from is None:
        raise ConfigError(
            f"there are checkpoints of another run, up to iter_{max(complete)}.pth",
            where=f"upload_dir = {str(url)!r}",
            why="this run starts at iteration 0 and would replace them one by one",
            do=f"give another upload_dir, or continue that run with --resume {url}",
        )
    later = [n for n in complete if begun_from is not None and n > begun_from]
    for number in later:
        manifest = complete[number][files.MANIFEST]
        store.write(f"{manifest.key}.superseded", store.read(manifest.key))
        store.delete([manifest.key])
    if later:
        names = ", ".join(f"iter_{n}.pth" for n in later)
        logger.warning(
            f"{url}: checkpoints newer than iter_{begun_from}.pth, which is resumed, are hidden (their manifests are "
            f"renamed to {SUPERSEDED}): {names}"
        )


def bring_checkpoint(
    work_dir: Path, resume: str | bool | None, upload_dir: str | None, ranks: Ranks, keep_out: bool = False
) -> str | bool | None:
    """What to resume from on the disk: as requested, after a checkpoint in object storage has been downloaded.

    An address is downloaded to the work dir. With True or "auto", so is the newest in `upload_dir`, if the work dir has
    none that is as new. All ranks call it together; each downloads its share.

    Args:
        keep_out: the work dir must not change: download to this machine's cache instead (a dry run).
    Raises: ConfigError if there is no checkpoint, or the work dir has another one of that name; CheckpointError.
    """
    if isinstance(resume, str) and is_remote(resume):
        url = parse_url(resume, "--resume")
        found = ranks.run_on_main(lambda: str(_find(url)))
    elif resume is True or resume == "auto":
        if not upload_dir:
            return resume
        url = parse_url(upload_dir, "upload_dir")
        newer = ranks.run_on_main(lambda: _find_newer(url, work_dir))
        if newer is None:
            return resume
        logger.info(f"{newer} is newer than what the work dir has")
        found = newer
    else:
        return resume
    source = parse_url(found)
    if keep_out:
        folder = ranks.run_on_all(lambda: cache_folder(source, lambda name: True))
        return str(folder)
    return str(_download(source, work_dir / source.name, ranks))


def _find(url: Url) -> Url:
    if files.MANIFEST in list_names(url):
        return url
    complete = list_complete(url)
    if not complete:
        raise ConfigError(
            f"--resume {url}: there is no complete checkpoint",
            where=str(url),
            why="a fresh start instead would silently discard the run",
            do="give an iter_N.pth there that has a manifest.json, or the folder of such",
        )
    return url.join(f"iter_{max(complete)}.pth")


def _find_newer(url: Url, work_dir: Path) -> str | None:
    newest = max(list_complete(url), default=-1)
    here = max((n for n, _ in list_published(work_dir)), default=-1)
    return str(url.join(f"iter_{newest}.pth")) if newest > here else None


def _download(source: Url, target: Path, ranks: Ranks) -> Path:
    """Download a checkpoint to `target` together with all ranks, unless it is there."""
    state = ranks.run_on_main(lambda: _compare(source, target))
    if state == "same":
        logger.info(f"{target} is the checkpoint {source}: nothing is downloaded")
        return target
    logger.info(f"downloading {source}")
    temporary = Path(ranks.run_on_main(lambda: str(_make_room(source, target))))
    try:
        ranks.run_on_all(lambda: _plain(lambda: _download_share(source, temporary, ranks)))
        ranks.run_on_main(lambda: _plain(lambda: _publish(temporary, target)))
    except XTunerError:
        if ranks.is_main:
            files.remove_tree(temporary)
        raise
    return target


def _compare(source: Url, target: Path) -> str:
    """ "same", or "" if there is nothing at `target`. Raises: ConfigError if there is something else."""
    if not target.exists():
        return ""
    try:
        ours = (target / files.MANIFEST).read_bytes()
    except OSError:
        ours = b""
    if ours == open_store(source).read(source.join(files.MANIFEST).key):
        return "same"
    raise ConfigError(
        f"the work dir has another {target.name} than {source}",
        where=str(target),
        why="it would be replaced",
        do="give another --work-dir, or move it",
    )


def _make_room(source: Url, target: Path) -> Path:
    size = sum(entry.size for entry in list_names(source).values())
    free = shutil.disk_usage(target.parent).free
    if free < size * 1.01 + 2**20:
        raise CheckpointError(
            f"{source} has {human_bytes(size)}, the disk has {human_bytes(free)}",
            where=str(target.parent),
            do="free some space, or give another --work-dir",
        )
    return files.temporary_folder(target)


def _download_share(source: Url, folder: Path, ranks: Ranks) -> None:
    names = list_names(source)
    mine = sorted(names, key=lambda name: -names[name].size)[ranks.rank :: ranks.size]
    download_files({name: names[name] for name in mine}, source, folder)


def _publish(temporary: Path, target: Path) -> None:
    for path in (temporary, *temporary.rglob("*")):
        files.set_default_permissions(path)
        if path.is_dir():
            files.sync_folder(path)
    files.publish(temporary, target)

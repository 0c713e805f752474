"""Plans which input is written to which output, and finds outputs that are complete already.

`made_from/TYPE/NAME.json` next to the data records what each output was made from. It contains `"done": true` only when
the train and valid files have their names, so that an incomplete output is recognised and written again.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtuner.core.errors import CheckpointError, ConfigError, DataError, did_you_mean
from xtuner.core.files import file_entry, read_json, sha256, write_json
from xtuner.core.foreign_inputs import check_regular
from xtuner.core.log import logger
from xtuner.data.format.file_order import walk_files
from xtuner.data.format.made_from import RECORDS, SPLITS
from xtuner.data.format.meta import meta_path
from xtuner.data.tokenize.read_chunks import first_record, is_json_list
from xtuner.data.tokenize.tokenize_settings import TokenizeSettings

SUFFIXES = {
    "auto": (".txt", ".json", ".jsonl"),
    "txt": (".txt",),
    "json": (".json",),
    "jsonl": (".jsonl",),
    "alpaca": (".json", ".jsonl"),
    "chat": (".json", ".jsonl"),
    "ftdp": (".jsonl",),
}
FTDP_FOLDER = "chatml_llamav13_32k"
SHOWN = 10
_SUFFIX_HINT = "--suffix .ENDING selects files with another ending, with --format FORMAT"


@dataclass
class Job:
    """One input file. `name` is TYPE/NAME, without `.bin`; `folder` contains train/ and valid/."""

    source: Path
    name: str
    folder: Path
    settings: TokenizeSettings
    sha256: str = ""  # of the source, set when it has been read

    def output(self, split: str) -> Path:
        return self.folder / split / f"{self.name}.bin"

    @property
    def record(self) -> Path:
        return self.folder / RECORDS / f"{self.name}.json"

    def existing(self) -> list[Path]:
        files = [p for split in SPLITS for p in (self.output(split), meta_path(self.output(split)))]
        return [p for p in files if os.path.exists(p)]

    def write_record(self, recipe: dict[str, Any], **facts: Any) -> None:
        write_json(self.record, {"input": self.source.name, "settings": recipe, **facts})


def plan_jobs(
    inputs: list[str], output: str, settings: TokenizeSettings, kind: str | None, suffixes: Sequence[str] = ()
) -> list[Job]:
    """One job per input file, in order.

    Args:
        kind: TYPE; None for `en`, or `cn/DATASET` for ftdp data.
        suffixes: endings of the files selected in a folder, with or without the dot, "" for files without an ending;
            an empty sequence for those of the format.

    Raises: ConfigError, DataError.
    """
    root = Path(os.path.expanduser(output))
    if kind is not None and (not kind or kind != Path(kind).name):
        raise ConfigError(f"{kind!r} is not a folder name", where="--type", do="a name such as en, cn or code")
    wanted = tuple(s if s.startswith(".") or not s else f".{s}" for s in suffixes) or SUFFIXES[settings.format]
    try:
        found = [
            job for name in inputs for job in _plan_input(Path(os.path.expanduser(name)), root, settings, kind, wanted)
        ]
    except OSError as e:
        raise DataError(f"the input cannot be read: {e.strerror}", where=str(e.filename)) from None
    if suffixes and not any(os.path.isdir(os.path.expanduser(name)) for name in inputs):
        what = "it selects files of a folder, and no input is a folder"
        raise ConfigError(what, where=f"--suffix {suffixes[0]}", do="omit it; --format says how files are read")
    by_name: dict[str, Job] = {}
    for job in found:
        other = by_name.setdefault(job.name, job)
        if other is not job:
            raise ConfigError(
                f"two inputs would be written as {job.name}.bin",
                where=f"{other.source} and {job.source}",
                do="rename one, or tokenize it separately with another --type",
            )
    return found


def _plan_input(
    path: Path, root: Path, settings: TokenizeSettings, kind: str | None, wanted: tuple[str, ...]
) -> list[Job]:
    if not os.path.exists(path):
        raise ConfigError("the input does not exist", where=str(path))
    if not os.path.isdir(path):
        check_regular(path)
    others: Counter[str] = Counter()
    suffix_hint = "" if settings.format == "ftdp" else _SUFFIX_HINT  # ftdp has its own script, and one ending
    if os.path.isfile(path):
        files = [(path, path.stem)]
    else:
        names = [Path(name) for name in walk_files(path, "")]
        names = [n for n in names if not any(part.startswith(".") for part in n.parts)]
        names = [n for n in names if not (path / n).resolve().is_relative_to(root.resolve())]
        files = [(path / n, n.with_suffix("").as_posix()) for n in names if n.suffix in wanted]
        if settings.format == "ftdp":
            files = [(file, name) for file, name in files if "processed" in Path(name).parent.parts]
        others = Counter(n.suffix for n in names if n.suffix not in wanted)
        if others:
            counts = (f"{n} {suffix or 'without an ending'}" for suffix, n in others.most_common(SHOWN))
            hint = f"; {suffix_hint}" if suffix_hint else ""
            what = f"{others.total()} files have another ending than {_or(wanted)}"
            logger.info(f"{path}: {what}: skipped ({', '.join(counts)}){hint}")
        elif left_out := len(names) - len(files):
            logger.info(f"{path}: {left_out} files are not in a folder `processed`: skipped")
    for file, _ in files:
        check_regular(file)
    if not files:
        layout = f"DATASET/processed/FILE{_or(wanted)}" if settings.format == "ftdp" else _or(wanted)
        raise DataError(f"no {layout} in the input folder", where=str(path), do=suffix_hint if others else "")
    if settings.format == "ftdp":
        named = [(file, f"{kind or 'cn'}/{_dataset(file)}/{file.stem}") for file, _ in files]
        return [Job(file, name, root / FTDP_FOLDER, settings.resolved("ftdp")) for file, name in named]
    return [Job(f, f"{kind or 'en'}/{name}", root, settings.resolved(_format(f, settings))) for f, name in files]


def _or(suffixes: tuple[str, ...]) -> str:
    return " or ".join(suffix or "name without an ending" for suffix in suffixes)


def _dataset(file: Path) -> str:
    """DATASET of …/DATASET/processed/…/FILE.jsonl: the folder above the innermost `processed`."""
    above = file.absolute().parent.parts
    if "processed" not in above:
        raise ConfigError(
            "the file is not in a folder `processed`",
            where=str(file),
            why="the data set's name is the folder above it",
            do="use --format chat for files elsewhere",
        )
    at = len(above) - 1 - above[::-1].index("processed")
    return above[at - 1]


def _format(file: Path, settings: TokenizeSettings) -> str:
    """The format of a file; for `auto` by its ending and first record."""
    if settings.format != "auto":
        return settings.format
    if file.suffix not in SUFFIXES["auto"]:
        hint = did_you_mean(file.suffix, list(SUFFIXES["auto"]))
        raise ConfigError(f"the ending {file.suffix!r} implies no format.{hint}", where=str(file), do="give --format")
    if file.suffix == ".txt":
        return "txt"
    texts = "json" if is_json_list(file, "auto") else "jsonl"
    if settings.whole_record or settings.text_key != TokenizeSettings.text_key:
        return texts
    try:
        record = json.loads(first_record(file))
    except (ValueError, RecursionError):
        record = None  # tokenizing reports what is wrong, and where
    head = record[0] if isinstance(record, list) and record else None
    if isinstance(head, dict) and "role" in head:
        return "chat"
    if isinstance(record, dict) and "messages" in record:
        return "chat"
    if isinstance(record, dict) and {"instruction", "output"} <= record.keys():
        return "alpaca"
    return texts


def is_done(job: Job, recipe: dict[str, Any]) -> bool:
    """Whether the output is complete and made from this input with these settings. Reads input and output.

    Raises: DataError if a different output of that name exists.
    """
    existing = job.existing()
    if not existing:
        return False
    try:
        found = read_json(job.record)
    except CheckpointError:
        found = None
    record = found if isinstance(found, dict) else {}
    if record.get("done") is False:
        return False
    reason = _difference(job, record, recipe, existing)
    if reason:
        raise DataError(
            f"an output exists already, and {reason}",
            where=str(existing[0]),
            why="tokenizing never appends, and replaces files only on request",
            do="replace it with --overwrite, or give another --output or --type",
        )
    return True


def _difference(job: Job, record: dict[str, Any], recipe: dict[str, Any], existing: list[Path]) -> str:
    if not record:
        return "there is no record of what it was made from"
    before, outputs = record.get("settings"), record.get("outputs")
    if not (isinstance(before, dict) and isinstance(outputs, dict)):
        return "the record of what it was made from is damaged"
    if changed := [key for key in recipe if before.get(key) != json.loads(json.dumps(recipe[key]))]:
        return f"it was made with other settings: {', '.join(changed)}"
    if record.get("bytes") != job.source.stat().st_size or record.get("sha256") != sha256(job.source):
        return f"it was made from other contents of {job.source.name}"
    if {str(p.relative_to(job.folder)) for p in existing} != set(outputs):
        return "one of its files is missing or was added"
    if altered := [name for name, entry in outputs.items() if file_entry(job.folder / name) != entry]:
        return f"{altered[0]} has been altered"
    return ""

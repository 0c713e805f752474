"""Which tokenizer a `.bin` was written with, from the record that `xtuner data tokenize` keeps next to its output.

OUTPUT/train/TYPE/NAME.bin  ─▶  OUTPUT/made_from/TYPE/NAME.json: settings.tokenizer, an identity
"""

from pathlib import Path

from xtuner.core.errors import XTunerError
from xtuner.core.files import read_json
from xtuner.core.remote.path import AnyPath, RemotePath

RECORDS, SPLITS = "made_from", ("train", "valid")


def find_record(path: AnyPath) -> Path | None:
    """Where the record of a `.bin` is, if there is one on a disk: it lies outside the folder that is listed."""
    if isinstance(path, RemotePath):
        return None
    for split in path.absolute().parents:
        if split.name in SPLITS:
            record = split.parent / RECORDS / path.absolute().relative_to(split).with_suffix(".json")
            return record if record.is_file() else None
    return None


def read_tokenizer(record: Path) -> str | None:
    """The identity of the tokenizer; None for a record that cannot be read or does not say it."""
    try:
        found = read_json(record)
    except (OSError, ValueError, RecursionError, XTunerError):
        return None
    settings = found.get("settings") if isinstance(found, dict) else None
    identity = settings.get("tokenizer") if isinstance(settings, dict) else None
    return identity if isinstance(identity, str) else None

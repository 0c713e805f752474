"""Whether the folders and files that a config names are there, before anything is started."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from xtuner.config.config import Config
from xtuner.config.specs import Spec, specs
from xtuner.core import hub, path_kinds
from xtuner.core.errors import ConfigError

_MODEL = ("name_or_path", "pretrained_model_name_or_path")
ORDER_FILE = "data_order.txt"  # by which `xtuner data order` calls it in a folder
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def problems(config: Config) -> list[ConfigError]:
    """A mistake for each missing path, once, with the line that names it."""
    found = [
        (key, value, problem)
        for key, value, problem in (*_data(config), *_models(config), *_weights(config))
        if problem is not None
    ]
    first = {(str(value), problem.what): (key, problem) for key, value, problem in reversed(found)}
    return [
        ConfigError(p.what, where=config.where(key), why=p.why, do=p.do) for key, p in reversed(list(first.values()))
    ]


def _data(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    for spec in specs(config):
        if not spec.key.startswith(("train_dataloader.", "val_dataset")):
            continue
        folder, order = spec.arguments.get("folder"), spec.arguments.get("data_order_path")
        if isinstance(folder, str | Path):
            yield f"{spec.key}.folder", folder, _folder(folder, config.written(f"{spec.key}.folder"))
        if isinstance(order, str | Path):
            yield f"{spec.key}.data_order_path", order, _order(order)


def data_keys(config: Config, root: str) -> list[str]:
    """The settings below `root` that name a data folder, and the order of its files; else `root` itself."""
    inside = [s for s in specs(config) if f"{s.key}.".startswith(f"{root}.")]
    named = [(s.key, n) for s in inside for n in ("folder", "data_order_path") if s.arguments.get(n) is not None]
    return [f"{key}.{name}" for key, name in named] or [root]


def _kind(name: str | Path) -> str:
    """ "folder", "file", or "" for what is not there and what no path can be."""
    if not str(name):  # to Path, the folder that we are in
        return ""
    try:
        path = Path(name).expanduser()
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except (OSError, RuntimeError, ValueError):  # too long, a ~user that is not known, a zero byte
        return ""


def _folder(name: str | Path, setting: str) -> ConfigError | None:
    kind = _kind(name)
    if kind == "folder":
        return None
    return ConfigError(
        f"the data folder is a file: {name}" if kind else f"the data folder does not exist: {str(name)!r}",
        do=f"set {setting} to the folder that holds your .bin and .bin.meta files",
    )


def _order(name: str | Path) -> ConfigError | None:
    kind, path = _kind(name), Path(name)
    if kind:
        path = path.expanduser()
        if path.is_file() or (path / ORDER_FILE).is_file():
            return None
    found = {"folder": f"the folder {str(name)!r} holds no {ORDER_FILE}", "": f"there is no file {str(name)!r}"}
    return ConfigError(
        f"the data order cannot be read: {found.get(kind, f'{str(name)!r} is not a regular file')}",
        do="write one with `xtuner data order --data-folder DATA --save-folder DIR`",
    )


def named_models(config: Config) -> Iterator[tuple[Spec, str, bool]]:
    """Each `dict(type=…)` that names a model's folder or hub id; the argument that does; is it for a tokenizer?"""
    for spec in specs(config):
        for name in _MODEL:
            if isinstance(spec.arguments.get(name), str | Path):
                yield spec, name, spec.key.rpartition(".")[2] == "tokenizer"


def _models(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    for spec, name, is_tokenizer in named_models(config):
        value = spec.arguments[name]
        yield f"{spec.key}.{name}", value, _model(str(value), is_tokenizer)


def _model(name: str, is_tokenizer: bool) -> ConfigError | None:
    what = "tokenizer" if is_tokenizer else "model"
    kind = _kind(name)
    usual = (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN, path_kinds.NOTHING)  # which have words of their own
    use, instead = "give {} as the model", "leave the model as it is: load_from = '{}' starts from its weights"
    if kind and not is_tokenizer and (other := _other_kind(Path(name).expanduser(), usual, use, instead)):
        return other
    if kind == "folder":
        path = Path(name).expanduser()
        if is_tokenizer:
            missing = [] if any((path / n).is_file() for n in _TOKENIZERS) else [" and no ".join(_TOKENIZERS)]
        else:
            missing = hub.missing_files(path)
        return ConfigError(f"the {what} folder {name!r} has no {missing[0]}") if missing else None
    if re.fullmatch(hub.ID, name) and not kind:
        return None  # of a hub, which is asked when the model is wanted
    return ConfigError(
        f"the {what} {name!r} is " + ("a file" if kind else "no folder here, and no hub id"),
        do="check the spelling, and that this machine sees the disk the folder is on",
    )


def _weights(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    resume = config.get("resume")
    if isinstance(resume, str) and resume not in ("", "auto") and not _kind(resume):
        what = f"there is no checkpoint {resume!r} to resume from"
        yield "resume", resume, ConfigError(what, do="give an iter_N.pth folder, or True for the work dir's newest")
    name = config.get("load_from")
    if not isinstance(name, str) or not name:
        return
    if not _kind(name):
        missing: ConfigError | None = ConfigError(f"there is no folder {name!r} to take weights from")
    else:
        missing = _other_kind(Path(name).expanduser(), (path_kinds.CHECKPOINT, path_kinds.HF), "load_from = '{}'")
    yield "load_from", name, missing


def _other_kind(path: Path, taken: Collection[str], use: str, checkpoint: str = "") -> ConfigError | None:
    """The error for a path that holds something else than `taken`."""
    try:
        path_kinds.take(path, taken, "", use, checkpoint)
    except ConfigError as e:
        return e
    return None

"""Check that the folders and files of a config exist, before anything is started."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from xtuner.config.build import type_name
from xtuner.config.config import Config
from xtuner.config.specs import Spec, find_specs
from xtuner.core import hub, path_kinds
from xtuner.core.errors import ConfigError
from xtuner.core.remote.url import is_remote, parse_url

_MODEL = ("name_or_path", "pretrained_model_name_or_path")
BIN_LOADER = "load_intern_repo_tokenized_dataset"
ORDER_FILE = "data_order.txt"  # the file that `xtuner data order` writes in a folder
_TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def find_missing(config: Config) -> list[ConfigError]:
    """One mistake for each missing path, with the line where it is written."""
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
    for spec in find_specs(config):
        if not spec.key.startswith(("train_dataloader.", "val_dataset")):
            continue
        folder, order = spec.arguments.get("folder"), spec.arguments.get("data_order_path")
        if isinstance(folder, str | Path):
            setting = config.name_in_file(f"{spec.key}.folder")
            yield f"{spec.key}.folder", folder, _folder(folder, setting, type_name(spec.kind))
        if isinstance(order, str | Path):
            yield f"{spec.key}.data_order_path", order, _order(order)


def data_keys(config: Config, root: str) -> list[str]:
    """The settings below `root` with a data folder or the order of its files; else `root` itself."""
    inside = [s for s in find_specs(config) if f"{s.key}.".startswith(f"{root}.")]
    named = [(s.key, n) for s in inside for n in ("folder", "data_order_path") if s.arguments.get(n) is not None]
    return [f"{key}.{name}" for key, name in named] or [root]


def _kind(name: str | Path) -> str:
    """ "folder", "file", or "" for a missing or invalid path."""
    if not str(name):  # Path("") is the current folder
        return ""
    try:
        path = Path(name).expanduser()
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except (OSError, RuntimeError, ValueError):  # too long, an unknown ~user, a zero byte
        return ""


def _address(name: str | Path) -> ConfigError | None:
    """The error of an invalid address in object storage. Whether something is there is seen when it is opened."""
    try:
        parse_url(str(name))
    except ConfigError as e:
        return e
    return None


def _folder(name: str | Path, setting: str, loader: str) -> ConfigError | None:
    if is_remote(str(name)):
        return _address(name)
    kind = _kind(name)
    if kind == "folder" or (kind == "file" and loader.rpartition(".")[2] != BIN_LOADER):  # others may take a file
        return None
    return ConfigError(
        f"the data folder is a file: {name}" if kind else f"the data folder does not exist: {str(name)!r}",
        do=f"set {setting} to the folder that holds your .bin and .bin.meta files",
    )


def _order(name: str | Path) -> ConfigError | None:
    if is_remote(str(name)):
        return _address(name)
    kind, path = _kind(name), Path(name)
    if kind:
        path = path.expanduser()
        if path.is_file() or (path / ORDER_FILE).is_file():
            return None
    found = {"folder": f"the folder {str(name)!r} has no {ORDER_FILE}", "": f"there is no file {str(name)!r}"}
    return ConfigError(
        f"the data order cannot be read: {found.get(kind, f'{str(name)!r} is not a regular file')}",
        do="write one with `xtuner data order --data-folder DATA --save-folder DIR`",
    )


def named_models(config: Config) -> Iterator[tuple[Spec, str, bool]]:
    """(spec, argument, is it a tokenizer) for each `dict(type=…)` with a model's folder or hub id."""
    for spec in find_specs(config):
        for name in _MODEL:
            if isinstance(spec.arguments.get(name), str | Path):
                yield spec, name, spec.key.rpartition(".")[2] == "tokenizer"


def _models(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    for spec, name, is_tokenizer in named_models(config):
        value = spec.arguments[name]
        yield f"{spec.key}.{name}", value, _model(str(value), is_tokenizer)


def _model(name: str, is_tokenizer: bool) -> ConfigError | None:
    if is_remote(name):
        return _address(name)
    what = "tokenizer" if is_tokenizer else "model"
    kind = _kind(name)
    usual = (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN, path_kinds.NOTHING)  # reported by the code below
    use, instead = "give {} as the model", "leave the model as it is: load_from = '{}' starts from its weights"
    if kind and not is_tokenizer and (other := _other_kind(Path(name).expanduser(), usual, use, instead)):
        return other
    if kind == "folder":
        path = Path(name).expanduser()
        if is_tokenizer:
            missing = [] if any((path / n).is_file() for n in _TOKENIZERS) else [" and no ".join(_TOKENIZERS)]
        else:
            missing = hub.missing_files(path)
        do = "complete the copy or download of the folder"
        return ConfigError(f"the {what} folder {name!r} has no {missing[0]}", do=do) if missing else None
    if kind:
        return ConfigError(f"the {what} {name!r} is a file", do="give its folder")
    return None if hub.is_hub_id(name) else hub.not_found(name, what)  # the hub itself is asked when the model is built


def _weights(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    if upload_dir := config.get("upload_dir"):
        yield "upload_dir", upload_dir, _address(upload_dir)
    resume = config.get("resume")
    if is_remote(resume):
        yield "resume", resume, _address(resume)
    elif isinstance(resume, str) and resume not in ("", "auto") and not _kind(resume):
        what = f"there is no checkpoint {resume!r} to resume from"
        yield "resume", resume, ConfigError(what, do="give an iter_N.pth folder, or True for the work dir's newest")
    name = config.get("load_from")
    if not isinstance(name, str) or not name:
        return
    if is_remote(name):
        yield "load_from", name, _address(name)
        return
    if not _kind(name):
        missing: ConfigError | None = ConfigError(f"there is no folder {name!r} to take weights from")
    else:
        missing = _other_kind(Path(name).expanduser(), (path_kinds.CHECKPOINT, path_kinds.HF), "load_from = '{}'")
    yield "load_from", name, missing


def _other_kind(path: Path, taken: Collection[str], use: str, checkpoint: str = "") -> ConfigError | None:
    """The error for a path of a kind that is not in `taken`."""
    try:
        path_kinds.require_kind(path, taken, "", use, checkpoint)
    except ConfigError as e:
        return e
    return None

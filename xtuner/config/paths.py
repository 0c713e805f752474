"""Whether the folders and files that a config names are there, before anything is started."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from xtuner.config.load import Config
from xtuner.config.walk import specs
from xtuner.core import hub, kinds
from xtuner.core.errors import ConfigError

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"
_MODEL = ("name_or_path", "pretrained_model_name_or_path")
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
            yield f"{spec.key}.folder", folder, _folder(folder)
        if isinstance(order, str | Path):
            yield f"{spec.key}.data_order_path", order, _order(order)


def _folder(name: str | Path) -> ConfigError | None:
    path = Path(name).expanduser()
    if path.is_dir():
        return None
    return ConfigError(
        f"the data folder is not there: {str(name)!r}" if not path.exists() else f"the data folder is a file: {name}",
        do="set dataset_folder in the config to the folder that holds your .bin and .bin.meta files",
    )


def _order(name: str | Path) -> ConfigError | None:
    if Path(name).expanduser().is_file():
        return None
    return ConfigError(
        f"the data order cannot be read: there is no file {str(name)!r}",
        do="write one with `xtuner data order --data-folder DATA --save-folder DIR`",
    )


def _models(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    for spec in specs(config):
        for name in _MODEL:
            value = spec.arguments.get(name)
            if isinstance(value, str | Path):
                is_tokenizer = spec.key.rpartition(".")[2] == "tokenizer"
                yield f"{spec.key}.{name}", value, _model(str(value), is_tokenizer)


def _model(name: str, is_tokenizer: bool) -> ConfigError | None:
    what = "tokenizer" if is_tokenizer else "model"
    path = Path(name).expanduser()
    usual = (kinds.HF, kinds.BARE, kinds.UNKNOWN, kinds.NOTHING)  # which have words of their own
    instead = "leave the model as it is: load_from = {} starts from its weights"
    if not is_tokenizer and (other := _other_kind(path, usual, "give {} as the model", instead)):
        return other
    if path.is_dir():
        if is_tokenizer:
            missing = [] if any((path / n).is_file() for n in _TOKENIZERS) else [" and no ".join(_TOKENIZERS)]
        else:
            missing = hub.missing_files(path)
        return ConfigError(f"the {what} folder {name!r} has no {missing[0]}") if missing else None
    if re.fullmatch(_HUB_ID, name) and not path.exists():
        return None  # of a hub, which is asked when the model is wanted
    return ConfigError(
        f"the {what} {name!r} is " + ("a file" if path.is_file() else "no folder here, and no hub id"),
        do="check the spelling, and that this machine sees the disk the folder is on",
    )


def _weights(config: Config) -> Iterator[tuple[str, Any, ConfigError | None]]:
    name = config.get("load_from")
    if not isinstance(name, str):
        return
    if not Path(name).expanduser().exists():
        missing: ConfigError | None = ConfigError(f"there is no folder {name!r} to take weights from (load_from)")
    else:
        missing = _other_kind(Path(name).expanduser(), (kinds.CHECKPOINT, kinds.HF), "load_from = {}")
    yield "load_from", name, missing


def _other_kind(path: Path, taken: Collection[str], use: str, checkpoint: str = "") -> ConfigError | None:
    """The error for a path that holds something else than `taken`."""
    try:
        kinds.take(path, taken, "", use, checkpoint)
    except ConfigError as e:
        return e
    return None

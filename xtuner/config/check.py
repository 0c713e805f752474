"""Rules that a config must keep, all checked at once, before any data, model or process is touched."""

from collections.abc import Mapping
from typing import Any

from xtuner.config.build import check_arguments, resolve_type
from xtuner.config.load import Config
from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.core.log import logger

# What `xtuner train` reads. Other top-level names are a file's own helpers.
REQUIRED = ("model", "train_dataloader", "optim_wrapper", "train_cfg")
OPTIONAL = (
    "custom_hooks", "default_hooks", "load_from", "log_level", "param_scheduler", "randomness", "resume", "tokenizer",
    "work_dir",
)  # fmt: skip
# Settings of which only some values are built or make sense: (name, allowed, why, what to do).
ONLY = (
    ("use_varlen_attn", True, "without it the documents of a pack see each other", "set it to True"),
    ("pack_to_max_length", True, "tokenized data are always trained in packs", "set it to True"),
    ("sequence_parallel_size", 1, "sequence parallelism is not built", "set it to 1; long packs fit by recompute"),
    ("batch_size", 1, "a batch is one pack; a longer max_length or accumulative_counts does the same", "set it to 1"),
)
BUILT = (
    "model", "tokenizer", "optim_wrapper", "optim_wrapper.optimizer", "train_dataloader.dataset",
    "train_dataloader.dataset.dataset_cfg", "train_dataloader.sampler",
)  # fmt: skip
GIVEN = {"train_dataloader.sampler": {"dataset": None}, "optim_wrapper.optimizer": {"params": None}}


def check(config: Config) -> None:
    """Raise one ConfigError that lists every mistake found, each with its file and line."""
    problems = [*_names(config), *_only(config), *_shapes(config), *_signatures(config)]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(f"{len(problems)} mistakes in the config\n" + "\n".join(f"* {p}" for p in problems))


def _names(config: Config) -> list[ConfigError]:
    known = [*REQUIRED, *OPTIONAL, *(name for name, *_ in ONLY)]
    missing = [
        ConfigError(f"the config has no {name!r}", where=str(config.path), do="compare with a shipped config")
        for name in REQUIRED
        if name not in config.values
    ]
    unknown = []
    for name in config.unmet:
        if name not in known:
            hint = did_you_mean(name, [*known, *(n for n in config.values if n != name)])
            unknown.append(ConfigError(f"nothing reads the setting {name!r}.{hint}", where=f"--cfg-options {name}"))
    used = [n for n in config.values if n not in config.unread]
    for name in config.unread:
        if name in known:
            continue
        if hint := did_you_mean(name, [*known, *used]):
            unknown.append(ConfigError(f"nothing reads the setting {name!r}.{hint}", where=config.where(name)))
        else:  # left over when a hook was removed
            logger.warning(f"nothing reads the setting {config.where(name)}")
    return missing + unknown


def _only(config: Config) -> list[ConfigError]:
    return [
        ConfigError(f"{name} = {config.values[name]!r} is not supported", where=config.where(name), why=why, do=do)
        for name, allowed, why, do in ONLY
        if config.values.get(name, allowed) != allowed
    ]


def _shapes(config: Config) -> list[ConfigError]:
    problems = []
    batch_size = config.get("train_dataloader.batch_size", 1)
    if batch_size != 1 and config.values.get("batch_size", 1) == 1:
        _, _, why, do = ONLY[-1]
        where = config.where("train_dataloader.batch_size")
        problems.append(ConfigError(f"batch_size = {batch_size!r} is not supported", where=where, why=why, do=do))
    unknown = set(config.get("train_dataloader", {})) - {"batch_size", "dataset", "num_workers", "sampler"}
    for name in sorted(unknown):
        hint = did_you_mean(name, ["batch_size", "dataset", "num_workers", "sampler"])
        where = config.where(f"train_dataloader.{name}")
        problems.append(ConfigError(f"train_dataloader has no setting {name!r}.{hint}", where=where))
    for key, least in (("train_cfg.max_epochs", 1), ("optim_wrapper.accumulative_counts", 1)):
        value = config.get(key, least)
        if type(value) is not int or value < least:
            problems.append(
                ConfigError(f"{key} = {value!r} is not an integer of at least {least}", where=config.where(key))
            )
    return problems


def _signatures(config: Config) -> list[ConfigError]:
    specs = {key: config.get(key) for key in BUILT}
    specs |= {f"default_hooks.{k}": v for k, v in (config.get("default_hooks") or {}).items()}
    specs |= {f"custom_hooks.{i}": v for i, v in enumerate(config.get("custom_hooks") or [])}
    specs |= {f"param_scheduler.{i}": v for i, v in enumerate(config.get("param_scheduler") or [])}
    problems = []
    for key, spec in specs.items():
        if spec is None:
            continue
        try:
            _signature(key, spec)
        except ConfigError as e:
            problems.append(ConfigError(e.what, where=config.where(e.where or key), why=e.why, do=e.do))
    return problems


def _signature(key: str, spec: Any) -> None:
    if not isinstance(spec, Mapping) or "type" not in spec:
        raise ConfigError(f"expected dict(type=…, …), found {spec!r}", where=key)
    arguments = {k: v for k, v in spec.items() if k != "type"} | GIVEN.get(key, {})
    check_arguments(resolve_type(spec["type"], key), arguments, key)

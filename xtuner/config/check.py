"""Check a config for all mistakes at once, before any data, model or process is touched."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.config import paths as path_checks
from xtuner.config import rules, types
from xtuner.config.adapter import find_adapter
from xtuner.config.build import OPENING, build, check_arguments, resolve_type, type_name
from xtuner.config.config import Config
from xtuner.config.findings import combine_errors
from xtuner.config.schema import REQUIRED
from xtuner.config.settings import MIXTURE_KEYS
from xtuner.config.specs import ROOTS, Spec, find_specs, walk_values
from xtuner.config.usual_adamw import is_usual_adamw
from xtuner.core.errors import ConfigError, did_you_mean, from_system_exit
from xtuner.core.log import logger

# Arguments that the trainer adds; to whatever opens data also `opening`
PASSED_BY_TRAINER = {
    "train_dataloader.sampler": ("dataset", "rank", "world_size"),
    "train_dataloader.batch_sampler": ("sampler",),
    "optim_wrapper.optimizer": ("params",),
}
DATA = ("train_dataloader.dataset", "val_dataset")
MIXED = re.compile(r"(train_dataloader\.dataset\.dataset_cfg|val_dataset)\.sources\.\d+")  # sources of a mixture
# Dicts whose "type" is a plain value, not a class to build
NOT_BUILT = ("clip_grad", "rope_parameters", "rope_scaling")


def check(config: Config, paths: bool = False) -> None:
    """Raise one ConfigError that lists all mistakes, each with file and line.

    Args:
        paths: also check that the folders and files in the config exist.
    """
    if found := find_mistakes(config, paths):
        raise combine_errors(found)


def find_mistakes(config: Config, paths: bool = False) -> list[ConfigError]:
    """All mistakes, each with its file and line."""
    length, found = list(_check_train_cfg(config)), _check_names(config)
    inside = [*_check_section(config, "", closed=False), *_check_parts(config), *_check_dataloader(config), *length]
    inside += [*_check_section(config, "train_dataloader"), *_check_section(config, "randomness")]
    inside += [*_check_section(config, "optim_wrapper.clip_grad", closed=False)]
    inside += [*_check_types(config), *rules.find_not_finite(config)]
    inside += [e for spec in find_specs(config) for e in _check_spec(config, spec)]
    if config.values.get("batch_size", 1) != 1:  # reported once, under the name in the file
        inside = [e for e in inside if not e.where.endswith(".batch_size")]
    wrong = [e.where for e in inside]
    if length or "train_cfg" not in config.values:
        wrong.append("param_scheduler")  # its begin and end are derived from max_epochs
    for spec in find_specs(config):
        if not any(_within(where, spec.key) or _within(spec.key, where) for where in wrong):
            inside += _try_constructor(spec)
    if "optim_wrapper.optimizer.lr" in wrong:  # eta_min is derived from it
        inside = [e for e in inside if not re.fullmatch(r"param_scheduler\..*eta_min", e.where)]
    found += [ConfigError(e.what, where=config.where(e.where), why=e.why, do=e.do) for e in inside]
    if paths:
        found += path_checks.find_missing(config)
    once = {(p.what, p.where.partition(" (")[0]): p for p in reversed(found)}  # one line may set several values
    return list(reversed(once.values()))


def _check_names(config: Config) -> list[ConfigError]:
    top = list(config.schema.inside(""))
    known, accepted = [s.name for s in top if not s.is_legacy], [s.name for s in top]
    missing = [
        ConfigError(f"the config has no {s.name!r}", where=str(config.path), do="compare with a shipped config")
        for s in top
        if s.default is REQUIRED and s.name not in config.values
    ]
    unknown = []
    overridden = {key: key.partition(".")[0] for key in config.unread}
    used = [n for n in config.values if n not in config.unused and n not in overridden.values()]
    for key, name in overridden.items():
        if name not in accepted:
            hint = did_you_mean(name, [*known, *used])
            unknown.append(ConfigError(f"nothing reads the setting {name!r}.{hint}", where=f"--cfg-options {key}"))
    for name in config.unused:
        if name in accepted:
            continue
        near = difflib.get_close_matches(name, [*known, *used], n=1, cutoff=0.8)
        if near:  # a typing mistake: lod_from
            hint = f" Did you mean {near[0]!r}?"
            unknown.append(ConfigError(f"nothing reads the setting {name!r}.{hint}", where=config.where(name)))
        else:  # left over, e.g. after a hook was removed
            logger.warning(f"nothing reads the setting {config.where(name)}")
    return missing + unknown


def _check_section(config: Config, parent: str, closed: bool = True) -> Iterator[ConfigError]:
    """Mistakes in the settings directly below a path that is not a `dict(type=…)`.

    Args:
        closed: undeclared settings are mistakes.
    """
    values = config.get(parent) if parent else config.values
    if not isinstance(values, Mapping):
        return
    settings = {s.name: s for s in config.schema.inside(parent)}
    for name, value in values.items():
        key = f"{parent}.{name}".lstrip(".")
        if name not in settings:
            if closed and name != "type":
                yield ConfigError(f"{parent} has no setting {name!r}.{did_you_mean(str(name), [*settings])}", where=key)
        elif not settings[name].built and (problem := settings[name].find_problem(key, value)):
            yield problem


def _check_parts(config: Config) -> Iterator[ConfigError]:
    for s in config.schema.settings:
        if s.built and s.default is REQUIRED and s.parent and not s.owner:
            whole = config.get(s.parent)
            if isinstance(whole, Mapping) and whole.get(s.name) is None:
                yield ConfigError(f"{s.parent} has no {s.name}", where=s.key, do="compare with a shipped config")


def _check_dataloader(config: Config) -> Iterator[ConfigError]:
    """Functions of older tools in `train_dataloader` that would not be called."""
    loader = config.get("train_dataloader")
    for name, right in (
        ("collate_fn", lambda kind: (facts := find_adapter(kind)) is not None and facts.unused),
        ("batch_sampler", lambda kind: type_name(kind).rpartition(".")[2] == "BatchSampler"),
    ):
        spec, key = loader.get(name) if isinstance(loader, Mapping) else None, f"train_dataloader.{name}"
        kind = _resolve(config, spec["type"], key) if isinstance(spec, Mapping) and "type" in spec else None
        if isinstance(kind, ConfigError):
            continue  # `_check_types` reports it
        if spec is not None and not right(kind):
            yield ConfigError(
                f"this {name} would not be called",
                where=key,
                why="the loader builds batches from packs itself",
                do="leave it out; to change batches, write your own dataset",
            )


def _check_train_cfg(config: Config) -> Iterator[ConfigError]:
    values, found = config.values.get("train_cfg"), list(_check_section(config, "train_cfg"))
    if not isinstance(values, Mapping):
        return  # reported with the other top-level settings
    if values.get("max_epochs") is None:
        iterations = [e for e in found if e.where in ("train_cfg.by_epoch", "train_cfg.max_iters")]
        given = " and ".join(f"{name} = {values[name]!r}" for name in (e.where.partition(".")[2] for e in iterations))
        why = f"{given}: the length of a run is given in epochs, not in iterations" if given else ""
        do = "set max_epochs"
        found = [e for e in found if e not in iterations and e.where != "train_cfg.max_epochs"]
        found.append(ConfigError("train_cfg has no max_epochs", where="train_cfg.max_epochs", why=why, do=do))
    if "type" in values:
        kind = _resolve(config, values["type"], "train_cfg")
        if not isinstance(kind, ConfigError) and find_adapter(kind) is None:
            found.append(ConfigError("a custom loop would not be called", where="train_cfg", do="leave type out"))
    yield from found


def _check_types(config: Config) -> Iterator[ConfigError]:
    built = [s.key for s in config.schema.settings if s.built]
    wanted = {key: config.get(key) for key in built}
    for name in ("default_hooks", "custom_hooks", "trackers", "param_scheduler"):
        parts = config.get(name) or []
        if name == "param_scheduler" and isinstance(parts, Mapping):
            parts = [parts]
        parts = dict(enumerate(parts)) if isinstance(parts, list | tuple) else parts
        items = parts.items() if isinstance(parts, Mapping) else ()
        wanted |= {f"{name}.{key}": spec for key, spec in items}
    for key, spec in wanted.items():
        absent = spec is None and key in built
        if not absent and not (isinstance(spec, Mapping) and "type" in spec):
            yield ConfigError(f"expected dict(type=…, …), found {spec!r}", where=key)
    for root in ROOTS:
        for key, value in walk_values(root, config.values.get(root)):
            if isinstance(value, Mapping) and "type" in value and not key.endswith(NOT_BUILT):
                problem = _resolve(config, value["type"], key)
                if isinstance(problem, ConfigError):
                    yield problem


def _resolve(config: Config, kind: Any, key: str) -> Any:
    """The class or function of `type=` at `key`, or the error."""
    where = f"{key}.type"
    try:
        return config.unknown.get(key) or resolve_type(kind, where)
    except ConfigError as e:
        return e
    except SystemExit as e:
        return from_system_exit(e, where, f"importing {kind!r}")
    except Exception as e:  # raised by a module of the user
        return ConfigError(f"type={kind!r} cannot be imported: {type(e).__name__}: {e}", where=where)


def _check_spec(config: Config, spec: Spec) -> Iterator[ConfigError]:
    """Mistakes in one dict(type=…): unknown or missing arguments, values of a wrong type or out of range, or values
    that an adapter rejects."""
    kind = _resolve(config, spec.kind, spec.key)
    if isinstance(kind, ConfigError):
        return  # reported by `_check_types`
    mixed = MIXTURE_KEYS if MIXED.fullmatch(spec.key) else ()
    own = [name for name in spec.arguments if name not in mixed]
    stated = [*own, "max_epochs"] if spec.key == "train_cfg" else own  # if it is missing, `_check_train_cfg` reports it
    passed = PASSED_BY_TRAINER.get(spec.key, (OPENING,) if spec.key.startswith(DATA) else ())
    try:
        check_arguments(kind, stated, spec.key, mixed, passed)
    except ConfigError as e:
        yield e
    if spec.key == "train_cfg":
        return  # `_check_train_cfg` reports it
    hints, facts = types.parameter_types(kind), find_adapter(kind)
    for name, value in spec.arguments.items():
        if name in passed:
            continue  # reported as unknown
        key, problem = f"{spec.key}.{name}", None
        if name in own and name in hints and not types.fits(value, hints[name]):
            yield ConfigError(f"{name} = {value!r} is not {types.describe(hints[name])}", where=key)
        elif setting := config.schema.find(key, None if name in mixed else type_name(kind)):
            problem = setting.find_problem(
                key if setting.allowed else name,
                value,
                typed=bool(setting.owner) and (name not in hints or name in mixed),
            )
        if problem:
            yield ConfigError(problem.what, where=key, why=problem.why, do=problem.do)
    for problem in facts.find_rejected(spec.arguments) if facts else ():
        yield ConfigError(problem.what, where=f"{spec.key}.{problem.where}", why=problem.why, do=problem.do)
    if spec.key == "model":
        yield from rules.check_shape(spec)


def _within(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


def _try_constructor(spec: Spec) -> Iterator[ConfigError]:
    """Errors of constructors that have no side effects: our own, and the optimizer's."""
    kind = resolve_type(spec.kind, spec.key)
    root, _, rest = spec.key.partition(".")
    own = inspect.unwrap(kind).__module__.startswith("xtuner.") if hasattr(kind, "__module__") else False
    hook = root in ("default_hooks", "custom_hooks") and "." not in rest
    scheduler = root == "param_scheduler" and "." not in rest
    try:
        if spec.key == "optim_wrapper.optimizer":  # OptimWrapper checks more, if it has no other mistakes
            if is_usual_adamw(kind, spec.arguments):
                return
            import torch

            kind([torch.nn.Parameter(torch.zeros(2, 2))], **spec.arguments)
        elif own and (hook or scheduler or spec.key == "optim_wrapper" or type_name(kind) == "from_scratch"):
            build({"type": kind, **spec.arguments}, spec.key)
    except ConfigError as e:
        inside = e.where == spec.key or e.where.startswith(f"{spec.key}.")
        where = f"{spec.key}.{e.where}" if e.where in spec.arguments else spec.key  # constructors name the argument
        yield ConfigError(e.what, where=e.where if inside else where, why=e.why, do=e.do)
    except SystemExit as e:
        yield from_system_exit(e, spec.key, type_name(kind))
    except (TypeError, ValueError) as e:
        yield ConfigError(f"{type_name(kind)} does not take these values: {e}", where=spec.key)
    except Exception as e:
        if spec.key == "optim_wrapper.optimizer":
            return  # it may need a GPU; reported when it is built for the run
        what = f"{type_name(kind)} does not take these values: {type(e).__name__}: {e}"
        yield ConfigError(what, where=spec.key)

"""Rules that a config must keep, all checked at once, before any data, model or process is touched."""

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from xtuner.config import paths as path_checks
from xtuner.config import rules, settings, types
from xtuner.config.adapter import adapter_of
from xtuner.config.build import build, check_arguments, resolve_type, type_name
from xtuner.config.config import Config
from xtuner.config.mistakes import together
from xtuner.config.told import tell
from xtuner.config.walk import ROOTS, Spec, specs, walked
from xtuner.core.errors import ConfigError, did_you_mean, of_exit
from xtuner.core.log import logger

# These must be there
PARTS = ("train_dataloader.dataset", "train_dataloader.sampler", "optim_wrapper.optimizer")
# These must be dict(type=…)
BUILT = (
    "model", "tokenizer", "optim_wrapper", "optim_wrapper.optimizer", "train_dataloader.dataset",
    "train_dataloader.dataset.dataset_cfg", "train_dataloader.sampler", "val_dataset",
)  # fmt: skip
MOST_EPOCHS = 1_000_000
# Dicts whose "type" is a word of theirs, not something to build
WORDS = ("clip_grad", "rope_parameters", "rope_scaling")
# What the trainer gives to them besides
GIVEN: dict[str, dict[str, Any]] = {
    "train_dataloader.sampler": {"dataset": None},
    "train_dataloader.batch_sampler": {"sampler": None},
    "optim_wrapper.optimizer": {"params": None},
    "train_cfg": {"max_epochs": 1},  # `_train_cfg` reports that it is missing
}


def check(config: Config, paths: bool = False) -> None:
    """Raise one ConfigError that lists every mistake found, each with its file and line; else tell what an older
    config is run as.

    Args:
        paths: look, too, whether the folders and files that it names are there.
    """
    if found := problems(config, paths):
        raise together(found)
    tell(config)


def problems(config: Config, paths: bool = False) -> list[ConfigError]:
    """All mistakes, each with its file and line."""
    length = list(_train_cfg(config))
    found = [*_names(config), *_only(config), *_parts(config), *_dataloader(config), *length]
    inside = [*_not_specs(config), *rules.not_finite(config)]
    inside += [*(e for spec in specs(config) for e in _spec(spec)), *rules.of_runtime(config)]
    wrong = [e.where for e in inside]
    if length or "train_cfg" not in config.values:
        wrong.append("param_scheduler")  # its begins and ends are made from max_epochs
    for spec in specs(config):
        if not any(_within(where, spec.key) or _within(spec.key, where) for where in wrong):
            inside += _trial(spec)
    if "optim_wrapper.optimizer.lr" in wrong:  # from which eta_min is made
        inside = [e for e in inside if not re.fullmatch(r"param_scheduler\..*eta_min", e.where)]
    found += [ConfigError(e.what, where=config.where(e.where), why=e.why, do=e.do) for e in inside]
    if paths:
        found += path_checks.problems(config)
    once = {(p.what, p.where.partition(" (")[0]): p for p in reversed(found)}  # one line may set several values
    return list(reversed(once.values()))


def _names(config: Config) -> list[ConfigError]:
    known = [*settings.REQUIRED, *settings.OPTIONAL, *settings.ONLY]
    accepted = [*known, *settings.NO_WORK, *settings.OLD]
    missing = [
        ConfigError(f"the config has no {name!r}", where=str(config.path), do="compare with a shipped config")
        for name in settings.REQUIRED
        if name not in config.values
    ]
    unknown = []
    for name in config.unmet:
        if name not in accepted:
            hint = did_you_mean(name, [*known, *(n for n in config.values if n != name)])
            unknown.append(ConfigError(f"nothing reads the setting {name!r}.{hint}", where=f"--cfg-options {name}"))
    used = [n for n in config.values if n not in config.unread]
    for name in config.unread:
        if name in accepted:
            continue
        near = difflib.get_close_matches(name, [*known, *used], n=1, cutoff=0.8)
        if near:  # a slip of the pen: lod_from
            hint = f" Did you mean {near[0]!r}?"
            unknown.append(ConfigError(f"nothing reads the setting {name!r}.{hint}", where=config.where(name)))
        else:  # left over, as when a hook is removed
            logger.warning(f"nothing reads the setting {config.where(name)}")
    return missing + unknown


def _only(config: Config) -> Iterator[ConfigError]:
    for name, only in (settings.ONLY | settings.OLD).items():
        if name in config.values and (problem := only.problem(name, config.values[name])):
            yield ConfigError(problem.what, where=config.where(name), why=problem.why, do=problem.do)


def _parts(config: Config) -> Iterator[ConfigError]:
    for key in PARTS:
        parent, _, name = key.rpartition(".")
        if isinstance(whole := config.get(parent), Mapping) and whole.get(name) is None:
            yield ConfigError(f"{parent} has no {name}", where=config.where(key), do="compare with a shipped config")


def _dataloader(config: Config) -> Iterator[ConfigError]:
    loader = config.get("train_dataloader", {})
    if not isinstance(loader, Mapping):
        yield ConfigError(f"expected dict(dataset=…, …), found {loader!r}", where=config.where("train_dataloader"))
        return
    known = [*settings.DATALOADER, *settings.NO_WORK_IN_DATALOADER]
    for name in sorted(set(loader) - set(known)):
        where = config.where(f"train_dataloader.{name}")
        yield ConfigError(f"train_dataloader has no setting {name!r}.{did_you_mean(name, known)}", where=where)
    for key in ("batch_size", "batch_sampler.batch_size"):
        size = config.get(f"train_dataloader.{key}", 1)
        told = config.values.get("batch_size", 1) != 1  # as a setting of the file
        if not told and (p := settings.ONLY["batch_size"].problem(key, size)):
            yield ConfigError(p.what, where=config.where(f"train_dataloader.{key}"), why=p.why, do=p.do)
    for name, right in (
        ("collate_fn", lambda kind: (facts := adapter_of(kind)) is not None and facts.idle),
        ("batch_sampler", lambda kind: type_name(kind).rpartition(".")[2] == "BatchSampler"),
    ):
        spec, key = loader.get(name), f"train_dataloader.{name}"
        kind = _resolved(spec["type"], key) if isinstance(spec, Mapping) and "type" in spec else None
        if isinstance(kind, ConfigError):
            continue  # `_not_specs` reports it
        if spec is not None and not right(kind):
            yield ConfigError(
                f"this {name} would not be called",
                where=config.where(f"train_dataloader.{name}"),
                why="the loader makes batches of packs itself",
                do="leave it out; to change batches, give a dataset of your own",
            )


def _train_cfg(config: Config) -> Iterator[ConfigError]:
    if "train_cfg" not in config.values:
        return  # `_names` reports it
    values = config.values["train_cfg"]
    if not isinstance(values, Mapping):
        yield ConfigError(f"expected dict(max_epochs=…), found {values!r}", where=config.where("train_cfg"))
        return
    where = config.where("train_cfg.max_epochs")
    epochs, only = values.get("max_epochs"), settings.TRAIN_CFG
    in_iterations = [n for n in only if n in values and epochs is None and only[n].problem(n, values[n])]
    if epochs is None:
        given = " and ".join(f"{n} = {values[n]!r}" for n in in_iterations)
        why = f"{given}: a run's length is not given in iterations here" if given else ""
        yield ConfigError("train_cfg has no max_epochs", where=where, why=why, do="give max_epochs, the run's length")
    elif type(epochs) is not int or epochs < 1:
        yield ConfigError(f"train_cfg.max_epochs = {epochs!r} is not an integer of at least 1", where=where)
    elif epochs > MOST_EPOCHS:
        what = f"train_cfg.max_epochs = {epochs!r} is above {MOST_EPOCHS:,}"
        yield ConfigError(what, where=where, why="so many are taken for a slip of the pen")
    skipped = values.get("max_skipped", 0)
    if type(skipped) is not int or skipped < 0:
        what = f"train_cfg.max_skipped = {skipped!r} is not a whole number of at least 0"
        yield ConfigError(what, where=config.where("train_cfg.max_skipped"))
    known = ["max_epochs", "max_skipped", *only, *settings.NO_WORK_IN_TRAIN_CFG]
    for name, value in values.items():
        where = config.where(f"train_cfg.{name}")
        if name == "type":
            kind = _resolved(value, "train_cfg")
            if not isinstance(kind, ConfigError) and adapter_of(kind) is None:
                yield ConfigError("a loop of your own would not be called", where=where, do="leave type out")
        elif name not in known:
            yield ConfigError(f"train_cfg has no setting {name!r}.{did_you_mean(name, known)}", where=where)
        elif name in only and name not in in_iterations and (p := only[name].problem(name, value)):
            yield ConfigError(p.what, where=where, why=p.why, do=p.do)


def _not_specs(config: Config) -> Iterator[ConfigError]:
    wanted = {key: config.get(key) for key in BUILT}
    for name in ("default_hooks", "custom_hooks", "trackers", "param_scheduler"):
        parts = config.get(name)
        if not parts:
            continue
        if name == "param_scheduler" and isinstance(parts, Mapping):
            parts = [parts]
        if not isinstance(parts, Mapping if name == "default_hooks" else list | tuple):
            yield ConfigError(f"{name} = {parts!r} is not a {'dict' if name[0] == 'd' else 'list'}", where=name)
            continue
        items = parts.items() if isinstance(parts, Mapping) else enumerate(parts)
        wanted |= {f"{name}.{key}": spec for key, spec in items}
    for key, spec in wanted.items():
        absent = spec is None and key in BUILT
        if not absent and not (isinstance(spec, Mapping) and "type" in spec):
            yield ConfigError(f"expected dict(type=…, …), found {spec!r}", where=key)
    for root in ROOTS:
        for key, value in walked(root, config.values.get(root)):
            if isinstance(value, Mapping) and "type" in value and not key.endswith(WORDS):
                problem = _resolved(value["type"], f"{key}.type")
                if isinstance(problem, ConfigError):
                    yield problem


def _resolved(kind: Any, where: str) -> Any:
    """The class or function behind `type=`, or what is wrong with it."""
    try:
        return resolve_type(kind, where)
    except ConfigError as e:
        return e
    except SystemExit as e:
        return of_exit(e, where, f"importing {kind!r}")
    except Exception as e:  # of a module of the user's that is imported for the first time
        return ConfigError(f"type={kind!r} cannot be imported: {type(e).__name__}: {e}", where=where)


def _spec(spec: Spec) -> Iterator[ConfigError]:
    """Mistakes in one dict(type=…): settings that its type does not take or lacks, values of other types or out of
    range, what an adapter refuses."""
    kind = _resolved(spec.kind, spec.key)
    if isinstance(kind, ConfigError):
        return  # told above
    try:
        check_arguments(kind, spec.arguments | GIVEN.get(spec.key, {}), spec.key)
    except ConfigError as e:
        yield e
    wrong = set()
    if spec.key != "train_cfg":
        hints = types.parameter_types(kind)
        for name in spec.arguments.keys() & hints.keys():
            value = spec.arguments[name]
            if not types.fits(value, hints[name]):
                wrong.add(name)
                words = types.words(hints[name])
                yield ConfigError(f"{name} = {value!r} is not {words}", where=f"{spec.key}.{name}")
        facts = adapter_of(kind)
        for problem in facts.refused(spec.arguments) if facts else ():
            name = problem.where
            yield ConfigError(problem.what, where=f"{spec.key}.{name}", why=problem.why, do=problem.do)
    yield from rules.of_spec(spec, kind)


def _within(key: str, other: str) -> bool:
    return f"{key}.".startswith(f"{other}.")


def _trial(spec: Spec) -> Iterator[ConfigError]:
    """What a constructor of ours that touches nothing has to say itself."""
    kind = resolve_type(spec.kind, spec.key)
    root, _, rest = spec.key.partition(".")
    own = inspect.unwrap(kind).__module__.startswith("xtuner.") if hasattr(kind, "__module__") else False
    hook = root in ("default_hooks", "custom_hooks") and "." not in rest
    scheduler = root == "param_scheduler" and "." not in rest
    try:
        if spec.key == "optim_wrapper.optimizer":  # OptimWrapper tries more, if nothing else in it is wrong
            import torch

            kind([torch.nn.Parameter(torch.zeros(2, 2))], **spec.arguments)
        elif own and (hook or scheduler or spec.key == "optim_wrapper" or type_name(kind) == "from_scratch"):
            build({"type": kind, **spec.arguments}, spec.key)
    except ConfigError as e:
        inside = e.where == spec.key or e.where.startswith(f"{spec.key}.")
        where = f"{spec.key}.{e.where}" if e.where in spec.arguments else spec.key  # a constructor names its argument
        yield ConfigError(e.what, where=e.where if inside else where, why=e.why, do=e.do)
    except SystemExit as e:
        yield of_exit(e, spec.key, type_name(kind))
    except (TypeError, ValueError) as e:
        yield ConfigError(f"{type_name(kind)} does not take these values: {e}", where=spec.key)
    except Exception as e:
        if spec.key == "optim_wrapper.optimizer":
            return  # it needs a GPU, say: that is seen when it is built for the run
        what = f"{type_name(kind)} does not take these values: {type(e).__name__}: {e}"
        yield ConfigError(what, where=spec.key)

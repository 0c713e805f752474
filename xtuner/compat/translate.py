"""Configs of XTuner 0.1 and 0.2 run as they are: what they name of mmengine, transformers and the old package is
replaced by ours (`names`), first where it is imported, then in the values that the config comes to. So it does not
matter how a name got there: written in place, assigned, or put together by a loop. None of those packages is needed.
"""

import ast
from collections.abc import Callable
from typing import Any

from xtuner.compat import names as old_names
from xtuner.compat.moved import find_current
from xtuner.compat.settings import SCHEMA
from xtuner.config import load as load_ours
from xtuner.config import specs
from xtuner.config.config import Config, Replacement
from xtuner.config.findings import combine_errors
from xtuner.core.errors import ConfigError

# mmengine adds these to a config's default_hooks by itself
DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "timer": {"type": "xtuner.train.hooks.IterTimerHook"},
    "sampler_seed": {"type": "xtuner.train.hooks.DistSamplerSeedHook"},
    "logger": {"type": "xtuner.compat.adapters.train.LoggerHook"},
    "param_scheduler": {"type": "xtuner.train.hooks.ParamSchedulerHook"},
    "checkpoint": {"type": "xtuner.compat.adapters.train.CheckpointHook", "interval": 1},
}
# mmengine's names of the order in which hooks are called: those with lower numbers first, as here
PRIORITIES = {
    "HIGHEST": 0, "VERY_HIGH": 10, "HIGH": 30, "ABOVE_NORMAL": 40, "NORMAL": 50, "BELOW_NORMAL": 60, "LOW": 70,
    "VERY_LOW": 90, "LOWEST": 100,
}  # fmt: skip
_ONE_FILE = "a config is one whole file: copy the other one's contents into it"


def load(name_or_path: str, options: list[str] | None = None) -> Config:
    """`config.load.load` for configs of any of these tools."""
    return load_ours.load(name_or_path, options, DIALECT)


def replace_imports(tree: ast.Module, path: str) -> tuple[ast.Module, list[Replacement]]:
    """The config with imports of older tools replaced, line numbers kept; and what was replaced.

    Raises: ConfigError that lists every name that there is nothing for.
    """
    imports = _Imports(path)
    tree = ast.fix_missing_locations(imports.visit(tree))
    if imports.problems:
        raise combine_errors(imports.problems, "imports of the config have nothing in their place")
    return tree, imports.replaced


def replace_names(values: dict[str, Any], where: Callable[[str], str]) -> tuple[list[Replacement], dict[str, str]]:
    """Put our names in the place of old ones at `type` of every dict that is built, and take out what mmengine alone
    reads there. Names that there is nothing for stay: `check` lists them.

    Args:
        values: what the config assigns; its dicts are changed.
        where: from a dotted path to `file:line` for messages.

    Returns: what was replaced, and what was taken out: dotted path → why it has no effect.

    Raises: ConfigError for `_delete_`, which changes a base config that there is not.
    """
    replaced, dropped, problems = [], {}, []
    seen: set[int] = set()
    for key, spec in (pair for root in specs.ROOTS for pair in specs.walk_values(root, values.get(root), seen)):
        if not isinstance(spec, dict):
            continue
        if "_delete_" in spec:
            problems.append(ConfigError("_delete_ has no base config to act on", where=where(key), do=_ONE_FILE))
        if "type" not in spec:
            continue
        written = old_names.written_name(spec["type"])
        if new := old_names.find(written, key):
            if new != find_current(written):
                replaced.append(Replacement(written, new))
            spec["type"] = new
        if isinstance(spec.get("_scope_"), str):
            del spec["_scope_"]
            dropped[f"{key}._scope_"] = "names are imported, not registered"
        if old_names.kind_of(key) == "hook" and _is_our_hook(spec["type"]) and _is_priority(spec.get("priority")):
            del spec["priority"]
            dropped[f"{key}.priority"] = "hooks of ours run in a fixed order: they measure, log, then save"
    if problems:
        raise combine_errors(problems)
    return replaced, dropped


def find_unknown(values: dict[str, Any]) -> dict[str, ConfigError]:
    """Names of other tools, and of nobody, at `type` of what is built, for which there is nothing: path → error."""
    found = {}
    for key, spec in (pair for root in specs.ROOTS for pair in specs.walk_values(root, values.get(root))):
        written = spec.get("type") if isinstance(spec, dict) else None
        if isinstance(written, str) and old_names.is_unknown(written):
            found[key] = old_names.unknown(written, f"{key}.type", key)
    return found


def _translate(config: Config) -> None:
    replaced, dropped = replace_names(config.values, config.where)
    config.replaced = list({r.old: r for r in [*config.replaced, *replaced]}.values())
    config.dropped |= dropped


def _values(config: Config) -> None:
    _translate(config)
    complete_hooks(config.values, config.replaced)


def _overridden(config: Config) -> None:
    _translate(config)
    apply_hook_settings(config.values)
    config.unknown = find_unknown(config.values)


def apply_hook_settings(values: dict[str, Any], absent: bool = False) -> None:
    """Two settings by the names of hooks that switch them on: where another hook has the name, or None, they are off.

    Args:
        absent: a config that has no such hook means "off", too, as configs did before these were settings.
    """
    hooks = values.get("default_hooks") or {}
    if not isinstance(hooks, dict):
        return
    custom = values.get("custom_hooks")
    given = [*hooks.values(), *(custom if isinstance(custom, list | tuple) else ())]
    kinds = {old_names.written_name(spec.get("type")).rpartition(".")[2] for spec in given if isinstance(spec, dict)}
    for name, hook in (("param_scheduler", "ParamSchedulerHook"), ("sampler_seed", "DistSamplerSeedHook")):
        if hook in kinds or not (absent or name in hooks):
            continue
        loader = values.get("train_dataloader")
        if name == "param_scheduler":
            values["param_scheduler"] = None
        elif isinstance(loader, dict):
            values["train_dataloader"] = {"reshuffle": False, **loader}


def complete_hooks(values: dict[str, Any], replaced: list[Replacement]) -> None:
    """Give a config made for mmengine's runner the hooks that the runner adds, without those it switches off (None)."""
    hooks = values.get("default_hooks") or {}
    if isinstance(hooks, dict) and any(old_names.is_of_mmengine(r.old) for r in replaced):
        apply_hook_settings(values)
        hooks = {**DEFAULT_HOOKS, **hooks}
        values["default_hooks"] = {name: spec for name, spec in hooks.items() if spec is not None}


def _is_our_hook(kind: Any) -> bool:
    return old_names.written_name(kind).startswith(("xtuner.train.", "xtuner.compat.adapters.train."))


def _is_priority(value: Any) -> bool:
    if isinstance(value, str):
        return value.upper() in PRIORITIES
    return type(value) is int and 0 <= value <= 100


class _Imports(ast.NodeTransformer):
    def __init__(self, path: str) -> None:
        self.path = path
        self.replaced: list[Replacement] = []
        self.problems: list[ConfigError] = []

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        if any(isinstance(t, ast.Name) and t.id == "_base_" for t in node.targets):
            where = f"{self.path}:{node.lineno}"
            self.problems.append(ConfigError("_base_ is not followed", where=where, do=_ONE_FILE))
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        module = node.module or ""
        if node.level:
            return node
        kept: list[ast.alias] = []
        nodes: list[ast.AST] = []
        for alias in node.names:
            old = f"{module}.{alias.name}"
            new = old_names.REPLACED.get((module, alias.name)) or old_names.find(old)
            if new is None:
                if old_names.is_unknown(old):
                    self.problems.append(old_names.unknown(old, f"{self.path}:{alias.lineno}"))
                kept.append(alias)
                continue
            if new != find_current(old):
                self.replaced.append(Replacement(old, new))
            room, _, name = new.rpartition(".")
            own = ast.alias(name=name, asname=alias.asname or alias.name)
            ours = ast.ImportFrom(module=room, names=[ast.copy_location(own, alias)], level=0)
            nodes.append(ast.copy_location(ours, alias))
        if not nodes:
            return node
        if kept:
            nodes.append(ast.copy_location(ast.ImportFrom(module=module, names=kept, level=0), node))
        return nodes

    def visit_Import(self, node: ast.Import) -> ast.AST:
        for alias in node.names:
            if old_names.is_old(alias.name):
                self.problems.append(
                    ConfigError(
                        f"`import {alias.name}`: xtuner runs without it and puts its own in place of names only",
                        where=f"{self.path}:{alias.lineno}",
                        do=f"write `from {alias.name} import NAME`",
                    )
                )
        return node


DIALECT = load_ours.Dialect(SCHEMA, replace_imports, _values, _overridden)

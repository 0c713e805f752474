"""Run configs of XTuner 0.1 and 0.2 without changes: names of mmengine, transformers and the old package are replaced
by ours (`names`), first in imports, then in the values that result from running the config. So a name may be written in
place, assigned to a variable, or computed. None of those packages needs to be installed.
"""

import ast
from collections.abc import Callable
from typing import Any

from xtuner.compat import names as old_names
from xtuner.compat.moved import find_current
from xtuner.compat.settings import SCHEMA
from xtuner.compat.trackers import move_trackers
from xtuner.config import load as load_ours
from xtuner.config import specs
from xtuner.config.config import Config, Replacement
from xtuner.config.findings import combine_errors
from xtuner.core.errors import ConfigError

# mmengine adds these to the default_hooks of a config
DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "timer": {"type": "xtuner.train.hooks.IterTimerHook"},
    "sampler_seed": {"type": "xtuner.train.hooks.DistSamplerSeedHook"},
    "logger": {"type": "xtuner.legacy.train.LoggerHook"},
    "param_scheduler": {"type": "xtuner.train.hooks.ParamSchedulerHook"},
    "checkpoint": {"type": "xtuner.legacy.train.CheckpointHook", "interval": 1},
}
# mmengine's names of hook priorities; hooks with lower numbers are called first
PRIORITIES = {
    "HIGHEST": 0, "VERY_HIGH": 10, "HIGH": 30, "ABOVE_NORMAL": 40, "NORMAL": 50, "BELOW_NORMAL": 60, "LOW": 70,
    "VERY_LOW": 90, "LOWEST": 100,
}  # fmt: skip
_ONE_FILE = "a config is a single file: copy the contents of the other config into it"


def load(name_or_path: str, options: list[str] | None = None) -> Config:
    """`config.load.load`, also for configs of these tools."""
    return load_ours.load(name_or_path, options, DIALECT)


def replace_imports(tree: ast.Module, path: str) -> tuple[ast.Module, list[Replacement]]:
    """Replace imports of older tools, keeping line numbers. Returns the new tree and the replacements.

    Raises: ConfigError that lists all names without a replacement.
    """
    imports = _Imports(path)
    tree = ast.fix_missing_locations(imports.visit(tree))
    if imports.problems:
        raise combine_errors(imports.problems, "imports of the config have no replacement")
    return tree, imports.replaced


def replace_names(values: dict[str, Any], where: Callable[[str], str]) -> tuple[list[Replacement], dict[str, str]]:
    """Replace old names at `type` of every dict that is built, and remove keys that only mmengine reads. Names without
    a replacement are kept; `check` reports them.

    Args:
        values: what the config assigns; its dicts are changed in place.
        where: from a dotted path to `file:line`, for messages.

    Returns: the replacements, and the removed keys: dotted path → why it has no effect.

    Raises: ConfigError for `_delete_`, which needs a base config.
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
        if new := old_names.find_ours(written, key):
            if new != find_current(written):
                replaced.append(Replacement(written, new))
            spec["type"] = new
        if isinstance(spec.get("_scope_"), str):
            del spec["_scope_"]
            dropped[f"{key}._scope_"] = "names are imported, not registered"
        if old_names.find_kind(key) == "hook" and _is_our_hook(spec["type"]) and _is_priority(spec.get("priority")):
            del spec["priority"]
            dropped[f"{key}.priority"] = "xtuner's hooks run in a fixed order: they measure, log, then save"
    if problems:
        raise combine_errors(problems)
    return replaced, dropped


def find_unknown(values: dict[str, Any]) -> dict[str, ConfigError]:
    """Names without a replacement at `type` of what is built: path → error."""
    found = {}
    for key, spec in (pair for root in specs.ROOTS for pair in specs.walk_values(root, values.get(root))):
        written = spec.get("type") if isinstance(spec, dict) else None
        if isinstance(written, str) and old_names.is_unknown(written):
            found[key] = old_names.unknown_name(written, f"{key}.type", key)
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
    move_trackers(config)
    config.unknown = find_unknown(config.values)


def apply_hook_settings(values: dict[str, Any], absent: bool = False) -> None:
    """Set `param_scheduler` and `train_dataloader.reshuffle` from the hooks that enabled them in older tools: if such a
    hook is None or of another type, its setting is switched off.

    Args:
        absent: also switch it off if the hook is missing, as in configs from before these were settings.
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
    """Add the hooks that mmengine's runner adds automatically, and remove those that the config switches off (None)."""
    hooks = values.get("default_hooks") or {}
    if isinstance(hooks, dict) and any(old_names.is_of_mmengine(r.old) for r in replaced):
        apply_hook_settings(values)
        hooks = {**DEFAULT_HOOKS, **hooks}
        values["default_hooks"] = {name: spec for name, spec in hooks.items() if spec is not None}


def _is_our_hook(kind: Any) -> bool:
    return old_names.written_name(kind).startswith(("xtuner.train.", "xtuner.legacy.train."))


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
            self.problems.append(ConfigError("_base_ is not supported", where=where, do=_ONE_FILE))
        return node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        module = node.module or ""
        if node.level:
            return node
        kept: list[ast.alias] = []
        nodes: list[ast.AST] = []
        for alias in node.names:
            old = f"{module}.{alias.name}"
            new = old_names.REPLACED.get((module, alias.name)) or old_names.find_ours(old)
            if new is None:
                if old_names.is_unknown(old):
                    self.problems.append(old_names.unknown_name(old, f"{self.path}:{alias.lineno}"))
                kept.append(alias)
                continue
            if new != find_current(old):
                self.replaced.append(Replacement(old, new))
            module_of_ours, _, name = new.rpartition(".")
            own = ast.alias(name=name, asname=alias.asname or alias.name)
            ours = ast.ImportFrom(module=module_of_ours, names=[ast.copy_location(own, alias)], level=0)
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
                        f"`import {alias.name}`: only names imported with `from` are replaced by xtuner's",
                        where=f"{self.path}:{alias.lineno}",
                        do=f"write `from {alias.name} import NAME`",
                    )
                )
        return node


DIALECT = load_ours.Dialect(SCHEMA, replace_imports, _values, _overridden)

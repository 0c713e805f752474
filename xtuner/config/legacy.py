"""Configs of XTuner 0.1 and 0.2 run as they are: what they import of mmengine, transformers and the old package is
looked up here when a config is run, and ours is imported instead. None of those packages is needed.

The right-hand sides are strings: the rooms above are imported by the config itself, not by us.
"""

import ast
from dataclasses import dataclass
from typing import Any

from xtuner.config.mistakes import together
from xtuner.core.errors import ConfigError, did_you_mean

_HOOKS = ("DatasetInfoHook", "EvaluateChatHook", "ThroughputHook", "VarlenAttnArgsToMessageHubHook")
_DATA = ("build_packed_dataset", "load_intern_repo_tokenized_dataset")
_COLLATE = ("default_collate_fn", "intern_repo_collate_fn")

# (module, name) → what is imported instead
REPLACED: dict[tuple[str, str], str] = {
    ("mmengine.dataset", "DefaultSampler"): "xtuner.data.legacy.DefaultSampler",
    ("mmengine.hooks", "CheckpointHook"): "xtuner.train.legacy.CheckpointHook",
    ("mmengine.hooks", "DistSamplerSeedHook"): "xtuner.train.hooks.DistSamplerSeedHook",
    ("mmengine.hooks", "IterTimerHook"): "xtuner.train.hooks.IterTimerHook",
    ("mmengine.hooks", "LoggerHook"): "xtuner.train.legacy.LoggerHook",
    ("mmengine.hooks", "ParamSchedulerHook"): "xtuner.train.hooks.ParamSchedulerHook",
    ("mmengine.hooks", "RuntimeInfoHook"): "xtuner.train.legacy.RuntimeInfoHook",
    ("mmengine.optim", "AmpOptimWrapper"): "xtuner.engine.legacy.AmpOptimWrapper",
    ("mmengine.optim", "CosineAnnealingLR"): "xtuner.engine.legacy.CosineAnnealingLR",
    ("mmengine.optim", "LinearLR"): "xtuner.engine.legacy.LinearLR",
    ("mmengine.runner", "EpochBasedTrainLoop"): "xtuner.train.legacy.TrainLoop",
    ("mmengine.visualization", "LocalVisBackend"): "xtuner.train.legacy.LocalVisBackend",
    ("mmengine.visualization", "TensorboardVisBackend"): "xtuner.train.legacy.TensorboardVisBackend",
    ("mmengine.visualization", "Visualizer"): "xtuner.train.legacy.Visualizer",
    ("transformers", "AutoModelForCausalLM"): "xtuner.model.legacy.AutoModelForCausalLM",
    ("transformers", "AutoTokenizer"): "xtuner.data.legacy.AutoTokenizer",
    ("xtuner.engine.runner", "TrainLoop"): "xtuner.train.legacy.TrainLoop",
}
for _modules, _names, _room in (  # a package gives what its modules give, too
    (("xtuner.engine", "xtuner.engine.hooks"), _HOOKS, "xtuner.train.legacy"),
    (("xtuner.dataset", "xtuner.dataset.collate_fns"), _COLLATE, "xtuner.data.legacy"),
    (("xtuner.dataset", "xtuner.dataset.intern_repo"), _DATA, "xtuner.data"),
    (("xtuner.dataset", "xtuner.dataset.samplers"), ("InternRepoSampler",), "xtuner.data.legacy"),
    (("xtuner.model", "xtuner.model.sft"), ("SupervisedFinetune",), "xtuner.model.legacy"),
    (("xtuner.utils", "xtuner.utils.templates"), ("PROMPT_TEMPLATE",), "xtuner.data.legacy"),
):
    REPLACED |= {(module, name): f"{_room}.{name}" for module in _modules for name in _names}

# Packages that a config may import from only by the table above
_FOREIGN = ("mmengine", "transformers", "peft", "bitsandbytes", "mmcv")
_OLD_ROOMS = ("apis", "dataset", "engine.hooks", "engine.runner", "evaluation", "parallel", "registry", "utils")
# Old names of rooms that are ours, too
_SHARED = {"xtuner.engine": ("HFCheckpointHook",), "xtuner.model": ("LLaVAModel",)}
_TOKENIZED = "load_intern_repo_tokenized_dataset, on .bin and .bin.meta files (`xtuner data tokenize` writes them)"
_FULL = "all weights are trained: leave it out"
# name → the nearest that there is
_NEAREST = {
    "BitsAndBytesConfig": _FULL,
    "ConcatDataset": _TOKENIZED,
    "DeepSpeedOptimWrapper": "mmengine.optim.AmpOptimWrapper, and --deepspeed on the command line",
    "HFCheckpointHook": "`xtuner convert pth_to_hf` after the run; a checkpoint's weights/ is such a folder, too",
    "IterBasedTrainLoop": "xtuner.engine.runner.TrainLoop with max_epochs",
    "LLaVAModel": "SupervisedFinetune: models read text only",
    "LoraConfig": _FULL,
    "OptimWrapper": "mmengine.optim.AmpOptimWrapper",
    "SYSTEM_TEMPLATE": "the system prompt itself, as a string",
    "SequenceParallelSampler": "xtuner.dataset.samplers.InternRepoSampler; there is no sequence parallelism",
    "WandbVisBackend": "TensorboardVisBackend; scalars.json holds the same numbers for other tools",
    "load_intern_repo_untokenized_dataset": _TOKENIZED,
    "load_dataset": _TOKENIZED,
    "process_hf_dataset": _TOKENIZED,
    "read_base": "the other config's contents: a config is one whole file",
    "template_map_fn_factory": "nothing: templates are applied when the text is tokenized",
}
# mmengine adds these to a config's default_hooks by itself
DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "timer": {"type": "xtuner.train.hooks.IterTimerHook"},
    "sampler_seed": {"type": "xtuner.train.hooks.DistSamplerSeedHook"},
    "logger": {"type": "xtuner.train.legacy.LoggerHook"},
    "param_scheduler": {"type": "xtuner.train.hooks.ParamSchedulerHook"},
    "checkpoint": {"type": "xtuner.train.legacy.CheckpointHook", "interval": 1},
}


@dataclass(frozen=True)
class Replacement:
    """An imported name of an older tool, and what was imported instead."""

    old: str
    new: str
    line: int

    def __str__(self) -> str:
        return f"{self.old} → {self.new}"


def rewrite(tree: ast.Module, path: str) -> tuple[ast.Module, list[Replacement]]:
    """The config with imports of older tools replaced, line numbers kept; and what was replaced.

    Raises: ConfigError that lists every name that there is nothing for.
    """
    imports = _Imports(path)
    tree = ast.fix_missing_locations(imports.visit(tree))
    if imports.problems:
        raise together(imports.problems, "imports of the config have nothing in their place")
    return tree, list({r.old: r for r in imports.replaced}.values())


def complete_hooks(values: dict[str, Any], replaced: list[Replacement]) -> None:
    """Give a config made for mmengine's runner the hooks that the runner adds, without those it switches off (None)."""
    if any(r.old.startswith("mmengine.") for r in replaced):
        hooks = {**DEFAULT_HOOKS, **(values.get("default_hooks") or {})}
        values["default_hooks"] = {name: spec for name, spec in hooks.items() if spec is not None}


def _is_old(module: str) -> bool:
    """Whether nothing but the table is imported from a module."""
    parts = module.split(".")
    old = [f"xtuner.{room}" for room in _OLD_ROOMS]
    return parts[0] in _FOREIGN or any(module == room or module.startswith(f"{room}.") for room in old)


class _Imports(ast.NodeTransformer):
    def __init__(self, path: str) -> None:
        self.path = path
        self.replaced: list[Replacement] = []
        self.problems: list[ConfigError] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.AST]:
        module = node.module or ""
        if node.level:
            return node
        kept: list[ast.alias] = []
        nodes: list[ast.AST] = []
        for alias in node.names:
            new = self._find(module, alias.name, alias.lineno)
            if new is None:
                kept.append(alias)
                continue
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
            if _is_old(alias.name):
                self.problems.append(
                    ConfigError(
                        f"`import {alias.name}`: xtuner runs without it and puts its own in place of names only",
                        where=f"{self.path}:{alias.lineno}",
                        do=f"write `from {alias.name} import NAME`",
                    )
                )
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        """dict(type="mmengine.hooks.CheckpointHook"), as the old tool dumped configs."""
        if node.arg == "type":
            node.value = self._in_string(node.value)
        self.generic_visit(node)
        return node

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        for i, key in enumerate(node.keys):
            if isinstance(key, ast.Constant) and key.value == "type":
                node.values[i] = self._in_string(node.values[i])
        self.generic_visit(node)
        return node

    def _in_string(self, node: ast.expr) -> ast.expr:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str) or "." not in node.value:
            return node
        module, _, name = node.value.rpartition(".")
        owner, _, last = module.rpartition(".")
        if last[:1].isupper():  # transformers.AutoTokenizer.from_pretrained
            new = self._find(owner, last, node.lineno)
            new = new and f"{new}.{name}"
        else:
            new = self._find(module, name, node.lineno)
        return ast.copy_location(ast.Constant(new), node) if new else node

    def _find(self, module: str, name: str, line: int) -> str | None:
        """Our dotted name in place of an old one; None to leave it. Notes a problem where there is neither."""
        new = REPLACED.get((module, name))
        if new is not None:
            self.replaced.append(Replacement(f"{module}.{name}", new, line))
            return new
        if _is_old(module) or name in _SHARED.get(module, ()):
            self.problems.append(
                ConfigError(
                    f"there is no {module}.{name} here",
                    where=f"{self.path}:{line}",
                    why="configs of XTuner 0.1 and 0.2 run if they train all weights on tokenized data",
                    do=_nearest(module, name),
                )
            )
        return None


def _nearest(module: str, name: str) -> str:
    if name in _NEAREST:
        return f"nearest: {_NEAREST[name]}"
    elsewhere = [m for m, n in REPLACED if n == name]
    if elsewhere:
        return f"import it from {elsewhere[0]}"
    there = sorted(n for m, n in REPLACED if m == module)
    hint = did_you_mean(name, there).strip()
    known = f"of {module} there are: {', '.join(there)}" if there else "leave it out, with what uses it"
    return f"{hint} {known}".strip()

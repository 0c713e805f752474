"""Names of classes and functions in configs of XTuner 0.1 and 0.2, and ours in their place.

Such a config writes a name in one of four ways, which `find_ours` accepts:

    from mmengine.hooks import CheckpointHook         a class or function
    "mmengine.hooks.CheckpointHook"                   its dotted name, as in configs dumped by the old tool
    "CheckpointHook"                                  its name in mmengine's registry
    "mmengine.CheckpointHook"                         the same with the scope of the registry

Targets are strings, as the layers above must not be imported here; `config.build.resolve_type` imports them.
"""

import functools
import inspect
import re
from typing import Any

from xtuner.compat.moved import find_current
from xtuner.core.errors import ConfigError, did_you_mean

_HOOKS = "DatasetInfoHook EvaluateChatHook ThroughputHook VarlenAttnArgsToMessageHubHook"
_DATASETS = "build_packed_dataset load_intern_repo_tokenized_dataset"
_BACKENDS = "Aim ClearML DVCLive Local MLflow Neptune Tensorboard Wandb"

_SCHEDULERS = "ConstantLR CosineAnnealingLR CosineRestartLR LinearLR MultiStepLR"

# (kind, old modules, names, our module). Submodules of the old modules have the same names.
_TABLE: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    ("hook", ("mmengine.hooks",), "CheckpointHook LoggerHook RuntimeInfoHook", "xtuner.legacy.train"),
    ("hook", ("mmengine.hooks",), "DistSamplerSeedHook IterTimerHook ParamSchedulerHook", "xtuner.train.hooks"),
    ("hook", ("xtuner.engine", "xtuner.engine.hooks"), _HOOKS, "xtuner.legacy.train"),
    ("scheduler", ("mmengine.optim",), _SCHEDULERS, "xtuner.legacy.engine"),
    ("optimizer wrapper", ("mmengine.optim",), "AmpOptimWrapper", "xtuner.legacy.engine"),
    ("loop", ("xtuner.engine.runner", "xtuner.engine"), "TrainLoop", "xtuner.legacy.train"),
    ("loop", ("mmengine.runner",), "EpochBasedTrainLoop", "xtuner.legacy.train"),
    ("sampler", ("xtuner.dataset.samplers", "xtuner.dataset"), "InternRepoSampler InternlmRepoSampler",
     "xtuner.legacy.data"),
    ("sampler", ("mmengine.dataset",), "DefaultSampler", "xtuner.legacy.data"),
    ("batch sampler", ("torch.utils.data",), "BatchSampler", "torch.utils.data"),
    ("collate function", ("xtuner.dataset.collate_fns", "xtuner.dataset"),
     "default_collate_fn intern_repo_collate_fn", "xtuner.legacy.data"),
    ("dataset", ("xtuner.dataset.intern_repo", "xtuner.dataset"), _DATASETS, "xtuner.data"),
    ("model", ("xtuner.model", "xtuner.model.sft"), "SupervisedFinetune", "xtuner.legacy.model"),
    ("model", ("transformers",), "AutoModelForCausalLM", "xtuner.legacy.model"),
    ("adapter", ("peft",), "LoraConfig", "xtuner.legacy.peft"),
    ("quantization", ("transformers",), "BitsAndBytesConfig", "xtuner.legacy.peft"),
    ("tokenizer", ("transformers",), "AutoTokenizer", "xtuner.legacy.data"),
    ("template", ("xtuner.utils",), "PROMPT_TEMPLATE", "xtuner.legacy.data"),
    ("visualizer", ("mmengine.visualization",), "Visualizer", "xtuner.legacy.train"),
    ("visualizer's backend", ("mmengine.visualization",),
     " ".join(f"{name}VisBackend" for name in _BACKENDS.split()), "xtuner.legacy.train"),
    ("visualizer's backend", ("swanlab.integration.mmengine",), "SwanlabVisBackend", "xtuner.legacy.train"),
)  # fmt: skip

# (module, name) → our dotted name
REPLACED = {
    (module, name): f"{ours}.{name}" for _, old, names, ours in _TABLE for module in old for name in names.split()
}
_BY_NAME = {n: f"{ours}.{n}" for _, _, names, ours in _TABLE for n in names.split()}
_OF_MMENGINE = {name for module, name in REPLACED if module.startswith("mmengine.")}

# Packages of which only the names in the table are accepted
_FOREIGN = ("mmengine", "transformers", "peft", "bitsandbytes", "mmcv")
_OLD_PACKAGES = tuple(f"xtuner.{name}" for name in (
    "apis", "dataset", "engine._strategy", "engine.hooks", "engine.runner", "evaluation", "model.llava",
    "model.modules", "model.utils", "parallel", "registry", "utils",
))  # fmt: skip
# Old names in packages that we have also
_SHARED = {"xtuner.engine": ("DeepSpeedStrategy", "HFCheckpointHook"), "xtuner.model": ("LLaVAModel",)}

# Pattern of a path in a config → kind of object there. Only at these paths is a name without dots one of a registry.
_KIND_BY_PATH = {
    r"(default|custom)_hooks\.[^.]+": "hook",
    r"param_scheduler(\.\d+)?": "scheduler",
    r"optim_wrapper": "optimizer wrapper",
    r"optim_wrapper\.optimizer": "optimizer",
    r"train_cfg": "loop",
    r"train_dataloader\.sampler": "sampler",
    r"train_dataloader\.batch_sampler": "batch sampler",
    r"train_dataloader\.collate_fn": "collate function",
    r"train_dataloader\.dataset(\.dataset_cfg)?|val_dataset": "dataset",
    r"model(\.llm)?": "model",
    r"model\.lora": "adapter",
    r"model\.llm\.quantization_config": "quantization",
    r"(model\.)?tokenizer|custom_hooks\.[^.]+\.tokenizer": "tokenizer",
    r"visualizer": "visualizer",
    r"visualizer\.vis_backends(\.\d+)?": "visualizer's backend",
}

# Optimizers of PyTorch that cannot train a model here
_UNSUPPORTED = ("LBFGS", "SparseAdam")
_TOKENIZED = "load_intern_repo_tokenized_dataset, on .bin and .bin.meta files (`xtuner data tokenize` writes them)"
_DEEPSPEED = "--deepspeed on the command line"
# name → the nearest thing that exists
_NEAREST = {
    "ConcatDataset": _TOKENIZED,
    "DefaultOptimWrapperConstructor": "none; leave constructor out",
    "DeepSpeedOptimWrapper": f"mmengine.optim.AmpOptimWrapper, and {_DEEPSPEED}",
    "DeepSpeedStrategy": f"{_DEEPSPEED}: leave strategy out",
    "FusedAdam": "AdamW, or Adam where adam_w_mode is False",
    "HFCheckpointHook": "`xtuner convert pth_to_hf` after the run; a checkpoint's weights/ is such a folder, too",
    "HOOKS": "none, nothing is registered: define the hook in the config, and give the class itself as type",
    "Hook": "xtuner.train.hooks.Hook: before_run, after_iteration, after_checkpoint, after_run, on_error, on_end",
    "InfiniteSampler": "InternRepoSampler of xtuner.dataset.samplers",
    "IterBasedTrainLoop": "xtuner.engine.runner.TrainLoop with max_epochs",
    "LLaVAModel": "SupervisedFinetune: models read text only",
    "LocalAttnArgsToMessageHubHook": "none; each batch contains the document borders",
    "OptimWrapper": "mmengine.optim.AmpOptimWrapper",
    "ProfilerHook": "xtuner.train.reporting.profile.ProfileHook",
    "SYSTEM_TEMPLATE": "the system prompt itself, as a string",
    "SequenceParallelSampler": "xtuner.dataset.samplers.InternRepoSampler; sequence parallelism is not supported",
    "load_dataset": _TOKENIZED,
    "load_intern_repo_untokenized_dataset": _TOKENIZED,
    "process_hf_dataset": _TOKENIZED,
    "process_intern_repo_dataset": "build_packed_dataset with dataset_cfg: see the shipped configs",
    "read_base": "the contents of the other config: a config is a single file",
    "template_map_fn_factory": "none; templates are applied by `xtuner data tokenize`",
}


def find_kind(key: str) -> str:
    """The kind of object at a dotted path, such as `default_hooks.logger`; empty if none is built there."""
    return next((kind for pattern, kind in _KIND_BY_PATH.items() if re.fullmatch(pattern, key)), "")


def find_ours(written: str, key: str = "") -> str | None:
    """Our dotted name for an old name, or None.

    Args:
        written: `package.module.name`, `….Class.method`, or a name in a registry.
        key: dotted path in the config; names of a registry are accepted only where objects are built.
    """
    module, name, method = _split(written)
    if "" in written.split("."):
        return None
    if (now := find_current(written)) != written:
        return now
    kind, new = find_kind(key), None
    if module in ("", "mmengine") and (kind or module):
        new = _BY_NAME.get(name) or (_torch_optimizers().get(name) if kind == "optimizer" else None)
    while module and new is None:
        new = REPLACED.get((module, name))
        module = module.rpartition(".")[0] if is_old(module) else ""
    return f"{new}.{method}" if new and method else new


def written_name(kind: Any) -> str:
    """`type=` of a spec as a string; for a class or function its dotted name."""
    if isinstance(kind, str):
        return kind
    if inspect.isclass(kind) or inspect.isroutine(kind):
        return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"
    return ""


def is_old(module: str) -> bool:
    """Whether only the names in the table are accepted from a module."""
    old = any(module == old or module.startswith(f"{old}.") for old in _OLD_PACKAGES)
    return old or module.partition(".")[0] in _FOREIGN


def is_unknown(written: str) -> bool:
    """Whether a name of an older tool, or of a registry, has no replacement."""
    module, name, _ = _split(written)
    return find_ours(written) is None and (not module or is_old(module) or name in _SHARED.get(module, ()))


def is_of_mmengine(written: str) -> bool:
    return written.startswith("mmengine.") or written in _OF_MMENGINE


def unknown_name(written: str, where: str, key: str = "") -> ConfigError:
    """The error for a name without a replacement."""
    module, name, _ = _split(written)
    if module and not (module == "mmengine" and find_kind(key)):
        why = "only configs of XTuner 0.1 and 0.2 for tokenized data are supported"
        return ConfigError(f"{written} has no replacement in xtuner", where=where, why=why, do=_nearest(module, name))
    kind = find_kind(key)
    known = _registered(kind)
    if name in _NEAREST:
        do = f"nearest: {_NEAREST[name]}"
    else:
        near = [n for n in known if n not in _UNSUPPORTED] or sorted(_BY_NAME)
        do = did_you_mean(name, near).strip() + " give a class, a function, or its dotted name"
        if known and kind != "optimizer":  # there are dozens of optimizers
            do += f"; names without a module: {', '.join(known)}"
    return ConfigError(
        f"there is no {kind or 'class or function'} {written!r}",
        where=where,
        why="a name without a module must be one of mmengine or XTuner",
        do=do.strip(),
    )


def _split(written: str) -> tuple[str, str, str]:
    """`a.b.Class.method` → ("a.b", "Class", "method"); `a.b.name` → ("a.b", "name", "")."""
    *owner, last = written.split(".")
    if owner and owner[-1][:1].isupper():
        return ".".join(owner[:-1]), owner[-1], last
    return ".".join(owner), last, ""


def _registered(kind: str) -> list[str]:
    if kind == "optimizer":
        return sorted(_torch_optimizers())
    return sorted(name for k, _, names, _ in _TABLE if k == kind for name in names.split())


def _nearest(module: str, name: str) -> str:
    if name in _NEAREST:
        return f"nearest: {_NEAREST[name]}"
    elsewhere = [m for m, n in REPLACED if n == name]
    if elsewhere:
        return f"import it from {elsewhere[0]}"
    there = sorted(n for m, n in REPLACED if m == module)
    if not there and is_old(module.rpartition(".")[0]):  # mmengine.hooks.checkpoint_hook
        return _nearest(module.rpartition(".")[0], name)
    hint = did_you_mean(name, there).strip()
    known = f"supported in {module}: {', '.join(there)}" if there else "leave it out, and what uses it"
    return f"{hint} {known}".strip()


@functools.cache
def _torch_optimizers() -> dict[str, str]:
    """Names under which mmengine registers PyTorch's optimizers."""
    import torch

    names = [n for n, kind in vars(torch.optim).items() if inspect.isclass(kind) and n != "Optimizer"]
    found = {n: f"torch.optim.{n}" for n in names if issubclass(getattr(torch.optim, n), torch.optim.Optimizer)}
    found["Muon"] = "xtuner.optim.muon.Muon"  # PyTorch's accepts only matrices
    if adafactor := found.pop("Adafactor", None):  # the registry's Adafactor is transformers'
        found["TorchAdafactor"] = adafactor
    return found

"""Adapters from the hooks and loops of XTuner 0.1 and 0.2 to ours, with the defaults of the old tool.

`compat/translate.py` replaces the old names by these.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.compat.settings import SCHEMA
from xtuner.config.adapter import adapter
from xtuner.config.schema import Allowed
from xtuner.data.chat_template import ChatTemplate
from xtuner.families.chat import ChatFormat
from xtuner.legacy.data import template_named
from xtuner.train import hooks

_NO_BEST = Allowed((None,), "checkpoints are kept by age", "leave it out; compare them with `xtuner eval loss`")
_DISK = Allowed((None,), "files are written to local or mounted file systems only", "leave it out; mount the storage")
_DISKS = {"backend_args": _DISK, "file_client_args": _DISK}
_LOGS = "logs are in the work dir, one folder per start"
_BARE = ChatTemplate(system="", user="{text}", assistant_begin="", assistant_end="", stop_words=())


@adapter(
    no_effect={
        "save_param_scheduler": ("the learning rate is a function of the iteration, and needs no state", bool),
        "filename_tmpl": ("checkpoints are named iter_N.pth", str | None),
        "save_begin": ("checkpoints are saved from the first interval on", int),
    },
    allowed={
        "out_dir": Allowed((None,), "checkpoints are in the work dir", "give --work-dir"),
        **dict.fromkeys(("save_best", "rule", "greater_keys", "less_keys"), _NO_BEST),
        **_DISKS,
        "save_last": Allowed((True,), "the end of a run is always saved", "leave it out"),
        "published_keys": Allowed((None,), "weights are published by `xtuner convert pth_to_hf`", "leave it out"),
    },
)
def CheckpointHook(
    interval: int = -1, by_epoch: bool = True, save_optimizer: bool = True, max_keep_ckpts: int = -1
) -> hooks.CheckpointHook:
    return hooks.CheckpointHook(interval, by_epoch, max_keep_ckpts, save_optimizer)


@adapter(
    no_effect={
        "log_metric_by_epoch": ("log lines count iterations", bool),
        "ignore_last": ("the last iteration is always logged", bool),
        "interval_exp_name": ("the log file is named after the start", int),
        "out_dir": (_LOGS, str | None),
        "out_suffix": _LOGS,
        "keep_local": (_LOGS, bool),
    },
    allowed=_DISKS,
)
def LoggerHook(interval: int = 10) -> hooks.LoggerHook:
    return hooks.LoggerHook(interval)


@adapter(no_effect={"is_intern_repo_dataset": ("all data are tokenized", bool)})
def DatasetInfoHook(tokenizer: Any) -> hooks.DatasetInfoHook:
    return hooks.DatasetInfoHook(tokenizer)


@adapter(
    no_effect={"generation_kwargs": "samples always take the most likely token"},
    allowed={
        "every_n_epochs": Allowed((None,), "the interval counts iterations", "give every_n_iters"),
        **dict.fromkeys(
            ("evaluation_images", "image_processor"), Allowed((None,), "models are text only", "leave it out")
        ),
    },
)
def EvaluateChatHook(
    tokenizer: Any,
    evaluation_inputs: str | Sequence[str],
    every_n_iters: int | None = None,
    system: str = "",
    prompt_template: ChatFormat | str | None = None,
    max_new_tokens: int = 600,
    stop_word: str | None = None,
    stop_words: Sequence[str] = (),
) -> hooks.EvaluateChatHook:
    inputs = evaluation_inputs if isinstance(evaluation_inputs, str) else list(evaluation_inputs)
    template = template_named(prompt_template) if isinstance(prompt_template, str) else prompt_template
    stops = [*stop_words, *([stop_word] if stop_word else [])]
    if stops:
        template = template or _BARE
        template = dataclasses.replace(template, stop_words=(*template.stop_words, *stops))  # type: ignore[type-var]
    return hooks.EvaluateChatHook(tokenizer, inputs, every_n_iters, system, template, max_new_tokens)


_SIZES = ("hidden_size", "num_layers", "vocab_size")
_SWITCHES = ("use_activation_checkpointing", "is_casual")
_KNOWN = dict.fromkeys(_SIZES, int | None) | dict.fromkeys(_SWITCHES, bool | None) | {"mlp_ratio": float | None}


@adapter(no_effect={name: ("read from the model", kind) for name, kind in _KNOWN.items()})
def ThroughputHook() -> hooks.ThroughputHook:
    return hooks.ThroughputHook()


@adapter("each batch contains the document borders")
def VarlenAttnArgsToMessageHubHook() -> hooks.Hook:
    return hooks.Hook()


@adapter("the trainer counts iterations itself")
def RuntimeInfoHook() -> hooks.Hook:
    return hooks.Hook()


_LENGTH = {s.name: s.allowed for s in SCHEMA.inside("train_cfg") if s.allowed}
_NO_EFFECT = {s.name: s.no_effect for s in SCHEMA.settings if s.no_effect and s.parent in ("", "train_cfg")}
_VALIDATION = {name: (_NO_EFFECT[name], int) for name in ("val_begin", "val_interval")}


@adapter(no_effect=_VALIDATION, allowed=_LENGTH)
def TrainLoop(max_epochs: int) -> dict[str, int]:
    """Never built: the trainer reads `train_cfg.max_epochs`."""
    return {"max_epochs": max_epochs}


@adapter(no_effect={**_VALIDATION, "dynamic_intervals": _NO_EFFECT["dynamic_intervals"]}, allowed=_LENGTH)
def EpochBasedTrainLoop(max_epochs: int) -> dict[str, int]:
    """Never built: the trainer reads `train_cfg.max_epochs`."""
    return {"max_epochs": max_epochs}


_SCALARS = _NO_EFFECT["visualizer"]
_FOLDER = {"save_dir": str | None}
_FIGURE = ("image", "fig_save_cfg", "fig_show_cfg")
_BACKENDS = Sequence[Mapping[str, Any]] | Mapping[str, Any] | None


@adapter(_SCALARS, ignored=_FOLDER | {"name": str, "vis_backends": _BACKENDS} | dict.fromkeys(_FIGURE, Any))
def Visualizer() -> None: ...


@adapter(_SCALARS, ignored=_FOLDER | dict.fromkeys(("img_save_dir", "config_save_file", "scalar_save_file"), str))
def LocalVisBackend() -> None: ...


@adapter(_SCALARS, ignored=_FOLDER)
def TensorboardVisBackend() -> None: ...


def _remote(name: str, service: str, package: str = "") -> Any:
    """`package`: with it installed, compat/trackers.py makes a tracker of the backend."""
    unless = f": install {package}" if package else ""

    @adapter(f"nothing is sent to {service}{unless}; metrics are in scalars.json and TensorBoard files")
    def backend(save_dir: str | None = None, **settings: Any) -> None: ...

    backend.__name__ = backend.__qualname__ = name
    return backend


WandbVisBackend = _remote("WandbVisBackend", "Weights & Biases", "wandb")
SwanlabVisBackend = _remote("SwanlabVisBackend", "SwanLab", "swanlab")
MLflowVisBackend = _remote("MLflowVisBackend", "MLflow")
ClearMLVisBackend = _remote("ClearMLVisBackend", "ClearML")
NeptuneVisBackend = _remote("NeptuneVisBackend", "Neptune")
DVCLiveVisBackend = _remote("DVCLiveVisBackend", "DVCLive")
AimVisBackend = _remote("AimVisBackend", "Aim")

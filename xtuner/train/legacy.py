"""What configs of XTuner 0.1 and 0.2 name of hooks and loops, as ours. `config/legacy.py` puts these in place of the
old names. Defaults are the old tool's.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from xtuner.config.adapter import Only, adapter
from xtuner.data.chat_template import ChatTemplate
from xtuner.data.legacy import template_named
from xtuner.train import hooks

_NO_BEST = Only((None,), "checkpoints are kept by age", "leave it out; `xtuner eval loss` compares")
_DISKS = Only((None,), "files are written to this machine's file systems", "leave it out; mount the storage")
_EPOCHS = {
    "by_epoch": Only((True,), "a run's length is given in epochs", "give max_epochs"),
    "max_iters": Only((None,), "a run's length is given in epochs", "give max_epochs"),
}
_VAL = "val_interval at the top level says how often val_dataset is measured"
_LOGS = "logs lie in the work dir, one folder a start"
_BARE = ChatTemplate(system="", user="{text}", assistant_begin="", assistant_end="", stop_words=())


@adapter(
    no_work={
        "save_param_scheduler": "the rate follows from the iteration; there is nothing to save",
        "filename_tmpl": "checkpoints are named iter_N.pth",
        "save_begin": "checkpoints are saved from the first interval on",
    },
    only={
        "out_dir": Only((None,), "checkpoints lie in the work dir", "give --work-dir"),
        "save_best": _NO_BEST,
        "rule": _NO_BEST,
        "greater_keys": _NO_BEST,
        "less_keys": _NO_BEST,
        "backend_args": _DISKS,
        "file_client_args": _DISKS,
        "save_last": Only((True,), "the end of a run is always saved", "leave it out"),
        "published_keys": Only((None,), "weights are published by `xtuner convert pth_to_hf`", "leave it out"),
    },
)
def CheckpointHook(
    interval: int = -1,
    by_epoch: bool = True,
    save_optimizer: bool = True,
    save_param_scheduler: bool = True,
    out_dir: str | None = None,
    max_keep_ckpts: int = -1,
    save_last: bool = True,
    save_best: Any = None,
    rule: Any = None,
    greater_keys: Any = None,
    less_keys: Any = None,
    file_client_args: Any = None,
    filename_tmpl: str | None = None,
    backend_args: Any = None,
    published_keys: Any = None,
    save_begin: int = 0,
) -> hooks.CheckpointHook:
    return hooks.CheckpointHook(interval, by_epoch, max_keep_ckpts, save_optimizer)


@adapter(
    no_work={
        "log_metric_by_epoch": "a line counts iterations",
        "ignore_last": "the last iteration is always logged",
        "interval_exp_name": "the log file is named after the start",
        "out_dir": _LOGS,
        "out_suffix": _LOGS,
        "keep_local": _LOGS,
    },
    only={"backend_args": _DISKS, "file_client_args": _DISKS},
)
def LoggerHook(
    interval: int = 10,
    ignore_last: bool = True,
    interval_exp_name: int = 1000,
    out_dir: str | None = None,
    out_suffix: Any = (".json", ".log", ".py", "yaml"),
    keep_local: bool = True,
    file_client_args: Any = None,
    log_metric_by_epoch: bool = True,
    backend_args: Any = None,
) -> hooks.LoggerHook:
    return hooks.LoggerHook(interval)


@adapter(no_work={"is_intern_repo_dataset": "all data are tokenized"})
def DatasetInfoHook(tokenizer: Any, is_intern_repo_dataset: bool = False) -> hooks.DatasetInfoHook:
    return hooks.DatasetInfoHook(tokenizer)


@adapter(
    no_work={"generation_kwargs": "samples take the most likely token each time"},
    only={
        "every_n_epochs": Only((None,), "samples are written by the iteration", "give every_n_iters"),
        "evaluation_images": Only((None,), "models read text only", "leave it out"),
        "image_processor": Only((None,), "models read text only", "leave it out"),
    },
)
def EvaluateChatHook(
    tokenizer: Any,
    evaluation_inputs: str | Sequence[str],
    every_n_iters: int | None = None,
    system: str = "",
    prompt_template: ChatTemplate | str | None = None,
    max_new_tokens: int = 600,
    stop_word: str | None = None,
    stop_words: Sequence[str] = (),
    generation_kwargs: Any = None,
    evaluation_images: Any = None,
    image_processor: Any = None,
    every_n_epochs: int | None = None,
) -> hooks.EvaluateChatHook:
    inputs = evaluation_inputs if isinstance(evaluation_inputs, str) else list(evaluation_inputs)
    template = template_named(prompt_template) if isinstance(prompt_template, str) else prompt_template
    stops = [*stop_words, *([stop_word] if stop_word else [])]
    if stops:
        template = template or _BARE
        template = dataclasses.replace(template, stop_words=(*template.stop_words, *stops))
    return hooks.EvaluateChatHook(tokenizer, inputs, every_n_iters, system, template, max_new_tokens)


_KNOWN = "read from the model"


@adapter(
    no_work={
        name: _KNOWN
        for name in (
            "use_activation_checkpointing",
            "hidden_size",
            "num_layers",
            "vocab_size",
            "mlp_ratio",
            "is_casual",
        )
    }
)
def ThroughputHook(
    use_activation_checkpointing: bool | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    vocab_size: int | None = None,
    mlp_ratio: float | None = None,
    is_casual: bool | None = None,
) -> hooks.ThroughputHook:
    return hooks.ThroughputHook()


@adapter(idle="the borders of documents come with each batch")
def VarlenAttnArgsToMessageHubHook() -> hooks.Hook:
    return hooks.Hook()


@adapter(idle="the trainer knows the iteration itself")
def RuntimeInfoHook() -> hooks.Hook:
    return hooks.Hook()


@adapter(no_work={"val_begin": _VAL, "val_interval": _VAL}, only=_EPOCHS)
def TrainLoop(
    max_epochs: int,
    by_epoch: bool = True,
    max_iters: int | None = None,
    val_begin: int = 1,
    val_interval: int = 1,
) -> dict[str, int]:
    """Never built: the trainer reads max_epochs where it stands."""
    return {"max_epochs": max_epochs}


@adapter(no_work={"val_begin": _VAL, "val_interval": _VAL, "dynamic_intervals": _VAL}, only=_EPOCHS)
def EpochBasedTrainLoop(
    max_epochs: int,
    by_epoch: bool = True,
    max_iters: int | None = None,
    val_begin: int = 1,
    val_interval: int = 1,
    dynamic_intervals: Any = None,
) -> dict[str, int]:
    """Never built, as above."""
    return {"max_epochs": max_epochs}


_SCALARS = "every run writes scalars.json and TensorBoard files"


@adapter(idle=_SCALARS)
def Visualizer(
    name: str = "visualizer",
    image: Any = None,
    vis_backends: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    save_dir: str | None = None,
    fig_save_cfg: Any = None,
    fig_show_cfg: Any = None,
) -> None: ...


@adapter(idle=_SCALARS)
def LocalVisBackend(
    save_dir: str | None = None,
    img_save_dir: str = "vis_image",
    config_save_file: str = "config.py",
    scalar_save_file: str = "scalars.json",
) -> None: ...


@adapter(idle=_SCALARS)
def TensorboardVisBackend(save_dir: str | None = None) -> None: ...


def _remote(name: str, service: str) -> Any:
    @adapter(idle=f"nothing is sent to {service}; scalars.json and TensorBoard files hold the numbers")
    def backend(save_dir: str | None = None, **settings: Any) -> None: ...

    backend.__name__ = backend.__qualname__ = name
    return backend


WandbVisBackend = _remote("WandbVisBackend", "Weights & Biases")
MLflowVisBackend = _remote("MLflowVisBackend", "MLflow")
ClearMLVisBackend = _remote("ClearMLVisBackend", "ClearML")
NeptuneVisBackend = _remote("NeptuneVisBackend", "Neptune")
DVCLiveVisBackend = _remote("DVCLiveVisBackend", "DVCLive")
AimVisBackend = _remote("AimVisBackend", "Aim")

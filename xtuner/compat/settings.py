"""Settings of XTuner 0.1 and 0.2 and of mmengine: only some values are accepted, or all are accepted without effect."""

from xtuner.config import settings
from xtuner.config.schema import Allowed, Schema, Setting

_NO_VALIDATION = Allowed((None,), "it would not be called", "set it to None; use val_dataset and val_interval")
_ENGINE = Allowed((None,), "the engine is chosen on the command line", "leave it out, and give --deepspeed")
_LENGTH = ("a run's length is given in epochs", "leave it out, and give max_epochs")
_VALIDATED = "the top-level val_interval sets how often the loss on val_dataset is computed"
_ALLOWED = {
    **{f"{part}_{what}": _NO_VALIDATION for part in ("val", "test") for what in ("cfg", "dataloader", "evaluator")},
    "strategy": _ENGINE,
    "model_wrapper_cfg": _ENGINE,
    "auto_scale_lr": Allowed((None, {"enable": False}), "the learning rate is not scaled", "set lr itself"),
    "custom_imports": Allowed((None,), "there are no registries", "import these modules at the top of the config"),
    "data_preprocessor": Allowed((None,), "packs are not preprocessed", "leave it out"),
    "framework": Allowed((None, "mmengine"), "xtuner uses no other framework", "leave it out"),
    "runner_type": Allowed((None, "Runner"), "the engine is chosen on the command line", "leave it out"),
    "train_cfg.by_epoch": Allowed((True,), *_LENGTH),
    "train_cfg.max_iters": Allowed((None,), *_LENGTH),
    "train_dataloader.batch_sampler.batch_size": Allowed(
        (1,), "a batch is one pack; a longer max_length or accumulative_counts does the same", "set it to 1"
    ),
}
_NO_EFFECT = {
    "default_scope": "names are imported, not registered",
    "env_cfg": "the launcher and the device determine how processes start and communicate",
    "experiment_name": "a run is named after its config and its start",
    "find_unused_parameters": "every parameter is used",
    "launcher": "it is a command-line option: --launcher",
    "log_processor": "the format of log lines is fixed",
    "visualizer": "every run writes scalars.json and TensorBoard files",
    "train_dataloader.batch_sampler": "a batch is one pack, selected by the sampler",
    "train_dataloader.collate_fn": "",
    "train_dataloader.drop_last": "a batch is one pack, and never incomplete",
    "train_dataloader.persistent_workers": "workers run until the end of the run",
    "train_dataloader.pin_memory": "a pack is about 1 MB, and is copied while the device computes",
    "train_dataloader.prefetch_factor": "the packs of one iteration are read ahead",
    "randomness.diff_rank_seed": "only initial weights are random, and they must be equal on all ranks",
    **dict.fromkeys((f"train_cfg.{n}" for n in ("dynamic_intervals", "val_begin", "val_interval")), _VALIDATED),
}

_DECLARED = (
    *(Setting(key, resume="harmless") for key in ("model.llm", "model.path")),  # the source of the weights
    Setting("model.llm.quantization_config", resume="changes the result"),
    Setting("model.lora", resume="impossible"),
    *(Setting(f"model.lora.{name}", resume="changes the result") for name in ("lora_alpha", "lora_dropout")),
    *(Setting(key, allowed=allowed) for key, allowed in _ALLOWED.items()),
    *(Setting(key, no_effect=why) for key, why in _NO_EFFECT.items()),
)

SCHEMA = Schema(_DECLARED, settings.SCHEMA)

# Arguments of from_pretrained, for models and tokenizers
HUB = {
    "cache_dir": Allowed((None,), "the cache of the hub is used", "leave it out; HF_HOME sets another folder"),
    "code_revision": Allowed((None,), "code of a hub is never run", "leave it out"),
    "force_download": Allowed((False, None), "a complete model in the cache is used", "leave it out"),
    "local_files_only": Allowed((False, None), "it applies to the whole run", "leave it out, and set HF_HUB_OFFLINE=1"),
    "proxies": Allowed((None,), "proxies are read from the environment", "leave it out, and set HTTPS_PROXY"),
    "revision": Allowed(
        (None, "main"), "the main branch is used", "download the revision, and give its folder as the model"
    ),
    "subfolder": Allowed(("", None), "only files of the top folder are used", "download it, and give the sub-folder"),
    "token": Allowed((None, False, True), "it would be kept with the config", "leave it out, and set HF_TOKEN"),
}

"""Settings of XTuner 0.1 and 0.2 and of mmengine: some values are accepted, or all, without effect."""

from xtuner.config import settings
from xtuner.config.schema import Allowed, Schema, Setting

_NO_VALIDATION = Allowed(
    (None,), "it would not be called", "set it to None; val_dataset and val_interval measure the loss"
)
_ENGINE = Allowed((None,), "the engine is chosen on the command line", "leave it out, and give --deepspeed")
_LENGTH = ("a run's length is given in epochs", "leave it out, and give max_epochs")
_VALIDATED = "val_interval at the top level says how often val_dataset is measured"
_ALLOWED = {
    **{f"{part}_{what}": _NO_VALIDATION for part in ("val", "test") for what in ("cfg", "dataloader", "evaluator")},
    "strategy": _ENGINE,
    "model_wrapper_cfg": _ENGINE,
    "auto_scale_lr": Allowed((None, {"enable": False}), "the rate is what the config says", "set lr itself"),
    "custom_imports": Allowed((None,), "nothing is registered", "import what it names at the top of the config"),
    "data_preprocessor": Allowed((None,), "packs go to the model as they are", "leave it out"),
    "framework": Allowed((None, "mmengine"), "xtuner trains by itself", "leave it out"),
    "runner_type": Allowed((None, "Runner"), "the engine is chosen on the command line", "leave it out"),
    "train_cfg.by_epoch": Allowed((True,), *_LENGTH),
    "train_cfg.max_iters": Allowed((None,), *_LENGTH),
    "train_dataloader.batch_sampler.batch_size": Allowed(
        (1,), "a batch is one pack; a longer max_length or accumulative_counts does the same", "set it to 1"
    ),
}
_NO_EFFECT = {
    "default_scope": "names are imported, not registered",
    "env_cfg": "how processes start and talk is chosen by the launcher and the device",
    "experiment_name": "a run is named after its config and its start",
    "find_unused_parameters": "every parameter is used",
    "launcher": "it is given as --launcher",
    "log_processor": "what a log line shows is fixed",
    "visualizer": "every run writes scalars.json and TensorBoard files",
    "train_dataloader.batch_sampler": "a batch is one pack, and the sampler gives its number",
    "train_dataloader.collate_fn": "",
    "train_dataloader.drop_last": "a batch is one pack: none is incomplete",
    "train_dataloader.persistent_workers": "workers live as long as the run",
    "train_dataloader.pin_memory": "a pack is about 1 MB, and copied while the device computes",
    "train_dataloader.prefetch_factor": "packs are read ahead, as many as an iteration takes",
    "randomness.diff_rank_seed": "ranks draw nothing but new weights, which must be equal",
    **dict.fromkeys((f"train_cfg.{n}" for n in ("dynamic_intervals", "val_begin", "val_interval")), _VALIDATED),
}

_DECLARED = (
    *(Setting(key, resume="harmless") for key in ("model.llm", "model.path")),  # where weights come from
    *(Setting(key, allowed=allowed) for key, allowed in _ALLOWED.items()),
    *(Setting(key, no_effect=why) for key, why in _NO_EFFECT.items()),
)

SCHEMA = Schema(_DECLARED, settings.SCHEMA)

# Of from_pretrained, for models and tokenizers
HUB = {
    "cache_dir": Allowed((None,), "the hub's own cache is read", "leave it out; the variable HF_HOME moves the cache"),
    "code_revision": Allowed((None,), "no code of a hub is run", "leave it out"),
    "force_download": Allowed((False, None), "what the cache holds whole is taken", "leave it out"),
    "local_files_only": Allowed((False, None), "it is set for all of a run", "leave it out, and set HF_HUB_OFFLINE=1"),
    "proxies": Allowed((None,), "the hub is reached as the environment says", "leave it out, and set HTTPS_PROXY"),
    "revision": Allowed(
        (None, "main"), "the main branch is read", "download the revision, and give its folder as the model"
    ),
    "subfolder": Allowed(("", None), "the files at the top are read", "download the model, and give the sub-folder"),
    "token": Allowed((None, False, True), "it would be written into logs", "leave it out, and set HF_TOKEN"),
}

"""Modules of xtuner that have moved. Configs and checkpoints may contain the old dotted names."""

MOVED = {
    **{
        f"xtuner.compat.adapters.{name}": f"xtuner.legacy.{name}"
        for name in ("data", "engine", "model", "peft", "train")
    },
    "xtuner.data.index": "xtuner.data.format.folder",
    "xtuner.data.legacy": "xtuner.legacy.data",
    "xtuner.data.order": "xtuner.data.loading.sampler",
    "xtuner.data.pack": "xtuner.data.packing.pack",
    "xtuner.engine.legacy": "xtuner.legacy.engine",
    "xtuner.engine.optim": "xtuner.optim.optim_wrapper",
    "xtuner.engine.schedule": "xtuner.optim.schedule",
    "xtuner.model.adapter": "xtuner.model.adapters.lora",
    "xtuner.model.legacy": "xtuner.legacy.model",
    "xtuner.train.legacy": "xtuner.legacy.train",
    "xtuner.train.profile": "xtuner.train.reporting.profile",
}


def find_current(written: str) -> str:
    """The current dotted name of a module, or of a class or function in one."""
    module, _, name = written.rpartition(".")
    if written in MOVED or not module:
        return MOVED.get(written, written)
    return f"{find_current(module)}.{name}"

"""What is told of a config made for an older tool: names replaced, settings without effect, what is done otherwise."""

from collections.abc import Iterator

from xtuner.config.adapter import adapter_of
from xtuner.config.build import resolve_type, type_name
from xtuner.config.load import Config
from xtuner.config.settings import NO_WORK, NO_WORK_IN_DATALOADER, NO_WORK_IN_TRAIN_CFG
from xtuner.config.walk import specs
from xtuner.core import dist
from xtuner.core.log import logger


def tell(config: Config) -> None:
    """Log it, once, on the main process; nothing for a config of our own."""
    if dist.is_main():
        for paragraph in paragraphs(config):
            logger.info(paragraph)


def paragraphs(config: Config) -> Iterator[str]:
    for title, lines in (
        (f"{config.path.name} is made for another tool; replaced:", [str(r) for r in config.replaced]),
        ("no work to do:", list(dict.fromkeys(_without_work(config)))),
        ("done otherwise than there:", list(_otherwise(config))),
    ):
        if lines:
            yield "\n  ".join((title, *lines))


def _without_work(config: Config) -> Iterator[str]:
    for name, why in NO_WORK.items():
        if name in config.values and (name != "visualizer" or config.values[name] is None):
            yield f"{name}: because {why}"
    for parent, names in (("train_dataloader", NO_WORK_IN_DATALOADER), ("train_cfg", NO_WORK_IN_TRAIN_CFG)):
        plain = parent != "train_cfg" or "type" not in config.values[parent]  # a TrainLoop speaks for itself
        for name, why in names.items():
            if plain and name in config.values[parent]:
                yield f"{parent}.{name}: because {why}"
    for spec in specs(config):
        if facts := adapter_of(resolve_type(spec.kind, spec.key)):
            for name, why in facts.without_work(spec.arguments):
                setting = f"{spec.key}.{name}" if name else f"{spec.key} ({type_name(spec.kind)})"
                yield f"{setting}: because {why}"


def _otherwise(config: Config) -> Iterator[str]:
    old = {r.old.rpartition(".")[2] for r in config.replaced}
    counts = config.get("optim_wrapper.accumulative_counts", 1)
    if counts != 1 and "CheckpointHook" in old:
        yield (
            f"save_steps, evaluation_freq and log intervals count optimizer steps, not packs: "
            f"1 of them is {counts} packs a device here (accumulative_counts)"
        )
    dataset = config.get("train_dataloader.dataset") or {}
    if "build_packed_dataset" in old and "label_rule" not in dataset:
        yield (
            "the last token of a document is not trained to predict the next document's first "
            "(label_rule='xtuner' of build_packed_dataset gives the old labels)"
        )
    if "AmpOptimWrapper" in old:
        yield "matrices are multiplied in bf16 on GPUs and in fp32 on CPUs, never in fp16; weights are kept in fp32"

"""Report on a config for an older tool: names that were replaced, settings without effect, and how its run differs from
a run of that tool. The documentation (`docs/*/config.md`) has the same list of differences.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtuner.compat.names import written_name
from xtuner.compat.settings import SCHEMA
from xtuner.config.adapter import find_adapter
from xtuner.config.build import resolve_type, type_name
from xtuner.config.config import Config
from xtuner.config.specs import find_specs
from xtuner.core.log import logger
from xtuner.dist import collectives


def log_report(config: Config) -> None:
    """Log the report once, on rank 0. For a config of xtuner itself there is none."""
    if collectives.is_main():
        for paragraph in report_paragraphs(config):
            logger.info(paragraph)


def report_paragraphs(config: Config) -> Iterator[str]:
    legacy = any(r.new.startswith("xtuner.") for r in config.replaced)  # not for "AdamW" alone
    differences = [d.text for d in DIFFERENCES if legacy and d.concerns(config)]
    for title, lines in (
        (f"{config.path.name} uses names of other tools; replaced:", [str(r) for r in config.replaced]),
        ("settings without effect:", list(dict.fromkeys(_without_effect(config)))),
        ("differences from XTuner 0.1 and 0.2:", differences),
    ):
        if lines:
            yield "\n  ".join((title, *lines))


def _without_effect(config: Config) -> Iterator[str]:
    for s in SCHEMA.settings:
        values = config.get(s.parent) if s.parent else config.values
        plain = isinstance(values, Mapping) and "type" not in values  # a TrainLoop has an adapter, which reports it
        if s.no_effect and plain and s.name in values and not (s.key == "visualizer" and config.get("visualizer.type")):
            yield f"{s.key}: because {s.no_effect}"
    for spec in find_specs(config):
        if facts := find_adapter(resolve_type(spec.kind, spec.key)):
            for name, why in facts.find_without_effect(spec.arguments):
                what = type_name(spec.kind).rpartition(".")[2]
                setting = f"{spec.key}.{name}" if name else f"{spec.key} ({what})"
                yield f"{setting}: because {why}"
    for setting, why in config.dropped.items():
        yield f"{setting}: because {why}"


@dataclass(frozen=True)
class Difference:
    """How a run differs from a run of the old tool with the same config.

    Args:
        text: as printed, and as in the documentation.
        concerns: whether it applies to a config.
    """

    text: str
    concerns: Callable[[Config], bool]


def _accumulates(config: Config) -> bool:
    return bool(config.get("optim_wrapper.accumulative_counts", 1) != 1)


def _builds(name: str, setting: str = "", *values: Any) -> Callable[[Config], bool]:
    """Whether a config has a `dict(type=name)` without `setting`, or with one of `values` for it."""

    def concerns(config: Config) -> bool:
        found = [s.arguments for s in find_specs(config) if f".{written_name(s.kind)}".endswith(f".{name}")]
        return any(setting not in given or given[setting] in values for given in found)

    return concerns


DIFFERENCES = (
    Difference(
        "The loss of an iteration, and so its gradient, is the mean over the targets of all its packs on all ranks; "
        "in XTuner it was the mean of the packs' means, and the log showed one rank's.",
        lambda config: True,
    ),
    Difference(
        "`save_steps`, `evaluation_freq`, log intervals, and `begin`, `end`, `T_max` of schedules with "
        "`by_epoch=False` count iterations (optimizer steps); in XTuner they counted packs of a rank, of which an "
        "iteration has `accumulative_counts`: divide by it.",
        _accumulates,
    ),
    Difference(
        "The learning rate changes with every iteration; in XTuner it changed with every pack, and a step used the "
        "rate of its last one (`accumulative_counts` above 1).",
        _accumulates,
    ),
    Difference(
        "Packs that do not fill a last iteration are not trained on, which is reported; in XTuner they made a smaller "
        "step (`accumulative_counts` above 1).",
        _accumulates,
    ),
    Difference(
        "The last token of a document is not trained to predict the next document's first, and the last position of a "
        "pack learns its true next token; in XTuner the first was trained and the second not, as with "
        "`label_rule='xtuner'` of `build_packed_dataset`.",
        _builds("build_packed_dataset", "label_rule"),
    ),
    Difference(
        "Documents of a pack do not attend to each other, and positions restart in each; in XTuner only with "
        "`use_varlen_attn=True`, which was off by default.",
        _builds("legacy.model.SupervisedFinetune", "use_varlen_attn"),
    ),
    Difference(
        "Matrix products are in bf16 on GPUs and in fp32 on CPUs, never in fp16; weights that are trained are kept in "
        "fp32.",
        _builds("legacy.engine.AmpOptimWrapper"),
    ),
    Difference(
        "Without `target_modules`, `lora` adapts all matrices of the blocks; in XTuner also the output layer of "
        "InternLM2.",
        _builds("legacy.peft.LoraConfig", "target_modules", None),
    ),
    Difference(
        "With `load_in_8bit=True`, weights of 8 bits are read back before each product; in XTuner products were in 8 "
        "bits.",
        _builds("legacy.peft.BitsAndBytesConfig", "load_in_8bit", True),
    ),
    Difference(
        "Checkpoints are directories named `iter_N.pth`, N in iterations, also with `by_epoch=True` (the default of "
        "`CheckpointHook`), which in XTuner named them `epoch_N.pth`.",
        _builds("legacy.train.CheckpointHook", "by_epoch", True),
    ),
    Difference(
        "Without `data_order_path`, sub-folders are sorted; in XTuner they had the file system's order.",
        _builds("load_intern_repo_tokenized_dataset", "data_order_path", None),
    ),
    Difference(
        "`DefaultSampler` has another permutation of packs than in XTuner; `InternRepoSampler` has the same.",
        _builds("legacy.data.DefaultSampler"),
    ),
    Difference(
        "Samples are generated greedily; in XTuner tokens were drawn at random.",
        _builds("legacy.train.EvaluateChatHook"),
    ),
    Difference(
        "Tokens per second count the tokens of packs, and FLOPs the arithmetic of the model; XTuner also counted "
        "padding and recomputation.",
        _builds("legacy.train.ThroughputHook"),
    ),
)

"""What a config trains on, as far as it matters for memory and speed; without weights or a GPU."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from xtuner.config.build import build
from xtuner.config.check import find_mistakes
from xtuner.config.config import Config
from xtuner.config.findings import combine_errors
from xtuner.config.paths import find_missing
from xtuner.core import hub
from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.data.format.cache_dirs import Opening
from xtuner.data.inspect.statistics import pack_costs
from xtuner.data.loading.sampler import count_epoch_packs
from xtuner.data.packing.pack import PackedDataset
from xtuner.engine.memory import USUAL_PACK
from xtuner.families import FAMILIES, read_config
from xtuner.model.adapters.lora import read_lora
from xtuner.model.source import ModelSource
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.train import preflight
from xtuner.train.model_checks import build_model_source
from xtuner.train.plan import DATASET, longest_document, require_possible_mixture

MEDIAN = 700  # tokens of a document, if the data is not here
DRAWN = 2048  # packs whose costs are drawn then
EXAMINED = 4096  # packs of the data whose costs are read
Costs = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Workload:
    """
    Args:
        pack: its tokens.
        document: tokens of the longest document; 0 if packs have a usual length.
        costs: Σ len² of packs.
        tokens: of all epochs; None if unknown.
        balance, sharers: settings of the config; sharers is None for "auto".
        data: a description of the data, or of what is assumed.
    """

    source: ModelSource
    optim: OptimWrapper
    pack: int
    document: int
    costs: Costs
    tokens: float | None
    balance: int
    sharers: int | None
    data: str

    @property
    def is_long(self) -> bool:
        """Whether it has documents for which several ranks may share a pack."""
        return self.document > USUAL_PACK


def read_workload(config: Config, tokens: float | None = None) -> Workload:
    """Read model and data, if they are on this machine, else what is known of them.

    Args:
        tokens: to train on, instead of those of the data.

    Raises: ConfigError, DataError.
    """
    if wrong := find_mistakes(config, False):
        raise combine_errors(wrong)
    source = _read_source(config)
    optim: OptimWrapper = build(config.values["optim_wrapper"], "optim_wrapper")
    pack = int(config.get(f"{DATASET}.packed_length") or USUAL_PACK)
    absent = find_missing(config)
    if any(e.where and "model" not in e.where and "pretrained" not in e.where for e in absent):
        costs, document = assume_packs(pack)
        what = "one document a pack" if document else f"lognormal documents, median {MEDIAN} tokens"
        data = f"not on this machine; assumed: {what}"
    else:
        dataset = preflight.open_dataset(config, Opening(read_only=True))
        costs, document, pack = _read_costs(dataset), longest_document(dataset), dataset.packed_length
        if isinstance(dataset, PackedDataset):
            dataset = dataset.with_packs_per_iteration(optim.accumulative_counts)
            require_possible_mixture(config, dataset)
        tokens = tokens or float(count_epoch_packs(dataset)) * pack * config.get("train_cfg.max_epochs", 1)
        squares = f"Σ len² of {costs.mean():.3g}"
        data = f"{len(dataset):,} packs, {squares} on average"
        if not len(dataset):
            data = f"not one pack of {pack:,} tokens: `train` rejects them; assumed: {squares}"
    sharers = None if config.with_sharers else int(config.setting("sequence_parallel_size"))
    balance = config.setting("train_dataloader.balance")
    return Workload(source, for_gpus(optim), pack, document, costs, tokens, balance, sharers, data)


def for_gpus(optim: OptimWrapper) -> OptimWrapper:
    """A copy that computes in the dtype of GPUs wherever it is asked."""
    other = copy.copy(optim)
    other.dtype = "bf16" if optim.dtype == "auto" else optim.dtype
    return other


def assume_packs(pack: int) -> tuple[Costs, int]:
    """(Σ len² of packs, longest document): of lognormal documents, or for long packs of one document each."""
    if pack > USUAL_PACK:
        return np.full(1, float(pack) ** 2), pack
    drawn = np.random.RandomState(0).lognormal(np.log(MEDIAN), 1.0, size=DRAWN * pack // MEDIAN + 1)
    ends = np.cumsum(np.clip(drawn, 2, pack).astype(np.int64))
    return pack_costs(ends[: int(np.searchsorted(ends, DRAWN * pack)) + 1], pack).astype(np.float64), 0


def _read_costs(dataset: PackedDataset) -> Costs:
    """Of at most EXAMINED packs, from the first files on."""
    if not isinstance(dataset, PackedDataset) or not len(dataset):
        return assume_packs(dataset.packed_length)[0]
    return dataset.costs(np.arange(min(len(dataset), EXAMINED))).astype(float)


def _read_source(config: Config) -> ModelSource:
    """The model of the config; of one that is not on this machine, the network that its family lists."""
    model = dict(config.values["model"])
    name = str(model.get("pretrained_model_name_or_path", ""))
    released = {m.hub_id: (family, m) for family in FAMILIES.values() for m in family.released}
    if not name or ((name not in released or hub.may_be_local(name)) and hub.is_local(name)):
        return build_model_source(config)
    if name not in released:
        raise ConfigError(
            f"{name} is not on this machine, and its shapes are not known.{did_you_mean(name, list(released))}",
            where=config.where("model.pretrained_model_name_or_path"),
            why="memory and speed follow from them",
            do="give a folder with the model, or a hub id of `xtuner list-models`",
        )
    family, found = released[name]
    network = read_config({"model_type": family.name, **family.defaults, **found.network}, f"{name}: ")
    source = ModelSource(network, None, recompute=bool(model.get("activation_checkpointing")))
    adapter = read_lora(model["adapter"], network) if model.get("adapter") else None
    kept = {name: model[name] for name in ("products", "frozen_weights") if name in model}
    return replace(source, adapter=adapter, **kept)


def parse_tokens(text: str) -> float:
    """`100B`, `1.5T`, `20000000`. Raises: ConfigError."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1:].upper(), 1.0)
    try:
        found = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        found = 0.0
    if not 0 < found < 1e18:
        raise ConfigError(f"--tokens {text} is not a number of tokens", where="--tokens", do="as 100B or 1.5T")
    return found

"""`iter_N.pth/adapter/` of a run with LoRA: what it has trained, and which base model that belongs to.

adapter.json         settings of the adapter; name and identity of the base model
config.json          the network
model.safetensors    trained parameters in fp32: factors, magnitudes, and parts of the network that are trained
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from xtuner.core import hub
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import read_json
from xtuner.core.log import logger
from xtuner.families import read_config, read_model
from xtuner.families.network import DecoderConfig
from xtuner.model.adapters.base_identity import BaseModel, identify_base, read_base, require_same_base
from xtuner.model.adapters.lora import MATRICES, LoRA, Target, build_lora, lora
from xtuner.model.ops.low_rank import Rows, join_columns, row_norms
from xtuner.model.ops.quantized import FORMATS, round_trip
from xtuner.model.weights import Shape, WeightFolder, WeightSource, hf_shapes, join_from_family

ADAPTER, RECORD = "adapter", "adapter.json"
VERSION = 1


def has_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint has an adapter in place of all weights."""
    return (checkpoint / ADAPTER / RECORD).is_file()


def write_record(adapter: LoRA, base: BaseModel, frozen_weights: str) -> dict[str, Any]:
    """Contents of adapter.json."""
    return {"version": VERSION, "adapter": adapter.to_json(), "base": base.to_json(), "frozen_weights": frozen_weights}


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk; its tensors, by our names, are read on access.

    Args:
        base: without an identity if that is not recorded, as in a folder of PEFT.
    """

    path: Path
    config: DecoderConfig
    adapter: LoRA
    base: BaseModel
    frozen_weights: str
    tensors: WeightSource

    def term(self, matrix: str) -> "FullTerm | None":
        """The term on `model.layers.N.attention.wqkv`, or None."""
        kind = ".".join(matrix.split(".")[3:])
        parts = [target for target in self.adapter.targets if target.matrix == kind]
        return FullTerm.read(self, matrix, parts) if parts else None

    def describe_frozen(self) -> str:
        """How merging treats the base's weights, for messages; "" for unchanged ones."""
        if self.frozen_weights == "own":
            return ""
        return f", whose matrices are those read back from {self.frozen_weights}, as the adapter was trained with"

    def list_differences(self, adapter: LoRA, frozen_weights: str) -> list[str]:
        """How the model of a run that starts from these terms differs from the one that they were trained in."""
        pairs = {"scale": (self.adapter.scale, adapter.scale), "frozen_weights": (self.frozen_weights, frozen_weights)}
        return [f"{what} {old} → {new}" for what, (old, new) in pairs.items() if old != new]

    def find_base(self, given: Path | None = None) -> Path:
        """The folder of the base model: `given`, or else the recorded one.

        Raises: ConfigError if it is not there, or is another model.
        """
        if given is None:
            try:
                given = hub.resolve(self.base.name)
            except ConfigError:
                raise ConfigError(
                    f"the base model of the adapter is not there: {self.base.name}",
                    where=str(self.path / RECORD),
                    why="the checkpoint contains only what was trained",
                    do="put it back there; or export with a CONFIG whose model.pretrained_model_name_or_path is where "
                    "it is now; in `eval loss` and `chat`, give the model as MODEL, the checkpoint with --adapter",
                ) from None
        layout, config = read_model(given)
        if self.base.identity:
            here = BaseModel(str(given), identify_base(given, layout, config))
            require_same_base(self.base, here, "the adapter", str(self.path))
        elif self.base.name and Path(self.base.name).name != given.resolve().name:
            logger.warning(
                f"{self.path} names {self.base.name} as the model that it was trained on, not {given}; nothing in it "
                "shows whether both have the same weights"
            )
        return given


def open_adapter(checkpoint: Path) -> AdapterFolder:
    """The adapter of a checkpoint. Raises: CheckpointError, ConfigError."""
    path = checkpoint / ADAPTER
    where = str(path / RECORD)
    record = read_json(path / RECORD)
    config = read_config(read_json(path / "config.json"), f"{path / 'config.json'}: ")
    if (
        not isinstance(record, Mapping)
        or record.get("version") != VERSION
        or not isinstance(record.get("adapter"), dict)
    ):
        raise CheckpointError(f"{RECORD} does not have the format of this version", where=where)
    given = {k: v for k, v in record["adapter"].items() if k != "type"}
    try:
        adapter = build_lora(lora(**given), config)
    except (TypeError, ConfigError) as e:
        raise CheckpointError(f"{RECORD} does not have the format of this version: {e}", where=where) from None
    base, frozen = read_base(record.get("base"), where), str(record.get("frozen_weights"))
    if frozen not in ("own", *FORMATS):
        raise CheckpointError(f"{RECORD} has frozen_weights = {frozen!r}, which is not known", where=where)
    return AdapterFolder(path, config, adapter, base, frozen, WeightFolder(path))


@dataclass(frozen=True)
class FullTerm:
    """The term of one matrix, over all of its rows: scale · B A, and the magnitudes of rows, if any.

    Args:
        a: [R, K]; b: [N, R], zero where a part does not reach.
        owner: int64 [N], the part of each row; −1 for none.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    owner: torch.Tensor
    magnitudes: torch.Tensor | None = None

    @classmethod
    def read(cls, folder: AdapterFolder, matrix: str, parts: list[Target]) -> "FullTerm":
        rows = torch.Size(hf_shapes(folder.config)[f"{matrix}.weight"])[0]
        pairs = [[folder.tensors[f"{matrix}.adapter.{t.part}.{key}"] for key in ("A", "B")] for t in parts]
        owner = torch.full((rows,), -1)
        magnitudes = torch.full((rows,), torch.nan) if folder.adapter.dora else None
        for i, target in enumerate(parts):
            target.rows.of(owner).fill_(i)
            if magnitudes is not None:
                into = target.rows.of(magnitudes)
                into.copy_(folder.tensors[f"{matrix}.adapter.{target.part}.magnitude"].view(into.shape))
        b = join_columns([t.rows for t in parts], [b for _, b in pairs], rows)
        return cls(torch.cat([a for a, _ in pairs]), b, folder.adapter.scale, owner, magnitudes)

    def merge(self, w_NK: torch.Tensor) -> torch.Tensor:
        """The weight with the term added, in fp32."""
        merged = torch.addmm(w_NK.float(), self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitudes is None:
            return merged
        norms = row_norms(w_NK, self.a, self.b, self.scale)
        return merged * torch.where(self.owner < 0, 1.0, self.magnitudes / norms)[:, None]

    def take_rows(self, rows: Rows) -> "FullTerm":
        """The term on some rows, without the columns of parts that do not reach them."""
        owner = rows.of(self.owner).flatten()
        each = len(self.a) // (int(self.owner.max()) + 1)
        kept = torch.cat(
            [torch.arange(i * each, (i + 1) * each) for i in sorted({*owner.tolist()} - {-1})] or [owner[:0]]
        )
        b = rows.of(self.b).flatten(0, 1)[:, kept]
        magnitudes = None if self.magnitudes is None else rows.of(self.magnitudes).flatten()
        return FullTerm(self.a[kept], b, self.scale, owner, magnitudes)


class MergedWeights(WeightSource):
    """The weights of a base model with an adapter merged into them, in fp32, by the decoder's names.

    Matrices that were kept in 4 or 8 bits are those that the adapter was trained with: quantized and read back.
    """

    def __init__(self, folder: AdapterFolder, base: Path) -> None:
        self.path, self._folder = folder.path, folder
        self._layout, self._config = read_model(base)
        self._base = WeightFolder(base)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        return hf_shapes(self._config)

    def __getitem__(self, name: str) -> torch.Tensor:
        folder = self._folder
        if name in folder.tensors:
            return folder.tensors[name]
        weight = join_from_family(self._base, name, self._layout, self._config)
        matrix = name.removesuffix(".weight")
        if matrix == name or ".".join(matrix.split(".")[3:]) not in MATRICES:
            return weight
        weight, term = round_trip(weight, folder.frozen_weights), folder.term(matrix)
        return weight if term is None else term.merge(weight)

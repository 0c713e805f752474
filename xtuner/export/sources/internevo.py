"""InternEvo's native checkpoints of InternLM2, split by tensor (T) and pipeline (P) parallelism.

    model_config.pt            a dict: number of heads, layers, …
    model_tpT_ppP.pt           weights of rank (T, P); layers are counted from 0 in every pipeline stage

InternEvo splits `wqkv` (between groups of heads), `w1`, `w3` and `output` by rows, `wo` and `w2` by columns, and the
embedding by rows, or by columns with `embed_split_hidden`; every rank has all norms. Without `adapt_hf` (its default),
elements of q and k that are rotated together are adjacent; here and in Hugging Face they are half a head apart. The
optimizer's files are not read: the weights are those that computed, usually in bf16.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import CheckpointError
from xtuner.core.foreign_inputs import short_repr
from xtuner.core.pickles import Opaque, load_tensors
from xtuner.model.weights import Shape, WeightSource, require_tensors

CONFIG = "model_config.pt"
_MOST = 2**31  # upper limit of all counts
_PART = re.compile(r"model_tp(\d+)_pp(\d+)\.pt")
_OTHERS = {  # other kinds of parallelism, by the names of their files
    re.compile(r"model_wp\d+_pp\d+\.pt"): "weight parallelism (isp)",
    re.compile(r"model_tp\d+_pp\d+_dp\d+\.pt"): "FSDP",
    re.compile(r"model_moe_layer.*\.pt"): "experts",
}
_CUT = {"attention.wqkv": 0, "attention.wo": 1, "feed_forward.w1": 0, "feed_forward.w3": 0, "feed_forward.w2": 1}
_CUT |= {"tok_embeddings": 0, "output": 0}  # name → split dimension; all ranks have the other tensors in full
_COPY = "copy all model_tp*_pp*.pt files and model_config.pt of one checkpoint here"


class InternEvoFolder(WeightSource):
    """Full weights by InternLM2's names. All files stay on disk.

    `network` has the fields of `DecoderConfig` that the checkpoint records in addition to shapes.
    Raises: CheckpointError for missing files, other kinds of parallelism, and inconsistent parts.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._read_config(folder / CONFIG)
        parts = self._files()
        self.tp, self.pp = (1 + max(at[i] for at in parts) for i in (0, 1))
        missing = next(((t, p) for t in range(self.tp) for p in range(self.pp) if (t, p) not in parts), None)
        if missing:
            name = "model_tp{}_pp{}.pt".format(*missing)
            raise CheckpointError(f"{name} is missing", where=str(folder), why="it has a part of the weights", do=_COPY)
        self._pieces: dict[str, list[torch.Tensor]] = {}  # one for each tensor-parallel rank, or a single full one
        first_layer = 0
        for p in range(self.pp):
            first_layer += self._add_stage([parts[t, p] for t in range(self.tp)], first_layer)
        self._shapes = {name: self._whole(name) for name in self._pieces}
        if first_layer != self._layers:
            raise self._contradiction(f"{self._layers} layers", f"{first_layer}")
        self._check_rows()

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        pieces, dim = self._pieces[name], self._dim(name)
        whole = pieces[0] if dim is None or len(pieces) == 1 else torch.cat(pieces, dim)
        return whole if self._halves or ".wqkv." not in name else self._to_halves(whole)

    def _read_config(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(f"{CONFIG} is missing", where=str(path), why="it has the number of heads", do=_COPY)
        config = load_tensors(path, opaque=True)
        if isinstance(config, Opaque):  # InternEvo's own class of dict
            pairs = zip(config.items[::2], config.items[1::2], strict=False)
            config = {key: value for key, value in pairs if isinstance(key, str)}
        if not isinstance(config, dict):
            raise CheckpointError(f"{CONFIG} is not a dict", where=str(path), do="give InternEvo's own file")

        def number(key: str, default: Any = None) -> int:
            value = config.get(key, default)
            if type(value) is not int or not 1 <= value < _MOST:
                what = f"{key} = {short_repr(value)} is not a size"
                raise CheckpointError(what, where=str(path), do="give InternEvo's own file")
            return value

        for key, plain in (("no_bias", True), ("norm_head", False), ("num_chunks", 1)):
            value = config.get(key, plain)
            if type(value) not in (bool, int) or value != plain:
                raise CheckpointError(
                    f"{key} = {short_repr(value)} is not supported",
                    where=str(path),
                    why="InternLM2 has no such option, or the order of its parts is unknown here",
                )
        self._layers, self._hidden, self._vocabulary = map(number, ("num_layers", "hidden_size", "vocab_size"))
        heads = number("num_attention_heads")
        network: dict[str, Any] = {"num_heads": heads, "num_kv_heads": number("num_kv_attention_heads", heads)}
        network |= {"rms_norm_eps": config.get("layer_norm_epsilon"), "rope_theta": config.get("rope_base")}
        self.network = {key: value for key, value in network.items() if value is not None}
        self._halves = config.get("adapt_hf", False) is True
        self._by_columns = config.get("embed_split_hidden", False) is True

    def _files(self) -> dict[tuple[int, int], Path]:
        """(tensor, pipeline) rank → file."""
        names = sorted(p.name for p in self.path.iterdir())
        for pattern, way in _OTHERS.items():
            found = next((name for name in names if pattern.fullmatch(name)), None)
            if found:
                raise CheckpointError(
                    f"{found} is of a model split by {way}",
                    where=str(self.path / found),
                    why="only tensor and pipeline parallelism (model_tp*_pp*.pt) are supported",
                    do="convert it to a Hugging Face folder with InternEvo's tools",
                )
        parts = {(int(m[1]), int(m[2])): self.path / name for name in names if (m := _PART.fullmatch(name))}
        if not parts:
            raise CheckpointError("there is no model_tp*_pp*.pt", where=str(self.path), do=_COPY)
        return parts

    def _add_stage(self, files: list[Path], first_layer: int) -> int:
        """Add the tensors of a pipeline stage; returns its number of layers."""
        states = [require_tensors(load_tensors(file, opaque=True), file) for file in files]
        layers = 0
        for key in states[0]:
            if key.endswith(".inv_freq"):
                continue
            absent = next((file for file, state in zip(files, states, strict=True) if key not in state), None)
            if absent:
                raise CheckpointError(f"{absent.name} lacks {key}, {files[0].name} has it", where=str(absent), do=_COPY)
            name = key.removeprefix("model.").replace("word_embeddings.", "")
            if match := re.fullmatch(r"layers\.(\d{1,4})\.(.+)", name):
                layers = max(layers, 1 + int(match[1]))
                name = f"layers.{first_layer + int(match[1])}.{match[2]}"
            name = name if name.startswith("output.") else f"model.{name}"
            pieces = [state[key].detach() for state in states]
            self._pieces[name] = pieces if self._dim(name) is not None else pieces[:1]
        return layers

    def _dim(self, name: str) -> int | None:
        """The dimension along which a tensor is split; None if every rank has it in full."""
        middle = re.sub(r"^(model\.)?(layers\.\d+\.)?|\.weight$", "", name)
        return 1 if middle == "tok_embeddings" and self._by_columns else _CUT.get(middle)

    def _whole(self, name: str) -> Shape:
        shapes = [tuple(piece.shape) for piece in self._pieces[name]]
        dim = self._dim(name)
        if dim is None:
            return shapes[0]
        rest = {(*shape[:dim], *shape[dim + 1 :]) for shape in shapes}
        if len(rest) > 1 or len(shapes[0]) != 2:
            raise self._contradiction(f"parts of {name} that fit together", ", ".join(str(list(s)) for s in shapes))
        total = sum(shape[dim] for shape in shapes)
        return (*shapes[0][:dim], total, *shapes[0][dim + 1 :])

    def _check_rows(self) -> None:
        """Check that no last rank is missing, which the names of files do not show, but the sizes of tensors do."""
        heads, kv_heads = self.network["num_heads"], self.network["num_kv_heads"]
        wanted = {name: (self._vocabulary, self._hidden) for name in ("model.tok_embeddings.weight", "output.weight")}
        rows = (heads + 2 * kv_heads) * self._hidden // heads
        wanted |= {name: (rows, self._hidden) for name in self._shapes if name.endswith(".wqkv.weight")}
        for name, shape in wanted.items():
            if name not in self._shapes or self._shapes[name] != shape:
                raise self._contradiction(f"{list(shape)} for {name}", f"{list(self._shapes.get(name, ()))}")

    def _to_halves(self, wqkv: torch.Tensor) -> torch.Tensor:
        """q and k from pairs (0, 1), (2, 3), … to the order 0, 2, … 1, 3, … in every head. wqkv: (rows, H)."""
        kv_heads = self.network["num_kv_heads"]
        in_group = self.network["num_heads"] // kv_heads + 2
        rows = torch.arange(wqkv.shape[0]).view(kv_heads, in_group, -1)
        rows[:, :-1] = torch.cat((rows[:, :-1, 0::2], rows[:, :-1, 1::2]), dim=-1)
        return wqkv[rows.flatten()]

    def _contradiction(self, wanted: str, have: str) -> CheckpointError:
        return CheckpointError(
            f"{CONFIG} describes {wanted}, the model_tp*_pp*.pt files have {have}",
            where=str(self.path),
            why="the last parts are missing, or the files are of different checkpoints",
            do=_COPY,
        )

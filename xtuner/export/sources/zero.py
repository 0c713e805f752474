"""DeepSpeed's checkpoints of ZeRO 1, 2 and 3, as XTuner and mmengine write them: the fp32 masters of all ranks.

    mp_rank_00_model_states.pt                            ZeRO 1, 2: bf16 weights, shapes, names
    zero_pp_rank_R_mp_rank_00_model_states.pt             ZeRO 3: the same for rank R, with empty weights
    bf16_zero_pp_rank_R_mp_rank_00_optim_states.pt        fp32 masters and moments of rank R (fp16: without `bf16_`)

`param_shapes` has names and shapes, one dict for each parameter group. The layout of masters (as written by
deepspeed/runtime/zero/stage_1_and_2.py and stage3.py):

    ZeRO 1, 2   a group is one line of elements, parameter after parameter, split into one part for each rank:
                | rank 0: a a a a b b | rank 1: b b c c c c |             `single_partition_of_fp32_groups`
                `param_alignment_paddings` (newer releases) has the number of unused elements after each parameter.
    ZeRO 3      every parameter is split into equal parts, the last one padded; a rank's line has its part of each:
                | rank 0: a a b b c c | rank 1: a a b - c c |             `fp32_flat_groups`, concatenated
"""

import contextlib
import math
import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from xtuner.core.errors import CheckpointError
from xtuner.core.foreign_inputs import short_repr
from xtuner.core.log import progress
from xtuner.core.pickles import Opaque, load_tensors
from xtuner.model.weights import Shape, WeightSource, require_tensors

_MODEL = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIM = re.compile(r"(?:[a-z0-9]+_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MOST = 2**63  # elements
_MOST_DIMENSIONS = 64
_OWN = "give DeepSpeed's own files"
_COPY = "copy the missing ones here: every node writes the files of its ranks, possibly to its own disk"


class _Line:
    """1-D tensors laid end to end."""

    def __init__(self, parts: list[torch.Tensor]) -> None:
        self.parts = parts
        self.ends = list(accumulate(part.numel() for part in parts))
        self.length = self.ends[-1] if self.ends else 0

    def take(self, begin: int, count: int) -> list[torch.Tensor]:
        """Views of the elements [begin, begin + count)."""
        found = []
        for part, end in zip(self.parts, self.ends, strict=True):
            start = end - part.numel()
            low, high = max(begin, start), min(begin + count, end)
            if low < high:
                found.append(part[low - start : high - start])
        return found


class ZeroFolder(WeightSource):
    """Weights by name: fp32 masters; frozen parameters and buffers in their own dtype. All files stay on disk.

    Raises: CheckpointError if a rank's file is missing, or files are inconsistent.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._shapes: dict[str, Shape] = {}
        optim = self._by_rank(_OPTIM)
        if not optim:
            raise self._all_missing("optim", "the fp32 weights")
        _allow_open_files(2 * len(optim))
        first = self._optimizer(optim[min(optim)])
        self.ranks = _ranks(first.get("partition_count"), optim[min(optim)])
        self._complete(optim, "optim")
        states = [self._optimizer(optim[rank]) for rank in progress(sorted(optim), "opening files")]
        if len({(_step(s), _counts(s.get("partition_count"))) for s in states}) > 1:
            raise CheckpointError(
                "the *_optim_states.pt files are of different steps or runs",
                where=str(folder),
                why="weights of different steps would be mixed",
                do="copy all files of one checkpoint again",
            )
        self.stage = _number(first.get("zero_stage"), 3 if "fp32_flat_groups" in first else 2)
        self._pieces: dict[str, list[tuple[_Line, int, int]]] = {}  # (line, begin, count) that make up a tensor
        model = self._model_states()
        groups: list[dict[str, Shape]] = []
        for group in _list(model.get("param_shapes"), self._model_file):
            groups.append(_shapes(group, self._model_file))
            if any(name in self._shapes for name in groups[-1]):
                raise self._contradiction("a parameter in two groups", "one of each")
            self._shapes |= groups[-1]
        if self.stage == 3:
            self._cut_each(groups, [self._flat(s, "fp32_flat_groups", optim[r]) for r, s in enumerate(states)])
        else:
            parts = [self._flat(s, "single_partition_of_fp32_groups", optim[r]) for r, s in enumerate(states)]
            self._cut_line(groups, parts, first.get("param_alignment_paddings"))
        self._rest(model)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        views = [view for line, begin, count in self._pieces[name] for view in line.take(begin, count)]
        whole = views[0] if len(views) == 1 else torch.cat(views) if views else torch.empty(0)
        return whole[: math.prod(shape)].view(shape)

    def _by_rank(self, pattern: re.Pattern[str]) -> dict[int, Path]:
        """Data-parallel rank → file."""
        found: dict[int, Path] = {}
        for path in sorted(self.path.iterdir()):
            match = pattern.fullmatch(path.name)
            if match and int(match[2]) > 0:
                raise CheckpointError(
                    f"{path.name} is of a model split by tensor parallelism",
                    where=str(path),
                    why="the files do not record how it was split",
                    do="merge it with the tool that trained it",
                )
            if match and found.setdefault(int(match[1] or 0), path) != path:
                raise CheckpointError(
                    f"{path.name} and {found[int(match[1] or 0)].name} are of the same rank",
                    where=str(self.path),
                    do="keep the files of one run in the folder",
                )
        return found

    def _all_missing(self, kind: str, what: str) -> CheckpointError:
        what, why = f"the *_{kind}_states.pt files are missing", f"they have {what}"
        return CheckpointError(what, where=str(self.path), why=why, do=_COPY)

    def _complete(self, files: dict[int, Path], kind: str) -> None:
        """Raise CheckpointError unless there is one file for each rank."""
        name = files[min(files)].name
        missing = next((r for r in range(self.ranks) if r not in files), None)
        if missing is not None:
            first = re.sub(r"pp_rank_\d+", f"pp_rank_{missing}", name)
            absent = self.ranks - sum(r < self.ranks for r in files)
            raise CheckpointError(
                f"{absent} of {self.ranks} *_{kind}_states.pt files are missing; the first is {first}",
                where=str(self.path),
                why="every rank has a part of all weights",
                do=_COPY,
            )
        if max(files) >= self.ranks:
            raise CheckpointError(
                f"{files[max(files)].name} is of a run with more ranks than the {self.ranks} that {name} counts",
                where=str(self.path),
                why="files of two runs are mixed here",
                do="keep the files of one run in the folder",
            )

    @staticmethod
    def _optimizer(path: Path) -> dict[str, Any]:
        content = load_tensors(path, opaque=True)
        state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        return _dict(state, path, "optimizer_state_dict")

    def _model_states(self) -> dict[str, Any]:
        files = self._by_rank(_MODEL)
        if not files:
            raise self._all_missing("model", "names and shapes of the weights")
        self._models = files
        self._model_file = files[min(files)]
        return _dict(load_tensors(self._model_file, opaque=True), self._model_file, "a model")

    @staticmethod
    def _flat(state: dict[str, Any], key: str, path: Path) -> list[torch.Tensor]:
        groups = _list(state.get(key), path)
        if not all(isinstance(t, torch.Tensor) and t.dim() == 1 and t.is_floating_point() for t in groups):
            raise CheckpointError(f"{path.name}: {key!r} is not a list of flat tensors", where=str(path), do=_OWN)
        return [t.detach() for t in groups]

    def _cut_line(self, groups: list[dict[str, Shape]], parts: list[list[torch.Tensor]], paddings: Any) -> None:
        """ZeRO 1 and 2. parts: [rank][group]."""
        if any(len(part) != len(groups) for part in parts):
            raise self._contradiction(f"{len(groups)} groups of parameters", "another number of their masters")
        for g, group in enumerate(groups):
            line = _Line([part[g] for part in parts])
            after = paddings[g] if isinstance(paddings, list) and len(paddings) == len(groups) else None
            after = after if isinstance(after, list) and len(after) == len(group) else [0] * len(group)
            at = 0
            for (name, shape), padding in zip(group.items(), after, strict=True):
                self._add(name, shape, [(line, at, math.prod(shape))])
                at += math.prod(shape) + _number(padding, 0)
            # some releases save the padding of a line to a multiple of 2 × ranks, others do not
            least = at - (_number(after[-1], 0) if after else 0)
            if not least <= line.length < at + 2 * len(parts):
                raise self._contradiction(f"{least:,} numbers in group {g}", f"{line.length:,}")

    def _cut_each(self, groups: list[dict[str, Shape]], parts: list[list[torch.Tensor]]) -> None:
        """ZeRO 3. parts: [rank][sub-group]."""
        lines = [_Line(part) for part in parts]
        at = 0
        for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
            count = -(-math.prod(shape) // len(lines))
            self._add(name, shape, [(line, at, count) for line in lines])
            at += count
        for rank, line in enumerate(lines):
            if line.length != at:
                raise self._contradiction(f"{at:,} numbers a rank", f"{line.length:,} of rank {rank}")

    def _rest(self, model: dict[str, Any]) -> None:
        """Frozen parameters, second names of shared ones, buffers."""
        path = self._model_file
        frozen = _shapes(_or(model.get("frozen_param_shapes"), {}), path)
        if frozen:
            files = [path]
            if self.stage == 3:
                self._complete(self._models, "model")
                files = [self._models[r] for r in range(self.ranks)]
            states = [_dict(load_tensors(f, opaque=True), f, "a model") for f in files]
            of_ranks = [require_tensors(s.get("frozen_param_fragments"), f) for s, f in zip(states, files, strict=True)]
            for name, shape in frozen.items():
                if not all(name in fragments for fragments in of_ranks):
                    raise CheckpointError(
                        f"the frozen parameter {name} was not saved",
                        where=str(path),
                        why="the model would lack it",
                    )
                lines = [_Line([fragments[name].detach().reshape(-1)]) for fragments in of_ranks]
                if not math.prod(shape) <= sum(line.length for line in lines) < math.prod(shape) + len(lines):
                    raise self._contradiction(f"{list(shape)} for {name}", f"{sum(n.length for n in lines):,} numbers")
                self._add(name, shape, [(line, 0, line.length) for line in lines])
        for name, other in _dict(_or(model.get("shared_params"), {}), path, "shared_params").items():
            if isinstance(other, str) and other in self._shapes:
                self._add(name, self._shapes[other], self._pieces[other])
        # Outside of lines: buffers, and parameters that were frozen under ZeRO 1. Under ZeRO 3 only buffers are full.
        module = _dict(model.get("module"), path, "a module")
        whole = _list(_or(model.get("buffer_names"), []), path) if self.stage == 3 else list(module)
        for name in whole:
            tensor = module.get(name) if isinstance(name, str) and name not in self._shapes else None
            if isinstance(tensor, torch.Tensor):
                self._add(name, tuple(tensor.shape), [(_Line([tensor.detach().reshape(-1)]), 0, tensor.numel())])

    def _add(self, name: str, shape: Shape, pieces: list[tuple[_Line, int, int]]) -> None:
        self._shapes[name], self._pieces[name] = shape, pieces

    def _contradiction(self, wanted: str, have: str) -> CheckpointError:
        return CheckpointError(
            f"{self._model_file.name} describes {wanted}, the *_optim_states.pt files have {have}",
            where=str(self.path),
            why="weights would be read from wrong offsets",
            do="copy all files of one checkpoint again: these are of different ones, or modified",
        )


def _ranks(count: Any, path: Path) -> int:
    """The number of ranks, from `partition_count`: a number, or one for each group."""
    ranks = max(map(_number, count, [0] * len(count)), default=0) if isinstance(count, list) else _number(count, 0)
    if not 0 < ranks < 10**6:
        raise CheckpointError(f"{path.name} does not record the number of ranks", where=str(path), do=_OWN)
    return ranks


def _dict(value: Any, path: Path, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} does not contain {what}", where=str(path), do=_OWN)
    return value


def _list(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise CheckpointError(f"{path.name} lacks a list that ZeRO's files have", where=str(path), do=_OWN)
    return value


def _shapes(value: Any, path: Path) -> dict[str, Shape]:
    for name, shape in _dict(value, path, "param_shapes").items():
        right = isinstance(name, str) and isinstance(shape, tuple) and len(shape) <= _MOST_DIMENSIONS
        if not right or any(type(n) is not int or not 0 <= n < _MOST for n in shape) or math.prod(shape) >= _MOST:
            raise CheckpointError(f"{path.name} gives no shape for {short_repr(name)}", where=str(path), do=_OWN)
    return {name: tuple(shape) for name, shape in value.items()}


def _or(value: Any, default: Any) -> Any:
    """`default` for None and for an empty list or dict. (`value or default` fails for tensors.)"""
    return default if value is None or (isinstance(value, list | dict) and not value) else value


def _number(value: Any, default: int) -> int:
    """A count, also from a `ZeroStageEnum`, which is a placeholder here; else `default`."""
    if isinstance(value, Opaque) and value.args:
        value = value.args[0]
    return value if type(value) is int and 0 <= value < _MOST else default


def _counts(count: Any) -> tuple[int, ...]:
    """`partition_count` in a comparable form."""
    return tuple(_number(c, -1) for c in count) if isinstance(count, list) else (_number(count, -1),)


def _step(state: dict[str, Any]) -> float | None:
    """Number of steps of the optimizer, if recorded."""
    inner = _or(state.get("base_optimizer_state"), state.get("optimizer_state_dict"))
    slots = inner.get("state") if isinstance(inner, dict) else None
    for slot in slots.values() if isinstance(slots, dict) else ():
        step = slot.get("step") if isinstance(slot, dict) else None
        if isinstance(step, torch.Tensor) and step.numel() == 1 and not step.is_complex():
            return float(step)
        if isinstance(step, int):
            return float(_number(step, -1))
    return None


def _allow_open_files(count: int) -> None:
    """Raise the process's soft limit: a mapped file needs a descriptor, and there are as many files as ranks."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count + 256
        if soft != resource.RLIM_INFINITY and soft < wanted:
            limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))

"""Optimizer state in any slicing, read in any other: what is read is what was written, and no more than is needed."""

import json
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from xtuner.core.errors import CheckpointError
from xtuner.engine.state.slices import SavedStates, blocks, cut

CPU = torch.device("cpu")
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


@given(st.data(), SHAPES)
def test_blocks_are_the_range(data: st.DataObject, shape: list[int]) -> None:
    full = torch.arange(prod(shape)).view(shape)
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, full.numel())] * 2)))
    found = [
        full[tuple(slice(o, o + n) for o, n in zip(*b, strict=True))].reshape(-1) for b in blocks(begin, end, shape)
    ]
    assert len(found) <= 2 * len(shape) - 1
    assert torch.cat([*found, torch.empty(0)]).tolist() == list(range(begin, end))


def write(folder: Path, tensors: list[dict[str, Any]], metadata: list[dict[str, Any]]) -> SavedStates:
    (folder / "optimizer").mkdir(exist_ok=True)
    for old in folder.glob("optimizer/*"):
        old.unlink()
    for rank, (these, facts) in enumerate(zip(tensors, metadata, strict=True)):
        texts = {k: json.dumps(v) for k, v in facts.items()}
        save_file(these, folder / "optimizer" / f"rank_{rank:05d}.safetensors", metadata=texts)
    return SavedStates(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@settings(max_examples=60, deadline=None)
@given(st.data(), SHAPES, st.sampled_from(["slices", "begins", "columns"]))
def test_any_slicing_is_read_in_any_other(folder: Path, data: st.DataObject, shape: list[int], how: str) -> None:
    """Written as ranges of this version or of earlier ones, or divided along the last dimension."""
    full = torch.randn(shape)
    along = shape[-1] if how == "columns" else full.numel()
    inner = data.draw(st.lists(st.integers(1, along), max_size=3, unique=True))
    files: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    for begin, end in pairwise(sorted({0, *inner, along})):
        if how == "columns":
            files.append({"m/w": full[..., begin:end].contiguous()})
            facts.append({"slices": {"m/w": [[0] * (len(shape) - 1) + [begin], shape]}})
        elif how == "begins":
            files.append({"m/w": full.view(-1)[begin:end].clone()})
            facts.append({"begins": {"m/w": begin}})
        else:
            pieces = cut("m/w", full.view(-1)[begin:end], begin, shape)
            files.append({key: values.clone() for key, (values, _) in pieces.items()})
            facts.append({"slices": {key: about for key, (_, about) in pieces.items()}})
    saved = write(folder, files, facts)
    assert saved.keys == {"w": ["m"]}
    begin, end = sorted(data.draw(st.tuples(*[st.integers(0, full.numel())] * 2)))
    if begin < end:
        assert saved.read_range("m/w", begin, end, shape, CPU).equal(full.view(-1)[begin:end])
    ends = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    sizes = tuple(max(b - a, 1) for a, b in ends)
    offset = tuple(min(a, n - 1) for (a, _), n in zip(ends, shape, strict=True))
    inside = tuple(slice(o, o + n) for o, n in zip(offset, sizes, strict=True))
    assert saved.read("m/w", offset, sizes, shape, CPU).equal(full[inside])
    if len(files) > 1:
        less = write(folder, files[1:], facts[1:])
        with pytest.raises(CheckpointError, match="elements of the optimizer state m/w are missing"):
            less.read_range("m/w", 0, full.numel(), shape, CPU)


@pytest.mark.parametrize(
    "facts",
    [[[0], [3]], [[0, -1], [2, 2]], [[0, 0.5], [2, 2]], [[1, 0], [2, 2]], [[0, 0]], 7, None, [["a", 0], [2, 2]]],
)
def test_slices_that_cannot_be(folder: Path, facts: Any) -> None:
    with pytest.raises(CheckpointError, match="not an optimizer state of ours"):
        write(folder, [{"m/w": torch.zeros(2, 2)}], [{"slices": {"m/w": facts}}])


def test_slices_of_another_shape(folder: Path) -> None:
    saved = write(folder, [{"m/w": torch.zeros(2, 2)}], [{"slices": {"m/w": [[0, 0], [2, 2]]}}])
    with pytest.raises(CheckpointError, match="4 elements of the optimizer state m/w are missing"):
        saved.read_range("m/w", 0, 4, (4,), CPU)


def test_what_is_not_divided(folder: Path) -> None:
    own = {"step/w": torch.tensor(3.0), "factor/w": torch.randn(1, 7)}
    saved = write(folder, [own], [{"slices": {}}])
    assert saved.read_range("step/w", 0, 4, (4,), CPU).item() == 3
    assert saved.read_range("factor/w", 0, 4, (4,), CPU).equal(own["factor/w"])
    save_file(own, folder / "optimizer" / "rank_00000.safetensors")
    with pytest.raises(CheckpointError, match="not an optimizer state of ours"):
        SavedStates(folder)

"""Angles of rotary positions up to a million tokens, against fp64."""

import numpy as np
import pytest
import torch

from xtuner.families.network import RopeScaling
from xtuner.model import rope
from xtuner.model.decoder import make_positions
from xtuner.model.rope import EXACT_FROM, Rope

MILLION = 2**20
BF16 = 2.0**-9  # its rounding of numbers near 1
D = 128


def reference_angles(r: Rope, positions: torch.Tensor, length: int) -> np.ndarray:
    """fp64 [T, D/2] of tokens of a document with `length` tokens: fp32 frequencies as Hugging Face computes them, and
    the product without rounding, as 20 and 24 bits fit into fp64."""
    scaling, theta, position = r.scaling, r.theta, positions.double()
    if scaling and scaling.kind == "dynamic" and length > r.max_position_embeddings:
        stretch = scaling.factor * length / r.max_position_embeddings - (scaling.factor - 1)
        theta *= stretch ** (D / (D - 2))
    frequency_D = 1.0 / theta ** (torch.arange(0, D, 2).float() / D)
    if scaling and scaling.kind == "linear":
        position = position / scaling.factor
    return (position[:, None] * frequency_D.double()).numpy()


@pytest.mark.parametrize("scaling", [None, RopeScaling("dynamic", 2.5), RopeScaling("linear", 4.0)])
@pytest.mark.parametrize(("theta", "trained"), [(1e6, 32768), (5e7, 262144)])
def test_angles_at_a_million_tokens(theta: float, trained: int, scaling: RopeScaling | None) -> None:
    r = Rope(D, theta, trained, scaling)
    near = torch.randint(0, EXACT_FROM, (1000,)).sort().values
    far = torch.cat((torch.arange(EXACT_FROM, EXACT_FROM + 500), torch.randint(0, MILLION, (3000,)) | EXACT_FROM))
    far[-500:] = torch.arange(MILLION - 500, MILLION)
    borders = torch.tensor([0, MILLION], dtype=torch.int32)  # as in generation: other tokens of it are cached
    for positions, bound in ((near, BF16 / 2), (far, 4e-7)):
        exact = reference_angles(r, positions, MILLION)
        for ours, expected in zip(r.table(positions, borders, MILLION), (np.cos(exact), np.sin(exact)), strict=True):
            assert np.abs(ours.double().numpy() - expected).max() < bound
    in_fp32 = positions.float()[:, None] * torch.from_numpy(exact[-1] / float(positions[-1])).float()
    assert np.abs(in_fp32.cos().double().numpy() - np.cos(exact)).max() > 2 * BF16  # what this is about


@pytest.mark.parametrize("scaling", [None, RopeScaling("dynamic", 2.5), RopeScaling("linear", 4.0)])
def test_a_documents_angles_do_not_depend_on_its_company(
    scaling: RopeScaling | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor on slices. Documents of at most EXACT_FROM tokens have the product in fp32, bit for bit."""
    r = Rope(16, 1e4, 512, scaling)
    lengths = [700, 0, EXACT_FROM + 100, 1, EXACT_FROM, 0, 40]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    alone = []
    for n in lengths:
        document = torch.tensor([0, n], dtype=torch.int32)
        alone.append(r.table(torch.arange(n), document, n))
        if n <= EXACT_FROM:
            length = document.diff()
            theta = r._dynamic_theta(length) if scaling and scaling.kind == "dynamic" else torch.tensor([1e4])
            position = torch.arange(n).float() / (scaling.factor if scaling and scaling.kind == "linear" else 1.0)
            assert torch.equal(alone[-1][1], (position[:, None] * r._frequencies(theta)).sin())
    for slice_ in (rope.SLICE, 1001):
        monkeypatch.setattr(rope, "SLICE", slice_)
        found = r.table(make_positions(borders, sum(lengths)), borders, max(lengths))
        for together, parts in zip(found, zip(*alone, strict=True), strict=True):
            assert torch.equal(together, torch.cat(parts))
    begins, ends = borders[:-1] + torch.tensor([600, 0, EXACT_FROM - 5, 0, 0, 0, 40]), borders[1:]  # ranks share them
    kept = torch.cat([torch.arange(a, b) for a, b in zip(begins.tolist(), ends.tolist(), strict=True)])
    fragments = torch.cat((torch.zeros(1, dtype=torch.int32), (ends - begins).cumsum(0).int()))
    positions = make_positions(borders, sum(lengths))[kept]
    cut = r.table(positions, fragments, max(lengths), torch.tensor(lengths, dtype=torch.int32))
    for part, whole in zip(cut, found, strict=True):
        assert torch.equal(part, whole[kept])

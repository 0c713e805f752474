"""Ten iterations of every shipped family, by our strategy and by its class in transformers with PyTorch's AdamW:
losses, and each parameter's gradient and value."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import LR, MAX_NORM, sharded_strategy
from helpers.neighbours import CASES, make_theirs
from torch.nn import functional as F

from xtuner.data.loading.batch import Batch
from xtuner.families import FAMILIES
from xtuner.model import from_pretrained
from xtuner.model.weights import split_for_family

# AdamW divides by the size of a gradient: of biases of k, which is near 0, PyTorch's 1e-8 would leave differences of
# rounding, whose size depends on the machine
EPS = 1e-6
LENGTHS = ((20, 1, 11), (17, 80))  # documents of the two packs of an iteration; one is longer than the context of 64


def documents(iteration: int, pack: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(2 * iteration + pack)
    return torch.randint(3, 131, (sum(LENGTHS[pack]),), generator=draw).split(LENGTHS[pack])


def as_pack(parts: tuple[torch.Tensor, ...]) -> Batch:
    targets = torch.cat([F.pad(part[1:], (0, 1), value=-100) for part in parts])
    lengths = torch.tensor([0, *map(len, parts)])
    item = dict(
        input_ids=torch.cat(parts), targets=targets, cumulative_len=lengths.cumsum(0).int(),
        position_ids=torch.cat([torch.arange(len(part)) for part in parts]),
    )  # fmt: skip
    return Batch.from_item(item)


@pytest.mark.parametrize("name", CASES)
def test_ten_iterations(name: str, tmp_path: Path) -> None:
    theirs = make_theirs(name)
    theirs.save_pretrained(tmp_path)
    ours = sharded_strategy(model=from_pretrained(str(tmp_path)), eps=EPS)
    c = ours.model.config

    def under_their_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: t for n, own in tensors.items() for k, t in split_for_family(n, own, FAMILIES[c.family], c).items()}

    def require_equal(found: dict[str, torch.Tensor], wanted: dict[str, Any], tolerance: float) -> None:
        assert found.keys() == wanted.keys()
        for key, tensor in found.items():
            assert (tensor - wanted[key]).norm() <= tolerance * wanted[key].norm() + 1e-9, (i, key)

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=LR, eps=EPS)
    for i in range(10):
        packs = [documents(i, pack) for pack in range(2)]
        alone = [part for pack in packs for part in pack if len(part) > 1]
        total = sum(F.cross_entropy(theirs(part[None]).logits[0, :-1], part[1:], reduction="sum") for part in alone)
        targets = sum(len(part) - 1 for part in alone)
        optimizer.zero_grad()
        (total / targets).backward()
        loss = ours.forward_backward([as_pack(pack) for pack in packs], targets)
        assert loss == pytest.approx(total.item() / targets, rel=1e-5)
        wanted = dict(theirs.named_parameters())
        require_equal(under_their_names(ours.gradients), {n: p.grad for n, p in wanted.items()}, 1e-4)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), MAX_NORM)
        optimizer.step()
        assert ours.step(LR, MAX_NORM)[0] == pytest.approx(norm.item(), rel=1e-4)
    require_equal(under_their_names(dict(ours.model.named_parameters())), wanted, 1e-4)

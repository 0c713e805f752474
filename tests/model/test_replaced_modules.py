"""What is put into the network acts wherever it is used: in training bit for bit as in evaluation and generation."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xtuner.model import from_scratch
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.decoder import CausalLM, make_positions
from xtuner.model.generate import Session
from xtuner.model.linear import Linear, RMSNorm
from xtuner.model.rope import rotate

SHAPE = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2)  # fmt: skip
BORDERS = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
IDS = torch.arange(24) * 7 % 96
TARGETS = IDS.roll(-1)


class Plus(Linear):
    """Adds 1 to what it computes."""

    def forward(self, x_TK: torch.Tensor, add_TN: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x_TK, add_TN) + 1.0


class Wrapped(nn.Module):
    """Any module around another, with a weight of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor = inner, nn.Parameter(torch.tensor(1.5))

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x_TK)) * self.factor


class LowRank(nn.Module):
    def __init__(self, linear: Linear, rank: int = 2) -> None:
        super().__init__()
        self.down, self.up = Linear(linear.weight.shape[1], rank), Linear(rank, linear.weight.shape[0])
        for weight in (self.down.weight, self.up.weight):
            nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))

    def forward(self, x_TK: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x_TK))


def subclass(owner: nn.Module, name: str) -> None:
    getattr(owner, name).__class__ = Plus


def wrap(owner: nn.Module, name: str) -> None:
    setattr(owner, name, Wrapped(getattr(owner, name)))


def adapt(owner: nn.Module, name: str) -> None:
    getattr(owner, name).adapter = LowRank(getattr(owner, name))


def hook(owner: nn.Module, name: str) -> None:
    getattr(owner, name).register_forward_hook(lambda module, inputs, output: output * 1.25)


def change_input(owner: nn.Module, name: str) -> None:
    """In place: what others would compute again from is no longer what was multiplied."""
    getattr(owner, name).register_forward_pre_hook(lambda module, inputs: (inputs[0].mul_(1.1),))


def foreign(owner: nn.Module, name: str) -> None:
    old = getattr(owner, name)
    new = nn.Linear(old.weight.shape[1], old.weight.shape[0], bias=True)
    new.weight = old.weight
    nn.init.constant_(new.bias, 0.1)
    setattr(owner, name, new)


def model() -> CausalLM:
    return from_scratch(seed=0, initializer_range=0.2, **SHAPE).build()


def gradients(m: CausalLM) -> dict[str, torch.Tensor]:
    m(IDS, BORDERS, TARGETS).backward()
    return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}


def in_plain_torch(m: CausalLM) -> torch.Tensor:
    """The loss as autograd derives it, without recipes and fused functions; projections are called as they are."""

    def norm(x_TH: torch.Tensor, n: RMSNorm) -> torch.Tensor:
        return x_TH * torch.rsqrt(x_TH.square().mean(-1, keepdim=True) + n.eps) * n.weight

    T, table = len(IDS), m.model.tok_embeddings.weight
    x_TH = torch.where((m.config.pad_token_id == IDS)[:, None], table.detach()[IDS], table[IDS])
    cos, sin = m.model.rope.table(make_positions(BORDERS, T), BORDERS, T)
    for block in m.model.layers:
        a, f = block.attention, block.feed_forward
        heads = a.wqkv(norm(x_TH, block.attention_norm)).view(T, a.num_kv_heads, a.groups + 2, a.head_dim)
        q, k, v = heads[:, :, : a.groups].reshape(T, -1, a.head_dim), heads[:, :, -2], heads[:, :, -1]
        o_TND = a.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, BORDERS, 14)
        x_TH = x_TH + a.wo(o_TND.reshape(T, -1))
        h_TH = norm(x_TH, block.ffn_norm)
        x_TH = x_TH + f.w2(F.silu(f.w1(h_TH)) * f.w3(h_TH))
    return F.cross_entropy(F.linear(norm(x_TH, m.model.norm), m.output.weight), TARGETS, reduction="sum")


@pytest.mark.parametrize("change", [subclass, wrap, adapt, hook, foreign])
@pytest.mark.parametrize("name", ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2"])
def test_a_change_acts_in_training_as_in_evaluation(change: Callable[[nn.Module, str], None], name: str) -> None:
    m = model()
    plain = m(IDS, BORDERS, TARGETS).item()
    owner, _, key = name.partition(".")
    for block in m.model.layers:
        change(getattr(block, owner), key)
    with torch.no_grad():
        evaluated = m(IDS, BORDERS, TARGETS).item()
    trained = m(IDS, BORDERS, TARGETS)
    assert trained.item() == evaluated != plain
    found = gradients(m)
    m.zero_grad()
    in_plain_torch(m).backward()
    for n, p in m.named_parameters():
        assert p.grad is not None, n
        torch.testing.assert_close(found[n], p.grad, rtol=1e-4, atol=1e-4)
    for room in (0, 3000, 6000, 12000, 24000, 10**6):  # whatever is kept or computed again
        m.zero_grad()
        m.keep_activations(ActivationPlan(m.config, 4, room))
        for n, g in gradients(m).items():
            assert torch.equal(g, found[n]), (n, room)


def test_generation_uses_the_same_modules() -> None:
    m = model()
    adapt(m.model.layers[0].attention, "wqkv")
    wrap(m.model.layers[1].feed_forward, "w2")
    session = Session(m)
    session.feed(IDS[:5].tolist())
    with torch.no_grad():
        torch.testing.assert_close(session.feed(IDS[5:9].tolist()), m(IDS[:9])[-1])


def test_an_input_that_is_changed_in_place() -> None:
    """A tensor's recipe is of what it was: consumers after a change keep the tensor itself."""
    m = model()
    for block in m.model.layers:
        change_input(block.attention, "wqkv")
    with torch.no_grad():
        evaluated = m(IDS, BORDERS, TARGETS).item()
    assert m(IDS, BORDERS, TARGETS).item() == evaluated != model()(IDS, BORDERS, TARGETS).item()


def test_frozen_weights_get_no_gradient() -> None:
    m = model()
    for block in m.model.layers:
        for owner, name in ((block.attention, "wqkv"), (block.feed_forward, "w2")):
            adapt(owner, name)
    for name, p in m.named_parameters():
        p.requires_grad_(".adapter." in name)
    assert {".".join(n.split(".")[3:]) for n in gradients(m)} == {
        f"{where}.adapter.{part}.weight" for where in ("attention.wqkv", "feed_forward.w2") for part in ("down", "up")
    }

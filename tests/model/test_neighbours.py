"""Networks of InternLM2's neighbours against transformers: logits, losses, gradients and generation, in fp32."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from xtuner.families import LLAMA, checkpoint_config, read_config
from xtuner.families.network import DecoderConfig, RopeScaling
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.decoder import CausalLM
from xtuner.model.flops import num_parameters
from xtuner.model.generate import Session, generate
from xtuner.model.ops.autograd_functions import KEEP_ALL, KEEP_NONE, KeepPolicy
from xtuner.model.ops.matmul import MATMULS
from xtuner.model.rope import Rope
from xtuner.model.source import ModelSource
from xtuner.model.weights import join_from_family

V, LENGTHS, PADDING = 150, (40, 1, 23), 5
SHAPE = dict(vocab_size=V, hidden_size=48, intermediate_size=72, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=12)
THEIR_SHAPE = dict(
    vocab_size=V, hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.1,
    pad_token_id=None, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
)  # fmt: skip
NAMES = {
    "tok_embeddings": "embed_tokens", "attention.": "self_attn.", "wo.": "o_proj.", "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj", "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "output.": "lm_head.",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network: fields of our config, and of transformers'."""

    family: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)


def rope(kind: str, **numbers: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A scaling of positions for us and for transformers, with an original context of 16 tokens."""
    numbers = {"factor": 4.0, "original_max_position_embeddings": 16, **numbers}
    scaling: Any = RopeScaling(kind, **numbers)  # type: ignore[arg-type]
    return dict(rope_scaling=scaling), dict(rope_parameters={"rope_type": kind, "rope_theta": 1e4, **numbers})


LLAMA3, YARN = rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0), rope("yarn", beta_fast=2.0, beta_slow=0.5)
DEEP = rope("yarn", beta_fast=2.0, beta_slow=0.25, mscale=1.0, mscale_all_dim=0.5, truncate=False)
CASES = {
    "llama": Case(
        "Llama",
        dict(qkv_bias=True, output_bias=True, mlp_bias=True, tie_word_embeddings=True, **LLAMA3[0]),
        dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, **LLAMA3[1]),
    ),
    "llama_yarn": Case("Llama", *DEEP),
    "qwen3": Case(
        "Qwen3",
        dict(qk_norm=True, head_dim=16, tie_word_embeddings=True, pad_token_id=PADDING),
        dict(head_dim=16, tie_word_embeddings=True, pad_token_id=PADDING),
    ),
    "mistral": Case("Mistral", dict(sliding_window=5, head_dim=16), dict(sliding_window=5, head_dim=16)),
    "qwen2_window": Case(
        "Qwen2",
        dict(qkv_bias=True, sliding_window=7, sliding_layers=(False, True)),
        dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
    ),
    "qwen2": Case(
        "Qwen2", dict(qkv_bias=True, tie_word_embeddings=True, **YARN[0]), dict(tie_word_embeddings=True, **YARN[1])
    ),
}
IDS = torch.randint(3, V, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
IDS[7] = PADDING
TARGETS = torch.cat([F.pad(ids[1:], (0, 1), value=-100) for ids in IDS.split(LENGTHS)])
BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0).int()


@cache
def theirs(name: str) -> Any:
    case = CASES[name]
    config = getattr(transformers, f"{case.family}Config")(
        **{**THEIR_SHAPE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, **case.theirs}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def ours(name: str) -> CausalLM:
    case = CASES[name]
    c = DecoderConfig(**{**SHAPE, "rope_theta": 1e4, "max_position_embeddings": 64, "pad_token_id": None, **case.ours})
    assert read_config(checkpoint_config(c)) == c  # as a resumed run reads it
    model = CausalLM(c)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(as_ours(theirs(name).state_dict(), n, c))
    assert sum(p.numel() for p in model.parameters()) == num_parameters(c)
    return model


def as_ours(tensors: dict[str, torch.Tensor], name: str, c: DecoderConfig) -> torch.Tensor:
    """Their tensors under our name."""
    if ".wqkv." in name:
        return join_from_family(tensors, name, LLAMA, c)
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return tensors[name]


@pytest.mark.parametrize("name", CASES)
def test_logits_losses_and_gradients(name: str) -> None:
    """Of documents in a pack and alone, whatever is recomputed."""
    their, our = theirs(name), ours(name)
    their.zero_grad()
    logits = torch.cat([their(ids[None]).logits[0] for ids in IDS.split(LENGTHS)])
    loss = F.cross_entropy(logits, TARGETS, reduction="sum")
    loss.backward()
    expected = {n: p.grad for n, p in their.named_parameters()}
    with torch.no_grad():
        packed = our(IDS, BORDERS)
        assert (packed - logits).abs().max() < 1e-5
        for ids, alone in zip(IDS.split(LENGTHS), packed.split(LENGTHS), strict=True):
            assert (our(ids) - alone).abs().max() < 1e-5
    kept: dict[str, torch.Tensor] = {}
    for room in (10**9, 30000, 60000, 90000, 120000, 150000, 0):
        our.zero_grad()
        our.keep_activations(ActivationPlan(our.config, 4, room))
        our_loss = our(IDS, BORDERS, TARGETS)
        our_loss.backward()
        assert our_loss.item() == pytest.approx(loss.item(), rel=1e-5)
        for n, p in our.named_parameters():
            assert p.grad is not None
            if room == 10**9:
                true = as_ours(expected, n, our.config)
                assert (p.grad - true).norm() < 1e-4 * true.norm(), n
                kept[n] = p.grad.clone()
            assert p.grad.equal(kept[n]), (n, room)


def test_a_hook_on_a_norm_of_heads() -> None:
    """It acts, and the modules' path has the gradients of the fused one."""
    fused, hooked = ours("qwen3"), ours("qwen3")
    seen = []
    for block in hooked.model.layers:
        block.attention.k_norm.register_forward_hook(lambda module, inputs, out: seen.append(out[1].shape))
    for model, room in ((fused, None), (hooked, 60000), (hooked, None)):
        model.zero_grad()
        model.keep_activations(ActivationPlan(model.config, 4, room))
        model(IDS, BORDERS, TARGETS).backward()
        for (n, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=n)
    assert seen[0] == (len(IDS) * 2, 16)


@dataclass(frozen=True)
class SamePolicy(ActivationPlan):
    """Keeps the same in every layer."""

    policy: KeepPolicy = KEEP_ALL

    def choose_kept(self, tokens: int) -> list[KeepPolicy]:
        return [self.policy] * self.config.num_layers


@pytest.mark.parametrize("products", MATMULS)
@pytest.mark.parametrize("extra", [{}, dict(qkv_bias=True, mlp_bias=True, qk_norm=True, tie_word_embeddings=True)])
def test_recomputed_heads_are_those_of_the_forward(extra: dict[str, Any], products: Any) -> None:
    """One document without shared heads: the tensors that attention keeps are q, k and v themselves."""
    shape = {**SHAPE, "hidden_size": 64, "num_kv_heads": 4, "head_dim": 16, "intermediate_size": 80}
    c, found = DecoderConfig(**{**shape, **extra}), []
    model = ModelSource(c, None, seed=0, products=products).build()
    for policy in (KEEP_ALL, KeepPolicy(qkv=False), KeepPolicy(True, False, False, False), KEEP_NONE):
        model.keep_activations(SamePolicy(c, 4, policy=policy))
        model.zero_grad()
        model(IDS, None, IDS.roll(-1)).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in found[1:]:
        assert len(other) == len(found[0]) > 10
        assert all(a.equal(b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_greedy_generation(name: str) -> None:
    their, our, prompt = theirs(name), ours(name), IDS[:17]
    settings = dict(attention_mask=torch.ones(1, 17), max_new_tokens=20, do_sample=False, eos_token_id=None)
    expected = their.generate(prompt[None], **settings)[0, 17:]
    assert list(generate(our, prompt.tolist(), 20)) == expected.tolist()
    session = Session(our)
    with torch.no_grad():
        exact = our(IDS[:40])
    for begin, end in ((0, 9), (9, 20), (20, 21), (21, 40)):
        assert (session.feed(IDS[begin:end].tolist()) - exact[end - 1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "theta", "more"),
    [
        ("llama3", 5e5, dict(factor=8.0, original_max_position_embeddings=8192)),  # Llama 3.1
        ("llama3", 5e5, dict(factor=32.0, original_max_position_embeddings=8192)),  # Llama 3.2
        ("yarn", 1e6, dict(factor=4.0, original_max_position_embeddings=32768)),  # Qwen2.5, Qwen3
        ("yarn", 1e6, dict(factor=4.0, original_max_position_embeddings=32768, attention_factor=1.5, truncate=False)),
        ("yarn", 1e4, dict(factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.7)),
    ],
)
def test_frequencies_of_released_models(kind: Any, theta: float, more: dict[str, Any]) -> None:
    rotations = dict(low_freq_factor=1.0, high_freq_factor=4.0) if kind == "llama3" else {}
    parameters = {"rope_type": kind, "rope_theta": theta, **more, **rotations}
    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=parameters)
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    scaling = RopeScaling(kind, **more)
    assert Rope(128, theta, 2**20, scaling)._frequencies(torch.tensor([theta]))[0].equal(frequencies)
    assert scaling.cos_sin_factor == pytest.approx(factor, rel=1e-12)

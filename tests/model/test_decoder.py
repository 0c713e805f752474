"""The network against the reference implementation's numbers: logits, losses, gradients, training, generation.

Tolerances are those of the reference data's README (fp32): logits 1e-4 absolute, losses 1e-5, gradients 1e-4 relative
to the norm, training losses 1e-4, grad norms 1e-3 relative, greedy tokens exact.
"""

import hashlib
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.paths import reference
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.families import FAMILIES, LLAMA, read_config
from xtuner.model import attention, from_scratch, load_pretrained
from xtuner.model.activation_memory import ActivationPlan
from xtuner.model.decoder import CausalLM
from xtuner.model.generate import Session, generate
from xtuner.model.loss import linear_cross_entropy
from xtuner.model.weights import join_from_family, split_for_family

MODELS = ["a_gqa", "b_mha", "c_dynamic_ntk", "d_mqa_bias", "e_linear"]


@cache
def facts(name: str) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
    folder = reference("models", name)
    arrays = np.load(folder / "reference.npz")
    tensors = {k: torch.from_numpy(arrays[k]) for k in arrays.files}
    tensors = {k: t.long() if t.dtype == torch.int32 else t for k, t in tensors.items()}
    return folder, json.loads((folder / "reference.json").read_text()), tensors


@cache
def model_of(name: str) -> CausalLM:
    return load_pretrained(facts(name)[0])


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Targets of rows [R, T] of unshifted labels, laid end to end."""
    return F.pad(labels[:, 1:], (0, 1), value=-100).reshape(-1)


def rows_as_documents(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.reshape(-1), torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)


def token_losses(model: CausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each position, 0 where there is no target."""
    return F.cross_entropy(model.output(hidden), targets, reduction="none")


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_losses(name: str) -> None:
    _, _, ref = facts(name)
    model = model_of(name)
    ids, cu_seqlens = rows_as_documents(ref["input_ids"])
    with torch.no_grad():
        logits = model(ids, cu_seqlens=cu_seqlens)
        assert (logits - ref["logits"].reshape(logits.shape)).abs().max() < 1e-4
        for labels, key in ((ref["labels"], "loss"), (ref["input_ids"], "loss_all_tokens")):
            targets = shifted(labels)
            loss = model(ids, cu_seqlens=cu_seqlens, targets=targets) / (targets != -100).sum()
            assert abs(loss - ref[key]) < 1e-5
        long = model(ref["long_input_ids"][0])
        assert (long[ref["long_positions"]] - ref["long_logits"]).abs().max() < 1e-4
        hidden = model.hidden(ref["long_input_ids"][0])
        losses = token_losses(model, hidden, shifted(ref["long_input_ids"]))
        assert (losses[:-1] - ref["long_per_token_loss"]).abs().max() < 1e-4
        assert abs(losses.sum() / (len(losses) - 1) - ref["long_loss"]) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents(name: str) -> None:
    """A pack gives what each document gives alone, under both label rules."""
    _, _, ref = facts(name)
    model = model_of(name)
    ids, cu_seqlens = ref["packed_input_ids"], ref["packed_cu_seqlens"].int()
    with torch.no_grad():
        logits = model(ids, cu_seqlens=cu_seqlens)
        assert (logits[ref["packed_logits_rows"]] - ref["packed_logits"]).abs().max() < 1e-4
        for begin, end in pairwise(cu_seqlens):
            assert (model(ids[begin:end]) - logits[begin:end]).abs().max() < 2e-5
        hidden = model.hidden(ids, cu_seqlens)
        within = ref["packed_per_token_loss"]
        targets = ids.roll(-1).masked_fill(within.isnan(), -100)
        losses = token_losses(model, hidden, targets)
        assert (losses - within.nan_to_num()).abs().max() < 1e-4
        assert abs(losses.sum() / (targets != -100).sum() - ref["packed_loss_within_documents"]) < 1e-5
        losses = token_losses(model, hidden, shifted(ids[None]))
        assert (losses[:-1] - ref["packed_per_token_loss_hf_shift"]).abs().max() < 1e-4
        assert abs(losses[:-1].mean() - ref["packed_loss_hf_shift"]) < 1e-5


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_gradients(name: str, recompute: bool) -> None:
    folder, info, ref = facts(name)
    model = load_pretrained(folder)
    model.keep_activations(ActivationPlan(model.config, 4, 0 if recompute else None))
    ids, cu_seqlens = rows_as_documents(ref["input_ids"])
    targets = shifted(ref["labels"])
    (model(ids, cu_seqlens=cu_seqlens, targets=targets) / (targets != -100).sum()).backward()
    parameters = dict(model.named_parameters())
    for parameter, norm in info["grad_norm"].items():
        assert parameters[parameter].grad.norm() == pytest.approx(norm, rel=1e-4), parameter
    for key, value in ref.items():
        kind, _, parameter = key.partition("/")
        if kind in ("grad", "grad_rows0_24"):
            grad = parameters[parameter].grad[: len(value)]
            assert (grad - value).norm() < 1e-4 * value.norm(), key
    pad_row = parameters["model.tok_embeddings.weight"].grad[2]
    assert pad_row.norm() == info["pad_row_grad_norm_reference"]


@pytest.mark.parametrize("name", MODELS)
def test_ten_training_steps(name: str) -> None:
    folder, _, ref = facts(name)
    model = load_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for i in range(10):
        ids, cu_seqlens = rows_as_documents(ref["train_input_ids"][i])
        targets = shifted(ref["train_labels"][i])
        loss = model(ids, cu_seqlens=cu_seqlens, targets=targets) / (targets != -100).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert abs(loss.item() - ref["train_loss"][i]) < 1e-4
        assert norm.item() == pytest.approx(ref["train_grad_norm"][i].item(), rel=1e-3)
        total = torch.stack([p.detach().norm() for p in model.parameters()]).norm()
        assert total.item() == pytest.approx(ref["train_param_norm_after"][i].item(), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_generation(name: str) -> None:
    _, _, ref = facts(name)
    model = model_of(name)
    prompt = ref["gen_prompt"][0].tolist()
    tokens = list(generate(model, prompt, 16))
    assert tokens == ref["gen_tokens_kv_cache"][0].tolist()
    session = Session(model)
    for step, fed in enumerate([prompt, *([t] for t in tokens[:-1])]):
        assert (session.feed(fed) - ref["gen_step_logits_kv_cache"][step]).abs().max() < 1e-4
    for row, mask, expected in zip(
        ref["padgen_input_ids"], ref["padgen_attention_mask"], ref["padgen_tokens_unpadded"], strict=True
    ):
        assert list(generate(model, row[mask.bool()].tolist(), 16)) == expected.tolist()
    in_two = Session(model)  # a prompt in two pieces, as a chat's second turn arrives
    in_two.feed(prompt[:10])
    if name != "c_dynamic_ntk":  # whose cached keys keep the rotation they were written with
        assert (in_two.feed(prompt[10:]) - ref["gen_step_logits_kv_cache"][0]).abs().max() < 1e-4


@pytest.mark.parametrize("mask", [1, 700, attention.MASK])
def test_a_document_generated_in_pieces(mask: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts, later turns and single tokens: the logits of the whole document, with masks of few elements, and keys
    and values moved to a larger buffer only a few times."""
    monkeypatch.setattr(attention, "MASK", mask)
    model, draw = model_of("a_gqa"), torch.Generator().manual_seed(0)
    pieces = [40, 1, 1, 130, 2, *[1] * 90, 33, 1]
    document = torch.randint(3, model.config.vocab_size, (sum(pieces),), generator=draw)
    with torch.no_grad():
        exact = model(document)
    session, sizes = Session(model), set()
    for piece, end in zip(document.split(pieces), torch.tensor(pieces).cumsum(0), strict=True):
        assert (session.feed(piece.tolist()) - exact[end - 1]).abs().max() < 1e-4
        buffer = session.caches[0].buffer
        assert buffer is not None
        sizes.add(buffer.shape[1])
        assert end <= max(sizes) <= max(end + 64, 1.2 * end)
    assert len(sizes) <= 4


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns while this is active."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if torch.is_tensor(x):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.itemsize)
        return out


def test_memory_of_a_long_document_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its loss and of a prompt: no tensor of all logits, nor of all pairs of tokens."""
    T, width, V = 4000, 192, 500
    shape = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    source = from_scratch(seed=0, vocab_size=V, intermediate_size=width, **shape)
    model = source.build(torch.device("cpu"), torch.float32)
    monkeypatch.setattr("xtuner.model.loss.CHUNK", 100 * V)
    monkeypatch.setattr(attention, "MASK", 50 * T)
    ids, borders = torch.randint(3, V, (T,)), torch.tensor([0, T], dtype=torch.int32)
    with torch.no_grad(), LargestTensor() as largest:
        model(ids, borders, ids.roll(-1))
        session = Session(model)
        session.feed(ids[: T // 2].tolist())
        session.feed(ids[T // 2 :].tolist())
    assert largest.elements <= T * width


def test_a_long_call_leaves_no_trace() -> None:
    """The original's dynamic NTK keeps its enlarged base after a long call; ours has no state."""
    _, _, ref = facts("c_dynamic_ntk")
    model = model_of("c_dynamic_ntk")
    with torch.no_grad():
        model(ref["long_input_ids"][0])
        logits = model(ref["input_ids"][0])
    assert (logits - ref["logits"][0]).abs().max() < 1e-4
    assert (logits - ref["logits_after_long_call_same_instance_row0"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_layouts_are_exact_and_reversible(name: str) -> None:
    folder, info, _ = facts(name)
    weights = load_file(folder / "model.safetensors")
    config = read_config(json.loads((folder / "config.json").read_text()))
    llama = {}
    for key, tensor in weights.items():
        parts = split_for_family(key, tensor, LLAMA, config)
        assert list(parts) == [rows.name for rows in LLAMA.stored(key, config)]
        assert join_from_family(parts, key, LLAMA, config).equal(tensor)
        llama.update(parts)
    assert llama.keys() == info["llama_tensors"].keys()
    for key, expected in info["llama_tensors"].items():
        assert hashlib.sha256(llama[key].contiguous().numpy().tobytes()).hexdigest() == expected["sha256_fp32_le"], key
    for layout in ("internlm2", "llama"):
        assert read_config(FAMILIES[layout].write_config(config, "float32")) == config


def test_foreign_pickles_give_the_same_model(tmp_path: Path) -> None:
    """`pytorch_model.bin` through the restricted reader: the same weights; one that would run code is refused."""
    folder = facts("a_gqa")[0]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    model = model_of("a_gqa")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(tmp_path)
    assert all(p.equal(loaded.state_dict()[n]) for n, p in model.state_dict().items())
    marker = tmp_path / "marker"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (marker,)

    torch.save({**model.state_dict(), "bomb": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="the pickle refers to"):
        load_pretrained(tmp_path)
    assert not marker.exists()


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    folder = facts("a_gqa")[0]
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    lacking = {k: v for k, v in weights.items() if k != "model.norm.weight"}
    for change, tensors, error, message in (
        ({}, lacking, CheckpointError, "model.norm.weight is missing"),
        ({}, {**weights, "extra": torch.zeros(1)}, CheckpointError, "not in the model"),
        ({"vocab_size": 99}, weights, CheckpointError, "by config.json"),
        ({"model_type": "gpt2"}, weights, ConfigError, "'gpt2' are not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, weights, ConfigError, "'yarn' is not supported"),
        ({"hidden_act": "gelu"}, weights, ConfigError, "hidden_act = 'gelu'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(error, match=message):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_single_strategy_keeps_the_contract(dtype: str, tmp_path: Path) -> None:
    """Gradients are Σ over targets ÷ their number however packs are cut; masters are fp32; save and load are exact."""
    from xtuner.data.loading.batch import Batch
    from xtuner.engine.strategies.sharded_strategy import ShardedStrategy
    from xtuner.model import from_pretrained
    from xtuner.optim.optim_wrapper import OptimWrapper

    _, _, ref = facts("a_gqa")
    ids, targets = ref["input_ids"], shifted(ref["labels"]).view(2, 48)
    source = from_pretrained(str(facts("a_gqa")[0]))
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1e-3), dtype=dtype)

    def batch(rows: slice) -> Batch:
        row, cu_seqlens = rows_as_documents(ids[rows])
        pack = dict(input_ids=row, targets=targets[rows].reshape(-1), cumulative_len=cu_seqlens)
        return Batch.from_item({**pack, "position_ids": torch.arange(48).repeat(len(ids[rows]))})

    total = int((targets != -100).sum())
    whole, cut = (ShardedStrategy(source, optim, torch.device("cpu")) for _ in range(2))
    assert whole.compute_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    losses = [whole.forward_backward([batch(slice(0, 2))], total)]
    losses += [cut.forward_backward([batch(slice(0, 1)), batch(slice(1, 2))], total)]
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    assert losses[0] == pytest.approx(losses[1], abs=tolerance)
    assert losses[0] == pytest.approx(float(ref["loss"]), abs=tolerance)
    for name, gradient in whole.gradients.items():
        assert gradient.dtype == torch.float32
        assert (gradient - cut.gradients[name]).norm() <= tolerance * gradient.norm(), name

    def masters(strategy: ShardedStrategy) -> dict[str, torch.Tensor]:
        return {n: s.master.read().clone() for n, s in strategy._shards().items()}

    norm, applied = whole.step(1e-3, 1.0)
    assert applied
    assert norm == pytest.approx(facts("a_gqa")[1]["grad_norm_total"], rel=tolerance)
    for name, weight in whole.model.named_parameters():
        assert weight.view(-1).equal(masters(whole)[name].to(weight.dtype))
    whole.snapshot(optimizer=True).write(tmp_path)
    cut.load(tmp_path)
    for strategy in (whole, cut):
        strategy.forward_backward([batch(slice(0, 2))], total)
        strategy.step(1e-3, 1.0)
    before = masters(whole)
    assert all(m.equal(before[n]) for n, m in masters(cut).items())
    whole.forward_backward([batch(slice(0, 2))], total)
    whole.gradients["output.weight"].fill_(torch.inf)
    whole._sum_over_ranks(torch.zeros(2))  # which takes the norm, as the end of forward_backward does
    assert whole.step(1e-3, 1.0)[1] is False
    assert whole.forward_backward([batch(slice(0, 2))], 0) == 0.0
    assert whole.step(1e-3, 1.0) == (0.0, False)
    assert all(m.equal(before[n]) for n, m in masters(whole).items())


def test_the_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk size changes neither loss nor gradients, and matches autograd through all logits in float64."""
    torch.manual_seed(0)
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    w = torch.randn(301, 24, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 301, (50,))
    targets[::7] = -100
    expected = F.cross_entropy(x @ w.T, targets, reduction="sum")
    dx, dw = torch.autograd.grad(expected * 0.3, (x, w))
    for tokens in (1, 7, 50, 64):
        monkeypatch.setattr("xtuner.model.loss.CHUNK", tokens * 301)
        loss = linear_cross_entropy(x, w, targets, 0.1)
        gx, gw = torch.autograd.grad(loss * 3, (x, w))
        assert abs(10 * loss.item() - expected.item()) < 1e-3
        assert (gx - dx).norm() < 1e-6 * dx.norm()
        assert (gw - dw).norm() < 1e-6 * dw.norm()
    nothing = linear_cross_entropy(x, w, torch.full((50,), -100))
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, x)[0].abs().max() == 0

"""Weights as other tools write them: DeepSpeed, InternEvo, one file of `torch.save`, a Hugging Face folder."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def internlm2_weights(layers: int = 1, hidden: int = 6, inner: int = 10, vocabulary: int = 7, seed: int = 0) -> Tensors:
    """Random weights: 3 heads, 1 of them for keys and values each."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"model.tok_embeddings.weight": (vocabulary, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.attention.wqkv.weight": (hidden // 3 * 5, hidden), f"{at}.attention.wo.weight": (hidden,) * 2}
        shapes |= {f"{at}.feed_forward.w{n}.weight": (inner, hidden) for n in (1, 3)}
        shapes |= {f"{at}.feed_forward.w2.weight": (hidden, inner)}
        shapes |= {f"{at}.{n}_norm.weight": (hidden,) for n in ("attention", "ffn")}
    shapes |= {"model.norm.weight": (hidden,), "output.weight": (vocabulary, hidden)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def write_zero(
    folder: Path, weights: Tensors, stage: int, ranks: int, frozen: tuple[str, ...] = (), padding: int = 0
) -> Path:
    """A DeepSpeed folder of two parameter groups: matrices and norms. padding: numbers behind each parameter."""
    folder.mkdir(parents=True)
    learned = {f"llm.{n}": t for n, t in weights.items() if n not in frozen}
    fixed = {f"llm.{n}": weights[n] for n in frozen}
    groups = [{n: t for n, t in learned.items() if (t.dim() == d)} for d in (2, 1)]
    masters: list[list[torch.Tensor]] = [[] for _ in range(ranks)]

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        each = -(-tensor.numel() // ranks)
        return list(torch.nn.functional.pad(tensor.flatten(), (0, each * ranks - tensor.numel())).split(each))

    for group in groups:
        if stage == 3:
            cut = [parts(t) for t in group.values()]
            for rank in range(ranks):
                masters[rank].append(torch.cat([c[rank] for c in cut]))
        else:
            line = torch.cat([torch.nn.functional.pad(t.flatten(), (0, padding)) for t in group.values()])
            for rank, part in enumerate(parts(line)):  # the last is saved without what fills it up
                masters[rank].append(part[: max(0, len(line) - rank * len(part))].clone())
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    model: dict[str, Any] = {
        "param_shapes": [OrderedDict((n, t.shape) for n, t in group.items()) for group in groups],
        "frozen_param_shapes": {n: t.shape for n, t in fixed.items()} if fixed and stage > 1 else None,
        "buffer_names": ["llm.model.layers.0.attention.rotary_emb.inv_freq"],
        "module": {"llm.model.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)} | (fixed if stage == 1 else {}),
        "shared_params": {},
    }
    for rank in range(ranks):
        state = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks], key: masters[rank]}
        if stage < 3:
            state |= {"param_alignment_paddings": [[padding] * len(g) for g in groups]} if padding else {}
            state |= {"base_optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}}}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        if stage == 3 or rank == 0:
            fragments = {n: parts(t)[rank].clone() if stage == 3 else t for n, t in fixed.items()} or None
            name = f"zero_pp_rank_{rank}_mp_rank_00" if stage == 3 else "mp_rank_00"
            torch.save({**model, "frozen_param_fragments": fragments}, folder / f"{name}_model_states.pt")
    return folder


def write_single(path: Path, weights: Tensors, *_: int) -> Path:
    """One file of bf16 weights."""
    path.parent.mkdir(exist_ok=True)
    torch.save({"state_dict": {f"llm.{n}": t.bfloat16() for n, t in weights.items()}}, path)
    return path


def write_internevo(folder: Path, weights: Tensors, tp: int, stages: list[int], **changes: Any) -> Path:
    """Cut InternLM2 weights as InternEvo does. stages: layers of each pipeline stage."""
    folder.mkdir(parents=True)
    shape = weights["model.tok_embeddings.weight"].shape
    config = {"num_layers": sum(stages), "hidden_size": shape[1], "vocab_size": shape[0], "num_attention_heads": 3}
    config |= {"num_kv_attention_heads": 1, "no_bias": True, "adapt_hf": True, "embed_split_hidden": False, **changes}
    torch.save(config, folder / "model_config.pt")
    first = 0
    for p, layers in enumerate(stages):
        for t in range(tp):
            part = {}
            for name, tensor in weights.items():
                inner = name.removeprefix("model.")
                if name.startswith("model.layers."):
                    layer, _, rest = inner.removeprefix("layers.").partition(".")
                    if not first <= int(layer) < first + layers:
                        continue
                    inner = f"layers.{int(layer) - first}.{rest}"
                elif p != (0 if "embed" in name else len(stages) - 1):
                    continue
                columns = inner.endswith(("wo.weight", "w2.weight"))
                columns |= "embed" in name and config["embed_split_hidden"]
                cut = tensor.dim() == 2
                part[f"model.{inner}"] = tensor.tensor_split(tp, 1 if columns else 0)[t].clone() if cut else tensor
            torch.save(part, folder / f"model_tp{t}_pp{p}.pt")
        first += layers
    return folder


D128 = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}


D64 = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


WEIGHTS = Path("triton_models") / "weights"


def write_hf_folder(
    folder: Path, layout: str = "internlm2", dtype: torch.dtype = torch.bfloat16, shards: int = 1, **hf: Any
) -> Path:
    """A Hugging Face folder: random weights, norms and biases, a tokenizer of 4 ids. `hf` goes into its config.json."""
    from tokenizers import Tokenizer, models

    from xtuner.families import FAMILIES
    from xtuner.model import from_scratch
    from xtuner.model.weights import split_for_family

    family = FAMILIES[layout]
    shape = {"vocab_size": 400, "intermediate_size": 320, "num_hidden_layers": 2, **D128}
    shape |= {"rope_theta": 1e6, "pad_token_id": 2}
    given = {k: v for k, v in hf.items() if k in family.fields}
    source = from_scratch(family=layout, **{**shape, **given})
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in source.build().state_dict().items():
        value = torch.randn(tensor.shape, generator=draw) if tensor.dim() == 1 else tensor
        parts = split_for_family(name, value, family, source.config)
        tensors |= {k: t.to(dtype).contiguous() for k, t in parts.items()}
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = {f"model-{i}.safetensors": names[i::shards] for i in range(shards)}
    for file, inside in files.items():
        save_file({n: tensors[n] for n in inside}, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {n: file for file, inside in files.items() for n in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({**family.write_config(source.config, str(dtype)[6:]), **hf}))
    Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2, "d": 3}, [])).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file but our manifest."""
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    files.pop("manifest.json", None)
    return files

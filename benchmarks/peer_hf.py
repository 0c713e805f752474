"""The same work by Hugging Face transformers: its Llama of the same shape on the same packs, beside `train.py`.

    python benchmarks/peer_hf.py 1.8b --attention flex --liger      # pip install liger-kernel
    python benchmarks/peer_hf.py 7b --attention flex --liger --optimizer 8bit    # and torchao

A plain loop as its Trainer runs it: one pack of 32,768 tokens a step, documents kept apart by positions that begin
again, full recompute, weights and gradients in bf16. Appends to the results of `train.py`; `--tiny` tries the script on
a CPU.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from train import CASES, PACK, SHAPES, machine, write_data
from transformers import LlamaConfig, LlamaForCausalLM

from xtuner.data.batch import Batch
from xtuner.data.index import load_intern_repo_tokenized_dataset
from xtuner.data.pack import PackedDataset
from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import peak_flops, training_flops


def optimizer_of(name: str, parameters: Any) -> torch.optim.Optimizer:
    if name == "8bit":
        from torchao.optim import AdamW8bit

        return AdamW8bit(parameters, lr=4e-5, weight_decay=0.01, bf16_stochastic_round=True)
    return torch.optim.AdamW(parameters, lr=4e-5, weight_decay=0.01, fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--attention", choices=["flex", "sdpa"], default="sdpa")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument(
        "--optimizer", choices=["fused", "8bit"], default="fused", help="AdamW with states in bf16 or 8 bits"
    )
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--tiny", action="store_true", help="a small model and short packs, on a CPU")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results.jsonl"))
    a = parser.parse_args()
    begin = time.perf_counter()
    device = torch.device("cpu" if a.tiny else "cuda")
    _, hidden, layers, heads, ffn = ("tiny", 128, 2, 1, 256) if a.tiny else SHAPES[CASES[a.case]["shape"]]
    kv_heads, pack = (1, 512) if a.tiny else (8, PACK)
    if a.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = LlamaConfig(
        vocab_size=92544, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128,
        max_position_embeddings=PACK, tie_word_embeddings=False,
        attn_implementation="flex_attention" if a.attention == "flex" else "sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = optimizer_of(a.optimizer, model.parameters())
    ours = DecoderConfig(92544, hidden, ffn, layers, heads, kv_heads, 128)
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(folder), max(a.iterations * pack // PACK, 1) + 4, CASES[a.case].get("long", False))
        packs = PackedDataset(load_intern_repo_tokenized_dataset(folder), pack)
        records, first = [], 0.0
        for i in range(a.iterations):
            start = time.perf_counter()
            b = Batch.of(packs[i])
            row = {"input_ids": b.input_ids, "position_ids": b.position_ids, "shift_labels": b.targets}
            row = {name: value[None].to(device) for name, value in row.items()}
            loss = model(**row, labels=row["shift_labels"], use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"iter {i + 1} loss {loss.item():.4f}", end=" ", flush=True)  # waits for the device
            took = time.perf_counter() - start
            first = first or time.perf_counter() - begin
            flops = training_flops(ours, pack, b.attention_pairs)
            records.append({"tokens_per_s": pack / took, "mfu": flops / took / (peak_flops(device) or float("nan"))})
            print(f"{pack / took:,.0f} tok/s", flush=True)
    records = records[a.warm :]
    rates = [r["tokens_per_s"] for r in records]
    found = {
        "case": a.case,
        "engine": f"transformers {'+ Liger ' if a.liger else ''}+ {a.attention} + AdamW {a.optimizer}",
        "date": time.strftime("%Y-%m-%d"),
        **({"gpu": "none", "torch": torch.__version__} if a.tiny else machine()),
        "tokens_per_s": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "mfu": statistics.median(r["mfu"] for r in records),
        "memory": 0 if a.tiny else torch.cuda.max_memory_allocated(),
        "first": first,
        "profile": None,
    }
    print(json.dumps(found))
    if not a.tiny:
        with open(a.results, "a") as f:
            f.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

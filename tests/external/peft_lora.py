"""python peft_lora.py JOBS.json: what PEFT itself computes with adapters that we have exported.

For each job {base, adapter, ids, lr, steps, out}: logits, the loss of predicting the next id, gradients of what is
trained, then steps of AdamW; all in fp32, as tensors of the file `out`.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

for job in json.loads(Path(sys.argv[1]).read_text()):
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True).eval()  # no dropout
    trained = {
        n.replace(".default", "").replace(".modules_to_save", ""): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    optimizer = torch.optim.AdamW(trained.values(), lr=job["lr"])
    ids = torch.tensor(job["ids"])
    found: dict[str, torch.Tensor] = {}
    for step in range(job["steps"] + 1):
        logits = model(ids[None]).logits[0]
        loss = F.cross_entropy(logits[:-1], ids[1:])
        found[f"loss {step}"] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        if not step:
            found["logits"] = logits.detach()
            found |= {f"gradient {n}": p.grad.clone() for n, p in trained.items()}
        optimizer.step()
    save_file({n: t.contiguous() for n, t in found.items()}, job["out"])

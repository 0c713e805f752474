"""A checkpoint's adapter → PEFT's own folder: adapter_config.json, adapter_model.safetensors, a card.

Modules have the names that the model's family has in its files, as `PeftModel.from_pretrained` and servers (vLLM,
LMDeploy) look them up. A matrix that a family stores in several (q, k, v) gets a part of the term; one that it stores
as a whole gets all parts' factors, side by side. Ranks are made equal by zeros, and any scaling is written as
alpha / rank: LMDeploy reads no others.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import xtuner
from xtuner.core.errors import ConfigError
from xtuner.core.files import require_utf8, verify, write_json
from xtuner.core.log import logger
from xtuner.export.destination import export_folder
from xtuner.export.hf import LOADABLE
from xtuner.export.sources.peft import IDENTITY, PREFIX
from xtuner.families import FAMILIES, NATIVE
from xtuner.families.base import ModelFamily
from xtuner.model.adapters.folder import AdapterFolder, FullTerm, open_adapter
from xtuner.model.adapters.lora import MATRICES, stored_rows
from xtuner.model.weights import split_for_family

KIND = "adapter"  # in the manifest of folders that the next export may replace


def export_peft(
    checkpoint: str | Path, target: str | Path, layout: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write `target` atomically. An earlier export there is replaced, anything else is not.

    Args:
        checkpoint: an `iter_N.pth` of a run with an adapter, which is verified first.
        layout: the family whose names the base model's files have; LOADABLE; None for the model's own family.

    Raises: CheckpointError, ConfigError.
    """
    source, target = Path(checkpoint).expanduser(), Path(target).expanduser().resolve()
    if layout not in (None, LOADABLE, *FAMILIES):
        raise ConfigError(f"--layout {layout!r} is not one of {', '.join(FAMILIES)}", where="--layout")
    require_utf8(target, "target")
    with export_folder(target, source.resolve(), KIND) as folder:
        verify(source)
        opened = open_adapter(source)
        own = FAMILIES.get(opened.config.family, NATIVE)
        form = FAMILIES[(own.loads_as or own.name) if layout == LOADABLE else layout or own.name]
        form.write_config(opened.config, "float32")  # a layout without the network has no base model for the adapter
        config, tensors = describe_adapter(opened, form)
        _report_readers(opened, form, own)
        saved = {name: tensor.to(dtype).contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"format": "pt"}
        if form is own:  # in another layout the base model has other tensors
            metadata[IDENTITY] = opened.base.identity
        save_file(saved, folder / "adapter_model.safetensors", metadata=metadata)
        write_json(folder / "adapter_config.json", config)
        (folder / "README.md").write_text(_card(source, opened, form, own), encoding="utf-8")
    return target


def describe_adapter(opened: AdapterFolder, form: ModelFamily) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's settings, and its tensors by name. Raises: ConfigError for what the family's files cannot express."""
    adapter = opened.adapter
    terms = dict(_stored_terms(opened, form))
    rank = max(len(term.a) for term in terms.values())
    tensors: dict[str, torch.Tensor] = {}
    for module, term in terms.items():
        more = rank - len(term.a)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = F.pad(term.a, (0, 0, 0, more))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = F.pad(term.b, (0, more))
        if term.magnitudes is not None:
            if (term.owner < 0).any():
                raise ConfigError(
                    f"{module} has magnitudes for a part of its rows only",
                    where="--layout",
                    why="PEFT has one for every row of a module",
                    do=f"give --layout {NATIVE.loads_as}, whose files have q, k and v apart, or --merge",
                )
            tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = term.magnitudes
    saved = list(_saved_modules(opened, form))
    tensors |= {f"{PREFIX}{name}": tensor for name, tensor in saved}
    is_tied = "embedding" in adapter.train and opened.config.tie_word_embeddings
    if is_tied:  # with ensure_weight_tying PEFT requires the copy
        (head,) = form.stored("output.weight", opened.config)
        tensors[f"{PREFIX}{head.name}"] = opened.tensors["model.tok_embeddings.weight"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": opened.base.name,
        "r": rank,
        "lora_alpha": adapter.scale * rank,
        "lora_dropout": adapter.dropout,
        "target_modules": list(dict.fromkeys(module.rpartition(".")[2] for module in terms)),
        "use_dora": adapter.dora,
        "modules_to_save": list(dict.fromkeys(name.split(".")[-2] for name, _ in saved)) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    if is_tied:
        config["ensure_weight_tying"] = True
    return config, tensors


def _stored_terms(opened: AdapterFolder, form: ModelFamily) -> Iterator[tuple[str, FullTerm]]:
    """(module of the family, its term), in the network's order."""
    for layer in range(opened.config.num_layers):
        for kind in MATRICES:
            matrix = f"model.layers.{layer}.{kind}"
            if (term := opened.term(matrix)) is None:
                continue
            for stored in form.stored(f"{matrix}.weight", opened.config):
                part = term.take_rows(stored_rows(stored))
                if len(part.a):
                    yield stored.name.removesuffix(".weight"), part


def _saved_modules(opened: AdapterFolder, form: ModelFamily) -> Iterator[tuple[str, torch.Tensor]]:
    """Parts of the network that were trained in full, by the family's names."""
    for name in opened.tensors:
        if ".adapter." not in name:
            yield from split_for_family(name, opened.tensors[name], form, opened.config).items()


def _report_readers(opened: AdapterFolder, form: ModelFamily, own: ModelFamily) -> None:
    if opened.adapter.train:
        logger.warning(
            f"{', '.join(opened.adapter.train)} were trained in full: PEFT reads them (modules_to_save), vLLM and "
            "LMDeploy do not. Give --merge for them"
        )
    if opened.adapter.dora:
        logger.warning("vLLM and LMDeploy do not read DoRA's magnitudes: give --merge for them")
    if opened.frozen_weights != "own":
        logger.warning(
            f"the adapter was trained on weights in {opened.frozen_weights}: on the same model without quantization it "
            "computes something slightly different. Load the model in that form as well, or give --merge"
        )
    if form is not own:
        logger.info(
            f"names are those of the {form.name} layout: the adapter belongs to the base model converted to that layout"
        )


def _card(checkpoint: Path, opened: AdapterFolder, form: ModelFamily, own: ModelFamily) -> str:
    adapter = opened.adapter
    base = opened.base.name if form is own else f"{opened.base.name}, converted to the {form.name} layout"
    kind = "DoRA" if adapter.dora else "LoRA"
    return f"""---
library_name: peft
base_model: {opened.base.name}
tags: [xtuner, lora, {form.name}]
---
# {checkpoint.resolve().parent.name}, {checkpoint.resolve().stem}

{kind} of rank {adapter.rank}, alpha {adapter.alpha:g} ({adapter.scaling}), trained with xtuner {xtuner.__version__} on
`{opened.base.name}` (identity `{opened.base.identity}`), whose weights were kept in {opened.frozen_weights}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, "this folder")
```
"""

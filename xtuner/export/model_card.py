"""The model card of an export: where the weights come from, with fingerprints that can be compared."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import xtuner
from xtuner.core.files import MANIFEST, read_json
from xtuner.export.sources import OpenedCheckpoint
from xtuner.families import FAMILIES
from xtuner.families.base import ModelFamily
from xtuner.model.decoder import DecoderConfig


def render_card(
    checkpoint: Path, opened: OpenedCheckpoint, c: DecoderConfig, layout: ModelFamily, dtype: torch.dtype
) -> str:
    """README.md as text. Raises: CheckpointError."""
    title, run = checkpoint.resolve().name, ""
    origin = f"Converted with xtuner {xtuner.__version__} from {opened.description}.\nE"
    if trainer := opened.trainer:
        title = f"{checkpoint.parent.name}, iteration {trainer['state']['iteration']}"
        origin, run = f"Trained with xtuner {xtuner.__version__}, e", _run(checkpoint, trainer)
    return f"""---
library_name: transformers
tags: [{", ".join(("xtuner", *FAMILIES[c.family].tags))}]
---
# {title}

{origin}xported in the `{layout.name}` layout as {str(dtype)[6:]}.

| | |
|---|---|
| layers, hidden size, vocabulary | {c.num_layers}, {c.hidden_size}, {c.vocab_size} |
{run}"""


def _run(checkpoint: Path, trainer: Mapping[str, Any]) -> str:
    """The part about the run, for checkpoints of xtuner: more rows, and the settings."""
    state, data = trainer["state"], trainer["data"]
    files = read_json(checkpoint / MANIFEST)["files"]
    weights = "".join(
        entry["sha256"] for name, entry in sorted(files.items()) if name.startswith(("weights/", "adapter/"))
    )
    return f"""| iterations | {state["iteration"]} of {trainer["max_iterations"]} |
| packs | {state["packs"]:,} of {data["packed_length"]:,} tokens |
| tokens learned from | {state["targets"]:,} |
| label rule | {data["label_rule"]} |
| fingerprint of the data | `{data["data"]}` |
| fingerprint of the fp32 masters | `{hashlib.sha256(weights.encode()).hexdigest()}` |

The settings of the run:

```json
{json.dumps(trainer["config"], indent=2, ensure_ascii=False)}
```
"""

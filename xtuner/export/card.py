"""The model card of an export: where the weights come from, in facts that can be compared."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import xtuner
from xtuner.core.files import MANIFEST, read_json
from xtuner.export.sources import Opened
from xtuner.model.decoder import DecoderConfig


def card(checkpoint: Path, opened: Opened, c: DecoderConfig, layout: str, dtype: torch.dtype) -> str:
    """README.md as text. Raises: CheckpointError."""
    if opened.trainer is not None:
        return _trained(checkpoint, opened.trainer, c, layout, dtype)
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [xtuner, internlm2]",
            "---",
            f"# {checkpoint.resolve().name}",
            "",
            f"Converted with xtuner {xtuner.__version__} from {opened.what}.",
            f"Exported in the `{layout}` layout as {str(dtype)[6:]}.",
            "",
            "| | |",
            "|---|---|",
            f"| layers, hidden size, vocabulary | {c.num_layers}, {c.hidden_size}, {c.vocab_size} |",
            "",
        ]
    )


def _trained(checkpoint: Path, trainer: Mapping[str, Any], c: DecoderConfig, layout: str, dtype: torch.dtype) -> str:
    """Of a checkpoint of ours."""
    state, data = trainer["state"], trainer["data"]
    files = read_json(checkpoint / MANIFEST)["files"]
    weights = "".join(entry["sha256"] for name, entry in sorted(files.items()) if name.startswith("weights/"))
    fingerprint = hashlib.sha256(weights.encode()).hexdigest()
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [xtuner, internlm2]",
            "---",
            f"# {checkpoint.parent.name}, iteration {state['iteration']}",
            "",
            f"Trained with xtuner {xtuner.__version__}, exported in the `{layout}` layout as {str(dtype)[6:]}.",
            "",
            "| | |",
            "|---|---|",
            f"| layers, hidden size, vocabulary | {c.num_layers}, {c.hidden_size}, {c.vocab_size} |",
            f"| iterations | {state['iteration']} of {trainer['max_iterations']} |",
            f"| packs | {state['packs']:,} of {data['packed_length']:,} tokens |",
            f"| tokens learned from | {state['targets']:,} |",
            f"| label rule | {data['label_rule']} |",
            f"| fingerprint of the data | `{data['data']}` |",
            f"| fingerprint of the fp32 masters | `{fingerprint}` |",
            "",
            "The settings of the run:",
            "",
            "```json",
            json.dumps(trainer["config"], indent=2, ensure_ascii=False),
            "```",
            "",
        ]
    )

"""A checkpoint → a Hugging Face folder, one tensor at a time: shards, index, config, tokenizer, model card.

Memory stays below one shard plus one tensor: tensors are read, cast and collected until a shard is full.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import xtuner
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, read_json, verify, write_json
from xtuner.core.log import human_bytes, progress
from xtuner.data.tokenizer import FILES as TOKENIZER_FILES
from xtuner.export.place import export_folder
from xtuner.export.tokenizer_json import complete
from xtuner.model.decoder import CausalLM, DecoderConfig
from xtuner.model.families import LAYOUTS, read_config, split, write_config
from xtuner.model.weights import INDEX, WeightFolder

IM_END = "<|im_end|>"
KIND = "export"  # in the manifest: what may be replaced by the next export


def export(
    checkpoint: str | Path,
    target: str | Path,
    tokenizer_folder: Path | None,
    layout: str = "internlm2",
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 2 * 10**9,
    with_code: bool = False,
) -> Path:
    """Write `target`, whole or not at all. An earlier export there is replaced, anything else is not.

    Args:
        checkpoint: an `iter_N.pth` directory; verified first.
        tokenizer_folder: whose tokenizer files are copied; None for none.
        layout: "internlm2" (LMDeploy's and llama.cpp's own; not known to transformers) or "llama" (loads everywhere).
        dtype: of the weights written.
        max_shard_bytes: a shard is at most this large, unless one tensor alone is larger.
        with_code: also write our two .py files, with which transformers 5 loads the internlm2 layout
            (`trust_remote_code=True`).

    Raises: CheckpointError, ConfigError.
    """
    checkpoint, target = Path(checkpoint), Path(target).expanduser().resolve()
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout!r} is not one of {', '.join(LAYOUTS)}", where="--layout")
    if with_code and layout != "internlm2":
        raise ConfigError(
            "--with-code belongs to the internlm2 layout", where="--with-code", do="leave it out: llama needs no code"
        )
    if not (checkpoint / MANIFEST).is_file():
        raise CheckpointError(
            "there is no checkpoint" if not checkpoint.exists() else "this is not a whole checkpoint",
            where=str(checkpoint),
            do="give a work_dirs/CONFIG/iter_N.pth folder; work_dirs/CONFIG/last_checkpoint names the newest",
        )
    with export_folder(target, checkpoint.resolve(), KIND) as folder:  # fails at once if nothing can be written there
        verify(checkpoint)
        config = read_config(read_json(checkpoint / "weights" / "config.json"))
        _write_shards(checkpoint / "weights", folder, config, layout, dtype, max_shard_bytes)
        code = _copy_code(folder) if with_code else {}
        write_json(folder / "config.json", {**code, **write_config(config, layout, dtype)})
        stops = _copy_tokenizer(tokenizer_folder, folder, config)
        write_json(folder / "generation_config.json", _generation(config, stops))
        (folder / "README.md").write_text(_card(checkpoint, config, layout, dtype), encoding="utf-8")
    return target


def _tensors(
    weights: WeightFolder, config: DecoderConfig, layout: str, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    with torch.device("meta"):
        names = [name for name, _ in CausalLM(config).named_parameters()]
    for name in progress(names, "writing weights"):
        for hf_name, tensor in split(name, weights[name], layout, config).items():
            yield hf_name, tensor.to(dtype).contiguous()


def _write_shards(source: Path, folder: Path, c: DecoderConfig, layout: str, dtype: torch.dtype, limit: int) -> None:
    """Fill shards in the order of the network; names get their final count at the end."""
    shard: dict[str, torch.Tensor] = {}
    files: list[list[str]] = []
    sizes: list[int] = []
    held = 0

    def flush() -> None:
        nonlocal held
        save_file(shard, folder / f"shard-{len(files)}.tmp", metadata={"format": "pt"})
        files.append(list(shard))
        sizes.append(held)
        shard.clear()
        held = 0

    for name, tensor in _tensors(WeightFolder(source), c, layout, dtype):
        if shard and held + tensor.nbytes > limit:
            flush()
        shard[name] = tensor
        held += tensor.nbytes
    flush()
    count = len(files)
    final = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    for i, name in enumerate(final):
        (folder / f"shard-{i}.tmp").rename(folder / name)
    if count > 1:
        weight_map = {name: final[i] for i, names in enumerate(files) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _copy_code(folder: Path) -> dict[str, Any]:
    """Write the .py files; returns what `config.json` says of them."""
    for name in ("configuration_internlm2.py", "modeling_internlm2.py"):
        shutil.copyfile(Path(__file__).parent / "remote" / name, folder / name)
    model = "modeling_internlm2.InternLM2"
    config, causal = "configuration_internlm2.InternLM2Config", f"{model}ForCausalLM"
    return {"auto_map": {"AutoConfig": config, "AutoModel": f"{model}Model", "AutoModelForCausalLM": causal}}


def _copy_tokenizer(source: Path | None, folder: Path, config: DecoderConfig) -> list[int]:
    """Copy tokenizer files, and add what loading needs; return the ids at which a chat model stops."""
    for name in TOKENIZER_FILES if source else ():
        if source and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    complete(folder)
    path = folder / "tokenizer_config.json"
    added = read_json(path).get("added_tokens_decoder", {}) if path.is_file() else {}
    chat = [int(i) for i, token in added.items() if token.get("content") == IM_END]
    return [config.eos_token_id, *chat]


def _generation(c: DecoderConfig, stops: list[int]) -> dict[str, Any]:
    ids = {"bos_token_id": c.bos_token_id, "eos_token_id": stops, "pad_token_id": c.pad_token_id}
    return {**ids, "do_sample": False}


def _card(checkpoint: Path, c: DecoderConfig, layout: str, dtype: torch.dtype) -> str:
    """The model card: where the weights come from, in facts that can be compared."""
    trainer = read_json(checkpoint / "trainer.json")
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


def parse_size(text: str) -> int:
    """`2GB` → 2 · 10⁹, `500MB`, `1GiB` → 2³⁰. Raises: ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise ConfigError(f"{text!r} is not a size", where="--max-shard-size", do="write it like 2GB or 500MB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def summary(folder: Path) -> str:
    """One line on what was written."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return f"{folder}: {len(files)} files, {human_bytes(sum(p.stat().st_size for p in files))}"

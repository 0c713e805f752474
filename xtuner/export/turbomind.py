"""A Hugging Face folder → the directory that LMDeploy up to 0.9 serves (`lmdeploy convert`, removed in LMDeploy 0.10).

    DST/*.json, *.py, tokenizer.model, …         copied from the source
    DST/triton_models/weights/config.yaml        shape, tp, dtype, chat template: `turbomind_config.py`
    … layers.0.attention.w_qkv.1.weight, …       next to it: raw little-endian numbers without header; 1 is the tp rank

Every file equals that of lmdeploy 0.9.2.post1, bit for bit. Differences: any head_dim (lmdeploy assumes 128 in the
internlm2 layout), yarn's factor as in config.json, no GPU needed, no code of the source is run, and our `manifest.json`
is added. Which features lmdeploy reads: `turbomind_support.py`.

Memory: tensors are mapped from safetensors and processed in blocks. In addition to imports, at most four blocks and
three times one layer's wqkv are in memory (7B: 280 MB), for any size of the model. Foreign `.bin` weights are read by
our own reader, which also maps them.
"""

import shlex
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from xtuner.core import path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, read_json
from xtuner.core.log import logger
from xtuner.data.tokenizer import load_tokenizer
from xtuner.export import turbomind_support as support
from xtuner.export.destination import export_folder
from xtuner.export.turbomind_config import TurboMindSource, find_difference, flatten_yaml, render_yaml
from xtuner.families import read_model
from xtuner.families.base import ModelFamily
from xtuner.families.network import DecoderConfig
from xtuner.model.weights import stream_weights

KIND = "turbomind"
WEIGHTS = Path("triton_models") / "weights"
BLOCK = 32 * 2**20
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = (64, 128)  # head sizes that TurboMind supports, according to lmdeploy 0.9.2.post1

Blocks = Iterator[torch.Tensor]


def read_source(folder: Path) -> TurboMindSource:
    """Read a folder's configs. Raises: ConfigError for a path that is not a Hugging Face folder, and for a model or
    tokenizer that cannot be converted; CheckpointError without config.json."""
    path_kinds.require_kind(
        folder, (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN), "HF_DIR", "give {} as the model"
    )
    hf = read_json(folder / "config.json")
    layout, config = read_model(folder)
    _check_features(folder, hf, layout, config)
    tokenizer = load_tokenizer(folder)
    return TurboMindSource(
        folder, hf, layout, config, tokenizer.vocab_size, support.find_chat(layout, tokenizer.special)
    )


def _check_features(folder: Path, hf: dict[str, Any], layout: ModelFamily, c: DecoderConfig) -> None:
    """Raises: ConfigError unless LMDeploy computes the network in this layout."""
    path, missing = folder / "config.json", support.missing_features(layout, c)
    if layout.trains_as or (missing and c.family != layout.name):
        raise ConfigError(
            f"this folder has a {c.family} network in another form than is converted",
            where=f"{path}: model_type",
            why="LMDeploy would take the directory for a network of another family",
            do=f"export it first: xtuner convert pth_to_hf CONFIG {shlex.quote(str(folder))} HF_DIR",
        )
    if layout.architecture not in support.ARCHITECTURES:
        raise ConfigError(
            f"{support.CONVERTER} does not know {layout.architecture}",
            where=f"{path}: model_type",
            why="it would refuse the converted directory",
            do="export the model with --layout llama if it can be expressed so, or use another server",
        )
    if missing:
        everywhere = c.num_windows in (0, c.num_layers)
        raise ConfigError(
            f"the model has {', '.join(missing.values())}, which {support.CONVERTER} does not read from "
            f"{layout.architecture}",
            where=f"{path}: {support.key_of(next(iter(missing)), hf)}",
            why="it drops them without a message: the directory would serve another network",
            do=f"serve the folder itself with the PyTorch engine of LMDeploy 0.18: `lmdeploy serve api_server "
            f"{shlex.quote(str(folder))} --backend pytorch`"
            if everywhere
            else "serve the folder itself with a server that has windows in some layers, such as vLLM",
        )


def convert_to_turbomind(
    source: TurboMindSource,
    target: Path,
    tp: int = 1,
    dtype: str = "auto",
    model_name: str = "",
    chat_template: str = support.BASE,
) -> Path:
    """Write `target` atomically. An earlier conversion there is replaced, anything else is not.

    Args:
        tp: number of GPUs that share the model, a power of two.
        dtype: "auto", "float16" or "bfloat16".
        model_name: recorded in config.yaml; LMDeploy does not use it.
        chat_template: LMDeploy's name of the template used for serving; "base" for none.

    Raises: ConfigError, CheckpointError.
    """
    c, dtype = source.config, source.dtype(dtype)
    _check_tp(c, tp)
    if c.head_dim not in KERNELS:
        logger.warning(f"head_dim is {c.head_dim}; LMDeploy 0.9 serves {KERNELS[0]} and {KERNELS[1]} only")
    if source.tokenizer_size > c.vocab_size:
        excess = f"the tokenizer has {source.tokenizer_size} ids, the embedding {c.vocab_size} rows"
        logger.warning(f"{excess}: a text with one of the other ids cannot be served")
    with export_folder(target.expanduser().resolve(), source.folder.resolve(), KIND) as folder:
        (folder / WEIGHTS).mkdir(parents=True)
        for name in _companions(source.folder):
            shutil.copyfile(source.folder / name, folder / name)
        text = render_yaml(source, tp, dtype, model_name, chat_template)
        (folder / WEIGHTS / "config.yaml").write_text(text, encoding="utf-8")
        for name, blocks in _files(source, tp, DTYPES[dtype], "writing weights"):
            with open(folder / WEIGHTS / name, "wb") as f:
                for block in blocks:
                    f.write(_bytes(block))
    return target


def compare_with_source(source: TurboMindSource, existing: Path) -> int:
    """Compare a converted directory, ours or LMDeploy's, with its source; returns the number of its weight files.

    Tp, dtype, name and chat template are taken from its config.yaml. Of that file only the keys that we write, too, are
    compared.

    Raises: CheckpointError naming the first difference, and in a weight file the first number that differs.
    """
    config_path = existing / WEIGHTS / "config.yaml"
    if not config_path.is_file():
        raise CheckpointError("this is not a converted directory", where=str(existing), why=f"{config_path} is missing")
    found = flatten_yaml(config_path.read_text(encoding="utf-8"))
    try:
        tp, dtype = int(found["model_config.attn_tp_size"]), found["model_config.weight_type"]
        name, template = found["model_config.model_name"], found["model_config.chat_template"]
        torch_dtype = DTYPES[dtype]
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"config.yaml cannot be parsed: {e}", where=str(config_path)) from None
    _check_tp(source.config, tp)
    text = render_yaml(source, tp, dtype, name, template)
    if difference := find_difference(found, flatten_yaml(text)):
        raise CheckpointError(
            difference,
            where=str(config_path),
            why="it was made from another model, or by an lmdeploy that reads config.json differently",
        )
    for companion in _companions(source.folder):
        path = existing / companion
        if not path.is_file() or path.read_bytes() != (source.folder / companion).read_bytes():
            raise CheckpointError(f"{companion} is not the source's", where=str(path))
    names = {"config.yaml"}
    for file, blocks in _files(source, tp, torch_dtype, "comparing weights"):
        _compare(existing / WEIGHTS / file, blocks)
        names.add(file)
    if extra := {p.name for p in (existing / WEIGHTS).iterdir()} - names:
        raise CheckpointError(f"{min(extra)} is not of this model", where=str(existing / WEIGHTS / min(extra)))
    return len(names) - 1


def _check_tp(c: DecoderConfig, tp: int) -> None:
    """Raise ConfigError unless heads and the embedding's columns divide evenly by `tp`, and kv heads can be divided or
    replicated."""

    def fits(n: int) -> bool:
        shared = c.num_kv_heads % n == 0 or n % c.num_kv_heads == 0
        return c.num_heads % n == 0 and c.hidden_size % n == 0 and shared

    sizes = [n for n in (2**i for i in range(c.num_heads.bit_length())) if fits(n)]
    if tp not in sizes:
        raise ConfigError(
            f"{tp} GPUs cannot share this model",
            where=f"--tp {tp}",
            why=f"it has {c.num_heads} heads, {c.num_kv_heads} kv heads and a hidden size of {c.hidden_size}, to be "
            "divided evenly by a power of two",
            do=f"sizes that work: {', '.join(map(str, sizes))}",
        )


def _companions(folder: Path) -> list[str]:
    """Files to copy: those that LMDeploy copies, which are more than the tokenizer's; never our manifest."""
    named = {"tokenizer.model", "qwen.tiktoken", "merges.txt"}
    files = (p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    return sorted(p.name for p in files if p.suffix in (".json", ".py") or p.name in named)


def _files(source: TurboMindSource, tp: int, dtype: torch.dtype, what: str) -> Iterator[tuple[str, Blocks]]:
    """Every weight file and its contents, in the order of the source's tensors."""
    c = source.config
    for name, tensor in stream_weights(source.folder, source.layout, c, what):
        base, _, kind = name.removeprefix("model.").replace(".wqkv.", ".w_qkv.").rpartition(".")
        parts: list[tuple[str, Iterable[torch.Tensor]]] = []  # a name and what each rank has of it
        if base.endswith(("q_norm", "k_norm")):
            yield base, _blocks(base, _interleave(tensor[None]), dtype)
        elif base.endswith("norm"):
            yield f"{base}.{kind}", _blocks(base, tensor, dtype)
        else:
            parts.append((base, _parts(name, tensor, c, tp)))
        if base == "tok_embeddings" and c.tie_word_embeddings:
            parts.append(("output", _parts("output.weight", tensor, c, tp)))
        if base.endswith("w_qkv") and kind == "bias" and not c.output_bias:  # lmdeploy has both or none
            parts.append((base.replace("w_qkv", "wo"), [torch.zeros(c.hidden_size)] * tp))
        for matrix, ranks in parts:
            for rank, part in enumerate(ranks):
                file = f"{matrix}.{rank}.{kind}"
                yield file, _blocks(file, part, dtype)


def _parts(name: str, w: torch.Tensor, c: DecoderConfig, tp: int) -> Iterator[torch.Tensor]:
    """Our matrix [out, in] as each rank's [in, out], the embedding [V, H] as [V, H / tp]; views where possible.

    Rows of the vocabulary and channels of the FFN are padded with zeros to a multiple of tp. Of the biases, that of
    `wqkv` is split like its columns, and every rank has that of `wo`.
    """
    matrix = name.split(".")[-2]
    if matrix == "wqkv":
        yield from (_qkv(w.view(len(w), -1), c, tp, rank) for rank in range(tp))
    elif w.dim() == 1:
        yield from [w] * tp
    elif matrix in ("wo", "w2"):  # split along the input dimension
        yield from (part.t() for part in _filled(w, 1, tp).chunk(tp, dim=1))
    elif matrix == "tok_embeddings":
        yield from _filled(w, 0, tp).chunk(tp, dim=1)
    else:
        yield from (part.t() for part in _filled(w, 0, tp).chunk(tp, dim=0))


def _filled(w: torch.Tensor, dim: int, tp: int) -> torch.Tensor:
    lacking = -w.shape[dim] % tp
    return F.pad(w, (0, lacking) if dim == 1 else (0, 0, 0, lacking)) if lacking else w


def _qkv(wqkv: torch.Tensor, c: DecoderConfig, tp: int, rank: int) -> torch.Tensor:
    """One rank's [H, (q + k + v) · D]: its query heads, its kv heads' k, then their v. Of the bias, H is 1."""
    groups = wqkv.view(c.num_kv_heads, -1, c.head_dim, wqkv.shape[1])  # [K, G + 2, D, H]
    copies = max(1, tp // c.num_kv_heads)  # ranks that share a kv head
    heads, kv_heads = c.num_heads // tp, c.num_kv_heads * copies // tp
    first = rank * kv_heads // copies
    per_group = c.queries_per_kv_head
    queries = [divmod(i, per_group) for i in range(rank * heads, (rank + 1) * heads)]
    q = torch.stack([groups[g, i] for g, i in queries])
    k, v = (groups[first : first + kv_heads, i] for i in (-2, -1))
    return torch.cat((_interleave(q), _interleave(k), v)).flatten(0, 1).t()


def _interleave(heads: torch.Tensor) -> torch.Tensor:
    """[N, D, …] with pairs (j, j + D/2), which Hugging Face rotates, as pairs (2j, 2j + 1), which TurboMind rotates."""
    return heads.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def _blocks(name: str, x: torch.Tensor, dtype: torch.dtype) -> Blocks:
    """Rows in the form of the file, at most BLOCK bytes at a time."""
    for part in x.split(max(1, BLOCK // max(1, x[0].nbytes))):
        block = part.to(dtype).contiguous()
        if dtype == torch.float16 != x.dtype and block.isinf().any():
            raise ConfigError(
                f"{name} has numbers that fp16 cannot represent (above 65504)",
                where="--dtype",
                why="they would become infinite",
                do="give --dtype bf16",
            )
        yield block


def _bytes(block: torch.Tensor) -> memoryview:
    return block.view(torch.uint8).flatten().numpy().data


def _compare(path: Path, blocks: Blocks) -> None:
    """Raise CheckpointError unless the file has exactly these numbers. It is mapped, not read into memory."""
    if not path.is_file():
        raise CheckpointError(f"{path.name} is missing", where=str(path))
    size, at = path.stat().st_size, 0
    mapped = torch.from_file(str(path), size=size // 2, dtype=torch.int16) if size > 1 else torch.empty(0)
    for block in blocks:
        wanted, found = block.flatten(), mapped[at : at + block.numel()]
        if len(found) < len(wanted):
            raise CheckpointError(f"{path.name} is too short: {size} bytes", where=str(path))
        if not found.equal(wanted.view(torch.int16)):
            i = int((found != wanted.view(torch.int16)).nonzero()[0])
            value, true = float(found.view(block.dtype)[i]), float(wanted[i])
            raise CheckpointError(
                f"{path.name} differs from the source: number {at + i} is {value} instead of {true}",
                where=f"{path}: byte {2 * (at + i)}",
            )
        at += len(wanted)
    if size > 2 * at:
        raise CheckpointError(f"{path.name} is too long: {size} bytes instead of {2 * at}", where=str(path))

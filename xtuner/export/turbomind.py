"""A Hugging Face folder → the directory from which LMDeploy up to 0.9 serves (its `lmdeploy convert`, gone since 0.10).

    DST/*.json, *.py, tokenizer.model, …         copied from the source
    DST/triton_models/weights/config.yaml        shape, tp, dtype, chat template: `turbomind_config.py`
    … layers.0.attention.w_qkv.1.weight, …       beside it: bare numbers, little-endian, no header; 1 is the tp rank

Every file equals that of lmdeploy 0.9.2.post1, bit for bit. Differences: any head_dim (it takes 128 for granted in the
internlm2 layout), no GPU, no code of the source is run, and `manifest.json` of ours is beside the rest.

Memory: tensors are mapped from safetensors and pass through in blocks. Above what the imports take, at most four blocks
and three times one layer's wqkv are held (7B: 280 MB), whatever the size of the model. Foreign `.bin` weights are read
by our own reader, which maps them, too.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from xtuner.core import path_kinds
from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import MANIFEST, read_json
from xtuner.core.log import logger
from xtuner.data.tokenizer import load_tokenizer
from xtuner.export.destination import export_folder
from xtuner.export.turbomind_config import BASE, Source, config_text, flat, shared_difference
from xtuner.families import read_model
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import stream

KIND = "turbomind"
WEIGHTS = Path("triton_models") / "weights"
BLOCK = 32 * 2**20
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
KERNELS = (64, 128)  # head sizes that lmdeploy 0.9.2.post1 says TurboMind computes

Blocks = Iterator[torch.Tensor]


def read_source(folder: Path) -> Source:
    """Raises: ConfigError for what is not a Hugging Face folder, or a model or tokenizer that cannot be converted,
    CheckpointError without config.json."""
    path_kinds.require_kind(
        folder, (path_kinds.HF, path_kinds.BARE, path_kinds.UNKNOWN), "HF_DIR", "give {} as the model"
    )
    hf = read_json(folder / "config.json")
    layout, config = read_model(folder)
    if config.attention_bias:
        raise ConfigError(
            "the model has biases in attention",
            where=f"{folder / 'config.json'}: bias",
            why="converted directories of this family hold none; `lmdeploy convert` left them out without a word",
            do="serve the folder itself with LMDeploy 0.10 or newer, or with another server",
        )
    tokenizer = load_tokenizer(folder)
    speaks_chat = layout.chat is not None and any(mark in tokenizer.special for mark in layout.chat.turn_marks)
    return Source(folder, hf, layout, config, tokenizer.vocab_size, speaks_chat)


def convert(
    source: Source, target: Path, tp: int = 1, dtype: str = "auto", model_name: str = "", chat_template: str = BASE
) -> Path:
    """Write `target`, whole or not at all. An earlier conversion there is replaced, anything else is not.

    Args:
        tp: GPUs that share the model, a power of two.
        dtype: "auto", "float16" or "bfloat16".
        model_name: noted in config.yaml; LMDeploy does not use it.
        chat_template: LMDeploy's name of it, used whenever the directory is served; BASE is none.

    Raises: ConfigError, CheckpointError.
    """
    c, dtype = source.config, source.dtype(dtype)
    _check_tp(c, tp)
    if c.head_dim not in KERNELS:
        logger.warning(f"head_dim is {c.head_dim}; LMDeploy 0.9 serves {KERNELS[0]} and {KERNELS[1]} only")
    if source.tokenizer_size > c.vocab_size:
        excess = f"the tokenizer has {source.tokenizer_size} ids, the embedding {c.vocab_size} rows"
        logger.warning(f"{excess}: a text that gives one of the ids above cannot be served")
    with export_folder(target.expanduser().resolve(), source.folder.resolve(), KIND) as folder:
        (folder / WEIGHTS).mkdir(parents=True)
        for name in _companions(source.folder):
            shutil.copyfile(source.folder / name, folder / name)
        text = config_text(source, tp, dtype, model_name, chat_template)
        (folder / WEIGHTS / "config.yaml").write_text(text, encoding="utf-8")
        for name, blocks in _files(source, tp, DTYPES[dtype], "writing weights"):
            with open(folder / WEIGHTS / name, "wb") as f:
                for block in blocks:
                    f.write(_bytes(block))
    return target


def check(source: Source, existing: Path) -> int:
    """Compare a converted directory, ours or LMDeploy's, with its source; returns how many weight files it has.

    Tp, dtype, name and chat template are those of its config.yaml, of which only keys that both know are compared.

    Raises: CheckpointError naming the first difference, and in a weight file the first number that differs.
    """
    place = existing / WEIGHTS / "config.yaml"
    if not place.is_file():
        raise CheckpointError("this is no converted directory", where=str(existing), why=f"{place} is missing")
    found = flat(place.read_text(encoding="utf-8"))
    try:
        tp, dtype = int(found["model_config.attn_tp_size"]), found["model_config.weight_type"]
        name, template = found["model_config.model_name"], found["model_config.chat_template"]
        torch_dtype = DTYPES[dtype]
    except (KeyError, ValueError) as e:
        raise CheckpointError(f"config.yaml cannot be understood: {e}", where=str(place)) from None
    _check_tp(source.config, tp)
    text = config_text(source, tp, dtype, name, template)
    if difference := shared_difference(found, flat(text)):
        raise CheckpointError(difference, where=str(place), why="it belongs to another model than the source")
    for companion in _companions(source.folder):
        path = existing / companion
        if not path.is_file() or path.read_bytes() != (source.folder / companion).read_bytes():
            raise CheckpointError(f"{companion} is not the source's", where=str(path))
    names = {"config.yaml"}
    for file, blocks in _files(source, tp, torch_dtype, "comparing weights"):
        _compare(existing / WEIGHTS / file, blocks)
        names.add(file)
    if strangers := {p.name for p in (existing / WEIGHTS).iterdir()} - names:
        raise CheckpointError(f"{min(strangers)} is not of this model", where=str(existing / WEIGHTS / min(strangers)))
    return len(names) - 1


def _check_tp(c: DecoderConfig, tp: int) -> None:
    """Heads and the embedding's columns are dealt out evenly; kv heads too, or each goes to several ranks."""

    def fits(n: int) -> bool:
        shared = c.num_kv_heads % n == 0 or n % c.num_kv_heads == 0
        return c.num_heads % n == 0 and c.hidden_size % n == 0 and shared

    sizes = [n for n in (2**i for i in range(c.num_heads.bit_length())) if fits(n)]
    if tp not in sizes:
        raise ConfigError(
            f"{tp} GPUs cannot share this model",
            where=f"--tp {tp}",
            why=f"it has {c.num_heads} heads, {c.num_kv_heads} kv heads and a hidden size of {c.hidden_size}; "
            "each rank takes as many, and their number is a power of two",
            do=f"sizes that would do: {', '.join(map(str, sizes))}",
        )


def _companions(folder: Path) -> list[str]:
    """Files that go along: those that LMDeploy takes, which are more than the tokenizer's; never our own manifest."""
    named = {"tokenizer.model", "qwen.tiktoken", "merges.txt"}
    files = (p for p in folder.iterdir() if p.is_file() and p.name != MANIFEST)
    return sorted(p.name for p in files if p.suffix in (".json", ".py") or p.name in named)


def _files(source: Source, tp: int, dtype: torch.dtype, what: str) -> Iterator[tuple[str, Blocks]]:
    """Every weight file and its contents, one tensor of the source after the other."""
    c = source.config
    for name, tensor in stream(source.folder, source.layout, c, what):
        base = name.removeprefix("model.").replace(".wqkv.", ".w_qkv.")
        if name.endswith("norm.weight"):
            yield base, _blocks(base, tensor, dtype)
            continue
        for rank, part in enumerate(_parts(name, tensor, c, tp)):
            file = f"{base.removesuffix('.weight')}.{rank}.weight"
            yield file, _blocks(file, part, dtype)


def _parts(name: str, w: torch.Tensor, c: DecoderConfig, tp: int) -> Iterator[torch.Tensor]:
    """A matrix [out, in] of ours as each rank's [in, out], the embedding [V, H] as [V, H / tp]. Views where possible.

    What does not divide by tp is filled up with zeros: rows of the vocabulary, channels of the FFN.
    """
    kind = name.split(".")[-2]
    if kind == "wqkv":
        yield from (_qkv(w, c, tp, rank) for rank in range(tp))
        return
    if kind in ("wo", "w2"):  # split where the tensor's input is
        yield from (part.t() for part in _filled(w, 1, tp).chunk(tp, dim=1))
    elif kind == "tok_embeddings":
        yield from _filled(w, 0, tp).chunk(tp, dim=1)
    else:
        yield from (part.t() for part in _filled(w, 0, tp).chunk(tp, dim=0))


def _filled(w: torch.Tensor, dim: int, tp: int) -> torch.Tensor:
    lacking = -w.shape[dim] % tp
    return F.pad(w, (0, lacking) if dim == 1 else (0, 0, 0, lacking)) if lacking else w


def _qkv(wqkv: torch.Tensor, c: DecoderConfig, tp: int, rank: int) -> torch.Tensor:
    """One rank's [H, (q + k + v) · D]: its query heads, its kv heads' k, then their v.

    TurboMind rotates neighbours (2j, 2j + 1), Hugging Face halves (j, j + D/2): rows of q and k change places.
    """
    groups = wqkv.view(c.num_kv_heads, -1, c.head_dim, wqkv.shape[1])  # [K, G + 2, D, H]
    copies = max(1, tp // c.num_kv_heads)  # ranks that share a kv head
    heads, kv_heads = c.num_heads // tp, c.num_kv_heads * copies // tp
    first = rank * kv_heads // copies
    per_group = c.num_heads // c.num_kv_heads
    queries = [divmod(i, per_group) for i in range(rank * heads, (rank + 1) * heads)]
    q = torch.stack([groups[g, i] for g, i in queries])
    k, v = (groups[first : first + kv_heads, i] for i in (-2, -1))
    q, k = (x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2) for x in (q, k))
    return torch.cat((q, k, v)).flatten(0, 1).t()


def _blocks(name: str, x: torch.Tensor, dtype: torch.dtype) -> Blocks:
    """Rows as they lie in the file, at most BLOCK bytes at a time."""
    for part in x.split(max(1, BLOCK // max(1, x[0].nbytes))):
        block = part.to(dtype).contiguous()
        if dtype == torch.float16 != x.dtype and block.isinf().any():
            raise ConfigError(
                f"{name} holds numbers that fp16 does not (above 65504)",
                where="--dtype",
                why="they would become infinite",
                do="give --dtype bf16",
            )
        yield block


def _bytes(block: torch.Tensor) -> memoryview:
    return block.view(torch.uint8).flatten().numpy().data


def _compare(path: Path, blocks: Blocks) -> None:
    """Raise CheckpointError unless the file holds exactly these numbers. It is mapped, not read into memory."""
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

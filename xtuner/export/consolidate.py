"""Any checkpoint → one `.safetensors` file of fp32 weights under InternLM2's names, a tensor at a time.

Memory stays below the largest tensor in fp32 plus 32 MiB (two chunks): the header needs only shapes, and contents are
read, converted to fp32 and written one by one. Format: 8 bytes little-endian length of the header, the header (JSON:
name → dtype, shape, begin and end after the header), the data.
"""

import json
import math
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from xtuner.core.errors import CheckpointError, ConfigError
from xtuner.core.files import atomic_file, remove_leftovers
from xtuner.core.foreign_inputs import open_regular, short
from xtuner.core.log import human_bytes, logger, progress
from xtuner.export.destination import require_parent
from xtuner.export.sources import OpenedCheckpoint, read_tensor, recognise
from xtuner.families import NATIVE
from xtuner.families.network import DecoderConfig
from xtuner.model.weights import Shape, WeightSource, check_network, check_shapes, hf_shapes

CHUNK = 4 * 2**20  # elements that are converted and written at once: 16 MiB
_MARK = "xtuner convert weights"  # in the metadata of files that the next conversion may replace
_LARGEST_HEADER = 100 * 10**6  # bytes; safetensors' own limit


def consolidate(checkpoint: str | Path, target: str | Path) -> Path:
    """Write `target` atomically. An earlier file of this function is replaced, anything else is not.

    Args:
        checkpoint: any kind that `sources.recognise` supports.
        target: a name that ends in `.safetensors`.

    Raises: CheckpointError, ConfigError.
    """
    kind, target = recognise(checkpoint), Path(target).expanduser().resolve()
    require_parent(target)
    _refuse_to_replace(target, kind.path.resolve())
    opened = kind.open()
    logger.info(f"{kind.path}: {opened.description}")
    shapes = _checked_shapes(opened)
    remove_leftovers(target)
    try:
        with atomic_file(target, "wb") as file:
            _write(file, shapes, opened)
    except BrokenPipeError:  # of the terminal, not of the disk
        raise
    except OSError as e:
        raise CheckpointError(
            f"the weights cannot be written: {e.strerror or e}",
            where=str(target),
            why=f"they need {human_bytes(sum(4 * math.prod(s) for s in shapes.values()))}",
            do="check the disk: space, quota, permissions",
        ) from None
    return target


def _checked_shapes(opened: OpenedCheckpoint) -> dict[str, Shape]:
    """Our tensors, name → shape, checked against the network that the checkpoint describes, or else against layer 0."""
    if opened.config:
        check_network(opened.source, opened.layout, opened.config)
        return hf_shapes(opened.config)
    if opened.layout is not NATIVE:
        raise CheckpointError(
            f"the names are those of the {opened.layout.name} layout, and the number of heads is unknown",
            where=str(opened.source.path),
            why="q, k and v cannot be joined without it",
            do="xtuner convert pth_to_hf CONFIG SRC DST --fp32: the config describes the network",
        )
    wanted = expected_shapes(opened.source)
    check_shapes(opened.source, wanted, "layer 0")
    return wanted


def expected_shapes(source: WeightSource) -> dict[str, Shape]:
    """The tensors of an InternLM2 network with as many layers, all shaped like layer 0. Raises: CheckpointError."""
    found, first = source.shapes, "model.layers.0."
    layers = 1 + max((int(m[1]) for n in found if (m := re.match(r"model\.layers\.(\d{1,4})\.", n))), default=0)
    if absent := [n for n in hf_shapes(DecoderConfig(2, 2, 2, 1, 1, 1, 2)) if n not in found]:
        shown = short(", ".join(list(found)[:3])) or "none"
        raise CheckpointError(
            f"tensor {absent[0]} is missing",
            where=str(source.path),
            why=f"these are not weights of InternLM2, or not all; found: {shown}",
            do="give a checkpoint with all weights",
        )

    def size(name: str, dim: int) -> int:
        shape = found[name]
        return max(1, shape[dim]) if len(shape) == 2 else 1

    embedding, wqkv = "model.tok_embeddings.weight", f"{first}attention.wqkv"
    q = size(f"{first}attention.wo.weight", 1)
    kv = max(1, (size(f"{wqkv}.weight", 0) - q) // 2)  # as one kv head: other heads have the same shapes
    vocabulary, hidden, inner = size(embedding, 0), size(embedding, 1), size(f"{first}feed_forward.w1.weight", 0)
    more: dict[str, Any] = dict(
        qkv_bias=f"{wqkv}.bias" in found,
        output_bias=f"{first}attention.wo.bias" in found,
        mlp_bias=f"{first}feed_forward.w1.bias" in found,
    )
    one = hf_shapes(DecoderConfig(vocabulary, hidden, inner, 1, max(1, q // kv), 1, kv, **more))
    layer = {n.removeprefix(first): one.pop(n) for n in list(one) if n.startswith(first)}
    wanted = {embedding: one.pop(embedding)}
    return wanted | {f"model.layers.{i}.{n}": s for i in range(layers) for n, s in layer.items()} | one


def _write(file: IO[bytes], shapes: Mapping[str, Shape], opened: OpenedCheckpoint) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt", "writer": _MARK}}
    at = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + 4 * math.prod(shape)]}
        at += 4 * math.prod(shape)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    narrow = set()
    for name in progress(shapes, "writing weights", total=len(shapes)):
        tensor = read_tensor(opened, name)
        narrow.add(tensor.dtype)
        _write_numbers(file, tensor.reshape(-1).split(CHUNK))
        del tensor  # free it before the next is read
    narrow -= {torch.float32}
    if narrow:
        names = ", ".join(sorted(str(dtype)[6:] for dtype in narrow))
        logger.info(f"weights stored in {names} have no fp32 masters: their values are written as fp32")


def _write_numbers(file: IO[bytes], parts: Iterable[torch.Tensor]) -> None:
    for part in parts:
        file.write(part.to(torch.float32).contiguous().numpy().data)


def _refuse_to_replace(target: Path, checkpoint: Path) -> None:
    """Raise ConfigError unless `target` is new or an earlier file of ours. Both paths are resolved."""
    if target.suffix != ".safetensors":
        raise ConfigError("the target's name must end in .safetensors", where=str(target))
    if checkpoint in target.parents:
        raise ConfigError(
            "the target lies inside the checkpoint",
            where=str(target),
            why="the checkpoint would be changed",
            do="give another path",
        )
    if target.exists() and not _is_ours(target):
        raise ConfigError(
            "the target exists and is not an earlier output of this command",
            where=str(target),
            why="it would be replaced",
            do="give another name, or remove it",
        )


def _is_ours(file: Path) -> bool:
    try:
        with open_regular(file) as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(length)) if length <= _LARGEST_HEADER else {}
    except (OSError, struct.error, ValueError):
        return False
    facts = header.get("__metadata__") if isinstance(header, dict) else None
    return isinstance(facts, dict) and facts.get("writer") == _MARK

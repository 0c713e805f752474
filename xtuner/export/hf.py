"""Any checkpoint → a Hugging Face folder, one tensor at a time: shards, index, config, tokenizer, model card, configs.

Memory stays below one shard plus one tensor: tensors are read, cast and collected until a shard is full.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from xtuner.core.errors import ConfigError
from xtuner.core.files import require_utf8, write_json
from xtuner.core.hub import INDEX, TOKENIZER_FILES
from xtuner.core.log import human_bytes, logger, progress
from xtuner.data.tokenizer import load_tokenizer
from xtuner.export.destination import export_folder
from xtuner.export.model_card import card
from xtuner.export.opencompass import write_configs
from xtuner.export.sources import Opened, read_tensor, recognise
from xtuner.export.tokenizer_json import complete
from xtuner.families import FAMILIES, NATIVE
from xtuner.families.base import ModelFamily
from xtuner.families.chat import ChatTemplate
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import check, hf_shapes, split

LOADABLE = "transformers"  # as a layout: the one in which transformers loads the model without code
KIND = "export"  # in the manifest: what may be replaced by the next export


def export(
    checkpoint: str | Path,
    target: str | Path,
    tokenizer_folder: Path | None,
    layout: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 2 * 10**9,
    with_code: bool = False,
    network: Callable[[], DecoderConfig] | None = None,
) -> Path:
    """Write `target`, whole or not at all. An earlier export there is replaced, anything else is not.

    Args:
        checkpoint: an `iter_N.pth` directory, which is verified first, or whatever else `sources.recognise` knows.
        tokenizer_folder: whose tokenizer files are copied; None for none.
        layout: "internlm2" (LMDeploy's and llama.cpp's own; not known to transformers), "llama" (loads everywhere),
            another family's name, or LOADABLE; None for the model's own family.
        dtype: of the weights written.
        max_shard_bytes: a shard is at most this large, unless one tensor alone is larger.
        with_code: also write our two .py files, with which transformers 5 loads the internlm2 layout
            (`trust_remote_code=True`).
        network: of the model that the config describes; asked for if the checkpoint does not describe its own.

    Raises: CheckpointError, ConfigError.
    """
    target = Path(target).expanduser().resolve()
    if layout not in (None, LOADABLE, *FAMILIES):
        raise ConfigError(f"--layout {layout!r} is not one of {', '.join(FAMILIES)}", where="--layout")
    require_utf8(target, "target")
    kind = recognise(checkpoint)
    with export_folder(target, kind.path.resolve(), KIND) as folder:  # fails at once if nothing can be written there
        opened = with_network(kind.open(), network)
        logger.info(f"{kind.path}: {opened.what}")
        config = opened.config
        assert config
        its = FAMILIES.find(config.family, str(kind.path), "import the module that registers it in the run's config")
        form = FAMILIES[(its.loads_as or its.name) if layout == LOADABLE else layout or its.name]
        if with_code and not form.auto_map:
            what = f"--with-code belongs to the {', '.join(n for n, f in FAMILIES.items() if f.auto_map)} layout"
            raise ConfigError(what, where="--with-code", do=f"leave it out: {form.name} needs no code")
        _check_tokenizer(tokenizer_folder, config)
        _check_readers(config, form)
        hf_shapes(config, form)  # all weights have a place
        settings = form.write_config(config, str(dtype).removeprefix("torch."))
        _write_shards(opened, folder, config, form, dtype, max_shard_bytes)
        code = _copy_code(folder, form) if with_code else {}
        write_json(folder / "config.json", {**code, **settings})
        stops = _copy_tokenizer(tokenizer_folder, folder, config, its.chat)
        write_json(folder / "generation_config.json", _generation(config, stops))
        (folder / "README.md").write_text(card(kind.path, opened, config, form, dtype), encoding="utf-8")
        write_configs(folder, target)
    return target


def with_network(opened: Opened, network: Callable[[], DecoderConfig] | None) -> Opened:
    """`opened` with the network that it, or else the config, describes; names and shapes of all weights fit it.

    Raises: CheckpointError, ConfigError.
    """
    if opened.config:
        check(opened.source, hf_shapes(opened.config, opened.layout))
        return opened
    if network is None:
        raise ConfigError(
            "the checkpoint does not describe its network",
            where=str(opened.source.path),
            do="give a config whose `model` is the one that was trained",
        )
    config = network()
    for key, value in opened.network.items():
        if getattr(config, key) != value:
            raise ConfigError(
                f"the config's model has {key} = {getattr(config, key)}, the checkpoint says {value}",
                where="model",
                why="the network would differ from the one that was trained",
                do="correct the config.json that `model` names",
            )
    check(opened.source, hf_shapes(config, opened.layout), "the config's model")
    return replace(opened, config=config)


def _tensors(
    opened: Opened, config: DecoderConfig, layout: ModelFamily, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in progress(list(hf_shapes(config)), "writing weights"):
        for hf_name, tensor in split(name, read_tensor(opened, name), layout, config).items():
            yield hf_name, tensor.to(dtype).contiguous()


def _write_shards(
    opened: Opened, folder: Path, c: DecoderConfig, layout: ModelFamily, dtype: torch.dtype, limit: int
) -> None:
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

    for name, tensor in _tensors(opened, c, layout, dtype):
        if shard and held + tensor.nbytes > limit:
            flush()
        shared = any(tensor.data_ptr() == other.data_ptr() for other in shard.values())
        shard[name] = tensor.clone() if shared else tensor  # two names of one tensor: safetensors keeps no such thing
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


def _copy_code(folder: Path, layout: ModelFamily = NATIVE) -> dict[str, Any]:
    """Write the .py files; returns what `config.json` says of them."""
    for name in {f"{cls.partition('.')[0]}.py" for cls in layout.auto_map.values()}:
        shutil.copyfile(Path(__file__).parent / "remote" / name, folder / name)
    return {"auto_map": layout.auto_map}


def _check_tokenizer(folder: Path | None, config: DecoderConfig) -> None:
    """Raises: ConfigError for a tokenizer with ids that the embedding has no rows for."""
    if folder is None:
        logger.warning(
            "the config names no tokenizer: what serves or evaluates the export needs one beside the weights"
        )
        return
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.vocab_size
    if ids > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids:,} ids, the embedding {config.vocab_size:,} rows",
            where=f"tokenizer: {folder}",
            why="a text that gives one of the ids above would fail, or be answered with nonsense",
            do="give the tokenizer that the data were tokenized with (`tokenizer` in the config); no rows are added: "
            "nothing would have been learnt for them",
        )
    if unplaced := tokenizer.tokens_without_id():
        raise ConfigError(
            f"the tokenizer's settings name special tokens without their ids: {', '.join(unplaced)}",
            where=f"tokenizer: {folder} (tokenizer_config.json, special_tokens_map.json)",
            why=f"transformers gives them new ids from {ids:,} on, which the model was not trained with",
            do="list each in `added_tokens_decoder` of tokenizer_config.json with its id in the data, or take the "
            " names out of these files, or give the tokenizer that the data were tokenized with",
        )
    if ids < config.vocab_size:
        logger.info(f"the tokenizer has {ids:,} ids; the embedding's other {config.vocab_size - ids:,} rows stay")


def _check_readers(c: DecoderConfig, layout: ModelFamily) -> None:
    """Warn of what servers' readers of the layout take for granted."""
    if what := layout.not_served(c):
        logger.warning(
            f"the model has {' and '.join(what)}: vLLM, SGLang, LMDeploy and llama.cpp do not read that from the "
            f"{layout.name} layout, and some leave it out without a message"
            + (f". Give --layout {layout.loads_as} for them" if layout.loads_as else "")
        )


def _copy_tokenizer(
    source: Path | None, folder: Path, config: DecoderConfig, chat: ChatTemplate | None = NATIVE.chat
) -> list[int]:
    """Copy tokenizer files, and add what loading needs; return the ids at which a chat model stops."""
    if source is None:
        return [config.eos_token_id]
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    complete(folder, chat)
    special = load_tokenizer(folder).special
    ends = [special[word] for word in (chat.stop_words if chat else ()) if word in special]
    return list(dict.fromkeys((config.eos_token_id, *ends)))


def _generation(c: DecoderConfig, stops: list[int]) -> dict[str, Any]:
    ids = {"bos_token_id": c.bos_token_id, "eos_token_id": stops, "pad_token_id": c.pad_token_id}
    return {**ids, "do_sample": False}


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

"""Any checkpoint → a Hugging Face folder, a tensor at a time: shards, index, config, tokenizer, card, OpenCompass
configs.

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
from xtuner.data.tokenizer import Tokenizer, load_tokenizer
from xtuner.data.tokenizer_template import read_template
from xtuner.export.destination import export_folder
from xtuner.export.model_card import render_card
from xtuner.export.opencompass import write_configs
from xtuner.export.sources import OpenedCheckpoint, read_tensor, recognise
from xtuner.export.tokenizer_json import add_template, complete_tokenizer
from xtuner.families import FAMILIES, NATIVE
from xtuner.families.base import ModelFamily
from xtuner.families.chat import ChatTemplate
from xtuner.model.decoder import DecoderConfig
from xtuner.model.weights import check_network, hf_shapes, shard_file_names, split_for_family, weight_index

LOADABLE = "transformers"  # as a layout: the one that transformers loads without remote code
KIND = "export"  # in the manifest of folders that the next export may replace


def export_hf(
    checkpoint: str | Path,
    target: str | Path,
    tokenizer_folder: Path | None,
    layout: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = 2 * 10**9,
    with_code: bool = False,
    network: Callable[[], DecoderConfig] | None = None,
    base: Path | None = None,
    template: ChatTemplate | None = None,
) -> Path:
    """Write `target` atomically. An earlier export there is replaced, anything else is not.

    Args:
        checkpoint: an `iter_N.pth` directory, which is verified first, or any other kind that `sources.recognise`
            supports.
        tokenizer_folder: where tokenizer files are copied from, or None.
        layout: "internlm2" (supported by LMDeploy and llama.cpp, not by transformers), "llama" (loads everywhere),
            another family's name, or LOADABLE; None for the model's own family.
        dtype: of the written weights.
        max_shard_bytes: limit of a shard, exceeded only by a single larger tensor.
        with_code: also write our two .py files, with which transformers 5 loads the internlm2 layout
            (`trust_remote_code=True`).
        network: returns the network of the config's model; called if the checkpoint does not describe its own.
        base: the model that a checkpoint's adapter is merged into; None for the one that it records.
        template: the chat template of a tokenizer that has none of its own.

    Raises: CheckpointError, ConfigError.
    """
    target = Path(target).expanduser().resolve()
    if layout not in (None, LOADABLE, *FAMILIES):
        raise ConfigError(f"--layout {layout!r} is not one of {', '.join(FAMILIES)}", where="--layout")
    require_utf8(target, "target")
    kind = recognise(checkpoint)
    with export_folder(target, kind.path.resolve(), KIND) as folder:  # fails early if the target is not writable
        opened = resolve_network(kind.open(base), network)
        logger.info(f"{kind.path}: {opened.description}")
        config = opened.config
        assert config
        own = FAMILIES.find(config.family, str(kind.path), "import the module that registers it in the run's config")
        form = FAMILIES[(own.loads_as or own.name) if layout == LOADABLE else layout or own.name]
        if with_code and not form.auto_map:
            what = f"--with-code is only for the {', '.join(n for n, f in FAMILIES.items() if f.auto_map)} layout"
            raise ConfigError(what, where="--with-code", do=f"leave it out: {form.name} needs no code")
        _check_tokenizer(tokenizer_folder, config)
        _check_readers(config, form)
        settings = form.write_config(config, str(dtype).removeprefix("torch."))
        hf_shapes(config, form)  # asserts that the layout stores all weights
        _write_shards(opened, folder, config, form, dtype, max_shard_bytes)
        code = _copy_code(folder, form) if with_code else {}
        write_json(folder / "config.json", {**code, **settings})
        stops = _copy_tokenizer(tokenizer_folder, folder, config, own, template)
        write_json(folder / "generation_config.json", _generation(config, stops))
        (folder / "README.md").write_text(render_card(kind.path, opened, config, form, dtype), encoding="utf-8")
        write_configs(folder, target)
    return target


def resolve_network(opened: OpenedCheckpoint, network: Callable[[], DecoderConfig] | None) -> OpenedCheckpoint:
    """`opened` with its network: the checkpoint's own, or else the config's. Names and shapes are checked against it.

    Raises: CheckpointError, ConfigError.
    """
    if opened.config:
        check_network(opened.source, opened.layout, opened.config)
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
    check_network(opened.source, opened.layout, config, "the config's model")
    return replace(opened, config=config)


def _tensors(
    opened: OpenedCheckpoint, config: DecoderConfig, layout: ModelFamily, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in progress(list(hf_shapes(config)), "writing weights"):
        for hf_name, tensor in split_for_family(name, read_tensor(opened, name), layout, config).items():
            yield hf_name, tensor.to(dtype).contiguous()


def _write_shards(
    opened: OpenedCheckpoint, folder: Path, c: DecoderConfig, layout: ModelFamily, dtype: torch.dtype, limit: int
) -> None:
    """Fill shards in the order of the network. Files are renamed at the end, when their number is known."""
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
        shard[name] = tensor.clone() if shared else tensor  # safetensors rejects two names of one tensor
        held += tensor.nbytes
    flush()
    final = shard_file_names("model", len(files))
    for i, name in enumerate(final):
        (folder / f"shard-{i}.tmp").rename(folder / name)
    if len(files) > 1:
        write_json(folder / INDEX, weight_index(dict(zip(final, files, strict=True)), sum(sizes)))


def _copy_code(folder: Path, layout: ModelFamily = NATIVE) -> dict[str, Any]:
    """Write the .py files; returns their entries of `config.json`."""
    for name in {f"{cls.partition('.')[0]}.py" for cls in layout.auto_map.values()}:
        shutil.copyfile(Path(__file__).parent / "remote" / name, folder / name)
    return {"auto_map": layout.auto_map}


def _check_tokenizer(folder: Path | None, config: DecoderConfig) -> None:
    """Raises: ConfigError for a tokenizer with ids that the embedding has no rows for."""
    if folder is None:
        logger.warning("the config names no tokenizer: servers and evaluators need one next to the weights")
        return
    tokenizer = load_tokenizer(folder)
    read_template(tokenizer)  # a broken one fails here, before the weights are written
    ids = tokenizer.vocab_size
    if ids > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {ids:,} ids, the embedding {config.vocab_size:,} rows",
            where=f"tokenizer: {folder}",
            why="a text with one of the other ids would fail, or get a meaningless answer",
            do="give the tokenizer that the data were tokenized with (`tokenizer` in the config); rows are not "
            "added, as they would be untrained",
        )
    if unplaced := tokenizer.tokens_without_id():
        raise ConfigError(
            f"the tokenizer's settings name special tokens without their ids: {', '.join(unplaced)}",
            where=f"tokenizer: {folder} (tokenizer_config.json, special_tokens_map.json)",
            why=f"transformers assigns new ids from {ids:,} on, which the model was not trained with",
            do="list each with its id in `added_tokens_decoder` of tokenizer_config.json, or remove the names from "
            "these files, or give the tokenizer that the data were tokenized with",
        )
    if ids < config.vocab_size:
        logger.info(f"the tokenizer has {ids:,} ids; the embedding keeps its other {config.vocab_size - ids:,} rows")


def _check_readers(c: DecoderConfig, layout: ModelFamily) -> None:
    """Warn if servers ignore a property of the model in this layout."""
    if what := layout.not_served(c):
        logger.warning(
            f"the model has {' and '.join(what)}: vLLM, SGLang, LMDeploy and llama.cpp do not read that from the "
            f"{layout.name} layout, and some ignore it silently"
            + (f". Give --layout {layout.loads_as} for them" if layout.loads_as else "")
        )


def _copy_tokenizer(
    source: Path | None,
    folder: Path,
    config: DecoderConfig,
    family: ModelFamily = NATIVE,
    template: ChatTemplate | None = None,
) -> list[int]:
    """Copy tokenizer files, and add what loading and chats need; return the ids at which a chat model stops."""
    if source is None:
        return [*config.stop_ids]
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer = load_tokenizer(source)
    chat = family.chat_for(tokenizer.special)
    named = template if template and _has_marks(tokenizer, template) else None
    complete_tokenizer(folder, named or chat)
    exported = load_tokenizer(folder)
    if named and read_template(exported) is None:
        add_template(folder, named)
    _report_template(tokenizer, exported, template, chat)
    known = (read_template(tokenizer), named, chat)
    words = [word for one in known if one for word in one.stop_words]
    ends = [exported.special[word] for word in words if word in exported.special]
    return list(dict.fromkeys((*config.stop_ids, *ends)))


def _has_marks(tokenizer: Tokenizer, template: ChatTemplate) -> bool:
    return set(template.turn_marks) <= set(tokenizer.special)


def _report_template(
    source: Tokenizer, exported: Tokenizer, template: ChatTemplate | None, chat: ChatTemplate | None
) -> None:
    """Log which chat template the export has.

    Args:
        template: the one that the config names.
        chat: the family's.
    """
    if read_template(source):
        logger.info("chat template: the one in the tokenizer's folder")
    elif template and not _has_marks(source, template):
        lacks = ", ".join(sorted(set(template.turn_marks) - set(source.special)))
        logger.warning(
            f"chat template: not {template.name}, as in the config: the tokenizer has no special token {lacks}"
        )
    elif read_template(exported):
        found = template or chat
        assert found
        logger.info(f"chat template: {found.name}, {'as in the config' if template else 'of the model family'}")
    else:
        fitting = f", such as PROMPT_TEMPLATE.{chat.name}" if chat and _has_marks(source, chat) else ""
        logger.info(
            "chat template: none, as in the tokenizer's folder. For a model trained on chats, name its template in the "
            f"config: prompt_template of EvaluateChatHook{fitting}"
        )


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


def summarize_export(folder: Path) -> str:
    """One line about the written files."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return f"{folder}: {len(files)} files, {human_bytes(sum(p.stat().st_size for p in files))}"

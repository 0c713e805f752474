"""`tokenizer.json` of a SentencePiece `tokenizer.model`, so that servers and transformers load it without remote code.

The same BPE in the form of the `tokenizers` library: pieces with their ids, and all merges of two pieces into a third,
those with the better resulting piece first. Special tokens replace the unused pieces that have their ids.
"""

import json
from pathlib import Path
from typing import Any

from xtuner.core.files import read_json, write_json
from xtuner.core.log import logger
from xtuner.data.tiktoken_files import build_tokenizer_json, find_tiktoken, is_tiktoken
from xtuner.data.tokenizer import load_tokenizer
from xtuner.families import NATIVE
from xtuner.families.chat import ChatTemplate

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # types of pieces
BPE = 2  # type of model
SPACE = "▁"
_LIBRARY = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_input_names": ["input_ids", "attention_mask"],  # without it, `generate` gets token_type_ids
}


def complete_tokenizer(folder: Path, chat: ChatTemplate | None = NATIVE.chat) -> None:
    """Make a folder's tokenizer load without remote code, with the same ids everywhere.

    A single `tokenizer.model` gets a `tokenizer.json` and a matching `tokenizer_config.json`. A `tokenizer_config.json`
    that refers to remote code, which is not copied, gets the library's class instead and keeps its other settings.
    Models that the library cannot reproduce exactly (not BPE, or with text normalization) stay as they are, with a
    warning.

    Args:
        chat: written into a new `tokenizer_config.json` if the tokenizer has the template's special tokens.
    """
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.is_file() else {}
    settings = {k: v for k, v in found.items() if k != "auto_map"}
    has_json = (folder / "tokenizer.json").is_file()
    if has_json and "auto_map" in found:
        settings |= _LIBRARY
    if not has_json and (tiktoken := find_tiktoken(folder)):
        (folder / "tokenizer.json").write_text(build_tokenizer_json(*tiktoken), encoding="utf-8")
        form = tiktoken[1]
        named = {"bos_token": form.begin or None, "eos_token": form.end, "clean_up_tokenization_spaces": False}
        template = {"chat_template": chat.jinja()} if chat and set(chat.turn_marks) <= set(form.special) else {}
        settings = {**named, **template, **settings, **_LIBRARY}
        has_json = True
    model = _read_model(folder / "tokenizer.model")
    if model and not has_json and not _is_plain(model):
        logger.warning(
            "tokenizer.model is not a plain BPE: no tokenizer.json is written, and servers may not be able to read it. "
            "Do not convert the export to GGUF: llama.cpp would treat it as a plain BPE and produce other ids"
        )
        return
    if model:  # read by llama.cpp's converter of the llama layout; without it, texts would begin with a space
        settings["add_prefix_space"] = bool(model.normalizer_spec.add_dummy_prefix)
    if model and not has_json:
        special = {i: name for name, i in load_tokenizer(folder).special.items()}
        text = json.dumps(_library_form(model, special), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8")
        defaults = _defaults(model, special, chat)
        listed = {**defaults["added_tokens_decoder"], **found.get("added_tokens_decoder", {})}
        settings = {**defaults, **settings, "added_tokens_decoder": listed, **_LIBRARY}
    if settings != found:
        write_json(path, settings)


def add_template(folder: Path, chat: ChatTemplate) -> None:
    """Write a chat template into a folder's `tokenizer_config.json`."""
    path = folder / "tokenizer_config.json"
    found = read_json(path) if path.is_file() else {}
    write_json(path, {**found, "chat_template": chat.jinja()})


def _read_model(path: Path) -> Any:
    """A SentencePiece model's protobuf message, or None if the file does not exist."""
    if not path.is_file() or is_tiktoken(path):
        return None
    from sentencepiece import sentencepiece_model_pb2  # it needs protobuf, a dependency of tensorboard

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # defined at import
    model.ParseFromString(path.read_bytes())
    return model


def _is_plain(model: Any) -> bool:
    """Whether it is a BPE without text normalization."""
    spec = model.normalizer_spec
    rewrites = spec.precompiled_charsmap or spec.remove_extra_whitespaces
    return model.trainer_spec.model_type == BPE and not rewrites


def _library_form(model: Any, special: dict[int, str]) -> dict[str, Any]:
    pieces = {special.get(i, p.piece): i for i, p in enumerate(model.pieces)}
    pieces |= {name: i for i, name in special.items()}
    prefix = model.normalizer_spec.add_dummy_prefix
    before = [{"type": "Prepend", "prepend": SPACE}] if prefix else []
    after = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    bos = special.get(model.trainer_spec.bos_id, "")
    begin: list[dict[str, Any]] = [{"SpecialToken": {"id": bos, "type_id": 0}}] if bos else []
    replace = {"pattern": {"String": " "}, "content": SPACE}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name) | {"id": i} for i, name in sorted(special.items())],
        "normalizer": {"type": "Sequence", "normalizers": [*before, {"type": "Replace", **replace}]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [*begin, {"Sequence": {"id": "A", "type_id": 0}}, *begin, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [pieces[bos]], "tokens": [bos]}} if bos else {},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *after,
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": special.get(model.trainer_spec.unk_id),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(model.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": pieces,
            "merges": _merges(model),
        },
    }


def _merges(model: Any) -> list[list[str]]:
    """All pairs of pieces that form a piece, in the order in which SentencePiece merges them: by score, then id."""
    score = {p.piece: p.score for p in model.pieces if p.type == NORMAL}
    found = []
    for i, p in enumerate(model.pieces):
        if p.type == NORMAL:
            text = p.piece
            splits = [(text[:at], text[at:]) for at in range(1, len(text))]
            found += [(-p.score, i, list(pair)) for pair in splits if pair[0] in score and pair[1] in score]
    return [pair for _, _, pair in sorted(found, key=lambda f: f[:2])]


def _added(name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": name, **flags}


def _defaults(model: Any, special: dict[int, str], chat: ChatTemplate | None) -> dict[str, Any]:
    """Default contents of tokenizer_config.json."""
    trainer = model.trainer_spec
    bos, eos, unk = (special.get(i) for i in (trainer.bos_id, trainer.eos_id, trainer.unk_id))
    has_marks = chat and set(chat.turn_marks) <= set(special.values())
    return {
        "bos_token": bos,
        "eos_token": eos,
        "unk_token": unk,
        "pad_token": eos,
        "clean_up_tokenization_spaces": False,
        **({"chat_template": chat.jinja()} if chat and has_marks else {}),
        "added_tokens_decoder": {str(i): _added(name) for i, name in sorted(special.items())},
    }

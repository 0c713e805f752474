"""python xtuner/tools/model_converters/pth_to_hf.py CONFIG SRC DST: convert a checkpoint to a Hugging Face folder.

Equivalent to `xtuner convert pth_to_hf`.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtuner.config.config import Config
    from xtuner.families.chat import ChatTemplate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the config of the run, for tokenizer and model")
    parser.add_argument(
        "pth_model",
        metavar="SRC",
        help="checkpoint: work_dirs/CONFIG/iter_N.pth, or any that `xtuner convert weights` accepts",
    )
    parser.add_argument("save_dir", metavar="DST", help="folder to write")
    parser.add_argument("--fp32", action="store_true", help="write the fp32 masters instead of bf16")
    parser.add_argument("--max-shard-size", default="2GB", help="largest weight file (default: 2GB)")
    parser.add_argument(
        "--layout",
        metavar="FAMILY",
        help="weight names and config.json of another family, such as llama (default: the model's own)",
    )
    parser.add_argument(
        "--with-code", action="store_true", help="add .py files, for transformers with trust_remote_code=True"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="of a run with LoRA: merge the adapter into its base model (default: write the adapter in PEFT's format)",
    )
    parser.add_argument("--safe-serialization", action="store_true", help="has no effect: always safetensors")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="overrides")


def run(args: argparse.Namespace) -> int:
    import torch

    from xtuner.core import log
    from xtuner.export.hf import parse_size, summarize_export
    from xtuner.export.peft import export_peft
    from xtuner.model.adapters.folder import has_adapter

    dtype = torch.float32 if args.fp32 else torch.bfloat16
    size = parse_size(args.max_shard_size)
    how = {"layout": args.layout, "dtype": dtype, "max_shard_bytes": size, "with_code": args.with_code}
    if has_adapter(Path(args.pth_model).expanduser()) and not args.merge:
        _reject_for_adapter(args)
        target = export_peft(args.pth_model, args.save_dir, args.layout, dtype)
    else:
        if args.merge:
            _require_adapter(args.pth_model)
        target = from_config(args.config, args.cfg_options, args.pth_model, args.save_dir, **how)
    log.logger.info(f"written {summarize_export(target)}")
    return 0


def _require_adapter(checkpoint: str) -> None:
    from xtuner.core.errors import ConfigError
    from xtuner.core.path_kinds import CONVERTIBLE, HF, recognise
    from xtuner.model.adapters.folder import has_adapter

    kind = recognise(checkpoint)
    if kind.what in (*CONVERTIBLE, HF) and not has_adapter(kind.path):  # of others, what they are is reported
        raise ConfigError(f"{checkpoint} has no adapter", where="--merge", do="leave --merge out")


def _reject_for_adapter(args: argparse.Namespace) -> None:
    from xtuner.core.errors import ConfigError

    if args.with_code:
        raise ConfigError("--with-code needs a complete model", where="--with-code", do="add --merge, or leave it out")


def from_config(
    config_path: str, options: Sequence[str], checkpoint: str | Path, target: str | Path, **how: Any
) -> Path:
    """Export a checkpoint with the tokenizer of its config, the chat template that this names, and, if the checkpoint
    does not describe its own, the network.

    Args: how: more arguments of `export.hf.export`.
    """
    from xtuner.compat.translate import load
    from xtuner.config.build import build
    from xtuner.export.hf import export_hf
    from xtuner.model.adapters.folder import has_adapter
    from xtuner.model.decoder import DecoderConfig
    from xtuner.model.source import ModelSource

    config = load(config_path, list(options))
    tokenizer = config.get("tokenizer")
    folder: Path | None = build(tokenizer, "tokenizer").folder if tokenizer else None

    def network() -> DecoderConfig:
        model: ModelSource = build(config.get("model") or {}, "model")
        return model.config

    if has_adapter(Path(checkpoint).expanduser()):
        how["base"] = build(config.get("model") or {}, "model").folder
    return export_hf(checkpoint, target, folder, network=network, template=_named_template(config), **how)


def _named_template(config: "Config") -> "ChatTemplate | None":
    """The template of the config's samples. None for texts that are continued, and for the one in the tokenizer's
    folder, which the export has anyway."""
    from xtuner.config.build import build
    from xtuner.core.errors import ConfigError
    from xtuner.families.chat import ChatTemplate

    for i, spec in enumerate(config.get("custom_hooks") or ()):
        if isinstance(spec, Mapping) and spec.get("prompt_template") is not None:
            try:
                template = getattr(build(spec, f"custom_hooks.{i}"), "template", None)
            except ConfigError:  # a hook that an export does not need
                continue
            if isinstance(template, ChatTemplate) and template.has_turns:
                return template
    return None


if __name__ == "__main__":
    from xtuner.core.command import run_script

    run_script("a checkpoint as a Hugging Face folder", add_arguments, run)

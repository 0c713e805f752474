"""xtuner convert turbomind [NAME] HF_DIR: write the directory that LMDeploy up to 0.9 serves; --check compares one."""

import argparse

from xtuner.export.turbomind_support import BASE, TEMPLATES

_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp16": "float16", "bfloat16": "bfloat16", "float16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model_name", nargs="?", default="", help="name as in `lmdeploy convert`, e.g. internlm2-chat-7b"
    )
    parser.add_argument("model_path", metavar="HF_DIR", help="Hugging Face folder, or hub id")
    parser.add_argument("--dst-path", default="workspace", metavar="DST", help="folder to write (default: workspace)")
    parser.add_argument("--check", metavar="DST", help="write nothing: compare DST with HF_DIR, bit for bit")
    parser.add_argument("--tp", type=int, default=1, help="number of GPUs for tensor parallelism (default: 1)")
    parser.add_argument(
        "--dtype", choices=list(_DTYPES), default="auto", help="auto (default): bf16 is kept, other dtypes become fp16"
    )
    parser.add_argument(
        "--chat-template",
        choices=(BASE, *TEMPLATES),
        metavar="NAME",
        help=f"LMDeploy's name of one: {BASE} (none), {', '.join(TEMPLATES)} (default: as in LMDeploy, by the path)",
    )


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xtuner.core import hub, log
    from xtuner.export.hf import summarize_export
    from xtuner.export.turbomind import compare_with_source, convert_to_turbomind, read_source
    from xtuner.export.turbomind_support import better_template, template_by_path

    source = read_source(hub.resolve(args.model_path))
    if args.check:
        files = compare_with_source(source, Path(args.check).expanduser())
        print(f"{args.check} has the weights of {args.model_path}: {files} files, bitwise equal")
        return 0
    if args.model_name:
        log.logger.info(f"the name {args.model_name} is only written to config.yaml; LMDeploy does not use it")
    template = args.chat_template or template_by_path(args.model_path)
    better = better_template(template, source.layout, source.chat)
    if better and not args.chat_template:
        found = f"{template} (none)" if template == BASE else f"{template}, which this tokenizer has no marks of"
        log.logger.warning(f"chat template: {found}, by the path; for chats give --chat-template {better}")
    target = convert_to_turbomind(source, Path(args.dst_path), args.tp, _DTYPES[args.dtype], args.model_name, template)
    log.logger.info(f"written {summarize_export(target)}")
    return 0

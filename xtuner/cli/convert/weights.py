"""xtuner convert weights SRC DST.safetensors: write all weights of a checkpoint as fp32 to one file."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="SRC",
        help="checkpoint (work_dirs/CONFIG/iter_N.pth), Hugging Face folder, DeepSpeed folder (ZeRO 1, 2, 3), "
        "InternEvo folder, or single .pth file; the kind is detected",
    )
    parser.add_argument("target", metavar="DST", help="file to write, NAME.safetensors")


def run(args: argparse.Namespace) -> int:
    from xtuner.core import log
    from xtuner.export.consolidate import consolidate

    target = consolidate(args.checkpoint, args.target)
    log.logger.info(f"written {target}: {log.human_bytes(target.stat().st_size)}")
    return 0

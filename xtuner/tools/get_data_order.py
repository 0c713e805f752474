"""python xtuner/tools/get_data_order.py --data-folder D --save-folder S: write the order of files for training.

Equivalent to `xtuner data order`.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-folder", required=True, help="folder of tokenized files, at any depth")
    parser.add_argument("--save-folder", required=True, help="folder for data_order.txt")
    parser.add_argument("--file-type", default=".bin", help="suffix of the token files (default: .bin)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xtuner.data.format.file_order import write_order

    target, count = write_order(args.data_folder, Path(args.save_folder).expanduser(), args.file_type)
    print(f"{target}: {count} files in order")
    return 0


if __name__ == "__main__":
    from xtuner.core.command import run_script

    run_script("write the order of files for training", add_arguments, run)

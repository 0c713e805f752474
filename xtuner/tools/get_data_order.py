"""python xtuner/tools/get_data_order.py --data-folder D --save-folder S: write the order of files for training.

The same as `xtuner data order`.
"""

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-folder", required=True, help="folder of tokenized files, at any depth")
    parser.add_argument("--save-folder", required=True, help="where data_order.txt goes")
    parser.add_argument("--file-type", default=".bin", help="ending of the token files (default: .bin)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xtuner.core.errors import ConfigError, DataError
    from xtuner.core.files import atomic_file
    from xtuner.data.index import walk

    root = Path(args.data_folder).expanduser()
    if not root.is_dir():
        raise ConfigError("the data folder is not there", where=f"--data-folder {args.data_folder}")
    names = list(walk(root, args.file_type))
    if not names:
        raise DataError(f"no {args.file_type} file in the data folder", where=str(root))
    target = Path(args.save_folder).expanduser() / "data_order.txt"
    with atomic_file(target) as f:
        f.writelines(name + "\n" for name in names)
    print(f"{target}: {len(names)} files in order")
    return 0


if __name__ == "__main__":
    from xtuner.cli.main import console

    console(["data", "order", *sys.argv[1:]])

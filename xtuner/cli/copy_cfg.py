"""xtuner copy-cfg NAME DIR: copy a shipped config to DIR/NAME_copy.py, to edit it."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config_name", help="name of a shipped config, see `xtuner list-cfg`")
    parser.add_argument("save_dir", help="folder for NAME_copy.py")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from xtuner.config.load import ALIASES, shipped_file, shipped_names
    from xtuner.core.errors import ConfigError, did_you_mean
    from xtuner.core.files import atomic_file

    name = args.config_name.removesuffix(".py")
    source = shipped_file(name)
    if source is None:
        hint = did_you_mean(name, [*shipped_names(), *ALIASES])
        raise ConfigError(f"no shipped config {name!r}.{hint}", do="`xtuner list-cfg` lists them")
    target = Path(args.save_dir).expanduser() / f"{name}_copy.py"
    if target.exists():
        raise ConfigError(
            "the file already exists",
            where=str(target),
            why="your changes in it would be lost",
            do="move it away first",
        )
    with atomic_file(target) as f:
        f.write(source.read_text(encoding="utf-8"))
    print(f"copied to {target}" + (f" (the config is now called {ALIASES[name]})" if name in ALIASES else ""))
    return 0

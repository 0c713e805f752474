"""xtuner plot-loss WORK_DIR: the curves of a run, all its starts joined, as a picture."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="a run's work dir")
    parser.add_argument("-o", "--output", help="picture to write, .png, .svg or .pdf (default: WORK_DIR/loss.png)")
    parser.add_argument(
        "--smoothing",
        type=float,
        metavar="ITERATIONS",
        help="iterations that the smoothed loss averages over, 0 for none (default: a 20th of the run)",
    )


def run(args: argparse.Namespace) -> int:
    from xtuner.core.errors import ConfigError
    from xtuner.tools.loss_plot import draw, read_runs

    work_dir = Path(args.work_dir)
    if args.smoothing is not None and not args.smoothing >= 0:
        raise ConfigError(f"--smoothing {args.smoothing:g} is negative or not a number", do="give a number from 0 on")
    runs = read_runs(work_dir)
    if not runs:
        raise ConfigError(
            "no run has left metrics here",
            where=str(work_dir),
            do="give the work dir of `xtuner train`; the first record is written with the first log line",
        )
    try:
        import matplotlib.figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib", do="pip install 'xtuner[plot]'") from None
    target = Path(args.output) if args.output else work_dir / "loss.png"
    known = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in known:
        raise ConfigError(
            f"{target.suffix or 'a name without an ending'} is not a kind of picture",
            where=f"--output {target}",
            do=f"give a name that ends with one of: {', '.join(sorted(known))}",
        )
    draw(runs, work_dir.resolve().name, target, args.smoothing)
    print(f"written {target}")
    return 0

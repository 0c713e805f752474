"""xtuner plot-loss WORK_DIR: plot the curves of a run, over all its starts."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="work dir of a run")
    parser.add_argument("-o", "--output", help="image to write, .png, .svg or .pdf (default: WORK_DIR/loss.png)")
    parser.add_argument(
        "--smoothing",
        type=float,
        metavar="ITERATIONS",
        help="iterations to average the smoothed loss over, 0 for none (default: a 20th of the run)",
    )


def run(args: argparse.Namespace) -> int:
    from xtuner.core.errors import ConfigError
    from xtuner.tools.loss_plot import draw
    from xtuner.tools.run_metrics import read_runs

    work_dir = Path(args.work_dir)
    if args.smoothing is not None and not args.smoothing >= 0:
        raise ConfigError(
            f"--smoothing {args.smoothing:g} is negative or not a number", do="give a number of at least 0"
        )
    runs = read_runs(work_dir)
    if not runs:
        raise ConfigError(
            "no metrics of a run here",
            where=str(work_dir),
            do="give the work dir of `xtuner train`; metrics are written from the first log line on",
        )
    try:
        import matplotlib.figure
    except ImportError:
        raise ConfigError("drawing needs matplotlib", do="pip install 'xtuner[plot]'") from None
    target = Path(args.output) if args.output else work_dir / "loss.png"
    known = matplotlib.figure.Figure().canvas.get_supported_filetypes()
    if target.suffix.lstrip(".").lower() not in known:
        raise ConfigError(
            f"{target.suffix or 'a name without a suffix'} is not an image format",
            where=f"--output {target}",
            do=f"give a name with one of these suffixes: {', '.join(sorted(known))}",
        )
    draw(runs, work_dir.resolve().name, target, args.smoothing)
    print(f"written {target}")
    return 0

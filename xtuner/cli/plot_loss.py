"""xtuner plot-loss WORK_DIR: the loss of a run, all its starts together, as a picture."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="a run's work dir")
    parser.add_argument("-o", "--output", help="picture to write, .png or .svg (default: WORK_DIR/loss.png)")


def run(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from xtuner.core.errors import ConfigError

    work_dir = Path(args.work_dir)
    starts = sorted(work_dir.glob("*/vis_data/scalars.json"))
    if not starts:
        raise ConfigError("no run has left metrics here", where=str(work_dir), do="give the work dir of `xtuner train`")
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("drawing needs matplotlib", do="pip install 'xtuner[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for start in starts:
        records = [json.loads(line) for line in start.read_text().splitlines()]
        iterations = [r["iter"] for r in records]
        left.plot(iterations, [r["loss"] for r in records], label=start.parent.parent.name, linewidth=1)
        right.plot(iterations, [r["lr"] for r in records], linewidth=1)
    left.set(title="Training loss", xlabel="iteration", ylabel="nats a token")
    right.set(title="Learning rate", xlabel="iteration")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    if len(starts) > 1:
        left.legend(title="start", frameon=False)
    target = Path(args.output) if args.output else work_dir / "loss.png"
    figure.savefig(target, dpi=120)
    print(f"written {target}")
    return 0

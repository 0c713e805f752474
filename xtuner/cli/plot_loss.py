"""xtuner plot-loss WORK_DIR: the loss of a run, all its starts together, as a picture."""

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work_dir", help="a run's work dir")
    parser.add_argument("-o", "--output", help="picture to write, .png or .svg (default: WORK_DIR/loss.png)")


def run(args: argparse.Namespace) -> int:
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
        records = read_records(start)
        name = f"{start.parent.parent.name} " if len(starts) > 1 else ""
        (line,) = left.plot(*curve(records, "loss"), label=f"{name}training", linewidth=1)
        iterations, losses = curve(records, "val_loss")
        if losses:
            style: dict[str, Any] = {"color": line.get_color(), "linewidth": 1, "markersize": 4}
            left.plot(iterations, losses, "o--", label=f"{name}validation", **style)
        right.plot(*curve(records, "lr"), linewidth=1)
    left.set(title="Loss", xlabel="iteration", ylabel="nats a token")
    right.set(title="Learning rate", xlabel="iteration")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    target = Path(args.output) if args.output else work_dir / "loss.png"
    figure.savefig(target, dpi=120)
    print(f"written {target}")
    return 0


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of one start; a last line that is still being written, or was torn by a kill, is left out."""
    import json

    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]


def curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the records that have `key`. What is no finite number is a gap in the line."""
    import math

    found = [(r["iter"], r[key]) for r in records if r.get(key) is not None]
    return [i for i, _ in found], [v if math.isfinite(v) else math.nan for _, v in found]

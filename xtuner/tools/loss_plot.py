"""Plots a run: loss with its smoothed value and validation loss, learning rate, gradient norm."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtuner.core.files import atomic_file
from xtuner.core.log import human
from xtuner.core.system.stdio import as_text
from xtuner.tools.run_metrics import Record

TRAINING, VALIDATION = "#0969da", "#bf5700"
EARLIER = "#8c959f"  # runs that a fresh start in the same work dir has replaced
SMOOTHED_OVER = 1 / 20  # window of the smoothed loss, as a share of the run
OUTLIERS = 0.01  # share of losses that may be cut off at the top if they are far above the others
INK, FAINT = "#1f2328", "#d1d9e0"
FONTS = (  # for the title, which is a folder's name: matplotlib's default, then common ones with Chinese characters
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "Source Han Sans CN",
    "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "PingFang SC", "PingFang HK", "Heiti TC", "Hiragino Sans GB",
    "Microsoft YaHei", "SimHei", "SimSun", "Arial Unicode MS", "Noto Serif CJK SC", "Noto Serif CJK JP",
    "Droid Sans Fallback",
)  # fmt: skip


def curve(records: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of the records with `key`. Values that are not finite become gaps (nan)."""
    found = [(r["iter"], r[key]) for r in records if r.get(key) is not None]
    return [i for i, _ in found], [v if math.isfinite(v) else math.nan for _, v in found]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of `window` values around each value; gaps (nan) are skipped.

    The window is centred, so that it does not lag behind a falling curve. It shrinks towards the first value; at the
    end it includes only earlier values, so that the last value is also a mean.
    """
    half = max(window // 2, 0)
    smoothed = []
    for i in range(len(values)):
        left = min(half, i)
        right = left if i < half else half
        inside = [v for v in values[i - left : i + right + 1] if not math.isnan(v)]
        smoothed.append(sum(inside) / len(inside) if inside else math.nan)
    return smoothed


def draw(runs: Sequence[Sequence[Record]], title: str, target: Path, smoothing: float | None = None) -> None:
    """Write the plot to `target`.

    Args:
        runs: records of each run, the current one last.
        smoothing: window of the smoothed loss in iterations; None: SMOOTHED_OVER of the run; 0: no smoothing.
    Raises: OSError if `target` cannot be written; ValueError for a suffix that is not an image format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: dict[Any, Any] = {
        "axes.edgecolor": FAINT,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.labelcolor": INK,
        "font.size": 10,
    }
    title, families = _drawable(as_text(title))
    style["font.family"] = families
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(
            3, 1, figsize=(9, 7.5), sharex=True, layout="constrained", height_ratios=(4, 1, 1)
        )
        loss, rate, norm = axes
        for run in runs[:-1]:
            _draw_loss(loss, run, smoothing, EARLIER, "earlier run" if run is runs[0] else None)
            rate.plot(*curve(run, "lr"), color=EARLIER, linewidth=1)
        _draw_loss(loss, runs[-1], smoothing, TRAINING, "training")
        _draw_validation(loss, runs[-1])
        rate.plot(*curve(runs[-1], "lr"), color=TRAINING, linewidth=1.2)
        norm.plot(*curve(runs[-1], "grad_norm"), color=TRAINING, linewidth=0.8)
        _limit(loss, runs)
        loss.set(ylabel="loss (nats per token)")
        loss.set_title(title, loc="left", fontsize=11, parse_math=False)
        rate.set(ylabel="learning rate")
        rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        norm.set(ylabel="gradient norm", xlabel="iteration")
        for axis in axes:
            axis.grid(color=FAINT, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(left=0)
        rate.set_ylim(bottom=0)
        norm.set_ylim(bottom=0)
        loss.legend(frameon=False, loc="upper right")
        _add_token_axis(loss, runs[-1])
        figure.align_ylabels(axes)
        try:
            with atomic_file(target, "wb") as file:  # on a full disk the old picture stays
                figure.savefig(file, dpi=130, format=target.suffix.lstrip(".").lower())
        finally:
            pyplot.close(figure)


def _drawable(title: str) -> tuple[str, list[str]]:
    """The title and font families to draw it with; characters that no installed font has become escapes."""
    from matplotlib import font_manager

    missing = sorted(set(title))
    families: list[str] = []
    for family in FONTS:
        if not missing:
            break
        try:
            file = font_manager.findfont(font_manager.FontProperties(family=[family]), fallback_to_default=False)
            font = font_manager.get_font(file)
        except (ValueError, OSError, RuntimeError):  # not installed, or removed since
            continue
        left = [c for c in missing if not font.get_char_index(ord(c))]
        if len(left) < len(missing) or not families:
            families.append(family)
        missing = left
    return "".join(c.encode("unicode_escape").decode() if c in missing else c for c in title), families


def _draw_loss(axis: Any, run: Sequence[Record], smoothing: float | None, colour: str, name: str | None) -> None:
    iterations, losses = curve(run, "loss")
    if not losses:
        return
    span = iterations[-1] - iterations[0] + 1
    over = SMOOTHED_OVER * span if smoothing is None else smoothing
    window = round(over * len(losses) / span)
    if window < 3:  # nothing to smooth
        axis.plot(iterations, losses, color=colour, linewidth=1.4, label=name, marker="." if len(losses) < 3 else "")
        return
    axis.plot(iterations, losses, color=colour, linewidth=0.7, alpha=0.3)
    label = f"{name}, mean of {over:.0f} iterations" if name else None
    axis.plot(iterations, smooth(losses, window), color=colour, linewidth=1.8, label=label)


def _draw_validation(axis: Any, run: Sequence[Record]) -> None:
    iterations, losses = curve(run, "val_loss")
    if losses:
        axis.plot(iterations, losses, "o-", color=VALIDATION, linewidth=1.4, markersize=4, label="validation")


def _limit(axis: Any, runs: Sequence[Sequence[Record]]) -> None:
    """Set the range of the y axis. The highest losses may be cut off: a single spike must not flatten the curve."""
    losses = sorted(v for run in runs for key in ("loss", "val_loss") for v in curve(run, key)[1] if not math.isnan(v))
    if len(losses) < 2:
        return
    bottom, most, top = losses[0], losses[int((len(losses) - 1) * (1 - OUTLIERS))], losses[-1]
    if top - bottom > 2 * (most - bottom) > 0:
        top = most
    room = 0.04 * (top - bottom) or 0.1
    axis.set_ylim(bottom - room, top + room)


def _add_token_axis(axis: Any, run: Sequence[Record]) -> None:
    """Add an upper x axis: tokens seen by all ranks. Every iteration has the same number."""
    counted = [(r["iter"], r["tokens"]) for r in run if r["iter"] and 0 < r.get("tokens", 0) < math.inf]
    if not counted:
        return  # written by an older version
    each = counted[-1][1] / counted[-1][0]
    above = axis.secondary_xaxis("top", functions=(lambda i: i * each, lambda tokens: tokens / each))
    above.xaxis.set_major_formatter(lambda tokens, _: human(tokens).replace(".00", ""))
    above.set_xlabel("tokens")
    above.spines["top"].set_visible(False)

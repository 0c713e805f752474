"""What a mixture will train on: shares requested and obtained, epochs of each source; and the statistics of each."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from xtuner.core.log import human
from xtuner.data.inspect.statistics import Stats, compute_statistics, format_statistics
from xtuner.data.inspect.stats_page import bars, complete_page, fact_boxes, sections
from xtuner.data.packing.mixture import Mixture
from xtuner.data.packing.mixture_plan import EpochShare, MixturePlan
from xtuner.data.packing.pack import PackedDataset


@dataclass(frozen=True)
class MixtureStats:
    """
    Args:
        name: of the config.
        mixed: the sources and their weights; sources: the statistics of each.
    """

    name: str
    mixed: Mixture
    plan: MixturePlan
    packed_length: int
    sources: list[Stats]

    @property
    def shares(self) -> list[EpochShare]:
        return self.plan.epoch_shares(self.plan.packs)

    def as_json(self) -> dict[str, Any]:
        plan = self.plan
        rows = [
            {
                **asdict(share),
                "weight": source.weight,
                "max_repeats": source.max_repeats,
                "epochs": share.visits,
                "tokens": share.packs * self.packed_length,
                "statistics": stats.as_json(),
            }
            for share, source, stats in zip(self.shares, self.mixed.sources, self.sources, strict=True)
        ]
        schedule = [
            {"iteration": phase.iteration, "shares": dict(zip(plan.names, map(float, phase.shares), strict=True))}
            for phase in plan.phases
        ]
        return {
            "config": self.name,
            "packed_length": self.packed_length,
            "packs": plan.packs,
            "tokens": plan.packs * self.packed_length,
            "by": self.mixed.by,
            "epoch": self.mixed.epoch,
            "ends_with": plan.names[plan.last],
            "packs_per_iteration": plan.packs_per_iteration,
            "schedule": schedule if self.mixed.schedule else [],
            "sources": rows,
        }


def compute_mixture_statistics(
    name: str, data: PackedDataset, ranks: Sequence[int], with_text: bool, workers: int | None
) -> MixtureStats:
    """Raises: DataError, ConfigError."""
    mixed, plan = data.documents, data.mixture
    assert isinstance(mixed, Mixture)
    assert plan is not None
    how = data.packed_length, data.seed, ranks, with_text, workers, data.packing, data.long
    return MixtureStats(name, mixed, plan, data.packed_length, [compute_statistics(p, *how) for p in mixed.parts])


HEAD = ("source", "requested", "obtained", "packs an epoch", "tokens an epoch", "its packs", "epochs", "learned")


def _rows(found: MixtureStats) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for share, stats in zip(found.shares, found.sources, strict=True):
        learned = f"{stats.learned / stats.tokens:.1%}" if stats.learned is not None and stats.tokens else "–"
        tokens = share.packs * found.packed_length
        rows.append((share.name, f"{share.requested:.2%}", f"{share.obtained:.2%}", f"{share.packs:,}", f"{tokens:,}",
                     f"{share.available:,}", f"{share.visits:.2f}", learned))  # fmt: skip
    return rows


def _describe(found: MixtureStats) -> str:
    plan = found.plan
    return (
        f"{plan.packs:,} packs of {found.packed_length:,} an epoch, {plan.packs * found.packed_length:,} tokens; it "
        f"ends with source {plan.names[plan.last]!r}, visited {plan.passes} time{'s' * (plan.passes > 1)}"
    )


def _changes(found: MixtureStats) -> list[str]:
    """The schedule, a line each."""
    plan = found.plan
    if not found.mixed.schedule:
        return []
    each = f"{plan.packs_per_iteration:,} pack{'s' * (plan.packs_per_iteration > 1)}"
    return [f"schedule, with {each} an iteration:", *plan.describe_phases()]


def format_mixture(found: MixtureStats) -> str:
    """The statistics as text for a terminal."""
    table = [HEAD, *_rows(found)]
    widths = [max(len(row[i]) for row in table) for i in range(len(HEAD))]
    lines = [f"{found.name}: a mixture of {len(found.sources)} sources, {_describe(found)}", ""]
    for row in table:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join((f"{row[0]:<{widths[0]}}", *cells)))
    if changes := _changes(found):
        lines += ["", changes[0], *(f"  {line}" for line in changes[1:])]
    for name, stats in zip(found.plan.names, found.sources, strict=True):
        lines += ["", f"── {name} " + "─" * max(80 - len(name), 3), format_statistics(stats)]
    return "\n".join(lines)


def mixture_page(found: MixtureStats) -> str:
    """The statistics as one HTML page."""
    plan, shares = found.plan, found.shares
    facts = [
        (f"{len(shares)}", "sources"),
        (f"{plan.packs:,}", f"packs of {found.packed_length:,} an epoch"),
        (human(plan.packs * found.packed_length), "tokens an epoch"),
    ]
    head = "".join(f"<th>{cell}</th>" for cell in HEAD)
    rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in _rows(found))
    parts = [
        f"<h1>{escape(found.name)}</h1>",
        f"<p>{escape(_describe(found))}</p>",
        fact_boxes(facts),
        "<h2>Shares</h2>",
        '<p>Share of the packs of an epoch:<i class="key" style="background:var(--bar)"></i>requested by the weights,'
        '<i class="key" style="background:var(--two)"></i>obtained.</p>',
        bars([s.name for s in shares], [s.requested for s in shares], [s.obtained for s in shares], percent=True),
        f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>',
        *(f"<p>{escape(line)}</p>" for line in _changes(found)),
    ]
    for name, stats in zip(plan.names, found.sources, strict=True):
        parts += sections(stats, f"{name}: {stats.folder}")
    return complete_page(found.name, parts)

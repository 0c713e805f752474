"""The statistics as one HTML page, light and dark, without scripts and without network access."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from xtuner.core.log import human
from xtuner.data.inspect.statistics import FileStats, Stats

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 220, 64, 26, 18
FILES = 500  # rows of the table; JSON contains all

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d1d9e0; --bar: #0969da; --two: #bf5700;
  --paper: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9198a1; --line: #3d444d; --bar: #4493f8;
  --two: #f0a35e; --paper: #0d1117; --card: #151b23; } }
body { margin: 0 auto; max-width: 960px; padding: 24px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 32px 0 4px; }
p { color: var(--dim); margin: 2px 0 10px; }
.facts { display: flex; flex-wrap: wrap; gap: 12px; }
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
.facts b { display: block; font-size: 20px; } .facts span { color: var(--dim); }
svg { width: 100%; height: auto; } svg text { fill: var(--dim); font-size: 11px; }
.bar { fill: var(--bar); } .two { fill: var(--two); } .axis { stroke: var(--line); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin: 0 5px 0 12px; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; } td, th { padding: 4px 10px;
  border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { position: sticky; left: 0; min-width: 8em; max-width: 24em; padding-left: 0;
  background: var(--paper); text-align: left; white-space: normal; overflow-wrap: break-word; }
@media (max-width: 560px) { body { padding: 14px; } svg text { font-size: 18px; } svg .odd { display: none; }
  td:first-child { max-width: 9em; }
  .facts { gap: 8px; } .facts b { font-size: 17px; } }
th { color: var(--dim); font-weight: 600; }
"""


def html_page(found: Stats) -> str:
    """The complete page."""
    return complete_page(found.folder, sections(found))


def complete_page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    head += f"<title>{escape(title)}</title>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def fact_boxes(facts: Iterable[tuple[str, str]]) -> str:
    """Numbers, each with what it counts."""
    boxes = "".join(f"<div><b>{escape(n)}</b><span>{escape(t)}</span></div>" for n, t in facts)
    return f'<div class="facts">{boxes}</div>'


def sections(found: Stats, title: str = "") -> list[str]:
    """The statistics of one source."""
    lost = found.padding / (found.packs * found.packed_length) if found.packing == "whole" and found.packs else None
    learned = f"{found.learned / found.tokens:.1%}" if found.learned is not None and found.tokens else None
    facts = [
        (human(found.tokens), "tokens"),
        (f"{found.documents:,}", "documents"),
        (f"{len(found.files):,}", "files"),
        *([(learned, "of tokens learned")] if learned else []),
        (f"{found.packs:,}", f"packs of {found.packed_length:,}"),
        (f"{found.tail / found.tokens:.2%}" if found.tokens else "–", "of tokens in dropped tails")
        if lost is None
        else (f"{lost:.2%}", "of packs is padding"),
    ]
    parts = [
        f"<h1>{escape(title or found.folder)}</h1>",
        f"<p>seed {found.seed}, documents of at least {found.min_length} tokens</p>",
        fact_boxes(facts),
        "<h2>Lengths of documents</h2>",
        '<p>Length of the document, lower bound of each bin in tokens:<i class="key" style="background:var(--bar)"></i>'
        'share of all documents,<i class="key" style="background:var(--two)"></i>share of all tokens.</p>',
        bars(
            [f"{x.least:,}–{x.most:,}" for x in found.lengths],
            [x.documents / max(found.documents, 1) for x in found.lengths],
            [x.tokens / max(found.tokens, 1) for x in found.lengths],
            ticks=[f"{x.least:,}" for x in found.lengths],
            percent=True,
        ),
        "<h2>Packs by data type</h2>",
        bars([t.name for t in found.types], [t.packs for t in found.types]),
        _table(found.types),
    ]
    if found.cost:
        c = found.cost
        costs = ", ".join(f"{name} {human(c[name])}" for name in ("least", "median", "mean", "p95", "most"))
        parts += [
            "<h2>Attention of a pack</h2>",
            f"<p>Number of packs by Σ len² over their fragments, proportional to the cost of attention: {costs}.</p>",
            bars(
                [f"{human(a)}–{human(b)}" for a, b, _ in found.cost_bars],
                [n for _, _, n in found.cost_bars],
                ticks=[_short(a) for a, _, _ in found.cost_bars],
            ),
        ]
    if found.imbalance:
        rows = "".join(
            f"<tr><td>{r['ranks']:,.0f} ranks</td><td>{r['mean']:.2f}</td><td>{r['p95']:.2f}</td></tr>"
            for r in found.imbalance
        )
        parts += [
            "<h2>Imbalance over ranks</h2>",
            "<p>Attention cost of the slowest rank in a step, divided by the mean of all ranks; one pack per rank.</p>",
            f'<div class="wide"><table><tr><th></th><th>mean</th><th>p95</th></tr>{rows}</table></div>',
        ]
    more = f" (the first {FILES})" if len(found.files) > FILES else ""
    parts += [f"<h2>Files{more}</h2>", _table(found.files[:FILES])]
    return parts


def _table(rows: Iterable[FileStats]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("", "documents", "tokens", "learned", "packs", "tail"))
    lines = []
    for f in rows:
        learned = f"{f.learned / f.tokens:.1%}" if f.learned is not None and f.tokens else "–"
        cells = (escape(f.name), f"{f.documents:,}", f"{f.tokens:,}", learned, f"{f.packs:,}", f"{f.tail:,}")
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def bars(
    names: Sequence[str], *series: Sequence[float], ticks: Sequence[str] | None = None, percent: bool = False
) -> str:
    """A bar chart; bars of several series are side by side. `ticks`: labels of the axis, if different from `names`."""
    highest = max((v for values in series for v in values), default=0)
    most = _round_up(highest or 1, whole=not percent)
    room, floor = (WIDTH - LEFT) / max(len(names), 1), HEIGHT - BOTTOM
    each = min(room * 0.8 / len(series), 60)
    parts = []
    for i in range(5):
        y, value = TOP + (floor - TOP) * (4 - i) / 4, most * i / 4
        tick = f"{100 * value:.3g}%" if percent else _short(value)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick}</text>')
    every = -(-len(names) // 12)
    for i, name in enumerate(names):
        middle = LEFT + room * (i + 0.5)
        for j, (style, values) in enumerate(zip(("bar", "two"), series, strict=False)):
            height = (floor - TOP) * values[i] / most
            x = middle + (j - len(series) / 2) * each
            label = escape(f"{name}: {_number(values[i], percent)}")
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{floor - height:.1f}" width="{each * 0.94:.1f}" '
                f'height="{height:.1f}"><title>{label}</title></rect>'
            )
        if i % every == 0:
            tick = ticks[i] if ticks else name
            short = tick if len(tick) <= 12 else tick[:11] + "…"
            odd = ' class="odd"' if i // every % 2 and len(names) > 4 else ""  # hidden on narrow pages
            parts.append(f'<text{odd} x="{middle:.1f}" y="{floor + 16}" text-anchor="middle">{escape(short)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _round_up(value: float, whole: bool) -> float:
    """The next larger number whose quarters are round; with `whole` also integers, for numbers of packs."""
    step = 10.0 ** math.floor(math.log10(value))
    rounded = (step * n for n in (1, 2, 4, 6, 8, 10, 20, 40) if step * n >= value)
    return next(n for n in rounded if not whole or n % 4 == 0)


def _short(value: float) -> str:
    """A number for an axis, with at most three digits: `1.13 M`, `250`."""
    number, _, unit = human(value).partition(" ")
    return f"{float(number):.3g} {unit}".rstrip()


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else human(value).replace(".00", "")

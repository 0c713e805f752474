"""Results of single_gpu.py as Markdown that fits a terminal: metrics, then time by part of profiled runs."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchlib.workloads import CASES, PACK, SHAPES

from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import peak_of, whole_pack_flops
from xtuner.train.reporting.profile import PARTS

Row = dict[str, Any]
LEGEND = (
    "MFU: attention inside documents. whole: as other tools count it, attention over whole packs and both ways;\n"
    "above 1 where documents are short."
)


def shape_of(case: str) -> DecoderConfig:
    return SHAPES[CASES[case].shape].config


def mfu_whole(case: str, tokens_per_s: float, gpu: str) -> float | None:
    """MFU with attention counted over whole packs, as other tools do; None for unknown GPUs."""
    peak = peak_of(gpu)
    return peak and whole_pack_flops(shape_of(case), PACK, PACK) / PACK * tokens_per_s / peak


def table(results: Path) -> str:
    """Rows in the order of measurement, grouped by machine."""
    if not results.exists():
        return f"nothing has been measured yet: {results} does not exist"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    setups = dict.fromkeys((r["gpu"], r["torch"], r["date"]) for r in rows)
    parts = [_setup_table(s, [r for r in rows if (r["gpu"], r["torch"], r["date"]) == s]) for s in setups]
    return "\n\n".join([*parts, LEGEND])


def _setup_table(setup: tuple[str, str, str], rows: list[Row]) -> str:
    gpu, torch, date = setup
    head = ["case", "engine", "state", "tok/s (from–to)", "MFU", "whole", "peak (exp.) GiB", "first s", "data s"]
    text = f"{gpu}, torch {torch}, {date}\n\n{_aligned(head, map(_figures, rows))}"
    profiled = [r for r in rows if r.get("profile")]
    if profiled:
        shown = [p for p in (*PARTS, "idle") if any(r["profile"].get(p) for r in profiled)]
        parts = (
            [r["case"], r["engine"], *(f"{r['profile'].get(p, 0):.0f}" for p in shown), _data(r)] for r in profiled
        )
        text += f"\n\nms per iteration by part\n\n{_aligned(['case', 'engine', *shown, 'data'], parts)}"
    versions = {r["engine"]: r["versions"] for r in rows if r.get("versions")}
    return "\n\n".join([text, *(f"{engine}: {shown}" for engine, shown in versions.items())])


def _figures(r: Row) -> list[str]:
    low, high = r["spread"]
    expected = re.search(r"peak ([\d.]+) GiB expected", r.get("expected") or "")
    whole = mfu_whole(r["case"], r["tokens_per_s"], r["gpu"])
    return [
        r["case"],
        r["engine"],
        r.get("states", "–"),
        f"{r['tokens_per_s']:,.0f} ({low / 1e3:.1f}–{high / 1e3:.1f}k)",
        _or_dash(r["mfu"], ".3f"),
        _or_dash(whole, ".3f"),
        f"{r['memory'] / 2**30:.1f}" + (f" ({expected[1]})" if expected else ""),
        f"{r['first']:.0f}",
        _or_dash(r.get("data_time"), ".3f"),
    ]


def _data(r: Row) -> str:
    seconds = r.get("data_time")
    return _or_dash(None if seconds is None else seconds * 1e3, ".0f")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def _aligned(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells)

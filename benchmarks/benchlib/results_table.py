"""Results of single_gpu.py as Markdown that fits a terminal: metrics, then time by part of profiled runs."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchlib.workloads import CASES, PACK, SHAPES

from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import peak_flops_by_name, whole_pack_flops
from xtuner.train.reporting.profile import PARTS

Row = dict[str, Any]
HEAD = ["case", "engine", "state", "tok/s (from–to)", "MFU", "whole", "peak (exp.) GiB", "first s", "data s"]
ADAPTERS_HEAD = ["case", "engine", "tok/s (from–to)", "MFU", "peak (exp.) GiB", "GPU", "first s", "data s"]
LEGEND = (
    "MFU: attention inside documents. whole: as other tools count it, attention over whole packs and both ways;\n"
    "above 1 where documents are short. LoRA, QLoRA: 4 FLOPs instead of 6 for a frozen weight and token, as it has no\n"
    "gradient; reading 4 bits back and recomputing do not count. GPU: GiB as the driver counts, with libraries and\n"
    "what PyTorch has cached; in a case with G, xtuner trained with only so many GiB of the GPU free."
)


def shape_of(case: str) -> DecoderConfig:
    return SHAPES[CASES[case].shape].config


def mfu_whole(case: str, tokens_per_s: float, gpu: str) -> float | None:
    """MFU with attention counted over whole packs, as other tools do; None for unknown GPUs."""
    peak = peak_flops_by_name(gpu)
    return peak and whole_pack_flops(shape_of(case), PACK, PACK) / PACK * tokens_per_s / peak


def table(results: Path) -> str:
    """Rows in the order of measurement, grouped by machine."""
    if not results.exists():
        return f"nothing has been measured yet: {results} does not exist"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    setups = dict.fromkeys(map(_setup, rows))
    parts = [_setup_table(s, [r for r in rows if _setup(r) == s]) for s in setups]
    return "\n\n".join([*parts, LEGEND])


def _setup(r: Row) -> tuple[str, str, str, bool]:
    return r["gpu"], r["torch"], r["date"], bool(r.get("terms"))


def _setup_table(setup: tuple[str, str, str, bool], rows: list[Row]) -> str:
    gpu, torch, date, adapters = setup
    figures = [_adapter_figures(r) if adapters else _figures(r) for r in rows]
    text = f"{gpu}, torch {torch}, {date}\n\n{align(ADAPTERS_HEAD if adapters else HEAD, figures)}"
    profiled = [r for r in rows if r.get("profile")]
    if profiled:
        shown = [p for p in (*PARTS, "idle") if any(r["profile"].get(p) for r in profiled)]
        parts = ([_case(r), r["engine"], *(f"{r['profile'].get(p, 0):.0f}" for p in shown), _data(r)] for r in profiled)
        text += f"\n\nms per iteration by part\n\n{align(['case', 'engine', *shown, 'data'], parts)}"
    versions = {r["engine"]: r["versions"] for r in rows if r.get("versions")}
    return "\n\n".join([text, *(f"{engine}: {shown}" for engine, shown in versions.items())])


def _figures(r: Row) -> list[str]:
    pack = r.get("pack", PACK)
    whole = mfu_whole(r["case"], r["tokens_per_s"], r["gpu"]) if pack == PACK else None
    speed, mfu = _speed(r), _or_dash(r["mfu"], ".3f")
    return [_case(r), r["engine"], r.get("states", "–"), speed, mfu, _or_dash(whole, ".3f"), _peak(r), *_seconds(r)]


def _adapter_figures(r: Row) -> list[str]:
    in_use = _or_dash(r["in_use"] and r["in_use"] / 2**30, ".1f")
    return [_case(r), r["engine"], _speed(r), _or_dash(r["mfu"], ".3f"), _peak(r), in_use, *_seconds(r)]


def _speed(r: Row) -> str:
    low, high = r["spread"]
    return f"{r['tokens_per_s']:,.0f} ({low / 1e3:.1f}–{high / 1e3:.1f}k)"


def _peak(r: Row) -> str:
    expected = re.search(r"peak ([\d.]+) GiB expected", r.get("expected") or "")
    return f"{r['memory'] / 2**30:.1f}" + (f" ({expected[1]})" if expected else "")


def _seconds(r: Row) -> list[str]:
    return [f"{r['first']:.0f}", _or_dash(r.get("data_time"), ".3f")]


def _case(r: Row) -> str:
    pack = r.get("pack", PACK)
    parts = [r["case"], r.get("terms"), f"{pack // 1024}k" if pack != PACK else "", r.get("limited")]
    return " ".join(part for part in parts if part)


def _data(r: Row) -> str:
    seconds = r.get("data_time")
    return _or_dash(None if seconds is None else seconds * 1e3, ".0f")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None or value != value else format(value, form)


def align(head: list[str], rows: Iterable[list[str]]) -> str:
    cells = [head, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells)

"""Speed of every attention backend by document length, forward and backward.

    python benchmarks/attention.py                      # all backends that this GPU runs; about a minute
    python benchmarks/attention.py --documents 131072 --backends flash4 varlen --shapes 7b
    python benchmarks/attention.py --tiny               # tries it on a CPU; measures nothing
    python benchmarks/attention.py --table              # all results, as Markdown

The heads are those of 7B (32, 8 of them with keys) and 1.8B (16 and 8), of 128 numbers in bf16. A pack has 32,768
tokens: documents of one length, or of the lognormal lengths of all benchmarks ("mix"); a longer document is a pack of
its own. All backends compute the same packs. Each result (one backend, shape and pack) is appended to `--results` at
once as a JSON line: medians in ms, TFLOP/s, and seconds of the first forward and backward, in which kernels are
compiled. FLOPs are those of causal pairs inside documents as in xtuner/model/flops.py: 2 · N · D · Σ len² forward and
4 · N · D · Σ len² backward, where computing the scores again does not count (papers count 5).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from benchlib.results_table import align
from benchlib.workloads import MEDIAN, PACK, SHAPES, TINY_PACK, Shape, describe_machine, draw_documents

from xtuner.model.attention import BACKENDS

MIX = "mix"
DOCUMENTS = [MIX, "512", "2048", "8192", "32768"]
PACKAGES = {"flash4": "flash-attn-4", "cudnn": "nvidia-cudnn-frontend"}  # the others are PyTorch's


def main() -> None:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=list(BACKENDS), help="instead of all")
    parser.add_argument("--documents", nargs="+", default=DOCUMENTS, help=f"lengths, or {MIX}")
    parser.add_argument("--shapes", nargs="+", default=["7b", "1.8b"], choices=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=10, help="measured calls of each; the median counts")
    parser.add_argument("--limit", type=float, default=90, metavar="S", help="seconds after which nothing is begun")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/attention.jsonl"))
    parser.add_argument("--table", action="store_true", help="print all results")
    parser.add_argument("--tiny", action="store_true", help="few heads and short packs, on a CPU; not recorded")
    a = parser.parse_args()
    for words in a.documents:
        if words != MIX and not (words.isdigit() and int(words)):
            parser.error(f"--documents: {words} is neither a length nor {MIX}")
    if a.repeats < 1:
        parser.error("--repeats: at least one call is measured")
    if a.table:
        print(table(a.results))
        return
    if not a.tiny and not torch.cuda.is_available():
        raise SystemExit("these packs need a GPU; --tiny tries short ones on a CPU")
    place = {"date": time.strftime("%Y-%m-%d"), **describe_machine()}
    device, dtype = (torch.device("cpu"), torch.float32) if a.tiny else (torch.device("cuda"), torch.bfloat16)
    for name in ["tiny"] if a.tiny else a.shapes:
        shape, usable = SHAPES[name], []
        for backend in a.backends or BACKENDS:
            if why := BACKENDS[backend].why_unavailable(device, dtype, shape.head_dim, shape.heads // shape.kv_heads):
                print(f"{name} without {backend}: {why}", flush=True)
            else:
                usable.append(backend)
        for words, backend in product(a.documents, usable):
            if time.perf_counter() - begin > a.limit:
                print(f"left out after {a.limit:g} s: {name} {words} {backend}", flush=True)
                continue
            lengths = document_lengths(words, TINY_PACK if a.tiny else PACK)
            try:
                found = measure(backend, shape, lengths, device, dtype, a.repeats)
            except Exception as e:  # of one backend: the others still count
                print(f"{name} {words} {backend} failed: {type(e).__name__}: {str(e)[:300]}", flush=True)
                continue
            found = {**place, "backend": label(backend), "shape": name, "documents": words, **found}
            if not a.tiny:
                with open(a.results, "a") as f:
                    f.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


def measure(
    backend: str, shape: Shape, lengths: list[int], device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """ms and TFLOP/s of a backend on a pack of documents of these lengths."""
    attend = BACKENDS[backend].load()
    assert attend is not None
    draw = torch.Generator(device).manual_seed(0)
    sizes = [(sum(lengths), heads, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)]
    inputs = [torch.randn(size, device=device, dtype=dtype, generator=draw).requires_grad_() for size in sizes]
    gradient = torch.randn(sizes[0], device=device, dtype=dtype, generator=draw)
    borders = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    forward, backward = [], []
    for _ in range(repeats + 1):
        seconds, out = timed(lambda: attend(*inputs, borders, max(lengths)), device)
        forward.append(seconds)
        backward.append(timed(partial(torch.autograd.grad, out, inputs, gradient), device)[0])
    flops = 2 * shape.heads * shape.head_dim * sum(n * n for n in lengths)
    found: dict[str, Any] = {"tokens": sum(lengths), "count": len(lengths), "first_s": forward[0] + backward[0]}
    for name, times, counted in (("forward", forward, flops), ("backward", backward, 2 * flops)):
        found[f"{name}_ms"] = statistics.median(times[1:]) * 1e3
        found[f"{name}_tflops"] = counted / statistics.median(times[1:]) / 1e12
    return found


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of the call, on a GPU until its kernels are done; what it returned."""
    if device.type != "cuda":
        start = time.perf_counter()
        returned = call()
        return time.perf_counter() - start, returned
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    returned = call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, returned


def document_lengths(words: str, pack: int) -> list[int]:
    """Of the documents of a pack; the last one is cut where the pack ends."""
    if words == MIX:
        lengths = [len(text) for text in draw_documents(pack, 100, MEDIAN * pack // PACK, pack, 0)]
    else:
        length = int(words) * pack // PACK or 1
        pack = max(pack, length)
        lengths = [length] * -(-pack // length)
    return [*lengths[:-1], pack - sum(lengths[:-1])]


def label(backend: str) -> str:
    try:
        return f"{backend} {version(PACKAGES[backend])}" if backend in PACKAGES else backend
    except PackageNotFoundError:
        return backend


def table(results: Path) -> str:
    """A row for each shape and pack, a column for each backend; the last of several results counts."""
    if not results.exists():
        return f"nothing has been measured yet: {results} does not exist"
    parts: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, str]]] = {}
    for r in map(json.loads, results.read_text().splitlines()):
        figures = (f"{r[f'{name}_tflops']:.0f} ({r[f'{name}_ms']:.2f})" for name in ("forward", "backward"))
        rows = parts.setdefault((r["gpu"], r["torch"], r["date"]), {})
        rows.setdefault((r["shape"], r["documents"]), {})[r["backend"]] = " / ".join(figures)
    texts = []
    for place, rows in parts.items():
        backends = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = [[*row, *(figures.get(name, "–") for name in backends)] for row, figures in rows.items()]
        texts.append(f"{', '.join(place)}\n\n{align(['shape', 'documents', *backends], cells)}")
    return "\n\n".join([*texts, "TFLOP/s (ms), forward / backward"])


if __name__ == "__main__":
    main()

"""Do AdamW's leaner states and fp8 products learn as well as fp32? Compared on the same real text.

    make demo && python benchmarks/optimizer_states.py --demo demo/out                # 4 M parameters, any machine
    python benchmarks/optimizer_states.py --text DIR --tokenizer DIR --iterations 250   # 1.8B, one GPU, 70 s each

DIR of `--text`: any folder with Python files; packs of 8,192 tokens, each seen once, from random weights. On a CPU,
bf16 weights compute in fp32. Reported: the mean training loss over quarters of the run, and the final loss on unseen
documents.
"""

import argparse
import os
import tempfile
from pathlib import Path

from benchlib import learning_curves
from benchlib.learning_curves import WINDOW, smooth
from benchlib.workloads import CASES
from benchlib.xtuner_training import render_config

from xtuner.core.log import progress
from xtuner.data.format.writer import write_bin
from xtuner.data.tokenizer import load_tokenizer
from xtuner.optim.adamw import FORMS

WAYS = {form: [f"states={form}"] for form in FORMS} | {
    kind: ["states=fp32", f"model.products={kind}"] for kind in ("fp8", "fp8_full")
}
DEMO = "internlm2_tiny_w_tokenized_dataset_copy.py"
PACK, LR, WARM_UP = 8192, 3e-4, 0.1


def write_text(text: Path, tokenizer: str, folder: Path, packs: int) -> None:
    """Python files below `text` as documents, every twentieth held out, until the others fill `packs`."""
    encode, total = load_tokenizer(tokenizer).encode, 0
    parts: dict[str, list[list[int]]] = {"train": [], "valid": []}
    for i, file in enumerate(progress(sorted(text.rglob("*.py")), "tokenizing")):
        tokens = [1, *encode(file.read_text(encoding="utf-8", errors="ignore").replace("\0", "")), 2][:PACK]
        parts["train" if i % 20 else "valid"].append(tokens)
        total += len(tokens) * bool(i % 20)
        if total >= packs * PACK:
            break
    else:
        raise SystemExit(f"{text} contains {total:,} tokens of Python; {packs * PACK:,} are needed")
    for part, documents in parts.items():
        count, tokens_written = write_bin(folder / part / "text.bin", documents)
        print(f"{part}: {count:,} documents, {tokens_written:,} tokens", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--demo", type=Path, help="demo/out after `make demo`")
    what.add_argument("--text", type=Path, help="train the 1.8B model on Python files below this folder")
    parser.add_argument("--tokenizer", help="with --text: a folder with InternLM2's tokenizer.model")
    parser.add_argument("--iterations", type=int, default=250, help="with --text")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--picture", type=Path, help="plot the losses of all variants: .png or .svg")
    a = parser.parse_args()
    if a.text and not a.tokenizer:
        parser.error("--text needs --tokenizer")
    picture = a.picture.resolve() if a.picture else None
    folder = Path(tempfile.mkdtemp(prefix="xtuner-states-"))
    if a.demo:
        os.chdir(a.demo)  # its paths are relative
        config, options = Path(DEMO), ["val_folder=data/valid", "val_interval=1000000"]  # at the end
    else:
        write_text(a.text, a.tokenizer, folder, a.iterations)
        config = folder / "config.py"
        config.write_text(render_config(CASES["1.8b"], folder / "train", a.tokenizer, 0))
        options = [f"val_folder={folder / 'valid'}", f"val_interval={a.iterations}", "save_steps=-1"]
        options += [f"max_length={PACK}", f"lr={LR}", f"warm_up_ratio={WARM_UP}"]
    print(f"| variant | training loss by quarter | last {WINDOW} | unseen |\n" + "|---" * 4 + "|", flush=True)
    curves = {}
    for name in a.ways:
        r = learning_curves.train(name, config, [*options, *WAYS[name]], folder / f"work-{name}")
        curves[name] = smooth(r.losses)
        print(f"| {name} | {r.quarters} | {r.last(WINDOW):.4f} | {r.unseen:.4f} |", flush=True)
    if picture:
        first, *others = curves
        differences = {name: curves[name] - curves[first] for name in others}
        learning_curves.draw({"Training loss": curves, f"Difference from {first}": differences}, picture)


if __name__ == "__main__":
    main()

"""Do full training, LoRA and QLoRA, AdamW and Muon learn? Compared on real text.

    python benchmarks/training_methods.py --picture learning.png      # 4 M parameters, a CPU, about 10 minutes
    python benchmarks/training_methods.py --shape 1.8b --text DIR     # one GPU; DIR with more Python files

From random weights, AdamW and Muon train on functions of the standard library, without docstrings. Then AdamW's model
learns another kind of text, the docstrings: all weights by AdamW or Muon, or adapters of rank 16 on all matrices of the
blocks, also with embedding and output layer in full. Every fiftieth source file is held out. AdamW has the same rate in
all runs, and Muon its usual one: they are not the best of several. Reported: the training loss of the first iteration
(for a base, before it learns), the mean over the last tenth, and the loss on held-out text.
"""

import argparse
import ast
import contextlib
import itertools
import random
import re
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchlib import learning_curves
from benchlib.learning_curves import Curve, smooth
from benchlib.workloads import SHAPES, Shape

from xtuner.config.load import SHIPPED
from xtuner.core.log import progress
from xtuner.data.format.writer import write_bin

DEMO = Shape("tiny", 256, 4, 4, 768, 2, 2048)
PACKS = {"demo": 1024, "1.8b": 8192}  # tokens
VOCABULARY = 2048
HELD_OUT = 50  # every 50th source file
LENGTHS = range(60, 4000)  # characters of a document
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}  # mostly tables
LR = 2e-3  # of AdamW
MUON = 'dict(type="Muon", lr=0.02, weight_decay=weight_decay, adamw=dict(lr=lr, betas=betas))'
ADAMW = "dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay)"
LORA = 'adapter=dict(type="xtuner.model.lora", rank=16, alpha=32)'


@dataclass(frozen=True)
class Method:
    name: str
    optimizer: str = ADAMW
    adapter: str = ""  # arguments of the model


PRETRAINING = (Method("AdamW"), Method("Muon", MUON))
FINE_TUNING = (
    Method("AdamW, all weights"),
    Method("Muon, all weights", MUON),
    Method("LoRA", adapter=LORA),
    Method("QLoRA, nf4", adapter=f'{LORA}, frozen_weights="nf4"'),
    Method("LoRA, embedding and output in full", adapter=LORA.replace(")", ', train=["embedding", "output"])')),
)


def read_source(source: str) -> tuple[list[str], list[str]]:
    """(functions without comments and docstrings, docstrings) of a source file."""
    functions, docstrings = [], []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            continue
        if text := ast.get_docstring(node):
            docstrings.append(text + "\n")
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            functions.append(ast.unparse(node) + "\n")
    functions, docstrings = ([t for t in texts if len(t) in LENGTHS] for texts in (functions, docstrings))
    return functions, docstrings


def write_data(text: Path, folder: Path, most: int) -> None:
    """Write FOLDER/tokenizer, and data of both kinds of text, each with a held-out part and `most` tokens at most."""
    import sentencepiece

    files = [p for p in sorted(text.rglob("*.py")) if not SKIPPED_FOLDERS & set(p.relative_to(text).parts)]
    kinds: dict[str, list[list[str]]] = {"functions": [], "docstrings": []}
    for file in progress(files, "reading"):
        with contextlib.suppress(SyntaxError, ValueError, RecursionError):
            for texts, found in zip(kinds.values(), read_source(file.read_text("utf-8", "ignore")), strict=True):
                texts.append(found)
    (folder / "tokenizer").mkdir(parents=True)
    every = [text for texts in kinds.values() for found in texts for text in found]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line + "\n" for text in every[::2] for line in text.split("\n") if line),
        model_prefix=str(folder / "tokenizer" / "tokenizer"), model_type="bpe", vocab_size=VOCABULARY,
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, num_threads=2, minloglevel=2,
    )  # fmt: skip
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    for kind, texts in kinds.items():
        for part, chosen in (("valid", texts[::HELD_OUT]), ("train", [t for i, t in enumerate(texts) if i % HELD_OUT])):
            documents = [[1, *tokenizer.encode(text), 2] for found in chosen for text in found]
            random.Random(0).shuffle(documents)
            ends = itertools.accumulate(map(len, documents))
            documents = [d for d, end in zip(documents, ends, strict=True) if end <= most]
            count, tokens = write_bin(folder / kind / part / "text.bin", documents)
            print(f"{kind}, {part}: {count:,} documents, {tokens:,} tokens", flush=True)


def render_config(method: Method, model: str) -> str:
    """The shipped tiny config with another model and optimizer."""
    text = (SHIPPED / "internlm2_tiny_w_tokenized_dataset.py").read_text()
    text = re.sub(r"(?s)\nmodel = dict\(.*?\n\)\n", f"\nmodel = {model}\n", text)
    return text.replace(f"optimizer={ADAMW}", f"optimizer={method.optimizer}")


def compare(
    methods: Sequence[Method], folder: Path, kind: str, model: str, pack: int
) -> Iterator[tuple[Method, Curve, Path]]:
    """Train by each method; yields its curve and work dir."""
    for method in methods:
        work = folder / f"{kind}-{re.sub('[^a-zA-Z0-9]+', '-', method.name)}"
        config = folder / f"{work.name}.py"
        config.write_text(render_config(method, f"{model}{method.adapter})"))
        options = {"dataset_folder": folder / kind / "train", "val_folder": folder / kind / "valid",
                   "tokenizer_path": folder / "tokenizer", "max_length": pack, "val_interval": 10**6, "save_steps": -1,
                   "lr": LR}  # fmt: skip
        given = [f"{key}={value}" for key, value in options.items()]
        curve = learning_curves.train(method.name, config, given, work, save=method is methods[0])
        print(
            f"| {kind} | {method.name} | {len(curve.losses)} | {curve.losses[0]:.4f} "
            f"| {curve.last(len(curve.losses) // 10):.4f} | {curve.unseen:.4f} |",
            flush=True,
        )
        yield method, curve, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="demo", choices=list(PACKS))
    parser.add_argument(
        "--text", type=Path, default=Path(sysconfig.get_paths()["stdlib"]), help="a folder of .py files"
    )
    parser.add_argument("--iterations", type=int, default=300, help="of each run at most; fewer with less text")
    parser.add_argument("--folder", type=Path, help="for data and runs; a new one")
    parser.add_argument("--picture", type=Path, help="plot the losses: .png or .svg")
    a = parser.parse_args()
    shape, pack = DEMO if a.shape == "demo" else SHAPES[a.shape], PACKS[a.shape]
    folder = a.folder or Path(tempfile.mkdtemp(prefix="xtuner-methods-"))
    write_data(a.text, folder, a.iterations * pack)
    fields = {**shape.fields(), "vocab_size": VOCABULARY, "max_position_embeddings": pack, "rope_theta": 10000}
    arguments = ", ".join(f"{key}={value!r}" for key, value in fields.items())
    print("| text | method | iterations | first | last tenth | held out |\n|---|---|---|---|---|---|", flush=True)
    scratch = f"dict(type=from_scratch, {arguments}, "
    found = list(compare(PRETRAINING, folder, "functions", scratch, pack))
    base = next(found[0][2].glob("iter_*.pth")) / "weights"
    pretrained = f'dict(type="xtuner.model.from_pretrained", pretrained_model_name_or_path="{base}", '
    tuned = list(compare(FINE_TUNING, folder, "docstrings", pretrained, pack))
    if a.picture:
        panels = {
            title: {method.name: smooth(curve.losses) for method, curve, _ in curves}
            for title, curves in (("From random weights", found), ("From AdamW's model, another kind of text", tuned))
        }
        learning_curves.draw(panels, a.picture)


if __name__ == "__main__":
    main()

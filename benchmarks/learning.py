"""Does it learn as well? Losses on real text: the sources and documentation of the installed Python packages.

    python benchmarks/learning.py forms      # fp8 products, AdamW's leaner states, next to what is the default
    python benchmarks/learning.py methods    # AdamW and Muon; then all weights, LoRA and QLoRA on another kind of text
    python benchmarks/learning.py forms --shape 1.8b --tokenizer internlm2/tokenizer.model --iterations 800 \\
        --variants own fp8 fp8_full --folder /scratch/learning --seconds 200      # one GPU
    python benchmarks/learning.py forms … --folder /scratch/learning --resume     # continue where that stopped
    python benchmarks/learning.py forms … --folder /scratch/learning --table      # what there is

Without --shape: 4 M parameters, on a CPU; `tiny` tries all of it, but learns little. Every file is a document, cut at
the length of a pack; none occurs twice. They are shuffled, and some are held out ("unseen"). An iteration is one pack
(8,192 tokens; 1,024 of the small model); each is seen once, if there is enough text. Rates rise over the first tenth
and fall along a cosine; gradients are clipped to norm 1. All variants have the same rates, which are not the best of
several, and see the same tokens in the same order.

forms: a variant passes if its mean loss over the last tenth and its unseen loss are at most 0.3 % above those of `own`,
and its largest spike is at most 0.1 nats, or the largest of `own` (learning_curves.Verdict says what a spike is).
methods: fine-tuning learns C and C++, from the finished `own` of `forms` in the same folder, else from its AdamW run.

Results (losses of all iterations as JSON, a picture, the table) are written after each variant and every half minute.
Several processes may train different variants of a folder, one a GPU: --prepare first, then --resume in each.
"""

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchlib import learning_curves, real_text
from benchlib.learning_variants import EXPERIMENTS, FINE_TUNING, TABLES, Variant, panels, render_config

from xtuner.core.files import write_json

PACKS = {"tiny": 256, "demo": 1024, "1.8b": 8192}  # tokens
RATES = {"tiny": 2e-3, "demo": 2e-3, "1.8b": 3e-4}  # of AdamW
VOCABULARY = {"tiny": 512, "demo": 2048}  # of a tokenizer that is trained here
UNSEEN_PACKS = 24
EVALUATIONS = 5  # of the loss on unseen documents
LEAST_ITERATIONS = 10  # of which the first warms up
LEAST_SECONDS = 20  # in which a variant can start


class Experiment:
    """One of EXPERIMENTS in a folder: its data, the runs of its variants, and their results."""

    def __init__(self, name: str, shape: str, iterations: int, folder: Path, results: Path) -> None:
        self.name, self.shape, self.results = name, shape, results
        self.root, self.folder, self.pack = folder, folder / name, PACKS[shape]
        self.variants = EXPERIMENTS[name]
        self.facts = {"shape": shape, "iterations": iterations, "pack": self.pack, "lr": RATES[shape]}

    def write_data(self, roots: Sequence[Path], tokenizer: Path | None) -> None:
        files = [] if tokenizer else real_text.find_files("python", roots)
        if not (self.root / "tokenizer" / "tokenizer.model").exists():
            real_text.prepare_tokenizer(self.root / "tokenizer", tokenizer, files, VOCABULARY.get(self.shape, 0))
        for kind in dict.fromkeys(v.text for v in self.variants):
            arguments = self.pack, self.facts["iterations"], UNSEEN_PACKS * self.pack
            data = real_text.write_text(kind, roots, self.root / "tokenizer", self.folder / kind, *arguments)
            print(data, flush=True)
        write_json(self.folder / "facts.json", self.facts)

    def require_same(self) -> None:
        """Exit unless the folder has data of the same settings."""
        if not (self.folder / "facts.json").exists():
            raise SystemExit(f"{self.folder} has no data; leave out --resume and --table")
        if (found := json.loads((self.folder / "facts.json").read_text())) != self.facts:
            raise SystemExit(f"{self.folder} has runs of {found}, not of {self.facts}; choose another --folder")

    def data(self, variant: Variant) -> dict:
        return json.loads((self.folder / variant.text / "text.json").read_text())

    def iterations(self, variant: Variant) -> int:
        return self.data(variant)["packs"] * self.data(variant)["epochs"]

    def curves(self) -> dict[Variant, learning_curves.Curve]:
        found = {v: learning_curves.read_curve(self.folder / v.file_name) for v in self.variants}
        return {variant: curve for variant, curve in found.items() if curve}

    def checkpoint(self, variant: Variant) -> Path | None:
        """The weights after its last iteration."""
        weights = self.folder / variant.file_name / f"iter_{self.iterations(variant)}.pth" / "weights"
        return weights if weights.exists() else None

    def find_base(self) -> Path | None:
        forms = Experiment("forms", self.shape, 0, self.root, self.results)
        learned = forms.checkpoint(forms.variants[0]) if (forms.folder / "facts.json").exists() else None
        return learned or self.checkpoint(self.variants[0])

    def train(self, variant: Variant, seconds: float, resumable: bool, save_steps: int) -> str:
        """Train a variant until it is finished or `seconds` have passed. Returns what to print of it."""
        base, iterations = None, self.iterations(variant)
        if variant.begin == FINE_TUNING:
            base = self.find_base()
            if base is None:
                return f"{variant.name}: left out, as {self.variants[0].name} has not finished"
        saves = variant == self.variants[0] and (self.name == "forms" or self.find_base() is None)
        curve = self.curves().get(variant)
        if curve and iterations in curve.unseen and (not saves or self.checkpoint(variant)):
            return f"{variant.name}: finished before"
        config = self.folder / f"{variant.file_name}.py"
        config.write_text(render_config(variant, self.shape, base))
        text = self.folder / variant.text
        settings = {
            "dataset_folder": text / "train", "val_folder": text / "valid", "tokenizer_path": self.root / "tokenizer",
            "max_length": self.pack, "max_epochs": self.data(variant)["epochs"], "lr": RATES[self.shape],
            "val_interval": max(iterations // EVALUATIONS, 1), "evaluation_inputs": [], "save_steps": save_steps,
            "save_total_limit": 1, "save_optimizer": resumable,
        }  # fmt: skip
        options = ["--cfg-options", *(f"{key}={value}" for key, value in settings.items()), *variant.settings]
        work, begin = self.folder / variant.file_name, time.monotonic()
        output = learning_curves.train(
            config, work, options, iterations, seconds, saves, resumable, report=self.write_results
        )
        curve, spent = self.curves().get(variant), time.monotonic() - begin
        if curve is None or iterations not in curve.unseen:
            reached = len(curve.losses) if curve else 0
            end = "" if spent > seconds else f"; its output ended with\n{output}"
            return f"{variant.name}: stopped at iteration {reached} of {iterations} after {spent:.0f} s{end}"
        return f"{variant.name}: finished in {spent:.0f} s"

    def table(self) -> str:
        curves = self.curves()
        if not curves:
            return "nothing has been trained yet"
        data = (
            "{kind}: {tokens:,} tokens in {documents:,} documents, epochs: {epochs}; {unseen_tokens:,} tokens held out"
        )
        lines = [data.format(**d) for d in self.kinds().values()]
        return "\n".join([*lines, "", *TABLES[self.name](curves, self.pack)])

    def kinds(self) -> dict[str, dict]:
        """Kind of text → what was written of it."""
        return {v.text: self.data(v) for v in self.variants}

    def write_results(self) -> None:
        """NAME.json, NAME.md and NAME.png in the folder of results."""
        curves = self.curves()
        if not curves:
            return
        found = {
            v.name: {"settings": v.settings, "begin": v.begin, "text": v.text, **asdict(c)} for v, c in curves.items()
        }
        write_json(self.results / f"{self.name}.json", {**self.facts, "data": self.kinds(), "variants": found})
        (self.results / f"{self.name}.md").write_text(self.table() + "\n")
        if importlib.util.find_spec("matplotlib"):
            learning_curves.draw(panels(self.name, curves), self.results / f"{self.name}.png")


def main() -> None:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--shape", default="demo", choices=list(PACKS))
    parser.add_argument("--tokenizer", type=Path, help="InternLM2's tokenizer.model; small models get their own")
    parser.add_argument("--iterations", type=int, default=300, help="of each variant")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="in this order; default: all of the table")
    parser.add_argument("--text", type=Path, nargs="+", help="folders with sources, instead of the installed packages")
    parser.add_argument("--folder", type=Path, help="for data and runs")
    parser.add_argument("--results", type=Path, help="folder for results (default: FOLDER)")
    parser.add_argument("--resume", action="store_true", help="continue what is in the folder")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="limit for each variant")
    parser.add_argument("--limit", type=float, default=float("inf"), help="limit for all, in seconds")
    parser.add_argument(
        "--save-steps", type=int, default=-1, help="iterations between checkpoints; -1: none but the last"
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="save no optimizer: an unfinished variant cannot be continued"
    )
    parser.add_argument("--prepare", action="store_true", help="only write the data")
    parser.add_argument("--table", action="store_true", help="only write results and print the table")
    a = parser.parse_args()
    variants = {v.name: v for v in EXPERIMENTS[a.experiment]}
    if unknown := set(a.variants or ()) - set(variants):
        parser.error(f"--variants: there are {', '.join(map(repr, variants))}, not {', '.join(map(repr, unknown))}")
    if a.iterations < LEAST_ITERATIONS:
        parser.error(f"--iterations: {LEAST_ITERATIONS} at least")
    if a.shape not in VOCABULARY and not a.tokenizer and not (a.resume or a.table):
        parser.error(f"--shape {a.shape} needs --tokenizer")
    if a.tokenizer and not (a.tokenizer / "tokenizer.model" if a.tokenizer.is_dir() else a.tokenizer).is_file():
        parser.error(f"--tokenizer: {a.tokenizer} is neither a tokenizer.model nor a folder with one")
    if (a.resume or a.table) and not a.folder:
        parser.error("--resume and --table need --folder")
    folder = (a.folder or Path(tempfile.mkdtemp(prefix="xtuner-learning-"))).resolve()
    results = (a.results or folder).resolve()
    results.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(a.experiment, a.shape, a.iterations, folder, results)
    if a.resume or a.table:
        experiment.require_same()
    elif (experiment.folder / "facts.json").exists():
        parser.error(f"{experiment.folder} exists; add --resume to continue it, or choose another --folder")
    else:
        experiment.write_data(a.text or real_text.installed_text(), a.tokenizer)
    for name in () if a.prepare or a.table else a.variants or variants:
        left = a.limit - (time.monotonic() - begin)
        if left < LEAST_SECONDS:
            print(f"{name}: left out, {left:.0f} s are left", flush=True)
            continue
        print(experiment.train(variants[name], min(a.seconds, left), not a.weights_only, a.save_steps), flush=True)
        experiment.write_results()
    experiment.write_results()
    print(f"\n{experiment.table()}\n\nresults: {results}", flush=True)


if __name__ == "__main__":
    main()

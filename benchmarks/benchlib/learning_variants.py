"""What `learning.py` compares: variants of a training, their configs, and tables of their results."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from benchlib.learning_curves import Curve, judge, smooth

from xtuner.config.load import SHIPPED

ADAMW = "dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay)"
MUON = 'dict(type="Muon", lr=0.02, weight_decay=weight_decay, adamw=dict(lr=lr, betas=betas))'
LORA = 'adapter=dict(type="xtuner.model.lora", rank=16, alpha=32)'
FROM_SCRATCH, FINE_TUNING = "from random weights", "from AdamW's model"


@dataclass(frozen=True)
class Variant:
    """
    Args:
        settings: overrides of the config.
        begin: what the training starts from.
        text: a kind of real_text.KINDS.
        adapter: arguments of the model.
    """

    name: str
    settings: tuple[str, ...] = ()
    begin: str = FROM_SCRATCH
    text: str = "python"
    optimizer: str = ADAMW
    adapter: str = ""

    @property
    def file_name(self) -> str:
        return re.sub("[^a-zA-Z0-9_]+", "-", self.name)


def _fine_tuning(name: str, optimizer: str = ADAMW, adapter: str = "") -> Variant:
    return Variant(name, (), FINE_TUNING, "c", optimizer, adapter)


# the first of `methods` is the base of fine-tuning unless `forms` has been run
EXPERIMENTS: dict[str, tuple[Variant, ...]] = {
    "forms": (
        Variant("own"),
        Variant("fp8", ("model.products=fp8",)),
        Variant("fp8_full", ("model.products=fp8_full",)),
        Variant("own, other seed", ("randomness.seed=1",)),  # how far two runs differ by chance
        *(Variant(f"states {form}", (f"states={form}",)) for form in ("split", "bf16", "8bit")),
    ),
    "methods": (
        Variant("AdamW"),
        Variant("Muon", optimizer=MUON),
        _fine_tuning("AdamW, all weights"),
        _fine_tuning("Muon, all weights", MUON),
        _fine_tuning("LoRA", adapter=LORA),
        _fine_tuning("QLoRA, nf4", adapter=f'{LORA}, frozen_weights="nf4"'),
        _fine_tuning(
            "LoRA, embedding and output in full", adapter=LORA.replace(")", ', train=["embedding", "output"])')
        ),
    ),
}


REFERENCE = EXPERIMENTS["forms"][0]


def render_config(variant: Variant, shape: str, base: Path | None) -> str:
    """The shipped tiny config with another model and optimizer."""
    from benchlib.workloads import SHAPES  # imports torch, which processes that tokenize do not need

    if variant.begin == FINE_TUNING:
        model = f'type="xtuner.model.from_pretrained", pretrained_model_name_or_path="{base}"'
    else:
        model = "type=from_scratch, " + ", ".join(f"{k}={v!r}" for k, v in SHAPES[shape].fields().items())
    text = (SHIPPED / "internlm2_tiny_w_tokenized_dataset.py").read_text()
    model = f"\nmodel = dict({model}, activation_checkpointing=True, {variant.adapter})\n"
    text = re.sub(r"(?s)\nmodel = dict\(.*?\n\)\n", lambda _: model, text)
    return text.replace(f"optimizer={ADAMW}", f"optimizer={variant.optimizer}")


Curves = Mapping[Variant, Curve]


def forms_table(curves: Curves, pack: int) -> Iterator[str]:
    """Markdown; each variant next to the reference."""
    yield "| variant | iterations | tokens | last tenth | unseen | largest spike (reference's) | tok/s | verdict |"
    yield "|---" * 8 + "|"
    reference = curves.get(REFERENCE)
    for variant, curve in curves.items():
        n = len(curve.losses)
        unseen = f"{curve.unseen[max(curve.unseen)]:.4f}" if curve.unseen else "–"
        cells = [variant.name, f"{n}", f"{n * pack:,}", f"{curve.last_tenth(n):.4f}", unseen, "–"]
        verdict = "reference" if variant == REFERENCE else "nothing to compare with"
        if variant != REFERENCE and reference and (found := judge(curve, reference)):
            cells[3] += f" ({found.last_tenth:+.2%})"
            cells[4] += f" ({found.unseen:+.2%})"
            cells[5] = f"{found.spike:.3f} ({found.reference_spike:.3f})"
            verdict = ("passed" if found.passed else "failed") + f", {found.iterations} iterations"
        yield f"| {' | '.join(cells)} | {curve.tokens_per_s:,.0f} | {verdict} |"


def methods_table(curves: Curves, pack: int) -> Iterator[str]:
    yield "| begins | text | method | iterations | first | mean of the last tenth | unseen | tok/s |"
    yield "|---" * 8 + "|"
    for variant, curve in curves.items():
        n = len(curve.losses)
        unseen = f"{curve.unseen[max(curve.unseen)]:.4f}" if curve.unseen else "–"
        yield (
            f"| {variant.begin} | {variant.text} | {variant.name} | {n} | {curve.losses[0]:.4f} "
            f"| {curve.last_tenth(n):.4f} | {unseen} | {curve.tokens_per_s:,.0f} |"
        )


TABLES = {"forms": forms_table, "methods": methods_table}


def panels(experiment: str, curves: Curves) -> dict[str, dict[str, np.ndarray]]:
    """What to draw: title → name → smoothed losses."""
    smoothed = {variant: smooth(curve.losses) for variant, curve in curves.items()}
    if experiment == "methods":
        starts = dict.fromkeys(variant.begin for variant in curves)
        return {s: {v.name: line for v, line in smoothed.items() if v.begin == s} for s in starts}
    reference, shown = smoothed.get(REFERENCE), {v.name: line for v, line in smoothed.items()}
    if reference is None or len(shown) == 1:
        return {"Training loss": shown}
    lengths = {v: min(len(line), len(reference)) for v, line in smoothed.items() if v != REFERENCE}
    differences = {v.name: smoothed[v][:n] - reference[:n] for v, n in lengths.items()}
    return {"Training loss": shown, f"Difference from {REFERENCE.name}": differences}

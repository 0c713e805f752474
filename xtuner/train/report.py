"""What a run tells before its first step: every derived number with its unit, and the machine it runs on."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from xtuner.core import machine
from xtuner.core.log import human, human_bytes
from xtuner.engine.parameter_groups import group_of
from xtuner.model.attention import BACKENDS
from xtuner.model.flops import num_parameters, training_flops
from xtuner.train.run import Run

SHOWN_FILES = 20
LOOKED_AT = 1024  # packs of which it is worked out how long ranks wait for each other
SUGGESTED = 16  # iterations whose packs are dealt together: `train_dataloader.balance`
MOST = 64  # iterations that are looked at for a window of more
WORTH = 0.005  # of an iteration, to suggest it


def environment(config: Path) -> dict[str, Any]:
    """Versions, machine, command line, and the git state of the folder that the config lies in; secrets masked."""
    return machine.facts(config.resolve().parent)


def report(run: Run) -> str:
    """The numbers that follow from config and data, for standard output."""
    data, config = run.loader.dataset, run.source.config
    documents, tails, dropped = data.documents, data.tail_tokens_per_file, data.dropped()
    files, lost = f"{len(documents):,} files", f"{dropped.dropped:,} tokens ({dropped.share})"
    if documents.num_repeated:
        files += f" ({documents.num_repeated:,} named more than once)"
    parameters = num_parameters(config)
    where = str(run.source.folder) if run.source.folder else f"random weights, seed {run.source.seed}"
    tokens = run.packs_per_iteration * data.packed_length
    compute = str(run.optim.compute_dtype(run.device)).removeprefix("torch.")
    flops = training_flops(config, tokens, 0)
    each = f"on each of {run.mesh.size} ranks " if run.mesh.size > 1 else ""
    rows = [
        ("model", f"{parameters:,} parameters, {config.num_layers} layers of {config.hidden_size}, from {where}"),
        ("optimizer", run.optim.describe()),
        *_groups(run),
        ("strategy", run.choice.name),
        ("precision", f"{_masters(run)}, compute in {compute} on {run.device}{_products(run)}"),
        ("attention", BACKENDS[run.source.attention_backend(run.device, run.optim.compute_dtype(run.device))].about),
        ("state", f"{human_bytes(run.choice.state)} {each}for weights, gradients and optimizer, by arithmetic"),
        (
            "data",
            f"{documents.num_tokens:,} tokens in {documents.num_documents:,} documents, {files}, {documents.location}",
        ),
        ("packs", f"{len(data):,} of {data.packed_length:,} tokens; {lost} of file tails fill none"),
    ]
    shown = (documents.file(i) for i in range(min(len(documents), SHOWN_FILES)))
    for file, packs, tail in zip(shown, data.packs_per_file, tails, strict=False):
        rows.append(("", f"{file.name}: {file.num_tokens:,} tokens, {packs:,} packs, tail of {tail:,}"))
    if len(documents) > SHOWN_FILES:
        rows.append(("", f"… and {len(documents) - SHOWN_FILES} more files"))
    rows += _dealing(run)
    left_over = run.total_packs - run.max_iterations * run.packs_per_iteration
    rows += [
        ("iteration", f"{tokens:,} tokens in packs: {run.packs_per_iteration}; {human(flops)}FLOPs without attention"),
        ("run", f"{run.max_iterations:,} iterations; epochs: {run.max_epochs}; packs left over: {left_over}"),
        ("work dir", str(run.work_dir)),
    ]
    return "what this run is\n" + "\n".join(f"  {name:<10} {text}" for name, text in rows)


def _groups(run: Run) -> list[tuple[str, str]]:
    """What the config's parameter groups take."""
    groups = run.optim.parameter_groups
    taken = Counter(group_of(name, groups) for name in (run.source.trained_names() if groups else ()))
    return [("", f"{taken[g]:,} parameters that match {g.match!r}: {g}") for g in groups]


def _dealing(run: Run) -> list[tuple[str, str]]:
    """Which packs are dealt to ranks, and how long those wait for the slowest, by arithmetic."""
    loader, window = run.loader, run.loader.balance
    if loader.dp_size == 1:
        of = f"packs of {window} iterations are dealt to them by attention cost, as on several ranks"
        return [("balance", of)] if window > 1 else []
    if window > 1:
        what = f"packs of {window} iterations are dealt to them by attention cost"
    elif loader.deals:
        what = "packs of an iteration are dealt to its ranks by attention cost"
    elif window:
        what = "one pack a rank in an iteration, nothing to deal"
    else:
        what = "packs are not dealt" + (f", because {loader.lacks}" if loader.lacks else "")

    def flops(squares: Any) -> Any:
        return training_flops(run.source.config, loader.dataset.packed_length, squares)

    most = max(LOOKED_AT // run.packs_per_iteration, min(window, MOST), SUGGESTED)
    now, undealt, better = (loader.waiting(flops, balance, most) for balance in (window, 0, SUGGESTED))
    if now is None or undealt is None or better is None:
        return [("balance", what)]
    what += f": ranks wait {now:.1%} of an iteration for the slowest"
    if loader.deals:
        what += f" instead of {undealt:.1%}"
    if window < SUGGESTED and now - better >= WORTH:
        what += f"; train_dataloader.balance = {SUGGESTED} would leave {better:.1%}"
    return [("balance", f"{what} (by arithmetic)")]


def _masters(run: Run) -> str:
    form = run.optim.states
    return "fp32 masters" if form.moment == torch.float32 else f"bf16 weights, {form.name} moments"


def _products(run: Run) -> str:
    return "" if run.source.products == "own" else f", products of blocks in {run.source.products}"

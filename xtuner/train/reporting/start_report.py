"""The report before the first step: every derived number with its unit, and the machine."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from xtuner.core.log import human, human_bytes
from xtuner.core.system import sysinfo
from xtuner.model.adapters.lora import LoRA
from xtuner.model.attention import BACKENDS
from xtuner.model.context_parallel.division import divide_heads
from xtuner.model.flops import num_parameters
from xtuner.optim.muon import is_matrix, parameter_flops
from xtuner.optim.parameter_groups import find_group
from xtuner.train.run import Plan, Settings

SHOWN_FILES = 20
PACKS_EXAMINED = 1024  # packs from which the waiting time of ranks is computed
SUGGESTED_WINDOW = 16  # iterations whose packs are assigned together: `train_dataloader.balance`
MAX_WINDOW = 64  # iterations examined for larger windows
MIN_GAIN = 0.005  # share of an iteration; smaller gains are not suggested


def describe_environment(config: Path) -> dict[str, Any]:
    """Versions, machine, command line, and the git state of the config's folder; secrets masked."""
    return sysinfo.facts(config.resolve().parent)


def format_start_report(settings: Settings, plan: Plan) -> str:
    """The numbers derived from config and data, for standard output."""
    data, config = settings.dataset, settings.source.config
    documents, tails, dropped = data.documents, data.tail_tokens_per_file, data.dropped()
    files = f"{len(documents):,} files"
    if documents.num_repeated:
        files += f" ({documents.num_repeated:,} listed more than once)"
    parameters = num_parameters(config)
    where = str(settings.source.folder) if settings.source.folder else f"random weights, seed {settings.source.seed}"
    tokens = plan.packs_per_iteration * data.packed_length
    device, dtype = settings.device, settings.optim.compute_dtype(settings.device)
    compute = str(dtype).removeprefix("torch.")
    flops = settings.source.training_flops(tokens, 0)
    each = f"on each of {settings.mesh.size} ranks " if settings.mesh.size > 1 else ""
    trained = settings.source.count_trained().total
    partly = f", {trained:,} of them trained" if settings.source.frozen else ""
    rows = [
        (
            "model",
            f"{parameters:,} parameters{partly}, {config.num_layers} layers of {config.hidden_size}, from {where}",
        ),
        *_adapter_rows(settings),
        ("optimizer", settings.optim.describe()),
        *_muon_rows(settings, flops),
        *_parameter_group_rows(settings),
        ("strategy", plan.choice.name),
        ("precision", f"{_describe_masters(settings)}, compute in {compute} on {device}{_describe_products(settings)}"),
        ("attention", BACKENDS[settings.source.attention_backend(device, dtype)].description),
        ("state", f"{human_bytes(plan.choice.state)} {each}for weights, gradients and optimizer, by arithmetic"),
        (
            "data",
            f"{documents.num_tokens:,} tokens in {documents.num_documents:,} documents, {files}, {documents.location}",
        ),
        ("packs", f"{len(data):,} of {data.packed_length:,} tokens; {dropped.describe()}"),
    ]
    rows += _mixture_rows(settings, plan)
    tail_name = "dropped:" if dropped.whole else "tail of"
    shown = (documents.file(i) for i in range(min(len(documents), SHOWN_FILES)))
    for file, packs, tail in zip(shown, data.packs_per_file, tails, strict=False):
        rows.append(("", f"{file.name}: {file.num_tokens:,} tokens, {packs:,} packs, {tail_name} {tail:,}"))
    if len(documents) > SHOWN_FILES:
        rows.append(("", f"… and {len(documents) - SHOWN_FILES} more files"))
    rows += _context_rows(settings)
    rows += _balance_rows(settings, plan)
    left_over = plan.total_packs - plan.max_iterations * plan.packs_per_iteration
    rows += [
        ("iteration", f"{tokens:,} tokens in packs: {plan.packs_per_iteration}; {human(flops)}FLOPs without attention"),
        ("run", f"{plan.max_iterations:,} iterations; epochs: {plan.max_epochs}; packs left over: {left_over}"),
        ("work dir", str(settings.work_dir)),
    ]
    return "plan of the run\n" + "\n".join(f"  {name:<10} {text}" for name, text in rows)


def _adapter_rows(settings: Settings) -> list[tuple[str, str]]:
    """The adapter, how much is trained, and how the rest is kept."""
    source = settings.source
    if not isinstance(source.adapter, LoRA):
        return []
    trained = source.count_trained().total
    kept = "" if source.frozen_weights == "own" else f"; frozen matrices in {source.frozen_weights}"
    share = trained / (num_parameters(source.config) + source.adapter.added_weights)
    return [("adapter", f"{source.adapter.describe()}: {trained:,} trained parameters ({share:.2%}){kept}")]


def _muon_rows(settings: Settings, iteration: float) -> list[tuple[str, str]]:
    """What Muon updates, and how many FLOPs it adds to an iteration's `iteration`, both of all ranks."""
    source, muon = settings.source, settings.optim.muon
    if not muon:
        return []
    shapes = {name: shape for name, shape in source.trained_shapes.items() if is_matrix(name, shape)}
    costs = [parameter_flops(name, shape, muon, source.config) for name, shape in shapes.items()]
    others = source.count_trained().total - settings.optim.count_matrices(source)
    flops = settings.mesh.dp_replicate * sum(costs)
    text = f"Muon updates {len(shapes):,} matrices of blocks, AdamW the other {others:,} parameters; it adds "
    return [("", text + f"{human(flops)}FLOPs to an iteration, {flops / iteration:.1%}")]


def _mixture_rows(settings: Settings, plan: Plan) -> list[tuple[str, str]]:
    """What an epoch of a mixture takes of each source."""
    mixed = getattr(settings.dataset, "mixture", None)
    if mixed is None:
        return []
    lines = mixed.describe(plan.packs_per_epoch, settings.dataset.packed_length)
    return [("" if i else "mixture", line) for i, line in enumerate(lines)]


def _parameter_group_rows(settings: Settings) -> list[tuple[str, str]]:
    """Number of parameters in each parameter group of the config."""
    groups, decay = settings.optim.parameter_groups, settings.optim.layer_decay
    names = replace(settings.source, frozen=frozenset()).trained_names() if groups else ()
    taken = Counter(find_group(name, groups) for name in names)
    layers = [("", f"each layer's rate is {decay:g} of that of the layer above it")] if decay else []
    return [("", f"{taken[g]:,} parameters that match {g.match!r}: {g}") for g in groups] + layers


def _context_rows(settings: Settings) -> list[tuple[str, str]]:
    """How many ranks share each pack, and how evenly they divide attention."""
    cp, config = settings.mesh.cp, settings.source.config
    if cp == 1:
        return []
    text = f"{cp} ranks share each pack: long documents by attention's heads, short ones are complete on one rank"
    heads = [
        share.num_queries for share in divide_heads(config.num_heads, config.num_kv_heads, min(cp, config.num_heads))
    ]
    if max(heads) > min(heads):
        text += f"; {config.num_heads} heads do not divide evenly: ranks have {min(heads)} to {max(heads)}"
    elif cp > config.num_heads:
        text += f"; {config.num_heads} heads are fewer than ranks, which divide the queries of each"
    return [("context", text)]


def _balance_rows(settings: Settings, plan: Plan) -> list[tuple[str, str]]:
    """How packs are assigned to ranks, and how long ranks wait for the slowest, by arithmetic."""
    loader, window = plan.loader(settings), plan.balance
    if loader.dp_size == 1:
        what = f"packs of {window} iterations are ordered by attention cost, as on several ranks"
        return [("balance", what)] if window > 1 else []
    if window > 1:
        what = f"packs of {window} iterations are assigned to ranks by attention cost"
    elif loader.is_balanced:
        what = "packs of an iteration are assigned to ranks by attention cost"
    elif window:
        what = "one pack per rank and iteration, nothing to balance"
    else:
        what = "packs are not balanced" + (f", because {loader.balance_obstacle}" if loader.balance_obstacle else "")

    def flops(squares: Any) -> Any:
        return settings.source.training_flops(loader.dataset.packed_length, squares)

    most = max(PACKS_EXAMINED // plan.packs_per_iteration, min(window, MAX_WINDOW), SUGGESTED_WINDOW)
    now, undealt, better = (loader.waiting_share(flops, balance, most) for balance in (window, 0, SUGGESTED_WINDOW))
    if now is None or undealt is None or better is None:
        return [("balance", what)]
    what += f": ranks wait {now:.1%} of an iteration for the slowest"
    if loader.is_balanced:
        what += f" instead of {undealt:.1%}"
    if window < SUGGESTED_WINDOW and now - better >= MIN_GAIN:
        what += f"; train_dataloader.balance = {SUGGESTED_WINDOW} would leave {better:.1%}"
    return [("balance", f"{what} (by arithmetic)")]


def _describe_masters(settings: Settings) -> str:
    form = settings.optim.states
    return "fp32 masters" if form.moment == torch.float32 else f"bf16 weights, {form.name} moments"


def _describe_products(settings: Settings) -> str:
    kind, dtype = settings.source.products, settings.optim.compute_dtype(settings.device)
    if kind == "own":
        return ""
    other = f"attention and output layer in {str(dtype).removeprefix('torch.')}"
    if kind == "fp8":
        return f"; products of blocks in fp8; gradients of weights, {other}"
    return f"; products of blocks and gradients of their weights in fp8; {other}"

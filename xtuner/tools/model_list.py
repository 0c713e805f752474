"""The released models that families list: parameters, features, exports, and by arithmetic the GPUs that they need."""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from xtuner.dist.mesh import Mesh
from xtuner.engine.memory import plan_memory
from xtuner.export.turbomind_support import why_not_converted
from xtuner.families import FAMILIES, read_config
from xtuner.families.base import ModelFamily, Released
from xtuner.families.network import DecoderConfig
from xtuner.model.flops import num_parameters
from xtuner.model.source import ModelSource
from xtuner.optim.adamw import FORMS
from xtuner.optim.optim_wrapper import OptimWrapper

NODE = 8  # GPUs
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
DRIVER = 2**30  # bytes of a GPU that processes cannot allocate


@dataclass(frozen=True)
class ListedModel:
    """One row of the list."""

    hub_id: str
    family: str
    parameters: int
    features: tuple[str, ...]
    exports: tuple[str, ...]  # besides a Hugging Face folder of its own family
    gpus: dict[str, int | None]  # form of the optimizer's state → fewest GPUs that train it; None: more than COUNTS has

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def list_features(c: DecoderConfig) -> tuple[str, ...]:
    """What distinguishes the network from a plain decoder, in words."""
    found = list(c.special_features().values())
    if c.attention_bias and not {"qkv_bias", "output_bias"} & c.special_features().keys():
        found.append("biases in attention")
    if c.rope_scaling and "rope_scaling" not in c.special_features():
        found.append(f"rope scaling {c.rope_scaling.kind}")
    if c.query_width != c.hidden_size:
        found.append(f"heads of {c.head_dim}")
    return tuple(found)


def list_exports(family: ModelFamily, c: DecoderConfig) -> tuple[str, ...]:
    """Forms in addition to a Hugging Face folder of its own family."""
    found = []
    if family.name != "llama" and not c.special_features() and not family.name.startswith("internlm2"):
        found.append("--layout llama")
    if family.loads_as:
        found.append(f"--layout {family.loads_as}")
    if not why_not_converted(family, c):
        found.append("TurboMind")
    return tuple(found)


def _state_fits(c: DecoderConfig, states: str, gpu_bytes: int, count: int) -> bool:
    """Whether the sharded part of the state fits, which is necessary and quick to compute."""
    return num_parameters(c) * (FORMS[states].bytes - 4) / count < gpu_bytes


@functools.lru_cache
def fewest_gpus(c: DecoderConfig, states: str, gpu_bytes: int, pack: int) -> int | None:
    """The smallest number of GPUs over which state and micro-batches fit, sharded over all."""
    optim = OptimWrapper(dict(type=torch.optim.AdamW, lr=1.0), dtype="bf16", states=states)
    source = ModelSource(c, None, recompute=True)
    for count in (n for n in COUNTS if _state_fits(c, states, gpu_bytes, n)):
        mesh = Mesh(dp_shard=count, local_size=min(count, NODE))
        plan = plan_memory(source, optim, torch.device("cuda"), mesh, pack, gpu_bytes - DRIVER)
        if plan.fits(plan.micro_batch_tokens(pack)):
            return count
    return None


def list_models(pattern: str, gpu_bytes: int, pack: int) -> Iterator[ListedModel]:
    """The models whose hub id or family contains `pattern`, whatever its case."""
    for family in FAMILIES.values():
        for model in family.released:
            if pattern.lower() in model.hub_id.lower() or pattern.lower() in family.name:
                yield _describe(family, model, gpu_bytes, pack)


def _describe(family: ModelFamily, model: Released, gpu_bytes: int, pack: int) -> ListedModel:
    c = read_config({"model_type": family.name, **family.defaults, **model.network}, where=f"{model.hub_id}: ")
    gpus = {states: fewest_gpus(c, states, gpu_bytes, pack) for states in ("fp32", "8bit")}
    features, exports = list_features(c), list_exports(family, c)
    return ListedModel(model.hub_id, family.name, num_parameters(c), features, exports, gpus)


def format_models(rows: list[ListedModel]) -> str:
    """The list as text for a terminal."""
    width = max(len(row.hub_id) for row in rows)
    lines = [f"{'model':<{width}}  {'family':<9}  {'parameters':>10}  {'fp32':>4}  {'8bit':>4}  features; exports"]
    for row in rows:
        fp32, eight = (str(row.gpus[states] or f">{COUNTS[-1]}") for states in ("fp32", "8bit"))
        more = "; ".join(", ".join(words) for words in (row.features, row.exports) if words)
        text = f"{row.hub_id:<{width}}  {row.family:<9}  {row.parameters / 1e9:>8.2f} B  {fp32:>4}  {eight:>4}  {more}"
        lines.append(text.rstrip())
    return "\n".join(lines)


def render_family_table() -> str:
    """The Markdown table of docs/*/models.md: families × templates, features of their released models, exports."""
    mark = {True: "yes", False: "–"}
    head = (
        "`model_type`",
        "tied",
        "biases",
        "q, k norms",
        "windows",
        "`rope_scaling`",
        "`--layout llama`",
        "TurboMind",
    )
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for family in FAMILIES.values():
        if not family.released:
            continue
        networks = [
            read_config({"model_type": family.name, **family.defaults, **m.network}, f"{m.hub_id}: ")
            for m in family.released
        ]
        kinds = sorted({c.rope_scaling.kind for c in networks if c.rope_scaling})
        exports = [list_exports(family, c) for c in networks]
        cells = [
            f"`{family.name}`",
            *(mark[any(found)] for found in (
                [c.tie_word_embeddings for c in networks],
                [c.attention_bias or c.mlp_bias for c in networks],
                [c.qk_norm for c in networks],
                [c.sliding_window is not None for c in networks],
            )),
            ", ".join(kinds) or "–",
            "own" if family.name == "llama" else _some("--layout llama", exports),
            _some("TurboMind", exports),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _some(form: str, exports: list[tuple[str, ...]]) -> str:
    """How many of a family's released models have a form."""
    count = sum(form in found for found in exports)
    return "yes" if count == len(exports) else f"{count} of {len(exports)}" if count else "–"

"""Small pretrained models, and adapters on them."""

from pathlib import Path
from typing import Any

import torch

from helpers.models import sharded_strategy, train_iterations
from xtuner.dist import collectives
from xtuner.families import FAMILIES
from xtuner.model import from_pretrained, from_scratch
from xtuner.model.adapters.lora import lora
from xtuner.model.decoder import CausalLM
from xtuner.model.source import ModelSource
from xtuner.model.weights import split_for_family
from xtuner.train.checkpoints import checkpoint
from xtuner.train.state import TrainState

SHAPE = dict(vocab_size=401, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1)  # fmt: skip


def write_base(folder: Path, family: str = "llama", seed: int = 0, **shape: Any) -> Path:
    """A pretrained model's folder, in the layout of its family; norms and biases are random, too."""
    from safetensors.torch import save_file

    from xtuner.core.files import write_json

    source = from_scratch(seed=seed, family=family, **SHAPE | shape)
    model, form = source.build(), FAMILIES[family]
    tensors: dict[str, torch.Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        value = p.detach() + (0.2 * torch.randn(p.shape, generator=draw) if p.dim() == 1 else 0.0)
        tensors |= {n: t.clone().contiguous() for n, t in split_for_family(name, value, form, source.config).items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", form.write_config(source.config, "float32"))
    return folder


def with_lora(base: Path, seed: int = 0, **settings: Any) -> ModelSource:
    settings = {"rank": 4, "alpha": 8, **settings}
    frozen: Any = settings.pop("frozen_weights", "own")
    how = dict(activation_checkpointing=True, frozen_weights=frozen)
    return from_pretrained(str(base), adapter=dict(type=lora, **settings), **how).with_seed(seed)


def trained_checkpoint(source: ModelSource, folder: Path, iterations: int = 3) -> tuple[Path, CausalLM]:
    """A checkpoint after a few iterations, and the network at that point."""
    strategy = sharded_strategy(model=source)
    list(train_iterations(strategy, range(iterations)))
    facts = {"max_iterations": 3, "data": dict(packed_length=64, label_rule="xtuner", data="x"), "config": {}}
    saved, _ = checkpoint.write(
        folder, TrainState(iterations), strategy.snapshot(optimizer=True), facts, collectives.ALL
    )
    return saved, strategy.model


def lora_config(tiny: Path, target: Path, base: Path, *lines: str) -> Path:
    """The tiny config with a pretrained model and LoRA of rank 4; `lines` are added at its end."""
    text = tiny.read_text().replace("import from_scratch", "import from_pretrained, lora")
    begin, end = text.index("model = dict("), text.index("####", text.index("model = dict("))
    model = f"model = dict(type=from_pretrained, pretrained_model_name_or_path={str(base)!r},\n"
    model += "             adapter=dict(type=lora, rank=4, alpha=8))\n\n"
    target.write_text(text[:begin] + model + text[end:] + "\n".join(lines) + "\n")
    return target

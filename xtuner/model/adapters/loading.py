"""A base model with an adapter, for evaluation and generation."""

from dataclasses import replace
from pathlib import Path

import torch

from xtuner.model.adapters.folder import AdapterFolder
from xtuner.model.decoder import CausalLM
from xtuner.model.parameter_ranges import FlatRange
from xtuner.model.source import from_pretrained
from xtuner.model.weights import check_shapes


def load_adapted(
    adapter: AdapterFolder, base: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> CausalLM:
    """A base model with an adapter, as it was trained: its weights unchanged, the terms computed apart.

    Raises: ConfigError, CheckpointError.
    """
    source = replace(from_pretrained(str(base)), adapter=adapter.adapter, frozen_weights=adapter.frozen_weights)
    shapes = {n: tuple(s) for n, s in source.trained_shapes.items() if ".adapter." in n or n in adapter.tensors}
    check_shapes(adapter.tensors, shapes, "the base model")
    model = source.build(device, dtype)
    parameters = dict(model.named_parameters())
    for name in shapes:
        FlatRange.from_parameter(parameters[name]).copy_from(adapter.tensors[name])
    return model.eval()

"""fp8 products of peers: torchao's Float8Linear in all linear layers of blocks.   # pip install torchao

    fp8                  one scale for each tensor: torchao's default, and its fastest
    fp8_rowwise          one for each row or column, finer
    fp8_rowwise_forward  the same, but gradients of weights in bf16; torchao calls it the most accurate

torchao leaves rounding to torch.compile. torchtitan compiles whole blocks; for transformers, whose Trainer compiles
nothing automatically, the projections of attention and the MLPs are compiled here (with Liger's kernels, which the
compiler cannot trace, only their projections). On CPUs products are emulated.
"""

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.config import Float8LinearRecipeName

RECIPES = {
    "fp8": Float8LinearRecipeName.TENSORWISE,
    "fp8_rowwise": Float8LinearRecipeName.ROWWISE,
    "fp8_rowwise_forward": Float8LinearRecipeName.ROWWISE_WITH_GW_HP,
}


def convert_layers(layers: nn.ModuleList, products: str, device: torch.device, liger: bool) -> None:
    """Replace the linear layers of transformers' blocks, in place. Parameters stay the same objects."""
    chosen = Float8LinearConfig.from_recipe_name(RECIPES[products])
    object.__setattr__(chosen, "emulate", device.type == "cpu")  # the recipes leave no choice
    convert_to_float8_training(layers, config=chosen)
    for layer in layers if device.type != "cpu" else ():
        projections = [m for m in (layer if liger else layer.self_attn).modules() if isinstance(m, nn.Linear)]
        for module in projections if liger else [layer.mlp, *projections]:
            module.compile()

"""Recognizes PyTorch's AdamW with valid arguments without constructing it: the constructor of any optimizer imports
PyTorch's compiler, which takes more than a second."""

from collections.abc import Mapping, Sequence
from typing import Any

ARGUMENTS = frozenset(("lr", "betas", "eps", "weight_decay"))
AT_LEAST_0 = ("lr", "eps", "weight_decay")


def is_usual_adamw(kind: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether it is AdamW with ARGUMENTS alone, in the ranges that its constructor accepts. False where in doubt."""
    if (getattr(kind, "__module__", ""), getattr(kind, "__qualname__", "")) != ("torch.optim.adamw", "AdamW"):
        return False
    betas = arguments.get("betas", (0.9, 0.999))
    return (
        arguments.keys() <= ARGUMENTS
        and all(type(v := arguments.get(name, 0)) in (int, float) and v >= 0 for name in AT_LEAST_0)
        and isinstance(betas, Sequence)
        and len(betas) == 2
        and all(type(beta) is float and 0 <= beta < 1 for beta in betas)
    )

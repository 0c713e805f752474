"""GPUs that runs are predicted for: figures of their data sheets.

What is reached of them was measured on one, two and four H100 and H200 (kernel_times.py, docs/performance.md). Other
kinds are assumed to reach the same shares; their predictions are marked as estimated.
"""

from dataclasses import dataclass

from xtuner.core.errors import ConfigError, did_you_mean
from xtuner.model.flops import PEAK

GIB = 2**30
LINK_SHARE = 2 / 3  # of the nominal link speed within a node: 300 of NVLink 4's 450 GB/s each way
CARD_SHARE = 0.9  # of the nominal speed of the network between nodes


@dataclass(frozen=True)
class GpuKind:
    """
    Args:
        free: bytes of GPU memory that a process can allocate.
        flops: dense bf16 peak, in FLOP/s.
        bandwidth: of its memory, bytes per second.
        link: nominal bytes per second each way to the other GPUs of a node, by NVLink or PCIe.
        fp8: whether it multiplies in fp8 as training needs it (model/ops/matmul.py).
        measured: whether training was measured on it.
    """

    name: str
    free: float
    flops: float
    bandwidth: float
    link: float
    fp8: bool = False
    measured: bool = False

    @property
    def title(self) -> str:
        return self.name.upper()


KINDS = {
    kind.name: kind
    for kind in (
        GpuKind("h100", 78.7 * GIB, PEAK["H100"], 3.35e12, 450e9, True, True),
        GpuKind("h200", 139 * GIB, PEAK["H200"], 4.8e12, 450e9, True, True),
        GpuKind("a100", 78.7 * GIB, PEAK["A100"], 2.039e12, 300e9),
        GpuKind("a800", 78.7 * GIB, PEAK["A800"], 2.039e12, 200e9),
        GpuKind("l40s", 43.9 * GIB, PEAK["L40S"], 0.864e12, 32e9),
        GpuKind("4090", 23.2 * GIB, PEAK["4090"], 1.008e12, 32e9),
    )
}
MEASURED = KINDS["h100"]  # the one whose times kernel_times.py has


def find_kind(name: str) -> GpuKind:
    """The kind of that name, whatever its case. Raises: ConfigError for an unknown one."""
    word = name.strip().lower()
    if word not in KINDS:
        raise ConfigError(
            f"no figures are known of a GPU {name!r}.{did_you_mean(word, list(KINDS))}",
            where="--gpu",
            do=f"give one of {', '.join(KINDS)}",
        )
    return KINDS[word]

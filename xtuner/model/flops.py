"""How much arithmetic a training step is, and how much a GPU could do (MFU).

    FLOPs = 6 · matmul parameters · tokens + 6 · L · N · D · Σ len²

The embedding is a look-up and does not count; attention counts causal pairs inside documents exactly; recomputation
does not count.
"""

import torch

from xtuner.model.decoder import DecoderConfig

# Dense bf16 peak, FLOP/s, by a part of the device's name.
PEAK = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12}


def num_parameters(c: DecoderConfig) -> int:
    return matmul_parameters(c) + c.vocab_size * c.hidden_size + c.hidden_size * (2 * c.num_layers + 1) + _biases(c)


def matmul_parameters(c: DecoderConfig) -> int:
    """Weights that every token is multiplied with."""
    attention = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size) + c.vocab_size * c.hidden_size


def _biases(c: DecoderConfig) -> int:
    one_layer = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim + c.hidden_size
    return c.num_layers * one_layer if c.attention_bias else 0


def training_flops(c: DecoderConfig, tokens: int, attention_pairs: float) -> float:
    """FLOPs of forward and backward over `tokens` tokens whose documents have Σ len² = `attention_pairs`."""
    return 6.0 * matmul_parameters(c) * tokens + 6.0 * c.num_layers * c.num_heads * c.head_dim * attention_pairs


def whole_pack_flops(c: DecoderConfig, tokens: int, pack: int) -> float:
    """The same as other tools count it: every token attends to all of its pack, also to other documents and the future.

    The 6·N + 12·L·H·Q·T a token of PaLM's appendix B (arXiv:2204.02311), which torchtitan and others print. It is above
    what is computed, so that an MFU made of it says nothing of a GPU's use; it only stands beside theirs.
    """
    return 6.0 * matmul_parameters(c) * tokens + 12.0 * c.num_layers * c.num_heads * c.head_dim * tokens * pack


def peak_flops(device: torch.device) -> float | None:
    """Of a GPU we know; None otherwise."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(gpu: str) -> float | None:
    """The same by its name."""
    return next((peak for part, peak in PEAK.items() if part in gpu), None)

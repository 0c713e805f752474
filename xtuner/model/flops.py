"""FLOPs of a training step, and a GPU's peak (for MFU).

    FLOPs = 6 · matmul parameters · tokens + 6 · L · N · D · Σ len²

A weight that is not trained counts 4 instead of 6: its products are those of the forward and of the gradient of its
input. The factors of LoRA are trained matmul parameters. The embedding is a look-up and does not count. Attention
counts the causal pairs inside documents, and inside windows of layers that have them. Recomputation does not count.
"""

import torch

from xtuner.model.decoder import DecoderConfig

# Dense bf16 peak in FLOP/s, by a substring of the device's name.
PEAK = {"H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12,
        "4090": 165.2e12}  # fmt: skip


def num_parameters(c: DecoderConfig) -> int:
    return c.num_layers * block_parameters(c) + c.vocabulary_parameters + c.hidden_size


def block_parameters(c: DecoderConfig) -> int:
    """Parameters of one decoder block."""
    norms = 2 * c.hidden_size + 2 * c.head_dim * c.qk_norm
    attention_biases = c.qkv_width * c.qkv_bias + c.hidden_size * c.output_bias
    return _block_weights(c) + norms + attention_biases + (2 * c.intermediate_size + c.hidden_size) * c.mlp_bias


def matmul_parameters(c: DecoderConfig) -> int:
    """Number of weights that every token is multiplied by: those of blocks, and of the output layer, tied or not."""
    return c.num_layers * _block_weights(c) + c.vocab_size * c.hidden_size


def _block_weights(c: DecoderConfig) -> int:
    return c.hidden_size * (c.qkv_width + c.query_width + 3 * c.intermediate_size)


def count_attention_pairs(c: DecoderConfig, cu_seqlens: torch.Tensor) -> int:
    """Σ len² over documents, mean over layers. With a sliding window w, a longer document counts len² − (len − w)²."""
    return int(c.attention_pairs.count(cu_seqlens.diff().long()).sum())


def training_flops(c: DecoderConfig, tokens: int, attention_pairs: float, frozen: int = 0, added: int = 0) -> float:
    """FLOPs of forward and backward over `tokens` tokens with so many pairs by `count_attention_pairs`.

    Args:
        frozen: matmul parameters that are not trained.
        added: those of an adapter.
    """
    weights = 6.0 * (matmul_parameters(c) + added) - 2.0 * frozen
    return weights * tokens + 6.0 * c.num_layers * c.query_width * attention_pairs


def whole_pack_flops(c: DecoderConfig, tokens: int, pack: int) -> float:
    """FLOPs as other tools count them: every token attends to its whole pack, including other documents and the future.

    This is 6·N + 12·L·H·Q·T a token of PaLM's appendix B (arXiv:2204.02311), which torchtitan and others print. It
    exceeds what is computed: an MFU based on it does not describe a GPU's use and only serves to compare with theirs.
    """
    return 6.0 * matmul_parameters(c) * tokens + 12.0 * c.num_layers * c.query_width * tokens * pack


def peak_flops(device: torch.device) -> float | None:
    """Peak of a GPU, or None if it is not listed."""
    return peak_flops_by_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_by_name(gpu: str) -> float | None:
    """Peak of a GPU by its name, or None."""
    return next((peak for part, peak in PEAK.items() if part in gpu), None)

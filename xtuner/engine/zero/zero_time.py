"""What an iteration by DeepSpeed costs in addition to step_time.py, counted in traces of one at 7B on four H100.

during compute   copies in memory to gather weights and to send gradients, in each micro-batch
step             copies around the optimizer; under stage 3 the host visits every parameter first
between          stage 3 ends a micro-batch by waiting for its last reduction; then the host has no lead, and for
                 short blocks it is slower than the device
"""

from xtuner.model.decoder import DecoderConfig
from xtuner.model.flops import block_parameters

COPYING = 2.5e12  # bytes a second of an H100's memory
COPY_SHARE = 0.45  # of the time of copies during compute, by which compute takes longer
HOST_BLOCK = 9.2e-3  # seconds in which the host runs a block's forward under stage 3
HOST_PARAMETER = 67e-6  # seconds for each parameter before the step of stage 3
TENSORS = 7  # parameters of a block


def copied_bytes(stage: int, ranks: int, sequential: bool = False) -> float:
    """Bytes read and written for each parameter during a micro-batch's compute.

    Args:
        sequential: parameters are gathered one by one, straight to their place.
    """
    if stage == 3:  # gradients are cast, ordered by rank, averaged, added to the owner's; weights put together twice
        return 6 + 8 + 8 + 12 / ranks + 8 * (not sequential)
    # into a bucket, flattened, cast, averaged; added to the owner's and copied back
    return 4 + 4 + 6 + 8 + 18 / ranks


def step_bytes(summing: str) -> int:
    """Bytes read and written for each parameter of a rank's shard in addition to the optimizer's: gradients are set to
    zero or flattened; then norm, scaling, and the cast of new weights."""
    return (8 if summing == "deepspeed" else 4) + 4 + 8 + 6


def end_bytes(c: DecoderConfig, bucket: int) -> int:
    """Bytes copied at the end of a micro-batch of stage 3, when nothing is computed: for the last bucket and the
    embedding, which is cast and averaged."""
    return 22 * bucket + 14 * c.vocab_size * c.hidden_size


def host_seconds(c: DecoderConfig, forward: float, micro_batches: int) -> float:
    """Seconds of an iteration in which the device waits for the host under stage 3.

    Args:
        forward: seconds of a block's forward on the device.
    """
    late = max(0.0, HOST_BLOCK - forward) * c.num_layers * (micro_batches - 1)
    return late + HOST_PARAMETER * (TENSORS * c.num_layers + 3)


def forward_seconds(c: DecoderConfig, tokens: int, flops: float) -> float:
    """Seconds of a block's forward with `tokens` tokens at `flops` per second; its products take four fifths."""
    return 1.25 * 2 * block_parameters(c) * tokens / flops

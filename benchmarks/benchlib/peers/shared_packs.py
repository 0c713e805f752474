"""torchtitan's context parallelism: every pack is one document, which all GPUs of a host share.

    torchrun --nproc-per-node N -m benchlib.peers.shared_packs DATA TOKENS SHAPE ITERATIONS WARM RESULT

Its ring attention over PyTorch's SDPA, tokens dealt from both ends of the document ("headtail", its default), blocks
and loss compiled, full recomputation, fp32 state sharded by FSDP2; the same packs and initial weights as ours.
`long_context.py` starts it; on CPUs its attention does not run. It has only a loss on full logits, of a rank's tokens.
"""

import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from benchlib.gpu_memory import in_use
from benchlib.peers.training_loop import Loop, Settings, build
from benchlib.workloads import SHAPES, packs_in_training_order

from xtuner.data.loading.batch import Batch
from xtuner.model.flops import peak_flops, training_flops


def main(words: Sequence[str]) -> None:
    data, result = Path(words[0]), Path(words[5])
    tokens, iterations, warm = int(words[1]), int(words[3]), int(words[4])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    mesh = dist.init_device_mesh(device.type, (ranks,), mesh_dim_names=("fsdp",))
    shape = replace(SHAPES[words[2]].config, max_position_embeddings=tokens)
    settings = Settings("torchtitan", shape, device, "fp32", True, "sdpa", "full", torch.bfloat16, mesh, shared=True)
    packs, order = packs_in_training_order(data, tokens)
    read = [Batch.from_item(packs[i]) for i in order[:iterations]]
    peer = build(settings)
    found = list(Loop(peer, settings).iterate([[pack] for pack in read]))[warm:]
    used = torch.tensor(in_use(device) or 0, device=device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    seconds, peak = statistics.median(it.seconds for it in found), peak_flops(device)
    flops = training_flops(shape, tokens, read[-1].attention_pairs) / ranks
    if rank == 0:
        record = {
            "versions": peer.versions,
            "tokens_per_s": tokens / seconds / ranks,
            "mfu": peak and flops / seconds / peak,
            "seconds": seconds,
            "times": [it.seconds for it in found],
            "losses": [it.loss for it in found],
            "in_use": int(used),
        }
        result.write_text(json.dumps(record))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])

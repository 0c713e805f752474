"""Documents that two GPUs share have the attention of one, whose error against fp64 is bf16's. Skipped elsewhere."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

from xtuner.data.loading.batch import Batch, make_borders
from xtuner.data.loading.document_groups import ContextCosts
from xtuner.model import attention
from xtuner.model.context_parallel.exchange import ContextGroup
from xtuner.model.context_parallel.shared_documents import SharedDocuments
from xtuner.model.decoder import make_positions

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")]
HEADS, DIM = (8, 2), 128
ROWS = 64  # queries that are compared with fp64
COSTS = ContextCosts(6.6e-5, 1.7e-9, 5.2e-6)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def attend_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """fp64 attention of some queries of one document, [rows, N, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("rnd,snd->rns", q[rows].double(), k) * DIM**-0.5
    later = torch.arange(len(k), device=k.device)[None, None] > rows[:, None, None]
    return torch.einsum("rns,snd->rnd", scores.masked_fill(later, float("-inf")).softmax(-1), v)


def compare(rank: int, folder: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    distributed: Any = torch.distributed
    distributed.init_process_group("nccl", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    context = ContextGroup(distributed.group.WORLD, rank, 2, *HEADS, divide_queries=True)
    backend = attention.choose_backend(device, torch.bfloat16, DIM)
    attend = attention.load_backend(backend)
    for lengths in ([8192], [65536], [16384] + [700] * 20):
        total, borders = sum(lengths), make_borders(lengths)
        draw = torch.Generator(device).manual_seed(0)
        q, k, v, d = (
            torch.randn(total, n, DIM, device=device, generator=draw).bfloat16() for n in (*HEADS, HEADS[1], HEADS[0])
        )
        for x in (q, k, v):
            x.requires_grad_()
        ids = torch.arange(total)
        batch = Batch(ids, ids, make_positions(borders, total), borders, max(lengths), total)
        mine = batch.share(2, rank, COSTS).to(device)
        assert mine.shared
        rows = mine.input_ids  # the number of each token in the complete batch
        one = attend(q, k, v, borders.to(device), max(lengths))
        expected = torch.autograd.grad(one, (q, k, v), d)
        parts = [x.detach()[rows].requires_grad_() for x in (q, k, v)]
        shared = SharedDocuments(mine.shared, context)
        o_TM = shared.attend(attend, None, *parts, mine.cu_seqlens, mine.max_seqlen, None, (), None)
        found = torch.autograd.grad(o_TM.view(len(rows), *q.shape[1:]), parts, d[rows])
        assert relative_error(o_TM.view(len(rows), -1), one[rows].flatten(1).double()) < 1e-3
        for mine_grad, grad in zip(found, expected, strict=True):
            assert relative_error(mine_grad, grad[rows].double()) < 5e-3
        if len(lengths) == 1:
            some = torch.linspace(0, len(rows) - 1, ROWS, device=device).long()
            exact = attend_rows(q.detach(), k.detach(), v.detach(), rows[some])
            assert relative_error(o_TM.view(len(rows), *q.shape[1:])[some], exact) < 1e-2
    distributed.destroy_process_group()


def test_two_gpus_attend_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(compare, (str(tmp_path),), nprocs=2)

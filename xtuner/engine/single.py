"""One process, one device. fp32 masters; on a GPU a copy of the weights in bf16 computes.

Memory a parameter on a GPU: master 4 B, gradient sum 4 B, two moments 8 B, bf16 copy 2 B: 18 B. On a CPU the masters
compute themselves: 16 B.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from xtuner.core.errors import CheckpointError
from xtuner.core.files import read_json
from xtuner.data.batch import Batch
from xtuner.engine.optim import OptimWrapper
from xtuner.engine.snapshot import HostCopy, Snapshot, in_shards
from xtuner.model.decoder import CausalLM
from xtuner.model.families import layout_of, write_config
from xtuner.model.source import ModelSource
from xtuner.model.weights import INDEX, fill


class SingleStrategy:
    name = "single"

    def __init__(self, source: ModelSource, optim: OptimWrapper, device: torch.device) -> None:
        self.device = device
        self.compute_dtype = optim.compute_dtype(device)
        self._config = source.config
        masters = source.build(device, torch.float32)
        self.masters: dict[str, torch.nn.Parameter] = dict(masters.named_parameters())
        if self.compute_dtype == torch.float32:
            self._model = masters
        else:
            self._model = source.empty(device, self.compute_dtype)
            self._copy_to_model()
            for name, weight in self._model.named_parameters():
                weight.register_post_accumulate_grad_hook(_Into(self.masters[name]))
        self._model.train()
        self.optimizer = optim.build(self.masters.values())
        self._may_step = False
        self._host = HostCopy()

    @property
    def model(self) -> CausalLM:
        return self._model

    def forward_backward(self, batch: Sequence[Batch], num_targets: int) -> float:
        self._may_step = False
        if not num_targets:
            return 0.0
        total = torch.zeros((), device=self.device)
        for pack in batch:
            if not pack.num_targets:
                continue
            b = pack.to(self.device)
            loss = self._model(b.input_ids, b.cu_seqlens, b.targets, b.position_ids, b.max_seqlen) / num_targets
            loss.backward()
            total += loss.detach()
        self._may_step = math.isfinite(loss_sum := total.item())
        return loss_sum

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        grads = [p.grad for p in self.masters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        applied = self._may_step and bool(norm.isfinite())
        if applied:
            if max_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self._copy_to_model()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item(), applied

    @torch.no_grad()
    def _copy_to_model(self) -> None:
        if self.compute_dtype != torch.float32:
            targets = [p.data for p in self._model.parameters()]
            torch._foreach_copy_(targets, [p.data for p in self.masters.values()])

    def snapshot(self, optimizer: bool) -> Snapshot:
        weights = self._host.of({n: p.data for n, p in self.masters.items()})
        shards = in_shards("weights/model", weights)
        json = {"weights/config.json": write_config(self._config, "internlm2", torch.float32)}
        if len(shards) > 1:
            weight_map = {name: file.split("/")[1] for file, names in shards.items() for name in names}
            total = sum(t.nbytes for t in weights.values())
            json[f"weights/{INDEX}"] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        if optimizer:
            shards |= in_shards("optimizer/rank_00000", self._host.of(self._optimizer_tensors()))
        return Snapshot(shards, json)

    def _optimizer_tensors(self) -> dict[str, torch.Tensor]:
        """`exp_avg/model.norm.weight` → tensor; every optimizer of torch keeps its state in tensors by parameter."""
        return {
            f"{key}/{name}": value
            for name, master in self.masters.items()
            for key, value in self.optimizer.state.get(master, {}).items()
        }

    def load(self, folder: Path) -> None:
        self.load_weights(folder / "weights")
        files = sorted((folder / "optimizer").glob("rank_00000*.safetensors"))
        if not files:
            raise CheckpointError(
                "the checkpoint has no optimizer state: it was saved with save_optimizer=False",
                where=str(folder),
                why="a resume would start AdamW's moments anew, and the run would not be the same",
                do=f"start a new run from its weights: load_from = {str(folder)!r}, in another work_dir",
            )
        state: dict[int, dict[str, torch.Tensor]] = {}
        numbers = {name: i for i, name in enumerate(self.masters)}
        for file in files:
            with safe_open(file, framework="pt", device=str(self.device)) as tensors:
                for full_name in tensors.keys():  # noqa: SIM118
                    key, _, name = full_name.partition("/")
                    state.setdefault(numbers[name], {})[key] = tensors.get_tensor(full_name)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.optimizer.zero_grad(set_to_none=True)

    def load_weights(self, folder: Path) -> None:
        layout = layout_of(read_json(folder / "config.json"))
        fill({n: p.data for n, p in self.masters.items()}, folder, layout, self._config)
        self._copy_to_model()


class _Into:
    """Adds a weight's fresh gradient to its master's fp32 sum and frees it, so that accumulation loses no bits."""

    def __init__(self, master: torch.nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        if self.master.grad is None:
            self.master.grad = weight.grad.float()
        else:
            self.master.grad += weight.grad
        weight.grad = None

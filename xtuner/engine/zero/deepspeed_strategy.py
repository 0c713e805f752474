"""ZeRO 1, 2 and 3 by DeepSpeed, with and without offload.

DeepSpeed flattens parameters into groups and shards each group over the ranks, so that a rank has a range of each
parameter's elements; this is all that our checkpoints need (shards.py). DeepSpeed's own checkpoint files, pickles for
one number of ranks, are never written.
"""

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from xtuner.data.loading.batch import Batch
from xtuner.dist.mesh import Mesh
from xtuner.engine.state.shards import Shard, StatefulStrategy
from xtuner.engine.strategies.micro_batches import run_micro_batches
from xtuner.engine.zero import deepspeed_config
from xtuner.engine.zero.gradient_exchange import FullGradientSums
from xtuner.engine.zero.gradient_norm import replace_norm
from xtuner.engine.zero.stage3_host import shorten_host_work
from xtuner.engine.zero.zero_memory import ZeroMemoryPlan, effective_stage, sends_unreduced
from xtuner.model.decoder import Block, CausalLM
from xtuner.model.parameter_ranges import FlatRange
from xtuner.model.source import ModelSource
from xtuner.optim import optimizer_traits
from xtuner.optim.optim_wrapper import OptimWrapper
from xtuner.optim.parameter_groups import set_lr


class _Piece(NamedTuple):
    """Elements [begin, begin + length) of a parameter, which this rank has in flat[at : at + length]."""

    flat: torch.Tensor  # fp32, the optimizer's parameter; of a frozen one the weight
    at: int
    begin: int
    length: int


class DeepSpeedStrategy(StatefulStrategy):
    """
    Args:
        settings: DeepSpeed's, complete (`deepspeed_config.prepare_settings`).
        memory: the plan of `choose_strategy`.
    """

    def __init__(
        self,
        source: ModelSource,
        optim: OptimWrapper,
        device: torch.device,
        settings: Mapping[str, Any],
        mesh: Mesh,
        memory: ZeroMemoryPlan,
    ) -> None:
        deepspeed = _init_deepspeed(device)
        config = copy.deepcopy(dict(settings))
        self.stage: int = config["zero_optimization"].get("stage", 0)
        self.name = f"zero{self.stage}"
        self.compute_dtype = optim.compute_dtype(device)
        self.memory = memory
        if (takes := effective_stage(config, memory.summing)) != self.stage:
            config["zero_optimization"]["stage"] = takes
            if self.compute_dtype == torch.bfloat16:
                config["data_types"] = {"grad_accum_dtype": "fp32"}
        shapes = {n: p.shape for n, p in source.build_empty(torch.device("meta"), torch.float32).named_parameters()}
        saves, record = bool(self.stage) or mesh.is_main, source.adapter_record()
        super().__init__(source.config, shapes, device, mesh, saves, record, source.trained_names())
        if self.stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = source.build_network()  # each module is sharded as soon as it is built
            # parameters of this model are gathered as it says; the engine would also prefetch only one at a time
            config["zero_optimization"].pop("stage3_allgather_sequential", None)
            source.configure(model, device, self.compute_dtype)
            if source.config.tie_word_embeddings:
                deepspeed.zero.register_external_parameter(model.output, model.model.tok_embeddings.weight)
            deepspeed.utils.set_z3_leaf_modules(model, [Block])  # a block gathers all of its weights at once
            model.model.tok_embeddings.register_forward_hook(_require_gradient)
        else:
            model = source.build_empty(device, self.compute_dtype)
        model.keep_activations(self.memory.activations)
        self._parameters: dict[str, Any] = dict(model.named_parameters())
        self._frozen = {n: p for n, p in self._parameters.items() if not p.requires_grad}
        optimizer = optim.build({n: p for n, p in self._parameters.items() if p.requires_grad})
        self._engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self._zero = self._engine.optimizer
        self.optimizer: torch.optim.Optimizer = self._zero.optimizer if self.stage else optimizer
        self._traits = optim.traits  # by device: offloaded states lie on the host
        self._model = model.train()
        if self.stage and not config["zero_optimization"].get("offload_optimizer"):
            replace_norm(self._zero, self.stage)
        if self.stage == 3:
            shorten_host_work(self._zero, model)
        self._sums: FullGradientSums | None = None
        self._sums_once = memory.summing == "fp32"
        if memory.summing != "deepspeed":
            dtype = torch.float32 if self._sums_once else self.compute_dtype
            sent = torch.bfloat16 if config.get("communication_data_type") == "bf16" else torch.float32
            bucket = int(config["zero_optimization"]["reduce_bucket_size"])
            unreduced = sends_unreduced(memory.summing, mesh, config)
            self._sums = FullGradientSums(self._zero, model, mesh, dtype, bucket, sent, unreduced)
        source.fill_weights({n: s.master for n, s in self._shards().items()}, shapes, device)
        self._sync_weights()
        self._to_step = False
        self.source_losses = [0.0]

    @property
    def model(self) -> CausalLM:
        return self._model

    def forward_backward(
        self, batch: Sequence[Batch], num_targets: int, parts: Sequence[int] | None = None, iteration: int = 0,
        sources: int = 1,
    ) -> float:  # fmt: skip
        self._to_step = bool(num_targets)
        self.source_losses = [0.0] * sources
        if not num_targets:
            return 0.0
        counts = parts or self.count_micro_batches(batch)
        pieces = self._cut_packs(batch, counts)
        run = self._run_with_sums if self._sums else self._run
        self.source_losses = self.mesh.ranks.sum_on_device(run(pieces, counts, num_targets))
        return sum(self.source_losses)

    def _run(self, pieces: list[Batch], counts: Sequence[int], num_targets: int) -> torch.Tensor:
        """DeepSpeed sends gradients: after each micro-batch, or under stage 0 and 1 after the last."""

        def backward(loss: torch.Tensor) -> None:
            # DeepSpeed averages over ranks
            self._engine.backward(_spread_nan(loss) * self.mesh.size, scale_wrt_gas=False)

        before = self._engine.set_gradient_accumulation_boundary
        return run_micro_batches(
            pieces, self._engine, self.device, num_targets, backward, before, False, self._context,
            len(self.source_losses),
        )  # fmt: skip

    def _run_with_sums(self, pieces: list[Batch], counts: Sequence[int], num_targets: int) -> torch.Tensor:
        """Gradients are summed by `FullGradientSums`; DeepSpeed's engine only takes the step."""
        assert self._sums
        sums, done = self._sums, 0
        ends = {len(pieces)} if self._sums_once else set(accumulate(counts))
        sums.begin()

        def backward(loss: torch.Tensor) -> None:
            nonlocal done
            _spread_nan(loss).backward()
            done += 1
            if done in ends:
                sums.send()

        before = self._engine.set_gradient_accumulation_boundary
        return run_micro_batches(
            pieces, self._model, self.device, num_targets, backward, before, False, self._context,
            len(self.source_losses),
        )  # fmt: skip

    def step(self, lr: float, max_norm: float | None) -> tuple[float, bool]:
        if not self._to_step:
            return 0.0, False
        set_lr(self.optimizer, lr)
        if not self.stage:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._model.parameters() if p.grad is not None])
            if not norm.isfinite():
                self._engine.zero_grad()
                return norm.item(), False
            self._engine.step()
            return norm.item(), True
        self._engine.step()
        applied = not self._zero.overflow
        return float(self._engine.get_global_grad_norm()) if applied else math.inf, applied

    def _piece(self, name: str) -> _Piece | None:
        parameter = self._parameters[name]
        if name in self._frozen and self.stage:
            return self._frozen_piece(name)
        if self.stage == 0:
            return _Piece(parameter.data.view(-1), 0, 0, parameter.numel())
        if self.stage == 3:
            group, at, _ = self._zero.grad_position[self._zero.get_param_id(parameter)]
            begin, count = self._own_elements(parameter)
            return _Piece(self._zero.fp32_partitioned_groups_flat[group], at, begin, count)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        group, address = mapping.param_group_index, mapping.hp_fragment_address
        flat = self._zero.single_partition_of_fp32_groups[group]
        return _Piece(flat, address.start, mapping.lp_fragment_address.start, address.numel)

    def _own_elements(self, parameter: Any) -> tuple[int, int]:
        """Under stage 3: the first of this rank's elements of a parameter, and their number."""
        begin = parameter.ds_tensor.ds_numel * self.mesh.rank
        return begin, max(0, min(parameter.ds_tensor.ds_numel, parameter.ds_numel - begin))

    def _frozen_piece(self, name: str) -> _Piece | None:
        """DeepSpeed keeps frozen parameters in the compute dtype: under stage 3 sharded, else full on every rank, and
        one of them reads and saves it."""
        parameter = self._frozen[name]
        if self.stage == 3:
            return _Piece(parameter.ds_tensor.data.view(-1), 0, *self._own_elements(parameter))
        if self._reader(name) != self.mesh.rank:
            return None
        return _Piece(parameter.data.view(-1), 0, 0, parameter.numel())

    def _reader(self, name: str) -> int:
        """The rank that reads and saves a frozen parameter."""
        return list(self._frozen).index(name) % self.mesh.size

    def _key(self, name: str, piece: _Piece) -> Any:
        """The tensor that is the key of the optimizer's state."""
        return piece.flat if self.stage else self._parameters[name]

    def _shards(self) -> dict[str, Shard]:
        shards = {}
        for name in self._parameters:
            piece = self._piece(name)
            if piece is None or not piece.length:
                continue
            key = self._key(name, piece)
            state = {} if name in self._frozen else self.optimizer.state.get(key, {})
            packed = optimizer_traits.pack(state, key)
            views = {k: v[piece.at : piece.at + piece.length] if v.dim() == 1 else v for k, v in packed.items()}
            shards[name] = Shard(FlatRange(piece.flat.data[piece.at : piece.at + piece.length], piece.begin), views)
        return shards

    def _restore_state(self, name: str, key: str, value: torch.Tensor) -> None:
        piece = self._piece(name)
        assert piece is not None
        tensor = self._key(name, piece)
        state = self.optimizer.state[tensor]
        if value.dim() == 1:
            if key not in state:
                state[key] = torch.zeros_like(tensor.data, dtype=value.dtype)
            state[key].view(-1)[piece.at : piece.at + piece.length] = value
        else:
            state[key] = self._traits(tensor.device).unpack(key, value, tensor)

    @torch.no_grad()
    def _sync_weights(self) -> None:
        if self.stage in (1, 2):
            self._zero.update_lp_params()
            for name, parameter in self._frozen.items():
                torch.distributed.broadcast(parameter.data, self._reader(name))
        elif self.stage == 3:
            self._zero._partition_all_parameters()
            for i in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(i)
            if self._zero.persistent_parameters:  # small ones, which stay full on every rank
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        self._engine.zero_grad()


def _require_gradient(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Compute gradients down to the embedding, also if it and blocks above it are frozen: under stage 3 DeepSpeed frees
    the weights of a module whose inputs need no gradient before the module's backward."""
    if torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_()


def _spread_nan(loss: torch.Tensor) -> torch.Tensor:
    """Make all gradients NaN if the loss is not finite: they must not look valid."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def _init_deepspeed(device: torch.device) -> Any:
    deepspeed = deepspeed_config.import_deepspeed()
    warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)  # it calls old names
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # or it compiles an unused kernel for minutes
    deepspeed.init_distributed(dist_backend="gloo" if device.type == "cpu" else "nccl")
    return deepspeed

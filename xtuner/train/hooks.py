"""The hooks that a config can add to the training loop. They observe and save; settings determine the training itself.

They are called in the order of `priority`: measuring hooks fill `it.record`, LoggerHook writes it, CheckpointHook runs
last.
"""

import platform
import resource
import time
from statistics import median
from typing import Any

import torch

from xtuner.config.build import build
from xtuner.config.settings import SCHEMA
from xtuner.core.log import human_bytes, human_time, logger, show_progress
from xtuner.data.packing.document_source import Documents
from xtuner.data.tokenizer import Tokenizer, begin_tokens, single_tokens
from xtuner.data.tokenizer_template import resolve_template
from xtuner.dist import collectives
from xtuner.families import FAMILIES
from xtuner.families.chat import ChatFormat
from xtuner.model.flops import peak_flops
from xtuner.model.generate import generate
from xtuner.train.evaluate import evaluate
from xtuner.train.reporting.averages import Averages
from xtuner.train.reporting.loss_watch import LossWatch
from xtuner.train.reporting.rank_times import SlowRanks
from xtuner.train.run import Hook, Iteration, Run


class IterTimerHook(Hook):
    """Seconds per iteration, seconds spent waiting for data, remaining time; with several ranks, their times."""

    priority = 10

    def before_run(self, run: Run) -> None:
        self._last = time.perf_counter()
        self._times: list[float] = []

    def after_iteration(self, run: Run, it: Iteration) -> None:
        now = time.perf_counter()
        self._times = [*self._times[-49:], now - self._last]
        self._last = now
        typical = sorted(self._times)[len(self._times) // 2]  # median: the first iterations compile, some save
        left = run.max_iterations - it.state.iteration
        it.record |= {"time": self._times[-1], "data_time": it.data_time, "eta": round(left * typical)}
        if it.ranks:
            works, products = [t.work for t in it.ranks], [t.product for t in it.ranks]
            it.record |= {"rank_median": median(works), "rank_slowest": max(works)}
            if all(products):
                it.record["rank_product"] = max(products) / median(products)


class ThroughputHook(Hook):
    """Tokens per second over all ranks and, on known GPUs, model FLOPs utilisation (MFU) as counted in flops.py."""

    priority = 20

    def before_run(self, run: Run) -> None:
        self._last = time.perf_counter()
        self._peak = peak_flops(run.strategy.device)

    def after_iteration(self, run: Run, it: Iteration) -> None:
        now = time.perf_counter()
        elapsed, self._last = now - self._last, now
        each = it.num_tokens / elapsed
        it.record["tokens_per_s"] = each * run.mesh.dp_size  # packs have the same length on all ranks
        if run.mesh.size > 1:
            it.record["tokens_per_s_a_rank"] = each / run.mesh.cp
        if self._peak:
            flops = run.source.training_flops(it.num_tokens, it.attention_pairs)
            it.record["mfu"] = flops / run.mesh.cp / elapsed / self._peak


class ParamSchedulerHook(Hook):
    """Placeholder: `param_scheduler` is applied unless another hook takes this name."""


class DistSamplerSeedHook(Hook):
    """Placeholder: `train_dataloader.reshuffle` is True unless another hook takes this name."""


class LoggerHook(Hook):
    """Writes a line to the log, scalars.json and TensorBoard every `interval` iterations; see reporting/averages.py.

    On a terminal it also updates a progress line at every iteration.
    """

    priority = 80

    def __init__(self, interval: int = 10) -> None:
        SCHEMA.require("default_hooks.logger", interval=interval)
        self.interval = interval
        self._averages = Averages()

    def before_run(self, run: Run) -> None:
        self._watch = LossWatch.start(run)
        self._slow = SlowRanks(run.mesh.ranks.gather(platform.node()))
        self._saver = next((hook for hook in run.hooks if isinstance(hook, CheckpointHook)), None)

    def after_iteration(self, run: Run, it: Iteration) -> None:
        if not collectives.is_main():
            return
        self._averages.add(it)
        number, last = it.state.iteration, run.max_iterations
        averages = self._averages.record()
        parts = [f"iter {number}/{last}  {100 * number // last} %", f"loss {averages['loss_smoothed']:.4f}"]
        if "eta" in averages:
            parts.append(f"ETA {human_time(averages['eta'])}")
        if "tokens_per_s" in averages:
            parts.append(f"{averages['tokens_per_s']:,.0f} tok/s")
        save = self._saver.next_save(run) if self._saver else None
        if save and "eta" in averages and number < last:
            parts.append(f"save in {human_time(averages['eta'] * (save - number) / (last - number))}")
        show_progress(*parts)
        if number % self.interval == 0 or number == last:
            record = {"iter": number, "lr": it.lr, "grad_norm": it.grad_norm, **averages}
            record["memory"] = peak_memory(run.strategy.device)
            record["tokens"] = it.state.packs * run.dataset.packed_length
            record |= {f"epoch/{name}": visits for name, visits in _visits(run).items()}
            run.metrics.log(record)  # before the log line: when the line is visible, the record exists
            logger.info(format_log_line(record, last))
            if it.sources:
                logger.info("  by source: " + ", ".join(_describe_source(part.name, record) for part in it.sources))
            self._averages.restart()
        self._watch.add(run, it)
        if found := self._slow.add(it.ranks):
            text, facts = found
            logger.warning(f"iteration {number}: {text}")
            run.metrics.event("slow rank", number, **facts)

    def after_run(self, run: Run) -> None:
        show_progress()


def _visits(run: Run) -> dict[str, float]:
    """How often each source of a mixture has been visited since the beginning of the run."""
    order = getattr(run.sampler, "mixture", None)
    position = run.state.position
    if order is None:
        return {}
    visits = order.visits(position.epoch, position.offset, run.plan.packs_per_epoch)
    return dict(zip(order.plan.names, visits, strict=True))


def _describe_source(name: str, record: dict[str, Any]) -> str:
    loss = f"{record[key]:.4f}" if (key := f"loss/{name}") in record else "no targets"
    return f"{name} {loss} ({record[f'targets/{name}']:,} targets, epoch {record[f'epoch/{name}']:.2f})"


def format_log_line(record: dict[str, Any], last: int) -> str:
    """A record as one log line."""
    loss = f"loss {record['loss']:.4f} (smoothed {record['loss_smoothed']:.4f})" if record["targets"] else "no targets"
    parts = [
        f"iter {record['iter']:>{len(str(last))}}/{last}",
        f"lr {record['lr']:.3e}",
        loss,
        f"grad norm {record['grad_norm']:.3f}",
    ]
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:,.0f} tok/s")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.3f}")
    if "data_time" in record:
        parts.append(f"data {record['data_time']:.3f} of {record['time']:.2f} s")
    parts.append(human_bytes(record["memory"]))
    if "eta" in record:
        parts.append(f"ETA {human_time(record['eta'])}")
    if not record["applied"] and record["targets"]:
        parts.append("NOT APPLIED")
    return "  ".join(parts)


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class CheckpointHook(Hook):
    """Saves every `interval` iterations (or epochs), at the end, and keeps the newest ones."""

    priority = 90

    def __init__(
        self, interval: int = -1, by_epoch: bool = False, max_keep_ckpts: int = -1, save_optimizer: bool = True
    ) -> None:
        SCHEMA.require("default_hooks.checkpoint", interval=interval, max_keep_ckpts=max_keep_ckpts)
        self.interval, self.by_epoch = interval, by_epoch
        self.max_keep_ckpts, self.save_optimizer = max_keep_ckpts, save_optimizer

    def before_run(self, run: Run) -> None:
        self._epoch = run.state.position.epoch
        self._reserved = False

    def after_iteration(self, run: Run, it: Iteration) -> None:
        if it.applied and not self._reserved:
            run.strategy.reserve_host_memory(self.save_optimizer)
            self._reserved = True
        epoch, self._epoch = self._epoch, it.state.position.epoch
        if self.interval == -1:
            return
        if self.by_epoch:
            due = self._epoch // self.interval > epoch // self.interval
        else:
            due = it.state.iteration % self.interval == 0
        if due:
            run.save(self.save_optimizer, self.max_keep_ckpts)

    def next_save(self, run: Run) -> int | None:
        """The iteration after which the next checkpoint is due; None if only the end is saved."""
        done = run.state.iteration
        if self.interval == -1:
            return None
        due = (done // self.interval + 1) * self.interval
        if self.by_epoch:
            packs = (run.state.position.epoch // self.interval + 1) * self.interval * run.plan.packs_per_epoch
            due = done + -(
                -(packs - run.state.position.packs_before(run.plan.packs_per_epoch)) // run.plan.packs_per_iteration
            )
        return min(due, run.max_iterations)

    def after_run(self, run: Run) -> None:
        run.save(self.save_optimizer, self.max_keep_ckpts, last=True)


class ValidationHook(Hook):
    """Loss on held-out data every `interval` iterations and at the end. Added automatically for `val_dataset`."""

    priority = 85

    def __init__(self, documents: Documents, interval: int, max_length: int) -> None:
        self.documents, self.interval, self.max_length = documents, interval, max_length
        self._last = -1

    def after_iteration(self, run: Run, it: Iteration) -> None:
        if it.state.iteration % self.interval == 0:
            self._evaluate(run)

    def after_run(self, run: Run) -> None:
        if self._last != run.state.iteration:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        self._last = run.state.iteration
        results = evaluate(run.strategy.model, self.documents, self.max_length, quiet=True, ranks=run.mesh.ranks)
        shown = ", ".join(f"{r.name} {r.loss:.4f}" for r in results)
        logger.info(f"validation at iteration {run.state.iteration}: {shown}")
        run.metrics.log({"iter": run.state.iteration, "val_loss": results[-1].loss})


class DatasetInfoHook(Hook):
    """Logs the number of packs and the beginning of the first one as text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def before_run(self, run: Run) -> None:
        logger.info(f"train dataset: {run.plan.num_packs:,} packs")
        tokenizer: Tokenizer = build(self.tokenizer, "custom_hooks: DatasetInfoHook.tokenizer")
        if run.plan.num_packs and collectives.is_main():
            ids = run.dataset[0]["input_ids"][:200].tolist()
            logger.info("first pack begins:\n" + tokenizer.decode(ids))


class EvaluateChatHook(Hook):
    """Logs the model's replies to `evaluation_inputs` before the run, every n iterations, and at the end."""

    priority = 70

    def __init__(
        self,
        tokenizer: Any,
        evaluation_inputs: str | list[str],
        every_n_iters: int | None = None,
        system: str = "",
        prompt_template: ChatFormat | None = None,
        max_new_tokens: int = 100,
    ) -> None:
        self.tokenizer_spec = tokenizer
        self.inputs = [evaluation_inputs] if isinstance(evaluation_inputs, str) else evaluation_inputs
        self.every_n_iters, self.system = every_n_iters, system
        self.template, self.max_new_tokens = prompt_template, max_new_tokens

    def before_run(self, run: Run) -> None:
        self.tokenizer: Tokenizer = build(self.tokenizer_spec, "custom_hooks: EvaluateChatHook.tokenizer")
        family = FAMILIES.get(run.source.config.family)
        chat = family.chat_for(self.tokenizer.special) if family else None
        self.template = resolve_template(self.template, self.tokenizer, chat)
        self._sample(run)

    def after_iteration(self, run: Run, it: Iteration) -> None:
        if self.every_n_iters and it.state.iteration % self.every_n_iters == 0:
            self._sample(run)

    def after_run(self, run: Run) -> None:
        self._sample(run)

    def _sample(self, run: Run) -> None:
        model, config = run.strategy.model, run.source.config
        words = self.template.stop_words if self.template else ()
        stops = [*config.stop_ids, *single_tokens(self.tokenizer, words)]
        for text in self.inputs:
            prompt = self.template.prompt(text, self.system) if self.template else text
            has_begin = self.template is not None and self.template.writes_begin
            begin = [] if has_begin else begin_tokens(self.tokenizer, config.bos_token_id)
            ids = [*begin, *self.tokenizer.encode(prompt)]
            ids = ids or [config.eos_token_id]  # it also separates documents
            agree = run.mesh.ranks.broadcast_int
            reply = self.tokenizer.decode(list(generate(model, ids, self.max_new_tokens, stops, agree=agree)))
            logger.info(f"sample at iteration {run.state.iteration}:\n{prompt}{reply}\n")
            run.metrics.text("sample", f"{prompt}{reply}", run.state.iteration)

"""`xtuner train` on 1, 2, 4 and 8 GPUs: a few iterations of each shape and engine, losses compared with one GPU's.

Speed is measured with one pack per rank and iteration, where collectives have the largest share. The reference losses
come from one GPU with the same N packs per iteration (accumulative_counts = N), fp32 state and a few iterations; where
that state does not fit one GPU (7B on 80 GB), from FSDP on the same GPUs. An "even" run of FSDP, whose packs all cost
the same, shows how long the others wait for the slowest rank. On the largest number of GPUs there are also runs of our
own strategy with other settings (VARIANTS), "mixed" runs of many iterations with long documents, which must not run out
of memory, and "save" runs (checkpoint_timing.py).

Runs on fewer GPUs than the host has run concurrently; runs that are in the results are not repeated. Each run is
killed when its iterations are done.
"""

import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from benchlib.checkpoint_timing import SAVE_AT, SIZE, describe, save_and_resume
from benchlib.gpu_memory import read_most_in_use
from benchlib.multi_gpu import prediction, single_gpu_times
from benchlib.multi_gpu.bandwidth import OFF
from benchlib.multi_gpu.waiting_time import Floats
from benchlib.workloads import PACK, SHAPES, Case, add_to_python_path, packs_in_training_order, write_data, write_mixed
from benchlib.xtuner_training import read_metrics, render_config, run_until, train_command

from xtuner.data.inspect.statistics import pack_costs
from xtuner.data.loading import balance
from xtuner.engine.memory import RESERVE_BYTES
from xtuner.optim.adamw import FORMS

ITERATIONS, WARM, COMPARED = 12, 4, 4  # of a speed run; of these not measured; of a reference run
MANY, MIXED_DEALT = 200, 64  # iterations of a mixed run, and of one to measure dealing
WINDOW = 16  # largest window of iterations for balancing; the iterations before it are not measured
MOST = 8  # packs per iteration
EVEN = 2860  # tokens per document of "even" packs: Σ len² equals the mean of lognormal packs
TINY_PACK = 512
PATIENCE = "120"  # s without progress before a run is ended
VARIANTS = {
    "fp8": ["model.products=fp8"],
    "fp8_full": ["model.products=fp8_full"],
    "8bit": ["states=8bit"],
    "split": ["states=split"],
    "sums-bf16": ["optim_wrapper.sums=bf16"],
    **{f"balance-{k}": [f"train_dataloader.balance={k}"] for k in (0, 1, WINDOW)},
}
DEALT = {f"balance-{k}": k for k in (1, WINDOW)}


class Job(NamedTuple):
    kind: str  # "speed", "even", "reference", "mixed", "save"
    shape: str
    engine: str
    gpus: int
    packs: int  # per iteration
    variant: str = ""

    @property
    def iterations(self) -> int:
        if self.kind == "mixed":
            return MIXED_DEALT if self.variant else MANY
        if self.variant.startswith("balance"):
            return 2 * WINDOW
        if self.shape == "20b":
            return 30
        return COMPARED if self.kind == "reference" else ITERATIONS

    @property
    def warm(self) -> int:
        """Iterations before the measurement."""
        return WINDOW if self.variant.startswith("balance") else min(WARM, self.iterations - 1)

    @property
    def epochs(self) -> int:
        return -(-self.iterations * self.packs // (2 * WINDOW * MOST))

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.engine}-{self.gpus}-{self.kind}-{self.packs}" + f"-{self.variant}" * bool(
            self.variant
        )


class HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=HasName)


def gpus_here() -> int:
    return torch.cuda.device_count()


def device(tiny: bool = False) -> str:
    return torch.cuda.get_device_name() if gpus_here() and not tiny else "cpu"


def jobs(counts: Sequence[int], shapes: Sequence[str], engines: Sequence[str]) -> list[Job]:
    """Runs that fit into the memory of this machine's GPUs, the largest numbers of GPUs first."""
    found, most = [], max(counts)
    usual = [shape for shape in shapes if shape != "20b"]
    for n in sorted((n for n in counts if n > 1), reverse=True):
        for shape in usual:
            found += [Job("speed", shape, engine, n, n) for engine in engines]
            found += [Job("even", shape, "fsdp", n, n)] if "fsdp" in engines and n == most else []
    for shape in usual:
        found += [Job("reference", shape, "single", 1, n) for n in counts if n > 1]
        found += [Job("speed", shape, "single", 1, 1)] if 1 in counts else []
    if most > 1 and "fsdp" in engines:
        found += [Job("speed", "20b", "fsdp", most, most, "8bit")] if "20b" in shapes else []
        for shape in usual:
            named = [v for v in VARIANTS if shape != "tiny" or "fp8" not in v]  # CPUs do not have fp8
            found += [Job("speed", shape, "fsdp", most, most, variant) for variant in named]
            found += [Job("speed", shape, "single", 1, most, variant) for variant in named if "fp8" in variant]
            found += [Job("mixed", shape, "fsdp", most, most, f"balance-{k}") for k in (0, WINDOW)]
        found += [Job(kind, shape, "fsdp", most, most) for kind in ("mixed", "save") for shape in usual]
    fitting = [job for job in found if _fits(job)]
    if left_out := [job.name for job in found if job not in fitting]:
        print(f"Not run, because they do not fit by arithmetic: {', '.join(left_out)}", flush=True)
    return fitting


def select(every: Sequence[Named], only: str | None) -> list[Named]:
    """Jobs whose names match, in the order of the patterns. Raises: ValueError for a pattern without a match."""
    if only is None:
        return list(every)
    found: dict[Named, None] = {}
    for pattern in only.split(","):
        matching = [job for job in every if fnmatch(job.name, pattern)]
        if not matching:
            raise ValueError(f"no run is called {pattern}; there are: {', '.join(job.name for job in every)}")
        found |= dict.fromkeys(matching)
    return list(found)


def _fits(job: Job) -> bool:
    model, there = single_gpu_times.MODELS.get(job.shape), _machine(device())
    if model is None or there is None or job.variant or job == Job("speed", "7b", "single", 1, 1):  # 8-bit moments
        return True
    if job.engine == "single":  # fp32 state of 18 bytes a parameter, the libraries, a micro-batch
        return 18 * model.parameters + 2 * RESERVE_BYTES <= there.free
    return prediction.plan_memory(model, job.engine, job.gpus, there.free) is not None


def _machine(name: str) -> single_gpu_times.Machine | None:
    return next((machine for kind, machine in single_gpu_times.MACHINES.items() if kind in name), None)


def data(folder: Path, tiny: bool, kind: str = "usual") -> Path:
    """The folder of packs, written if needed: "usual", "even", "long" (one document each) or "mixed"."""
    path = folder / (("tiny-" if tiny else "") + kind)
    if not (path / "synthetic.bin.meta").exists():
        pack, vocabulary = (TINY_PACK, SHAPES["tiny"].vocabulary) if tiny else (PACK, SHAPES["7b"].vocabulary)
        packs, length = 2 * WINDOW * MOST, {"even": EVEN * pack // PACK, "long": pack}.get(kind, 0)
        if kind == "mixed":
            write_mixed(path, packs, pack, vocabulary)
        else:
            write_data(path, packs, length, pack, vocabulary)
    return path


@cache
def squares(path: Path, tiny: bool) -> Floats:
    """Σ len² of the packs of `data`, in training order."""
    pack = TINY_PACK if tiny else PACK
    packs, order = packs_in_training_order(path, pack)
    costs = [pack_costs(packs.file_packs(i).ends, pack) for i in range(len(packs.documents))]
    return np.concatenate(costs).astype(float)[order]


def run(jobs: Sequence[Job], results: Path, folder: Path, tiny: bool, deadline: float) -> int:
    """Run the jobs that are not in `results` yet, starting none after `deadline` (of time.monotonic). Returns the
    number of failed runs."""
    given = "0,1" if tiny else os.environ.get("CUDA_VISIBLE_DEVICES")
    free = given.split(",") if given else [str(i) for i in range(gpus_here())]
    done = {Job(*r["job"]) for r in read(results) if "failed" not in r and "cut" not in r}
    left = [job for job in jobs if job not in done]
    for kind in dict.fromkeys(map(kind_of_data, left)):
        data(folder, tiny, kind)
    change, failed, futures = threading.Condition(), [], []

    def do(job: Job, gpus: list[str]) -> None:
        record: dict[str, Any] = {}
        try:
            record = measure(job, folder, tiny, gpus, deadline)
        finally:
            with change:
                if not record or "failed" in record:
                    failed.append(job)
                if record:
                    with open(results, "a") as f:
                        f.write(json.dumps(record) + "\n")
                free.extend(gpus)
                change.notify()

    with ThreadPoolExecutor(len(free)) as pool:
        for job in left:
            with change:
                change.wait_for(lambda n=job.gpus: len(free) >= n)  # in order: small jobs must not overtake large ones
                mine = [free.pop(0) for _ in range(job.gpus)]
            if time.monotonic() > deadline:
                print(f"{job.name} and later runs are left for another call", flush=True)
                break
            futures.append(pool.submit(do, job, mine))
    for future in futures:
        future.result()
    return len(failed)


def kind_of_data(job: Job) -> str:
    return job.kind if job.kind in ("even", "mixed") else "usual"


def measure(job: Job, folder: Path, tiny: bool, gpus: Sequence[str], deadline: float) -> dict[str, Any]:
    """One run, killed after its last iteration; a mixed one at the latest at `deadline`."""
    run_folder = folder / f"{job.name}-{time.strftime('%H%M%S')}"
    run_folder.mkdir()
    work, log = run_folder / "work", run_folder / "log"
    states = "8bit" if (job.shape, job.kind, job.engine) == ("7b", "speed", "single") else "fp32"
    case, packs = Case(job.shape, job.shape, states), data(folder, tiny, kind_of_data(job))
    (run_folder / "config.py").write_text(render_config(case, packs, None, 0, run_folder))
    words = train_command(run_folder / "config.py", work, job.engine)
    words += ["--cfg-options", f"accumulative_counts={job.packs // job.gpus}", *VARIANTS.get(job.variant, [])]
    words += [f"save_steps={SAVE_AT}", "save_total_limit=1"] if job.kind == "save" else ["save_optimizer=False"]
    words += [f"max_epochs={job.epochs}"] if job.kind == "mixed" else []
    words += [f"max_length={TINY_PACK}"] if tiny else []
    environ = add_to_python_path(os.environ) | OFF
    environ |= {"NPROC_PER_NODE": str(job.gpus), "XTUNER_STUCK_SECONDS": PATIENCE}
    environ["CUDA_VISIBLE_DEVICES"] = "" if tiny else ",".join(gpus)
    states = job.variant if job.variant in FORMS else states
    record: dict[str, Any] = {"job": list(job), "states": states, "tiny": tiny, "date": time.strftime("%Y-%m-%d")}
    record |= {"device": device(tiny), "torch": torch.__version__}
    if job.kind == "save":
        found = save_and_resume(words, work, log, environ, 2**20 if tiny else SIZE)
        print(f"{job.name}: " + ("failed" if "failed" in found else describe(found)) + f", see {log}", flush=True)
        for folder in work.glob("iter_*"):  # tens of GiB
            shutil.rmtree(folder, ignore_errors=True)
        return record | found
    ended = run_until(words, job.iterations, log, environ, deadline=deadline if job.kind == "mixed" else math.inf)
    record |= {
        "first": ended.first,
        "expected": ended.expected,
        "short": ended.short,
        "in_use": read_most_in_use(run_folder),
    }
    if ended.iteration < job.iterations:
        if job.kind != "mixed" or time.monotonic() < deadline or ended.iteration <= job.warm:
            print(f"{job.name}: failed in iteration {ended.iteration + 1}, see {log}\n  {ended.last}", flush=True)
            return record | {"failed": (ended.short or [ended.last])[-1]}
        record["cut"] = ended.iteration
    found = read_metrics(work, job.warm, min(job.iterations, ended.iteration))
    print(f"{job.name}: {found['mean'] / job.gpus:,.0f} tok/s/GPU, loss {found['losses'][-1]:.4f}", flush=True)
    return record | found


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(results: Path, folder: Path, links: Callable[[int], prediction.Interconnect]) -> str:
    """Measured and predicted speed, and whether losses equal those of one GPU."""
    records = {Job(*r["job"]): r for r in read(results)}
    lines = [
        "| shape, engine, GPUs | tok/s/GPU | predicted | measured ÷ predicted | MFU | GiB by PyTorch "
        "| by the driver, expected, off | of one GPU | losses, norms differ from | by at most | equal |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    waits, saves, gains = [], [], []
    for job, r in records.items():
        if "failed" in r:
            lines.append(f"| {job.name} | failed: {r['failed'].strip()} |" + " |" * 9)
            continue
        if job.kind == "save":
            saves.append(f"{job.name}: {describe(r)}")
        if job.kind in ("reference", "save"):
            continue
        speed, alone = r["mean"] / job.gpus, records.get(_alone(job), {}).get("mean")
        expected = _predicted(job, r, folder, links(job.gpus))
        cells = [f"{job.shape}, {job.engine}, {job.gpus}{_noted(job, r)}", f"{speed:,.0f}"]
        cells += [f"{expected:,.0f}", f"{speed / expected:.3f}"] if expected else ["", ""]
        cells += [f"{r['mfu']:.3f}" if r["mfu"] else "", f"{r['memory'] / 2**30:.1f}", _memory(r)]
        cells += [f"{speed / alone:.1%}" if alone else "", *_compared(job, r, records)]
        lines.append(f"| {' | '.join(cells)} |")
        if job.kind == "even" and (uneven := records.get(job._replace(kind="speed"), {}).get("mean")):
            longer = f"{r['mean'] / uneven - 1:.1%}"
            waits.append(f"{job.shape}, {job.gpus} GPUs: packs of unequal cost take {longer} longer")
            other = _predicted(job._replace(kind="speed"), r, folder, links(job.gpus))
            waits[-1] += f" ({expected / other - 1:.1%} predicted)" if expected and other else ""
        undealt = records.get(job._replace(variant="balance-0"), {})
        if job.variant in DEALT and "mean" in undealt and not any("cut" in of_both for of_both in (r, undealt)):
            gain = f"{job.name}: {r['mean'] / undealt['mean'] - 1:+.1%} tok/s against balance-0"
            gains.append(gain + (f" ({promised:+.1%} predicted)" if (promised := _dealt(job, folder)) else ""))
    found = {"The wait for the slowest rank": waits, "Packs balanced by cost": gains, "Checkpoints": saves}
    return "\n".join([*lines, "", *(f"{what}: {'; '.join(said or ['not measured'])}" for what, said in found.items())])


def _alone(job: Job) -> Job:
    """The run of one GPU that a run is compared with."""
    same_products = "fp8" in job.variant
    return Job("speed", job.shape, "single", 1, job.packs if same_products else 1, job.variant * same_products)


def _noted(job: Job, r: dict[str, Any]) -> str:
    notes = [job.variant] if job.variant else []
    notes += [job.kind] if job.kind != "speed" else []
    if job.kind == "mixed":
        notes.append(f"{r.get('cut', job.iterations)} of {job.iterations} iterations")
    notes += [f"memory ran out {len(r['short'])} times"] if r.get("short") else []
    return f" ({', '.join(notes)})" if notes else ""


def _memory(r: dict[str, Any]) -> str:
    """GiB by the driver, the expected GiB, and the relative error."""
    found = re.search(r"peak ([\d.]+) GiB expected", r.get("expected") or "")
    if not r.get("in_use"):
        return ""
    used = r["in_use"] / 2**30
    return f"{used:.1f}" + (f", {found[1]}, {float(found[1]) / used - 1:+.1%}" if found and not r["tiny"] else "")


def _dealt(job: Job, folder: Path) -> float | None:
    """Expected gain of tokens per second by balancing, on the measured iterations."""
    if job.shape not in single_gpu_times.MODELS:
        return None
    model = single_gpu_times.MODELS[job.shape]
    costs = squares(data(folder, False, kind_of_data(job)), False)[job.warm * job.packs : job.iterations * job.packs]
    undealt, dealt = (
        balance.waiting_share(
            costs, lambda c: model.fixed + model.a + model.b * c, job.gpus, job.packs // job.gpus, window
        )
        for window in (0, DEALT[job.variant])
    )
    return (1 - dealt) / (1 - undealt) - 1


def _predicted(job: Job, r: dict[str, Any], folder: Path, links: prediction.Interconnect) -> float | None:
    """Predicted tokens per second and GPU, from the packs of the measured iterations."""
    machine = _machine(r["device"])
    if machine is None or job.shape not in single_gpu_times.MODELS or job.variant or job.kind == "mixed":
        return None
    every = squares(data(folder, False, kind_of_data(job)), False)[WARM * job.gpus : ITERATIONS * job.gpus]
    model = single_gpu_times.MODELS[job.shape]
    if job.engine == "single":
        return prediction.single_gpu_speed(model, machine, every)
    found = prediction.predict(model, machine, job.engine, job.gpus, every, links)
    return found.tokens_per_s if found else None


def _compared(job: Job, r: dict[str, Any], records: dict[Job, dict[str, Any]]) -> tuple[str, str, str]:
    """(name of the reference, largest differences, whether they are small enough)

    In fp32 on CPUs losses agree to 1e-5 and norms to 1e-4 relative, as in the tests. In bf16 on a GPU FSDP, ZeRO-1 and
    ZeRO-2 differed by 3e-4 (of a loss of 11): sums are rounded in another order. The bound of 1e-3 is three times that;
    a lost micro-batch or a wrong divisor would change the norm, whose bound is 2 %.
    """
    if job.kind != "speed" or job.gpus == 1 or job.variant:
        return "", "", ""
    other = records.get(Job("reference", job.shape, "single", 1, job.packs))
    name = "one GPU"
    if other is None or "failed" in other:
        other, name = records.get(job._replace(engine="fsdp"), {}), "FSDP"
    if "losses" not in other or other is r:
        return "", "", ""
    loss = max(abs(x - y) for x, y in zip(r["losses"], other["losses"], strict=False))
    norm = max(abs(x / y - 1) for x, y in zip(r["norms"], other["norms"], strict=False))
    most = (1e-5, 1e-4) if r["tiny"] else (1e-3, 2e-2)
    return name, f"{loss:.1e}, {norm:.1e}", "yes" if loss <= most[0] and norm <= most[1] else "NO"

"""A mixture of 8 sources next to megatron-core's BlendedDataset, grain's MapDataset.mix and OLMo-core's loader.

    PYTHONPATH=. PYTHON benchmarks/mixture_peers.py [--folder DIR]

PYTHON has xtuner's requirements and those of megatron-core, grain and ai2-olmo-core that are to be measured; the others
are named and left out. The same tokens for all, 8 sources of 8 M tokens in documents of lognormal length, each ended by
id 2. A read is one pack of 32,768 tokens with targets, positions and borders of documents; what a tool does not return
is computed from what it does. grain has no format of its own: it mixes a flat memory map of each source. OLMo-core's
loader is given all files without weights, because its mixtures select tokens of files beforehand.
Each runs in a process of its own. Times are CPU seconds; memory is private and dirty.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

SOURCES, TOKENS, LENGTH, PACKS, END = 8, 8_000_000, 32768, 1500, 2
WEIGHTS = [0.3, 0.2, 0.15, 0.1, 0.1, 0.08, 0.05, 0.02]
Read = Callable[[int], Any]  # number of a pack in the run's order → its tensors


def documents(source: int) -> list[np.ndarray]:
    rng = np.random.RandomState(source)
    lengths = np.clip(rng.lognormal(np.log(700), 1.0, TOKENS // 1000), 2, None).astype(np.int64)
    ids = rng.randint(3, 50_000, int(lengths.sum())).astype(np.int32)
    ids[np.cumsum(lengths) - 1] = END
    return np.split(ids, np.cumsum(lengths)[:-1])


def complete(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Targets, positions and borders of a pack in which id 2 ends documents."""
    borders = torch.cat((torch.tensor([0]), (ids[:-1] == END).nonzero().flatten() + 1, torch.tensor([len(ids)])))
    lengths = borders.diff()
    targets = torch.cat((ids[1:], torch.tensor([-100])))
    targets[borders[1:] - 1] = -100
    positions = torch.arange(len(ids)) - torch.repeat_interleave(borders[:-1], lengths)
    return ids, targets, positions, borders.int()


def xtuner(folder: Path) -> tuple[Read, Callable[[int], Any]]:
    from xtuner.data import InternRepoSampler, load_intern_repo_tokenized_dataset, mixture
    from xtuner.data.loading.batch import Batch
    from xtuner.data.loading.loader import PackLoader
    from xtuner.data.loading.sampler import Position
    from xtuner.data.packing.pack import PackedDataset

    kind = load_intern_repo_tokenized_dataset
    sources = [dict(type=kind, folder=folder / f"bin{s}", weight=w, max_repeats=99) for s, w in enumerate(WEIGHTS)]
    data = PackedDataset(mixture(sources), LENGTH)
    loader = PackLoader(data, InternRepoSampler(data, rank=0, world_size=1), reshuffle=True)
    stream = loader.numbers_from(Position())

    def read(_: int) -> Any:
        return Batch.from_raw(data.raw(next(stream)), "internevo")

    def resume(at: int) -> Any:
        number = next(loader.numbers_from(Position().advance(at, loader.packs_per_epoch)))
        return Batch.from_raw(data.raw(number), "internevo")

    return read, resume


def megatron(folder: Path) -> tuple[Read, Callable[[int], Any]]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    tokenizer = SimpleNamespace(eod=END, pad=0, vocab_size=100_000, unique_identifiers={"name": "none"})
    paths = [str(folder / f"idx{s}") for s in range(SOURCES)]
    config = GPTDatasetConfig(
        random_seed=0, sequence_length=LENGTH, blend=(paths, WEIGHTS), split="1,0,0", reset_position_ids=True,
        reset_attention_mask=False, eod_mask_loss=True, create_attention_mask=False, tokenizer=tokenizer,
        path_to_cache=str(folder / "megatron_cache"),
    )  # fmt: skip
    data = BlendedMegatronDatasetBuilder(GPTDataset, [4 * PACKS, 0, 0], lambda: True, config).build()[0]

    def read(i: int) -> Any:
        found = data[i]
        borders = torch.cat(((found["position_ids"] == 0).nonzero().flatten(), torch.tensor([LENGTH]))).int()
        return found["tokens"], found["labels"].masked_fill(found["loss_mask"] == 0, -100), borders

    return read, read


def grain(folder: Path) -> tuple[Read, Callable[[int], Any]]:
    import grain.python as g

    class Flat:
        def __init__(self, path: Path) -> None:
            self.tokens = np.memmap(path, np.int32, "r")

        def __len__(self) -> int:
            return len(self.tokens) // LENGTH

        def __getitem__(self, i: int) -> np.ndarray:
            return np.array(self.tokens[i * LENGTH : (i + 1) * LENGTH], np.int64)

    parts = [g.MapDataset.source(Flat(folder / f"flat{s}")).shuffle(seed=s).repeat() for s in range(SOURCES)]
    data = g.MapDataset.mix(parts, weights=WEIGHTS).map(lambda ids: complete(torch.from_numpy(ids)))
    return data.__getitem__, data.__getitem__


def olmo(folder: Path) -> tuple[Read, Callable[[int], Any]]:
    from olmo_core.data.collator import DataCollator
    from olmo_core.data.data_loader import NumpyFSLDataLoader
    from olmo_core.data.numpy_dataset import NumpyFSLDataset

    paths = [folder / f"flat{s}" for s in range(SOURCES)]
    data = NumpyFSLDataset(
        *paths, sequence_length=LENGTH, pad_token_id=0, eos_token_id=END, vocab_size=100_000, dtype=np.uint32
    )
    data.work_dir = folder / "olmo"

    def loader() -> Any:
        made = NumpyFSLDataLoader(
            data, collator=DataCollator(0), global_batch_size=LENGTH, work_dir=folder / "olmo", num_threads=0
        )
        made.reshuffle(epoch=1)
        return made

    stream = iter(loader())

    def read(_: int) -> Any:
        return complete(next(stream)["input_ids"][0].long())

    def resume(at: int) -> Any:
        again = loader()
        again.batches_processed = at
        return complete(next(iter(again))["input_ids"][0].long())

    return read, resume


TOOLS = {"xtuner": xtuner, "megatron-core": megatron, "grain": grain, "ai2-olmo-core": olmo}


def prepare(folder: Path) -> None:
    from xtuner.data import load_intern_repo_tokenized_dataset
    from xtuner.data.format.writer import write_bin
    from xtuner.data.inspect.build_caches import build_caches

    for s in range(SOURCES):
        found = documents(s)
        np.concatenate(found).tofile(folder / f"flat{s}")
        (folder / f"bin{s}").mkdir()
        write_bin(folder / f"bin{s}/a.bin", [d.tolist() for d in found])
        build_caches(load_intern_repo_tokenized_dataset(folder / f"bin{s}"), 1024, workers=1)
        try:
            from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
        except ImportError:
            continue
        builder = IndexedDatasetBuilder(str(folder / f"idx{s}.bin"), dtype=np.int32)
        for document in found:
            builder.add_document(document, [len(document)])
        builder.finalize(str(folder / f"idx{s}.idx"))


def private() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def measure(tool: str, folder: Path) -> None:
    torch.set_num_threads(1)
    try:
        TOOLS[tool](folder)  # imports, and caches
    except ImportError as e:
        print(f"{tool}: cannot be imported ({e}): not measured")
        return
    before, begin = private(), time.process_time()
    read, resume = TOOLS[tool](folder)
    start = time.process_time() - begin
    for i in range(50):
        read(i)
    speeds = []
    for part in range(3):
        begin = time.process_time()
        for i in range(PACKS // 3):
            read(50 + part * PACKS // 3 + i)
        speeds.append(PACKS // 3 * LENGTH / (time.process_time() - begin) / 1e6)
    begin = time.process_time()
    for at in range(100, 120):
        resume(at)
    seek = (time.process_time() - begin) / 20 * 1e3
    print(
        f"{tool} {version(tool)}: {max(speeds):.1f} M tokens a CPU second (slowest of 3: {min(speeds):.1f}); start "
        f"{start:.3f} s; a pack after a resume {seek:.2f} ms; {private() - before:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the data (default: a temporary one)")
    parser.add_argument("--tool", choices=TOOLS, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.tool:
        return measure(a.tool, a.folder)
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} CPU cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(dir=a.folder) as folder:
        prepare(Path(folder))
        for tool in TOOLS:
            words = [sys.executable, __file__, "--tool", tool, "--folder", folder]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            print(done.stdout.strip() or f"{tool}: {done.stderr.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()

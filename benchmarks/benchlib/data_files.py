"""Data of `data_path.py`, written once, and their pages in memory."""

import contextlib
import ctypes
import mmap
import os
import shutil
from pathlib import Path

import numpy as np

FILES, DOCUMENTS, TOKENS = 20, 200_000, 200_000_000
LENGTH = 32768  # tokens of a pack
VOCABULARY = 92544


def make_text(folder: Path) -> None:
    """Documents of lognormal length; each file repeats a thousand different ones."""
    if folder.is_dir():
        return
    unfinished = folder.with_name(folder.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for i in range(FILES):
        draw = np.random.RandomState(i)
        lengths = np.clip(draw.lognormal(np.log(700), 1.0, 1000), 2, LENGTH)
        lengths = (lengths * (TOKENS / DOCUMENTS) / lengths.mean()).astype(int)
        lines = []
        for n in lengths.tolist():
            ids = draw.randint(3, VOCABULARY, n)
            signed = np.where(draw.rand(n) < 0.9, ids, -ids).tolist()
            lines.append(b'{"tokens": [' + ", ".join(map(str, signed)).encode() + b"]}\n")
        chosen = draw.randint(1000, size=DOCUMENTS // FILES)
        sizes = np.array([len(line) for line in lines])[chosen]
        with open(unfinished / f"{i:02d}.bin", "wb") as f:
            f.writelines(lines[j] for j in chosen)
        with open(unfinished / f"{i:02d}.bin.meta", "wb") as f:
            np.save(f, np.stack((np.cumsum(sizes) - sizes, lengths[chosen]), axis=1))
    os.rename(unfinished, folder)


def make_large(folder: Path, files: int, documents: int, seed: int = 0) -> None:
    """`files` links to one sparse text of `documents` lines, of which only the last is written."""
    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    line = b'{"tokens": [1, 2, 3]}\n'
    lengths = np.random.RandomState(seed).randint(3, 2000, documents)
    lengths[-1] = 3
    offsets = np.concatenate(([0], np.cumsum(lengths * 7 + 14)))[:-1]
    with open(folder / "00000.bin", "wb") as f:
        f.seek(int(offsets[-1]))
        f.write(line)
    with open(folder / "00000.bin.meta", "wb") as f:
        np.save(f, np.stack((offsets, lengths), axis=1))
    for i in range(1, files):
        for ending in (".bin", ".bin.meta"):
            os.link(folder / f"00000{ending}", folder / f"{i:05d}{ending}")


def in_page_cache(files: list[Path]) -> float:
    """Share of the files' pages that are in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    there = pages = 0
    for path in files:
        with open(path, "rb") as f, contextlib.suppress(ValueError):
            mapped = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
            n = -(-len(mapped) // mmap.PAGESIZE)
            found = (ctypes.c_ubyte * n)()
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), found):
                return float("nan")
            there += int(np.count_nonzero(np.frombuffer(found, np.uint8) & 1))
            pages += n
    return there / max(pages, 1)


def forget(files: list[Path]) -> None:
    """Ask the system to drop the files from the page cache."""
    os.sync()
    for path in files:
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

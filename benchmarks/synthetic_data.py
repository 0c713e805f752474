"""Write a folder of synthetic tokenized data: documents of lognormal length, random ids.

    python benchmarks/synthetic.py DIR --tokens 20000000

The lengths are those of the published figures: median 700, sigma 1, cut at 32,768.
"""

import argparse
from pathlib import Path

from benchlib.workloads import draw_documents

from xtuner.data.format.writer import write_bin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--vocabulary", type=int, default=92544)
    parser.add_argument("--median", type=int, default=700)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    count, total = write_bin(
        a.folder / "synthetic.bin", draw_documents(a.tokens, a.vocabulary, a.median, a.longest, a.seed)
    )
    print(f"{a.folder / 'synthetic.bin'}: {count:,} documents, {total:,} tokens")


if __name__ == "__main__":
    main()

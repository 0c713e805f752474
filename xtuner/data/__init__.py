"""The data path: tokenized files → packs → batches. The names exported here are used in configs.

They are imported on first use: packs need torch, walking a folder and tokenizing text do not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xtuner.data.format.folder import load_intern_repo_tokenized_dataset
    from xtuner.data.loading.sampler import InternRepoSampler
    from xtuner.data.packing.mixture import mixture
    from xtuner.data.packing.pack import build_packed_dataset
    from xtuner.data.sources.load import load_token_files

__all__ = [
    "InternRepoSampler",
    "build_packed_dataset",
    "load_intern_repo_tokenized_dataset",
    "load_token_files",
    "mixture",
]

_HOME = {
    "InternRepoSampler": "loading.sampler",
    "build_packed_dataset": "packing.pack",
    "load_intern_repo_tokenized_dataset": "format.folder",
    "load_token_files": "sources.load",
    "mixture": "packing.mixture",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)

"""The data path: tokenized files → packs → batches. Names here are what configs use."""

from xtuner.data.index import load_intern_repo_tokenized_dataset
from xtuner.data.order import InternRepoSampler
from xtuner.data.pack import build_packed_dataset

__all__ = ["InternRepoSampler", "build_packed_dataset", "load_intern_repo_tokenized_dataset"]

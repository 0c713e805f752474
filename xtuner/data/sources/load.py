"""`load_token_files`: tokens of other tools as a source of documents.

train_dataset = dict(
    type=build_packed_dataset,
    dataset_cfg=dict(type=load_token_files, folder="/data/megatron"),
    packed_length=max_length,
    seed=1024,
)
"""

from pathlib import Path

from xtuner.config.settings import SCHEMA
from xtuner.core.errors import ConfigError
from xtuner.data.format.cache_dirs import CacheDirs, Opening
from xtuner.data.format.file_order import read_order
from xtuner.data.format.folder import TokenizedFolder, load_intern_repo_tokenized_dataset, open_files
from xtuner.data.sources.columns import AUTO, Columns
from xtuner.data.sources.files import split_location
from xtuner.data.sources.kinds import INTERNEVO, SUFFIXES, Kind, detect_kind, list_files, make_kind


def load_token_files(
    folder: str | Path,
    kind: Kind = "auto",
    ids: str = AUTO,
    labels: str | None = AUTO,
    mask: str | None = AUTO,
    min_length: int = 0,
    data_order_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    opening: Opening = Opening(),  # noqa: B008
) -> TokenizedFolder:
    """Open token files of Megatron, Parquet, Arrow (also Hugging Face's `save_to_disk`) or JSON lines, without changing
    them. Each file is shuffled and packed separately, as `.bin` files are.

    Args:
        folder: contains the files at any depth; or one file.
        kind: "auto": by the files.
        ids: column of token ids; "auto": input_ids, tokens or ids, else the only column of integer lists.
        labels: column with the id where a token is learned, else -100 (not shifted); "auto": `labels`, if there is one;
            None: every token is learned. Of Megatron's files the ending of the second pair's name, "_labels".
        mask: column with 1 where a token is learned, else 0; "auto": loss_mask or mask, if there is one.
        min_length, data_order_path, cache_dir, opening: see `load_intern_repo_tokenized_dataset`.

    Raises: ConfigError, DataError.
    """
    SCHEMA.require("train_dataloader.dataset.dataset_cfg", kind=kind)
    columns = Columns(ids, labels, mask)
    root, only = split_location(folder)
    name = detect_kind(root, only) if kind == "auto" else kind
    if name == INTERNEVO:
        if only or columns != Columns():
            raise ConfigError(
                "InternEvo's .bin files have no columns" if not only else "a single .bin is not a data folder",
                where=str(folder),
                do="give a folder of .bin files, without ids, labels and mask",
            )
        return load_intern_repo_tokenized_dataset(
            root, min_length, data_order_path, cache_dir=cache_dir, opening=opening
        )
    cache_dirs = CacheDirs(root, opening.cache_dir or cache_dir, opening.read_only)
    request = [str(folder), name, ids, str(labels), str(mask), str(min_length), str(data_order_path)]

    def find_names() -> list[str]:
        if only:
            return [only]
        if data_order_path is not None:
            return read_order(data_order_path, root, SUFFIXES[name][0])
        return list_files(name, root, columns)

    made = make_kind(name, columns, cache_dirs)
    return open_files(root, find_names, min_length, cache_dirs, request, made, opening, str(folder))

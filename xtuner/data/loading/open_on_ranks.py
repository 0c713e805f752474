"""Opens the folders of data on all ranks of a run; ranks other than 0 reuse the indexes of rank 0 where they can.

Rank 0 walks each folder, reads sizes and times, and builds a missing index. Then the first rank of each node receives
its path and hash; of few documents, which need no index, the catalog. It uses them if it can access them and all files;
else it walks the folder itself, and must find the same contents. The other ranks of a node use what its first rank has
found. An error of one rank is raised on all.
"""

import platform
from base64 import b64encode
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xtuner.core.errors import DataError
from xtuner.data.format.file_catalog import to_bytes
from xtuner.data.format.folder import read_signatures
from xtuner.data.packing.mixture import list_parts
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.collectives import Ranks

MAX_SENT_NAMES = 10_000  # of files, sent by rank 0 where there is no index
MAX_SENT_FILES = 10_000  # of a catalog, sent where there is no index: 1 MB


Known = dict[str, Any]  # what another rank has found
Build = Callable[[Sequence[Known]], PackedDataset]  # with what another rank has found of each folder that has an index


def open_on_ranks(build: Build, ranks: Ranks) -> PackedDataset:
    """Build the same data on all ranks. Raises, on all ranks: what `build` raises on any; DataError if data differ."""
    if ranks.size == 1:
        return build(())
    nodes = ranks.gather(platform.node())
    first = nodes.index(nodes[ranks.rank])
    data = ranks.run_on_all(lambda: build(()) if ranks.is_main else None)
    found = ranks.broadcast(_summarize(data))
    data = ranks.run_on_all(lambda: _open_on_first_rank(build, found) if data is None and first == ranks.rank else data)
    own = _summarize(data)
    of_node = ranks.gather(None if own == found else own)[first] or found
    data = ranks.run_on_all(lambda: build(of_node["folders"]) if data is None else data)
    ranks.run_on_all(lambda: _check_same(data, found))
    return data


def _summarize(data: Any) -> Known | None:
    """What other ranks need to open or compare the data; None for no data."""
    if data is None:
        return None
    documents = getattr(data, "documents", None)
    if documents is None:  # a user's own dataset
        return {"folders": [], "fingerprint": None}
    folders = [_summarize_folder(part) for part in list_parts(documents) if part.request is not None]
    folders = [folder for folder in folders if folder]
    names = None if folders or len(documents) > MAX_SENT_NAMES else documents.names
    return {"folders": folders, "fingerprint": data.fingerprint(), "names": names}


def _summarize_folder(part: Any) -> Known | None:
    if part.orders:
        return {"request": part.request, "path": str(part.orders.path.absolute()), "key": part.orders.key}
    if len(part) > MAX_SENT_FILES:
        return None
    return {"request": part.request, "path": None, "catalog": b64encode(to_bytes(part.catalog)).decode()}


def _open_on_first_rank(build: Build, known: Known) -> PackedDataset:
    data = build(known["folders"])
    sent = [folder["request"] for folder in known["folders"]]
    for part in list_parts(data.documents) if sent else []:
        if part.request not in sent:
            continue
        seen = read_signatures(part.folder, part.catalog.names, part.kind)
        unseen = np.flatnonzero(seen["size"] < 0)
        if len(unseen):
            raise _access_error([part.catalog.names[i] for i in unseen], str(part.folder))
        if not (seen == part.catalog.records["signature"]).all():
            return build(())  # a copy on this node, with other times
    return data


def _check_same(data: Any, known: Known) -> None:
    if known["fingerprint"] is None or data.fingerprint() == known["fingerprint"]:
        return
    documents = data.documents
    names = set(documents.names)
    if known["names"] and (missing := [n for n in known["names"] if n not in names]):
        raise _access_error(missing, documents.location)
    raise DataError(
        f"the data on {platform.node()} differ from those of rank 0",
        where=documents.location,
        why="ranks with different packs would not train on what the run reports",
        do="copy the folder again, or use one that all nodes share",
    )


def _access_error(names: list[str], folder: str) -> DataError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return DataError(
        f"{names[0]}{more} can be accessed by rank 0, but not on {platform.node()}",
        where=f"{folder}/{names[0]}",
        why="all ranks read all files",
        do="use a folder that all nodes share, or copy it completely to each node",
    )

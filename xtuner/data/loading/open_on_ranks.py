"""Opens one folder of data on all ranks of a run; ranks other than 0 reuse the index of rank 0 where they can.

Rank 0 walks the folder, reads sizes and times, and builds a missing index. Then the first rank of each node receives
its path and hash. It opens that index if it can access it and all files; else it walks the folder itself, and must find
the same contents. The other ranks of a node open the index of its first rank. An error of one rank is raised on all.
"""

import platform
from collections.abc import Callable
from typing import Any

import numpy as np

from xtuner.core.errors import DataError
from xtuner.data.format.folder import read_signatures
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.collectives import Ranks

MAX_SENT_NAMES = 10_000  # of files, sent by rank 0 where there is no index


Known = dict[str, Any]  # what another rank has found
Build = Callable[[Known | None], PackedDataset]


def open_on_ranks(build: Build, ranks: Ranks) -> PackedDataset:
    """Build the same data on all ranks. Raises, on all ranks: what `build` raises on any; DataError if data differ."""
    if ranks.size == 1:
        return build(None)
    nodes = ranks.gather(platform.node())
    first = nodes.index(nodes[ranks.rank])
    data = ranks.run_on_all(lambda: build(None) if ranks.is_main else None)
    found = ranks.broadcast(_summarize(data))
    data = ranks.run_on_all(lambda: _open_on_first_rank(build, found) if data is None and first == ranks.rank else data)
    of_node = ranks.gather(_summarize(data))[first]
    data = ranks.run_on_all(lambda: _open_known(build, of_node) if data is None else data)
    ranks.run_on_all(lambda: _check_same(data, found))
    return data


def _summarize(data: Any) -> Known | None:
    """What other ranks need to open or compare the data; None for no data."""
    if data is None:
        return None
    documents = getattr(data, "documents", None)
    if documents is None:  # a user's own dataset
        return {"request": None, "fingerprint": None}
    orders = documents.orders
    names = None if orders or len(documents) > MAX_SENT_NAMES else documents.names
    where = {"path": str(orders.path.absolute()), "key": orders.key} if orders else {"path": None, "key": None}
    return {"request": documents.request, "fingerprint": data.fingerprint(), "names": names, **where}


def _open_known(build: Build, known: Known) -> PackedDataset:
    return build(None if known["request"] is None or known["path"] is None else known)


def _open_on_first_rank(build: Build, known: Known) -> PackedDataset:
    data = _open_known(build, known)
    documents = getattr(data, "documents", None)
    if documents is None or documents.orders is None or documents.orders.key != known["key"]:
        return data  # it has walked the folder itself
    seen = read_signatures(documents.folder, documents.catalog.names, documents.kind)
    unseen = np.flatnonzero(seen["size"] < 0)
    if len(unseen):
        raise _access_error([documents.catalog.names[i] for i in unseen], str(documents.folder))
    if (seen == documents.catalog.records["signature"]).all():
        return data
    return build(None)  # a copy on this node, with other times


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

"""How the ranks of a run open one folder of data: rank 0 looks at all of it, the others take its word where they can.

Rank 0 walks, asks for sizes and times, and builds what is missing. Then the first rank of each node, given a path and a
hash, opens rank 0's index if it sees it and all files; else it looks for itself, and must find the same contents. The
other ranks of the node open what their first one has. What one rank cannot see, all report together.
"""

import platform
from collections.abc import Callable
from typing import Any

import numpy as np

from xtuner.core.errors import DataError
from xtuner.data.format.folder import read_signatures
from xtuner.data.packing.pack import PackedDataset
from xtuner.dist.collectives import Ranks

NAMED = 10_000  # files whose names rank 0 tells where there is no index to tell them


Known = dict[str, Any]  # what another rank has found
Build = Callable[[Known | None], PackedDataset]


def open_on_ranks(build: Build, ranks: Ranks) -> PackedDataset:
    """Build the same data on all ranks. Raises, on all: what `build` raises on any; DataError for other data."""
    if ranks.size == 1:
        return build(None)
    nodes = ranks.gather(platform.node())
    first = nodes.index(nodes[ranks.rank])
    data = ranks.together(lambda: build(None) if ranks.is_main else None)
    found = ranks.from_main(_told(data))
    data = ranks.together(lambda: _first_of_node(build, found) if data is None and first == ranks.rank else data)
    of_node = ranks.gather(_told(data))[first]
    data = ranks.together(lambda: _given(build, of_node) if data is None else data)
    ranks.together(lambda: _compare(data, found))
    return data


def _told(data: Any) -> Known | None:
    """A path and a hash, and by what they are recognised; None for no data."""
    if data is None:
        return None
    documents = getattr(data, "documents", None)
    if documents is None:  # a dataset of the user's own
        return {"request": None, "fingerprint": None}
    orders = documents.orders
    names = None if orders or len(documents) > NAMED else documents.names
    where = {"path": str(orders.path.absolute()), "key": orders.key} if orders else {"path": None, "key": None}
    return {"request": documents.request, "fingerprint": data.fingerprint(), "names": names, **where}


def _given(build: Build, told: Known) -> PackedDataset:
    return build(None if told["request"] is None or told["path"] is None else told)


def _first_of_node(build: Build, told: Known) -> PackedDataset:
    data = _given(build, told)
    documents = getattr(data, "documents", None)
    if documents is None or documents.orders is None or documents.orders.key != told["key"]:
        return data  # it has looked for itself
    seen = read_signatures(documents.folder, documents.catalog.names)
    unseen = np.flatnonzero(seen["size"] < 0)
    if len(unseen):
        raise _not_seen([documents.catalog.names[i] for i in unseen], str(documents.folder))
    if (seen == documents.catalog.records["signature"]).all():
        return data
    return build(None)  # a copy of its own, with times of its own


def _compare(data: Any, told: Known) -> None:
    if told["fingerprint"] is None or data.fingerprint() == told["fingerprint"]:
        return
    documents = data.documents
    names = set(documents.names)
    if told["names"] and (missing := [n for n in told["names"] if n not in names]):
        raise _not_seen(missing, documents.location)
    raise DataError(
        f"the data on {platform.node()} are not those that rank 0 sees",
        where=documents.location,
        why="ranks that count other packs would train on others than the run says",
        do="copy the folder again, or give one that all nodes share",
    )


def _not_seen(names: list[str], folder: str) -> DataError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return DataError(
        f"{names[0]}{more} cannot be seen on {platform.node()}, but by rank 0",
        where=f"{folder}/{names[0]}",
        why="all ranks read all files",
        do="give a folder that all nodes share, or copy it whole to each",
    )

"""Id 0, which has no sign: by InternEvo's rule it is never learned, `learn_zero` derives its label from its neighbours.

In Llama 3's and Qwen's vocabularies id 0 is "!". With `learn_zero`, a 0 is learned if the closest token before it in
its fragment that has a sign is learned; at the beginning of a fragment, the closest one after it; in a fragment of
zeros alone, always. So the zeros of a prompt stay masked.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Signed = npt.NDArray[np.signedinteger[Any]]


def find_learned(signed: Signed, borders: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Which of T signed tokens are learned with `learn_zero`, bool [T].

    Args:
        borders: of the n fragments, [n + 1] from 0 to T.
    """
    learned = signed > 0
    at = np.flatnonzero(signed == 0)
    if not len(at):
        return learned
    signs = np.flatnonzero(signed)  # tokens with a sign
    if not len(signs):
        return np.ones(len(signed), np.bool_)
    fragment = np.searchsorted(borders, at, side="right")
    begins, ends = borders[fragment - 1], borders[fragment]
    after = np.searchsorted(signs, at)  # number of signs before each zero
    before, following = signs[np.maximum(after - 1, 0)], signs[np.minimum(after, len(signs) - 1)]
    has_before, has_after = (after > 0) & (before >= begins), (after < len(signs)) & (following < ends)
    learned[at] = np.where(has_before, learned[before], np.where(has_after, learned[following], True))
    return learned


def count_unlearned(signed: Signed, borders: npt.NDArray[np.integer[Any]]) -> int:
    """Number of zeros that only `learn_zero` learns."""
    if np.count_nonzero(signed) == len(signed):
        return 0
    return int(np.count_nonzero(find_learned(signed, borders))) - int(np.count_nonzero(signed > 0))

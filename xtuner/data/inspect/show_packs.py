"""Shows a pack as text: decoded learned and masked parts, document borders, positions."""

from collections.abc import Iterator
from itertools import groupby

from xtuner.core.errors import ConfigError
from xtuner.data.packing.pack import PackedDataset
from xtuner.data.tokenizer import Tokenizer

WAYS = ("text", "masked_text", "input_ids", "labels", "all")
MASK = "…"  # replaces parts without loss in masked_text


def show_pack(data: PackedDataset, pack: int, way: str, tokenizer: Tokenizer | None, colour: bool) -> Iterator[str]:
    """Lines that show one pack.

    Args:
        way: "text" (learned and masked parts, marked), "masked_text" (only learned parts), "input_ids", "labels"
            (numbers), "all" (text and both).
        tokenizer: needed for text.
        colour: learned parts green, masked parts dim; without colour masked parts are in ⟦ ⟧.

    Raises: ConfigError for a pack that does not exist.
    """
    if not 0 <= pack < len(data):
        raise ConfigError(f"there is no pack {pack}: they are numbered 0 to {len(data) - 1}", where="--pack")
    file_number, start, stop = data.find_tokens(pack)
    packs = data.file_packs(file_number)
    item = data[pack]
    ids, labels, borders = (item[k].tolist() for k in ("input_ids", "labels", "cumulative_len"))
    learned = [label >= 0 for label in labels]
    targets = int((item["targets"] >= 0).sum())  # positions with loss; differs from the number of learned tokens
    yield (
        f"pack {pack} of {len(data)}: {len(ids)} tokens, {sum(learned)} marked as learned, {targets} targets of the "
        f"loss, {packs.file.name} from token {start}"
    )
    for span, begin, end in zip(packs.spans(start, stop), borders, borders[1:], strict=False):
        length = span.length
        part = "" if span.stop - span.start == length else f", its tokens {span.start} to {span.stop - 1} of {length}"
        yield _rule(f"document {span.row}{part}; positions 0 to {end - begin - 1}", colour)
        if way in ("text", "masked_text", "all"):
            assert tokenizer is not None
            yield _text(ids[begin:end], learned[begin:end], tokenizer, colour, way == "masked_text")
        if way in ("input_ids", "all"):
            yield f"input_ids {ids[begin:end]}"
        if way in ("labels", "all"):
            yield f"labels    {labels[begin:end]}"
    if padding := len(ids) - (stop - start):
        yield _rule(f"{padding} tokens of padding", colour)


def _rule(text: str, colour: bool) -> str:
    return f"\033[36m── {text}\033[0m" if colour else f"── {text}"


def _text(ids: list[int], learned: list[bool], tokenizer: Tokenizer, colour: bool, masked: bool) -> str:
    parts = []
    for is_learned, group in groupby(zip(ids, learned, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([i for i, _ in group])
        if is_learned:
            parts.append(f"\033[32m{text}\033[0m" if colour else text)
        elif masked:
            parts.append(MASK)
        else:
            parts.append(f"\033[2m{text}\033[0m" if colour else f"⟦{text}⟧")
    return "".join(parts)

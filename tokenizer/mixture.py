"""Mix sources in given shares: which source gives how much, and in which order.

    data_files: [allenai/c4:en@0.5, wikimedia/wikipedia:20231101.en@0.3, notes/*.txt@0.2]

The number behind "@" is a source's share of the whole (any scale: 5, 3, 2 is the same). Sources are
streamed, so a mixture of Hub data sets needs no room for them; `HF_ENDPOINT` names a mirror.
"""

import logging
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

SHUFFLED_AT_ONCE = 1 << 24  # characters in a source's buffer: a few thousand web pages
T = TypeVar("T")

logger = logging.getLogger(__name__)


def parse_shares(data_files: list[str]) -> dict[str, float]:
    """Each source's share of the mixture, in the order given; the shares add up to 1.

    Args:
        data_files: names as `read_documents` takes them, all with "@share" or all without, which
            means equal shares.

    Raises:
        ValueError: a share that is not positive, only some shares given, or a source named twice.
    """
    found = [re.fullmatch(r"(.+)@([-+]?[\d.]+(?:e[-+]?\d+)?)", name) for name in data_files]
    bare = [name for name, match in zip(data_files, found, strict=True) if match is None]
    if bare and len(bare) < len(data_files):
        raise ValueError(f"data_files: {bare[0]} has no share, others have. Write {bare[0]}@0.5")
    if bare or not data_files:
        shares = dict.fromkeys(data_files, 1.0)
    else:
        shares = {match[1]: _read_share(match) for match in found if match is not None}
    if len(shares) < len(data_files):
        names = [match[1] if match else name for match, name in zip(found, data_files, strict=True)]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"data_files: {twice} is named twice; name it once, with its whole share")
    total = sum(shares.values())
    return {name: share / total for name, share in shares.items()}


def _read_share(match: re.Match) -> float:
    try:
        share = float(match[2])
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        raise ValueError(f"data_files: {match[0]}: the share '{match[2]}' must be a number above 0")
    return share


def has_shares(data_files: list[str]) -> bool:
    """Whether any source ends in "@number"."""
    return any(re.search(r"@[-+]?[\d.]+(e[-+]?\d+)?$", name) for name in data_files)


def check_budget(data_files: list[str], budget: int | None, name: str) -> None:
    """Raise a ValueError where shares have no budget, or the budget is not positive."""
    if budget is None and has_shares(data_files):
        raise ValueError(
            f"data_files has shares and there is no {name}: shares say nothing without a whole. "
            f"Give one, e.g. --{name} 1_000_000"
        )
    if budget is not None and budget <= 0:
        raise ValueError(f"{name}={budget} must be above 0")


def open_sources(
    shares: dict[str, float], seed: int, read: Callable[[str], Iterable[str]]
) -> dict[str, Iterator[str]]:
    """The documents that `read` finds in each source, in an order that `seed` decides."""
    return {name: shuffle(read(name), random.Random(f"{seed} {name}")) for name in shares}


def shuffle(documents: Iterable[str], rng: random.Random) -> Iterator[str]:
    """Shuffle a stream within a buffer of `SHUFFLED_AT_ONCE` characters: bounded memory."""
    buffer, size = [], 0
    for text in documents:
        buffer.append(text)
        size += len(text)
        while size > SHUFFLED_AT_ONCE and len(buffer) > 1:
            position = rng.randrange(len(buffer))
            buffer[position], buffer[-1] = buffer[-1], buffer[position]
            size -= len(buffer[-1])
            yield buffer.pop()
    rng.shuffle(buffer)
    yield from buffer


def interleave(
    streams: dict[str, Iterator[T]], shares: dict[str, float], size: Callable[[T], int]
) -> Iterator[T]:
    """Take the next item from the source that is furthest behind its share.

    No dice: at any point every source has its share up to the length of its last item, also where
    one's items are a thousand times as long as another's (books and web pages). A source that
    ends is named in a warning, and the others go on; nothing is read twice.

    Args:
        size: what the shares are of, such as an item's tokens.
    """
    taken = dict.fromkeys(streams, 0)
    open_ones = list(streams)
    while open_ones:
        name = min(open_ones, key=lambda name: taken[name] / shares[name])
        item = next(streams[name], None)
        if item is None:
            open_ones.remove(name)
            if open_ones:
                logger.warning("%s ended after %d; the other sources go on", name, taken[name])
            continue
        taken[name] += size(item)
        yield item


def take(items: Iterator[T], budget: float, size: Callable[[T], int]) -> Iterator[T]:
    """Items until their sizes add up to `budget`; the last one may exceed it."""
    taken = 0
    while taken < budget:
        item = next(items, None)
        if item is None:
            logger.warning("the sources ended after %d of %d", taken, budget)
            return
        taken += size(item)
        yield item

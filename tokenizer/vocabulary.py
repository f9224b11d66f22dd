"""A byte-level vocabulary as a person can read it.

Byte-level BPE writes each byte as a visible character ("ä½ł" for 你). Here entries are text again;
what is only a part of a character is shown as its bytes, as in <E4BD>.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any


@cache
def byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level entry stands for (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + position): byte for position, byte in enumerate(others)}


def entry_bytes(entry: str) -> bytes | None:
    """The bytes of an entry; None of one that is no byte-level text (most special tokens)."""
    table = byte_of()
    return bytes(table[char] for char in entry) if all(char in table for char in entry) else None


def is_single_byte(entry: str) -> bool:
    """Whether an entry is one of the 256 bytes."""
    return len(entry) == 1 and entry in byte_of()


def is_bare_byte(entry: str) -> bool:
    """Whether an entry is one byte of a character that takes several in UTF-8."""
    return is_single_byte(entry) and byte_of()[entry] >= 0x80


def readable(entry: str) -> str:
    """An entry as text; bytes that are only a part of a character in hex, as in 是<E4BD>."""
    raw = entry_bytes(entry)
    if raw is None:
        return entry

    def spell(part: re.Match) -> str:
        return f"<{part[0].encode(errors='surrogateescape').hex().upper()}>"

    return re.sub("[\udc80-\udcff]+", spell, raw.decode(errors="surrogateescape"))


def longest_entries(tokenizer: Any, count: int = 12) -> list[str]:
    """The entries with the most characters, special tokens aside, quoted as in JSON."""
    special = set(tokenizer.all_special_tokens)
    entries = {readable(entry) for entry in tokenizer.get_vocab() if entry not in special}
    longest = sorted(entries, key=lambda entry: (-len(entry), entry))[:count]
    return [json.dumps(entry, ensure_ascii=False) for entry in longest]


def write_vocabulary(tokenizer: Any, used: Mapping[int, int], path: str) -> None:
    """Write a table: id, kind (special, byte, part, text), times used, the entry in JSON quotes."""
    special, used = set(tokenizer.all_special_tokens), Counter(used)
    lines = ["id\tkind\tused\tentry"]
    for entry, i in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        text = entry if entry in special else readable(entry)
        whole = (entry_bytes(entry) or b"").decode("utf-8", "replace") == text
        kind = "byte" if is_single_byte(entry) else "text" if whole else "part"
        kind = "special" if entry in special else kind
        lines.append(f"{i}\t{kind}\t{used[i]}\t{json.dumps(text, ensure_ascii=False)}")
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

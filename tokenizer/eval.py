"""How well a tokenizer fits a text: bytes a token by language, exact round trip, unused ids.

python -m tokenizer.eval output/tiny/tokenizer --files data/generated/pretrain_validation.jsonl
"""

import argparse
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from tokenizer.corpus import list_files, read_documents


def evaluate_tokenizer(tokenizer: Any, documents: dict[str, list[str]]) -> dict[str, dict]:
    """Measure a tokenizer on held-out documents.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        documents: language -> texts.

    Returns:
        {metric: {"value", "n", "unit"}}: `bytes_per_token/<language>` (UTF-8 bytes),
        `round_trip` (share of documents that decode to exactly their text), `unused_ids`.
    """
    metrics, used, exact, total = {}, set(), 0, 0
    for language, texts in sorted(documents.items()):
        token_count = 0
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            token_count += len(ids)
            used.update(ids)
            exact += tokenizer.decode(ids) == text
        total += len(texts)
        size = sum(len(text.encode()) for text in texts)
        metrics[f"bytes_per_token/{language}"] = {
            "value": round(size / max(token_count, 1), 4),
            "n": token_count,
            "unit": "bytes/token",
        }
    metrics["round_trip"] = {"value": exact / max(total, 1), "n": total, "unit": "share"}
    unused = len(tokenizer) - len(used)
    metrics["unused_ids"] = {"value": unused / len(tokenizer), "n": len(tokenizer), "unit": "share"}
    return metrics


def read_by_language(data_files: list[str]) -> dict[str, list[str]]:
    """Documents by the language that most of their letters belong to: `zh` or `en`."""
    return group_by_language(read_documents(data_files))


def group_by_language(texts: Iterable[str]) -> dict[str, list[str]]:
    """Texts by the language that most of their letters belong to."""
    documents = defaultdict(list)
    for text in texts:
        documents[detect_language(text)].append(text)
    return dict(documents)


def detect_language(text: str) -> str:
    """`zh` where at least a fifth of the letters are Chinese characters, else `en`.

    A character carries about as much as a word of five letters: hence a fifth, not a half.
    """
    letters = [char for char in text if char.isalpha()]
    chinese = sum(unicodedata.name(char, "").startswith("CJK UNIFIED") for char in letters)
    return "zh" if chinese > len(letters) / 5 else "en"


def main(directory: str, files: list[str]) -> None:
    """Print the measurements as a table."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    list_files(files)
    for name, metric in evaluate_tokenizer(tokenizer, read_by_language(files)).items():
        print(f"{name:24} {metric['value']:8.4f} {metric['unit']:12} n={metric['n']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a directory with a tokenizer")
    parser.add_argument("--files", nargs="+", required=True, help="held-out text")
    arguments = parser.parse_args()
    main(arguments.directory, arguments.files)

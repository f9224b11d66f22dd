"""How well a tokenizer fits a text: bytes and characters a token, exact round trip, unused ids.

    python -m tokenizer.eval output/tiny/tokenizer --files data/generated/pretrain_validation.jsonl
    python -m tokenizer.eval output/my/tokenizer --against path/to/gpt2 --files en.txt zh.txt \
        --vocabulary vocabulary.tsv

`--against` sets other tokenizers beside it on the same text: directories that AutoTokenizer loads,
or with GPT-2's files (vocab.json or encoder.json, merges.txt or vocab.bpe), or names on the Hub.
"""

import argparse
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import stages
from tokenizer.corpus import list_files, read_documents
from tokenizer.vocabulary import is_bare_byte, longest_entries, write_vocabulary

BATCH = 256
GPT2_FILES = (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"))
# Texts that tokenizers have lost or changed: each must decode to exactly itself.
HOSTILE = (
    " one space before", "two  spaces,   three", "trailing \t\n\n", "\r\n line ends \r",
    "\x00\x1b[0m", "\ufeffbyte order mark", "\u200bzero\u200bwidth\u200d", "e\u0301 is not \u00e9",
    "\U0001fa9c\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e8\U0001f1f3 \u270a\U0001f3ff",
    "ｆｕｌｌ ｗｉｄｔｈ　空格", "汉字 和 English混合123",
    "\u3400\U00020000\U0002a6a5", "\u202eright to left\u202c",
    "\ufdfa \ufb01 ½ ²", "<|im_end", "<|im_end|>", "</s> <s> [INST]",
    "&amp; <script>alert(1)</script>",
    "Ġ Ċ âĢĻ", "\ufffd\uffff", "0001,000.00e-10", "_" * 100, "a" * 1000, "哈" * 500,
    "def f(x):\n\treturn x  # 注释\n",
)  # fmt: skip


class Score(NamedTuple):
    """What a tokenizer made of some text."""

    documents: int
    bytes: int
    characters: int
    tokens: int
    single_bytes: int
    exact: int


def measure(tokenizer: Any, texts: Iterable[str], used: Counter | None = None) -> Score:
    """Encode and decode texts.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        used: counts the ids, where it is given.
    """
    texts, used = list(texts), Counter() if used is None else used
    own, exact = Counter(), 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        rows = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
        for text, ids in zip(batch, rows, strict=True):
            own.update(ids)
            # The default of some tokenizers tidies up spaces, which is not what was encoded.
            exact += tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    used.update(own)
    entries = tokenizer.convert_ids_to_tokens(list(own))
    parts = {i for i, entry in zip(own, entries, strict=True) if is_bare_byte(entry)}
    return Score(
        documents=len(texts),
        bytes=sum(len(text.encode()) for text in texts),
        characters=sum(map(len, texts)),
        tokens=own.total(),
        single_bytes=sum(own[i] for i in parts),
        exact=exact,
    )


def evaluate_tokenizer(tokenizer: Any, documents: dict[str, list[str]]) -> dict[str, dict]:
    """Measure a tokenizer on held-out documents.

    Args:
        tokenizer: a `PreTrainedTokenizerFast`.
        documents: language -> texts.

    Returns:
        {metric: {"value", "n", "unit"}}: `bytes_per_token/<language>` (UTF-8) and
        `characters_per_token/<language>`, `single_byte_tokens` (share of tokens that are one byte
        of a longer character), `round_trip` (share of documents that decode to exactly their
        text), `round_trip/hostile` (of `HOSTILE`), `unused_ids`.
    """
    metrics, used = {}, Counter()
    scores = {name: measure(tokenizer, texts, used) for name, texts in sorted(documents.items())}
    for name, score in scores.items():
        for unit in ("bytes", "characters"):
            value = round(getattr(score, unit) / max(score.tokens, 1), 4)
            metrics[f"{unit}_per_token/{name}"] = _metric(value, score.tokens, f"{unit}/token")
    tokens, total = used.total(), sum(score.documents for score in scores.values())
    alone = sum(score.single_bytes for score in scores.values())
    metrics["single_byte_tokens"] = _metric(round(alone / max(tokens, 1), 4), tokens, "share")
    exact = sum(score.exact for score in scores.values())
    metrics["round_trip"] = _metric(exact / max(total, 1), total, "share")
    hostile = measure(tokenizer, HOSTILE)
    metrics["round_trip/hostile"] = _metric(hostile.exact / len(HOSTILE), len(HOSTILE), "share")
    unused = len(tokenizer) - len(used)
    metrics["unused_ids"] = _metric(unused / len(tokenizer), len(tokenizer), "share")
    return metrics


def _metric(value: float, n: int, unit: str) -> dict[str, Any]:
    return {"value": value, "n": n, "unit": unit}


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


def load_tokenizer(directory: str) -> Any:
    """A tokenizer that AutoTokenizer loads, or of GPT-2's two files under any of their names.

    Raises:
        FileNotFoundError: a directory without a tokenizer.
    """
    from transformers import AutoTokenizer, GPT2Tokenizer

    path = Path(directory)
    if not path.is_dir() or (path / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(directory)
    found = [next((path / n for n in names if (path / n).is_file()), None) for names in GPT2_FILES]
    if None in found:
        names = " and ".join(" or ".join(names) for names in GPT2_FILES)
        raise FileNotFoundError(f"{directory} holds no tokenizer: tokenizer.json, or {names}")
    return GPT2Tokenizer.from_pretrained(
        directory, vocab_file=str(found[0]), merges_file=str(found[1])
    )


def compare(tokenizers: dict[str, Any], files: list[str]) -> str:
    """A table: each file's languages in rows, the tokenizers in columns."""
    width = max(12, *(len(name) + 2 for name in tokenizers))
    used = {name: Counter() for name in tokenizers}
    everything = dict.fromkeys(tokenizers, Score(0, 0, 0, 0, 0, 0))
    lines = [_row("", tokenizers, width)]
    for path in list_files(files):
        for language, texts in sorted(group_by_language(read_documents(str(path))).items()):
            scores = {name: measure(t, texts, used[name]) for name, t in tokenizers.items()}
            for name, score in scores.items():
                total = zip(everything[name], score, strict=True)
                everything[name] = Score(*(a + b for a, b in total))
            lines += _rows(f"{path.name} {language}", scores, width)
    lines += _rows("all", everything, width)
    hostile = {name: measure(one, HOSTILE).exact for name, one in tokenizers.items()}
    shown = [f"{count}/{len(HOSTILE)}" for count in hostile.values()]
    lines.append(_row("hostile strings, round trip", shown, width))
    shown = [f"{len(one) - len(used[name]):,}" for name, one in tokenizers.items()]
    lines.append(_row("ids not used here", shown, width))
    lines.append(_row("of entries", [f"{len(one):,}" for one in tokenizers.values()], width))
    for name, one in tokenizers.items():
        lines.append(f"\nlongest entries of {name}: " + " ".join(longest_entries(one)))
    return "\n".join(lines)


def _rows(title: str, scores: dict[str, Score], width: int) -> list[str]:
    first, *others = scores.values()
    tokens = [f"{first.tokens:,}"]
    tokens += [f"{s.tokens:,} x{s.tokens / max(first.tokens, 1):.2f}" for s in others]
    numbers = {
        f"{title}: tokens": tokens,
        "  bytes a token": [f"{s.bytes / max(s.tokens, 1):.3f}" for s in scores.values()],
        "  characters a token": [f"{s.characters / max(s.tokens, 1):.3f}" for s in scores.values()],
        "  single bytes of characters": [
            f"{s.single_bytes / max(s.tokens, 1):.1%}" for s in scores.values()
        ],
        "  exact round trip": [f"{s.exact:,}/{s.documents:,}" for s in scores.values()],
    }  # fmt: skip
    return [_row(name, values, width) for name, values in numbers.items()]


def _row(title: str, cells: Iterable[str], width: int) -> str:
    return f"{title:38}" + "".join(f"{cell:>{width}}" for cell in cells)


def main(args: argparse.Namespace) -> None:
    """Print the measurements as a table, and write the vocabulary where it is asked for."""
    list_files(args.files)
    names = [args.directory, *args.against]
    for name in names:
        stages.require_input(name)
    short = [Path(name).name if len({Path(n).name for n in names}) == len(names) else name
             for name in names]  # fmt: skip
    tokenizers = {label: load_tokenizer(n) for label, n in zip(short, names, strict=True)}
    print(compare(tokenizers, args.files))
    if args.vocabulary:
        first = next(iter(tokenizers.values()))
        used: Counter = Counter()
        measure(first, read_documents(args.files), used)
        write_vocabulary(first, used, args.vocabulary)
        print(f"\n{len(first):,} entries -> {args.vocabulary}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a directory with a tokenizer")
    parser.add_argument("--files", nargs="+", required=True, help="held-out text")
    parser.add_argument("--against", nargs="+", default=[], help="tokenizers to set beside it")
    parser.add_argument("--vocabulary", metavar="TSV", help="write the entries as readable text")
    with stages.plain_errors():
        main(parser.parse_args())

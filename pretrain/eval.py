"""Held-out numbers of a language model, and the intervals that every stage reports.

python -m pretrain.eval output/tiny/pretrain --files data/generated/pretrain_validation.jsonl

Texts are streamed: neither a whole file nor the logits of a whole batch are ever in memory.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import stages
from tokenizer.eval import detect_language

Z = 1.96  # 95 % of a normal distribution lies within so many standard errors
LONGEST_WINDOW = 4096  # tokens; a model that could read more is not asked to
CUT = 2**16  # characters of a document that are tokenized at once
PIECE = 1000  # characters: the unit of intervals, and of what two runs are compared by
TOKENS_AT_ONCE = 2**13  # of a forward pass, with padding
TOKENS_SORTED = 2**16  # windows of so many tokens are batched by length
LOGITS_AT_ONCE = 2**24  # 64 MB in fp32


def mean_with_interval(values: Sequence[float], unit: str) -> dict[str, Any]:
    """The mean of independent values and its 95 % interval (normal approximation)."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else math.nan
    margin = Z * spread / math.sqrt(n) if n else math.nan
    return make_metric(mean, mean - margin, mean + margin, n, unit)


def share_with_interval(hits: Iterable[bool]) -> dict[str, Any]:
    """The share of true values and its 95 % interval (Wilson 1927: right near 0 and 1 as well)."""
    hits = [bool(hit) for hit in hits]
    n = len(hits)
    if not n:
        return make_metric(math.nan, math.nan, math.nan, 0, "share")
    share = sum(hits) / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    margin = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return make_metric(share, middle - margin, middle + margin, n, "share")


def ratio_with_interval(
    tops: Sequence[float], bottoms: Sequence[float], unit: str
) -> dict[str, Any]:
    """sum(tops) / sum(bottoms) of independent pairs, with the 95 % interval of such a ratio."""
    n, ratio = len(tops), sum(tops) / sum(bottoms)
    residuals = sum((top - ratio * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    margin = Z * math.sqrt(residuals * n / (n - 1)) / sum(bottoms) if n > 1 else math.nan
    return make_metric(ratio, ratio - margin, ratio + margin, n, unit)


def make_metric(value: float, low: float, high: float, n: int, unit: str) -> dict[str, Any]:
    """An entry of eval.json; what is not a number is None."""
    # A numpy number of 32 bits is no float, and JSON has no other way to write it than a string.
    rounded = (round(float(x), 6) if math.isfinite(x) else None for x in (value, low, high))
    return dict(zip(("value", "low", "high"), rounded, strict=True)) | {"n": n, "unit": unit}


def print_metrics(metrics: dict[str, dict]) -> None:
    """A line a metric; a dash for what is not known."""
    for name, m in metrics.items():
        value, low, high = (
            "-" if m.get(part) is None else f"{m[part]:.4f}" for part in ("value", "low", "high")
        )
        print(f"{name:28} {value} [{low}, {high}] {m['unit']} n={m.get('n', '-')}")


def save_metrics(directory: str | Path, metrics: dict[str, dict]) -> None:
    """Add metrics to a directory's eval.json; one of the same name is replaced, others stay."""
    path = Path(directory, "eval.json")
    stages.write_json(path, (stages.read_json(path) or {}) | metrics)


@dataclass
class Piece:
    """`PIECE` characters of a document, and what a model needed for the tokens that begin there."""

    size: int  # UTF-8 bytes
    nats: float = 0.0
    tokens: int = 0


@dataclass
class ScoredDocument:
    """A document in pieces, which no tokenizer and no context decides on."""

    text: str  # its beginning
    sha256: str
    lang: str
    pieces: list[Piece]

    @classmethod
    def from_text(cls, text: str) -> "ScoredDocument":
        """Not read yet."""
        digest, lang = hashlib.sha256(text.encode()).hexdigest(), detect_language(text[:10_000])
        parts = (text[i : i + PIECE] for i in range(0, len(text), PIECE))
        return cls(text[:80], digest, lang, [Piece(len(part.encode())) for part in parts])

    def to_row(self) -> dict[str, Any]:
        """A line of texts.jsonl, which `scripts/compare.py` pairs with another run's."""
        nats, tokens, size = (sum(getattr(p, key) for p in self.pieces) for key in
                              ("nats", "tokens", "size"))  # fmt: skip
        row = {"text": self.text, "sha256": self.sha256, "lang": self.lang,
               "nats": round(nats, 4), "tokens": tokens, "bytes": size}  # fmt: skip
        pieces = [[round(piece.nats, 4), piece.size] for piece in self.pieces]
        return row | ({"pieces": pieces} if len(pieces) > 1 else {})


class Window(NamedTuple):
    """Ids to read together; the last ones are predicted, as many as there are `pieces`."""

    ids: list[int]
    pieces: list[Piece]  # of each predicted id


@torch.no_grad()
def score_documents(model: Any, tokenizer: Any, documents: Iterable[str]) -> list[ScoredDocument]:
    """The negative log-likelihood of each document, read behind <bos> where there is one.

    A document that is longer than the context is read through a window that slides by half of it:
    each token is predicted from at least half a context, but for those at the beginning.

    Args:
        model: a causal language model, in the dtype it is to be measured in.
        documents: texts; an iterator is read as it is used.

    Raises:
        ValueError: there is no text.
    """
    context = getattr(model.config, "max_position_embeddings", None) or 1024
    context = min(context, LONGEST_WINDOW)
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    was_training = model.training
    model.eval()
    head = find_plain_head(model, first)
    scored = []
    for batch in batch_windows(slide(tokenizer, documents, first, context, scored), head):
        for window, nats in zip(batch, _measure_nats(model, head, batch), strict=True):
            for piece, value in zip(window.pieces, nats, strict=True):
                piece.nats += value
                piece.tokens += 1
    model.train(was_training)
    if not scored:
        raise ValueError("there is no text to measure: the files hold no document")
    return scored


def slide(
    tokenizer: Any, documents: Iterable[str], first: int, context: int, scored: list
) -> Iterator[Window]:
    """The windows of all documents, in their order; each document is appended to `scored`."""
    stride = max(context // 2, 1)
    for text in documents:
        if not text:
            continue
        document = ScoredDocument.from_text(text)
        scored.append(document)
        ids, new = [first], []  # `new`: the pieces of the last ids, those not yet in a window
        room = context - 1  # of the first window, whose first id is given
        start = 0
        for cut in cut_text(text):
            more, offsets = tokenize_with_offsets(tokenizer, cut)
            ids += more
            new += [document.pieces[(start + offset) // PIECE] for offset in offsets]
            start += len(cut)
            while len(new) > room:
                end = len(ids) - len(new) + room
                kept = max(end - context, 0)
                yield Window(ids[kept:end], new[:room])
                ids, new, room = ids[kept:], new[room:], stride
        if new:
            yield Window(ids[-context:], new)


def tokenize_with_offsets(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """The ids of plain text, and the character that each begins at (without a fast tokenizer: as
    if all were equally long)."""
    options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, **options)
        return encoded["input_ids"], [begin for begin, _ in encoded["offset_mapping"]]
    ids = tokenizer(text, **options)["input_ids"]
    return ids, [i * len(text) // len(ids) for i in range(len(ids))]


def cut_text(text: str) -> Iterator[str]:
    """Parts of at most `CUT` characters, cut before a space or a newline where one is near."""
    start = 0
    while len(text) - start > CUT:
        cuts = (text.rfind(mark, start + CUT // 2, start + CUT) for mark in ("\n", " "))
        end = next((cut for cut in cuts if cut > 0), start + CUT)
        yield text[start:end]
        start = end
    yield text[start:]


def batch_windows(windows: Iterable[Window], head: Any) -> Iterator[list[Window]]:
    """Windows of like length together, at most `TOKENS_AT_ONCE` with padding; without a plain
    head one at a time."""
    limit = TOKENS_AT_ONCE if head is not None else 1
    pool, tokens = [], 0
    for window in windows:
        pool.append(window)
        tokens += len(window.ids)
        if tokens >= TOKENS_SORTED:
            yield from _fill_batches(pool, limit)
            pool, tokens = [], 0
    yield from _fill_batches(pool, limit)


def _fill_batches(pool: list[Window], limit: int) -> Iterator[list[Window]]:
    batch = []
    for window in sorted(pool, key=lambda one: len(one.ids)):
        if batch and (len(batch) + 1) * len(window.ids) > limit:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def find_plain_head(model: Any, token: int) -> Any:
    """The output head, where the logits are this head of the hidden states and nothing else.

    Returns:
        The module (its input (N, C), its output (N, V)), or None where the model caps or scales its
        logits behind the head, as Gemma 2 does: then they have to come from its own `forward`.
    """
    head = model.get_output_embeddings()
    probe = torch.full((1, 2), token, device=model.device)
    inputs = {"input_ids": probe, "attention_mask": torch.ones_like(probe), "use_cache": False}
    expected = model(**inputs).logits
    hidden = model.base_model(**inputs)[0]
    if head is None or hidden.shape[-1] != getattr(head, "weight", expected.mT).shape[-1]:
        return None
    return head if torch.allclose(head(hidden), expected, rtol=1e-3, atol=1e-3) else None


def _measure_nats(model: Any, head: Any, batch: list[Window]) -> list[list[float]]:
    """Negative log-likelihood of each predicted id of each window; logits in chunks."""
    width = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask, is_scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for i, window in enumerate(batch):
        ids[i, : len(window.ids)] = torch.tensor(window.ids)
        mask[i, : len(window.ids)] = 1
        is_scored[i, len(window.ids) - len(window.pieces) : len(window.ids)] = True
    ids, mask, is_scored = (tensor.to(model.device) for tensor in (ids, mask, is_scored))
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    states = model(**inputs).logits if head is None else model.base_model(**inputs)[0]
    states = states[:, :-1][is_scored[:, 1:]]  # (N, C), or (N, V) without a head
    targets = ids[:, 1:][is_scored[:, 1:]]
    rows = max(1, LOGITS_AT_ONCE // model.config.get_text_config().vocab_size)
    nats = []
    for part, target in zip(states.split(rows), targets.split(rows), strict=True):
        logits = (part if head is None else head(part)).float()
        nats.append(torch.nn.functional.cross_entropy(logits, target, reduction="none"))
    parts = torch.cat(nats).split([len(window.pieces) for window in batch])
    return [part.tolist() for part in parts]


def summarize(documents: Sequence[ScoredDocument]) -> dict[str, dict]:
    """Bits per byte over all documents and by language, and perplexity a token.

    Bits per byte compare models of any tokenizer; perplexity only those of the same. The interval
    takes documents, and the pieces of long ones, as independent.
    """
    pieces = {"": [piece for document in documents for piece in document.pieces]}
    languages = sorted({document.lang for document in documents})
    for lang in languages if len(languages) > 1 else []:
        pieces[f"/{lang}"] = [piece for document in documents if document.lang == lang
                              for piece in document.pieces]  # fmt: skip
    metrics = {}
    for ending, chosen in pieces.items():
        bits = [piece.nats / math.log(2) for piece in chosen]
        sizes = [piece.size for piece in chosen]
        metrics[f"bits_per_byte{ending}"] = ratio_with_interval(bits, sizes, "bits/byte")
    nats, tokens = ([getattr(piece, key) for piece in pieces[""]] for key in ("nats", "tokens"))
    a_token = ratio_with_interval(nats, tokens, "nats/token")
    bounds = [math.nan if a_token[part] is None else _exp(a_token[part])
              for part in ("value", "low", "high")]  # fmt: skip
    metrics["perplexity"] = make_metric(*bounds, a_token["n"], "per token")
    return metrics


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def bits_per_byte(model: Any, tokenizer: Any, documents: Iterable[str]) -> dict[str, Any]:
    """Bits a model needs for each UTF-8 byte of unseen text: comparable across tokenizers."""
    return summarize(score_documents(model, tokenizer, documents))["bits_per_byte"]


def evaluate_language_model(
    model: Any, tokenizer: Any, documents: Iterable[str], directory: str | None = None
) -> dict[str, dict]:
    """Bits per byte and perplexity; with a directory, each document's numbers in its texts.jsonl.

    Args:
        documents: held-out texts; an iterator is read as it is used.
        directory: where texts.jsonl goes: what two runs are compared by.
    """
    scored = score_documents(model, tokenizer, documents)
    if directory is not None:
        lines = [json.dumps(one.to_row(), ensure_ascii=False) + "\n" for one in scored]
        Path(directory, "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    return summarize(scored)


def main(directory: str, files: list[str]) -> None:
    """Print the measurements of one directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tokenizer.corpus import read_documents

    stages.require_input(directory, "config.json")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    print_metrics(evaluate_language_model(model, tokenizer, read_documents(files)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a directory or a Hub name of a causal language model")
    parser.add_argument("--files", nargs="+", required=True, help="held-out text")
    arguments = parser.parse_args()
    with stages.plain_errors():
        main(arguments.directory, arguments.files)

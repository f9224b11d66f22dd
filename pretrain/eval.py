"""Held-out numbers of a language model, and the intervals that every stage reports.

python -m pretrain.eval output/tiny/pretrain --files data/generated/pretrain_validation.jsonl
"""

import argparse
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tokenizer.eval import detect_language

Z = 1.96  # 95 % of a normal distribution lies within so many standard errors


def mean_with_interval(values: Sequence[float], unit: str) -> dict[str, Any]:
    """The mean of independent values and its 95 % interval (normal approximation)."""
    n = len(values)
    mean = sum(values) / n if n else math.nan
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else math.nan
    margin = Z * spread / math.sqrt(n) if n else math.nan
    return _metric(mean, mean - margin, mean + margin, n, unit)


def share_with_interval(hits: Iterable[bool]) -> dict[str, Any]:
    """The share of true values and its 95 % interval (Wilson 1927: right near 0 and 1 as well)."""
    hits = [bool(hit) for hit in hits]
    n = len(hits)
    if not n:
        return _metric(math.nan, math.nan, math.nan, 0, "share")
    share = sum(hits) / n
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    margin = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return _metric(share, middle - margin, middle + margin, n, "share")


def _metric(value: float, low: float, high: float, n: int, unit: str) -> dict[str, Any]:
    rounded = (None if math.isnan(x) else round(x, 6) for x in (value, low, high))
    return dict(zip(("value", "low", "high"), rounded, strict=True)) | {"n": n, "unit": unit}


@torch.no_grad()
def bits_per_byte(
    model: Any, tokenizer: Any, documents: Sequence[str], batch_size: int = 16
) -> dict[str, Any]:
    """Bits a model needs for each UTF-8 byte of unseen text: comparable across tokenizers.

    Long documents are cut into windows of the model's context, each read from its beginning.

    Args:
        documents: texts; each is read behind <bos> where the tokenizer has one.
        batch_size: windows in a forward pass.

    Returns:
        {"value", "low", "high", "n" (windows), "unit"}; the interval is that of a ratio of sums.
    """
    context = getattr(model.config, "max_position_embeddings", 1024)
    windows = _cut_windows(tokenizer, documents, context)
    windows.sort(key=lambda window: len(window[0]))  # little padding
    nats, sizes = [], []
    was_training = model.training
    model.eval()
    for start in range(0, len(windows), batch_size):
        batch = windows[start : start + batch_size]
        nats += _sum_nats([ids for ids, _ in batch], model)
        sizes += [size for _, size in batch]
    model.train(was_training)
    bits = [value / math.log(2) for value in nats]
    n, ratio = len(bits), sum(bits) / sum(sizes)
    residuals = sum((b - ratio * s) ** 2 for b, s in zip(bits, sizes, strict=True))
    margin = Z * math.sqrt(residuals * n / max(n - 1, 1)) / sum(sizes)
    return _metric(ratio, ratio - margin, ratio + margin, n, "bits/byte")


def _cut_windows(tokenizer: Any, documents: Sequence[str], context: int) -> list[tuple]:
    """(ids, bytes they stand for) of each window; a window's first id is not predicted."""
    windows = []
    first = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        size = len(text.encode())
        for start in range(0, len(ids), context - 1):
            part = ids[start : start + context - 1]
            windows.append((first + part, size * len(part) / len(ids)))
    if not windows:
        raise ValueError("there is no text to measure bits per byte on")
    return windows


def _sum_nats(rows: list[list[int]], model: Any) -> list[float]:
    """Summed negative log-likelihood of each row behind its first id, in nats."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses * mask[:, 1:]).sum(dim=1).tolist()


def evaluate_language_model(model: Any, tokenizer: Any, documents: Sequence[str]) -> dict:
    """Bits per byte over all documents, and by language."""
    metrics = {"bits_per_byte": bits_per_byte(model, tokenizer, documents)}
    for language in ("en", "zh"):
        texts = [text for text in documents if detect_language(text) == language]
        if 0 < len(texts) < len(documents):
            metrics[f"bits_per_byte/{language}"] = bits_per_byte(model, tokenizer, texts)
    return metrics


def main(directory: str, files: list[str]) -> None:
    """Print the measurements of one directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tokenizer.corpus import read_documents

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for name, m in evaluate_language_model(model, tokenizer, list(read_documents(files))).items():
        print(
            f"{name:20} {m['value']:.4f} [{m['low']:.4f}, {m['high']:.4f}] {m['unit']} n={m['n']}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="a directory or a Hub name of a causal language model")
    parser.add_argument("--files", nargs="+", required=True, help="held-out text")
    arguments = parser.parse_args()
    main(arguments.directory, arguments.files)

"""Say which label a text has, by a classifier of sft.train_classifier.

    python -m sft.classify output/tiny/classifier --text "Thank you for the new lamps!"
    python -m sft.classify output/tiny/classifier --file letters.txt

Prints one line a text: the label, its probability, the text. A file has a text a line. The same
without this program: transformers.pipeline("text-classification", model="output/tiny/classifier").
"""

import argparse
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import stages
from tokenizer.corpus import read_documents

BATCH = 64


def main(args: argparse.Namespace) -> None:
    """Print the label of each text."""
    stages.require_input(args.directory, "config.json", "tokenizer.json")
    texts = [*args.text]
    if args.file:
        texts += read_documents(args.file, txt_documents="line")
    if not texts:
        raise ValueError('nothing to classify: give --text "..." or --file lines.txt')
    model, tokenizer = load_classifier(args.directory)
    for text, shares in zip(texts, classify(model, tokenizer, texts), strict=True):
        probability, best = max((share, number) for number, share in enumerate(shares))
        print(f"{model.config.id2label[best]}\t{probability:.3f}\t{text}")


def load_classifier(directory: str) -> tuple[Any, Any]:
    """The model and the tokenizer of a directory. Raises ValueError for another kind of model."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    if loaded["missing_keys"]:
        raise ValueError(
            f"{directory} holds no classifier ({', '.join(sorted(loaded['missing_keys']))} is "
            "missing). Make one with: python -m sft.train_classifier"
        )
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


@torch.no_grad()
def classify(model: Any, tokenizer: Any, texts: list[str]) -> list[list[float]]:
    """The probability of each label, for each text: (texts, labels).

    Texts longer than the tokenizer's `model_max_length` are read up to it, as in training.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
    shares: list[list[float]] = [[]] * len(texts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = tokenizer(
            [texts[i] for i in chosen],
            truncation=True,
            padding=True,
            split_special_tokens=True,  # a control token's characters are text, as in training
            return_tensors="pt",
        )
        logits = model(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
        ).logits
        for i, row in zip(chosen, logits.float().softmax(dim=-1).tolist(), strict=True):
            shares[i] = row
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", help="output of sft.train_classifier")
    parser.add_argument("--text", action="append", default=[], help="may be given several times")
    parser.add_argument("--file", help="a text a line")
    with stages.plain_errors():
        main(parser.parse_args())

"""Train a byte-level BPE tokenizer on raw text.

Reads   text, JSON, CSV or parquet files (`data_files`)
Writes  a directory that AutoTokenizer loads, with the chat template; eval.json; run.json

    python -m tokenizer.train --config configs/tiny/tokenizer.yaml
    python -m tokenizer.train --data_files my.txt --output_dir output/my/tokenizer --vocab_size 8192
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import stages
from tokenizer.corpus import BadRows, read_documents
from tokenizer.eval import evaluate_tokenizer, group_by_language
from tokenizer.mixture import check_budget, interleave, open_sources, parse_shares, take
from tokenizer.pieces import Pieces
from tokenizer.special_tokens import BOS, EOS, PAD, SPECIAL_TOKENS, UNK

SEED = 42  # order of a mixture's documents


@dataclass
class TokenizerArguments:
    """What the tokenizer is trained on, and how large it becomes."""

    data_files: list[str] = field(
        default_factory=list, metadata={"help": "training text; name@share, ... for a mixture"}
    )
    validation_files: list[str] = field(default_factory=list, metadata={"help": "held-out text"})
    output_dir: str = "output/my/tokenizer"
    vocab_size: int = field(default=4096, metadata={"help": "entries, special tokens included"})
    max_bytes: int | None = field(
        default=None, metadata={"help": "text taken from a mixture, UTF-8; None reads all"}
    )
    max_token_length: int = field(default=16, metadata={"help": "longest entry, in UTF-8 bytes"})
    model_max_length: int = field(default=1024, metadata={"help": "context of the model, tokens"})
    encoding: str | None = field(
        default=None, metadata={"help": "of text that is not UTF-8: its name, or auto"}
    )
    text_field: str = field(
        default="text", metadata={"help": "where rows have the text; text: or content, paragraphs"}
    )
    on_bad_row: str = field(
        default="raise", metadata={"help": "raise, or skip: count rows that cannot be read"}
    )


def main(args: TokenizerArguments) -> None:
    """Train, save, evaluate and record a tokenizer."""
    if not args.data_files:
        raise ValueError("data_files is empty: name the training text, e.g. --data_files my.txt")
    check_budget(args.data_files, args.max_bytes, "max_bytes")
    data_files = [*parse_shares(args.data_files), *args.validation_files]
    run = stages.start_run("tokenizer", args.output_dir, [args], data_files=data_files)
    bad_rows = BadRows(args.on_bad_row)
    documents, held_out = read_text(args, bad_rows)
    documents = require_documents(documents)
    if run.scratch is not None:
        run.end_dry_run(**count_text(documents, held_out))
    pieces = Pieces(show_progress(documents))
    bpe = train_bpe(pieces, args.vocab_size, args.max_token_length)
    print(describe(pieces))
    bad_rows.report("tokenizer", args.output_dir)
    tokenizer = wrap(bpe, args.model_max_length)
    tokenizer.save_pretrained(args.output_dir)
    is_held_out = bool(args.validation_files or args.max_bytes)
    counts = {"documents": pieces.documents, "bytes": pieces.size, "halved_runs": pieces.halved}
    counts["bad_rows"] = bad_rows.count
    run.finish(evaluate_tokenizer(tokenizer, held_out), held_out=is_held_out, data=counts)


def read_text(
    args: TokenizerArguments, bad_rows: BadRows
) -> tuple[Iterable[str], dict[str, list[str]]]:
    """The training documents, and held-out ones by language.

    Of a mixture `max_bytes` are taken, each source by its share. Without validation_files a
    hundredth more of it, from its beginning, is held out; of other files the training text itself
    is measured.

    Args:
        bad_rows: where those of what is trained on are counted.
    """
    options = {"text_field": args.text_field, "encoding": args.encoding}
    read = partial(read_documents, **options, bad_rows=bad_rows)
    measure = partial(read, bad_rows=BadRows(args.on_bad_row))  # no row is counted twice
    if args.max_bytes is None:
        return read(args.data_files), group_by_language(
            measure(args.validation_files or args.data_files)
        )
    shares = parse_shares(args.data_files)
    mixed = interleave(open_sources(shares, SEED, read), shares, _count_bytes)
    if args.validation_files:
        held_out = group_by_language(measure(args.validation_files))
    else:
        held_out = group_by_language(take(mixed, args.max_bytes / 100, _count_bytes))
    return take(mixed, args.max_bytes, _count_bytes), held_out


def count_text(documents: Iterable[str], held_out: dict[str, list[str]]) -> dict[str, str]:
    """How much text there is, for a dry run: everything is read, nothing is trained."""
    sizes = [_count_bytes(text) for text in documents]
    shares = {lang: sum(map(_count_bytes, texts)) for lang, texts in sorted(held_out.items())}
    languages = ", ".join(f"{lang} {size / 1e6:.2f} MB" for lang, size in shares.items())
    return {
        "training_text": f"{sum(sizes) / 1e6:.2f} MB in {len(sizes):,} documents",
        "held_out_text": languages,
    }


def show_progress(documents: Iterable[str]) -> Iterator[str]:
    """Pass the documents on, with a bar of the bytes read where somebody looks."""
    with tqdm(desc="tokenizer", unit="B", unit_scale=True, disable=None) as bar:
        for text in documents:
            yield text
            bar.update(_count_bytes(text))


def require_documents(documents: Iterable[str]) -> Iterator[str]:
    """Pass the documents on; raises ValueError where there is none."""
    text = None
    for text in documents:
        yield text
    if text is None:
        raise ValueError(
            "data_files has no document: all rows are without text. Name the field that holds it, "
            "e.g. --text_field content, or give other files"
        )


def describe(pieces: Pieces) -> str:
    """What was counted, as a line for a person."""
    halved = f", {pieces.halved:,} rare ones in pieces" if pieces.halved else ""
    return (
        f"tokenizer: {pieces.size / 1e6:.1f} MB in {pieces.documents:,} documents, "
        f"{pieces.distinct:,} different runs of letters{halved}"
    )


def _count_bytes(text: str) -> int:
    return len(text.encode())


def train_bpe(documents: Iterable[str], vocab_size: int, max_token_length: int) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2).

    Every byte is in the vocabulary, so any text survives the round trip. Digits stand one by one:
    a number's digits then mean the same wherever they stand, and arithmetic can be learned.

    Raises:
        ValueError: `vocab_size` has no room for the 256 bytes and the special tokens.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} is too small: {smallest} is the least")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_token_length,
        show_progress=stages.is_main_process(),
    )
    bpe.train_from_iterator(documents, trainer)
    return bpe


def wrap(bpe: Tokenizer, model_max_length: int):
    """Wrap trained BPE as a `PreTrainedTokenizerFast` with the chat template."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=list(SPECIAL_TOKENS[4:]),
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    template = Path(__file__).with_name("chat_template.jinja")
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(SPECIAL_TOKENS))), ids
    return tokenizer


if __name__ == "__main__":
    with stages.plain_errors():
        main(*stages.parse_args([TokenizerArguments]))

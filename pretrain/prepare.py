"""Clean and tokenize text, and pack it into blocks of equal length.

Reads   text files or Hub data sets (`data_files`), whole or as a mixture; the tokenizer
Writes  train-*.parquet, validation-*.parquet (column `input_ids`), meta.json, the tokenizer

    python -m pretrain.prepare --config configs/tiny/prepare.yaml
    python -m pretrain.prepare --data_files prose.txt@0.8 code.jsonl@0.2 --max_tokens 1_000_000 \
        --tokenizer output/tiny/tokenizer --output_dir output/my/prepare

Killed, it goes on where it was: what is tokenized stays in `parts/` until all of it is packed.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import stages
from pretrain.cleaning import CleaningArguments, check_cleaning, hash_evaluation
from pretrain.encoding import Encoder, Encoding, encode, name_encoder
from pretrain.packing import Shards
from pretrain.parts import Document, Seen, Source
from tokenizer.corpus import BadRows, Documents, find_cut, is_hub_name, list_files, read_documents
from tokenizer.mixture import check_budget, interleave, parse_shares, take

SPLITS = ("train", "validation")
HELD_OUT = "validation_files"  # their name among the sources
CHARACTERS_PER_PART = 1 << 24  # shuffled, and lost by a kill, together: seconds of two cores' work
FEWEST_CHARACTERS = 1 << 16  # in a part of a mixture with a small budget


@dataclass
class PrepareArguments(CleaningArguments):
    """What is packed, by which tokenizer, how long a block is; and what is left out."""

    data_files: list[str] = field(
        default_factory=list, metadata={"help": "training text; name@share, ... for a mixture"}
    )
    validation_files: list[str] = field(default_factory=list, metadata={"help": "held-out text"})
    validation_share: float = field(
        default=0.1, metadata={"help": "held out of data_files where there are no validation_files"}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "of text that is not UTF-8: its name, or auto"}
    )
    text_field: str = field(
        default="text", metadata={"help": "where rows have the text; text: or content, paragraphs"}
    )
    on_bad_row: str = field(
        default="raise", metadata={"help": "raise, or skip: count rows that cannot be read"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "training tokens taken from a mixture; None reads all"}
    )
    tokenizer: str = "output/my/tokenizer"
    output_dir: str = "output/my/prepare"
    block_size: int = field(default=256, metadata={"help": "tokens a block: the model's context"})
    seed: int = field(default=42, metadata={"help": "order of the documents"})


def main(args: PrepareArguments) -> None:
    """Read, clean, tokenize, mix, pack, record."""
    from transformers import AutoTokenizer  # here: the processes that encode do not need it

    check_arguments(args)
    stages.require_input(args.tokenizer, "tokenizer.json")
    data_files = [*parse_shares(args.data_files), *args.validation_files, *args.evaluation_files]
    run = stages.start_run("prepare", args.output_dir, [args], [args.tokenizer], data_files)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokenizer.save_pretrained(args.output_dir)
    if run.scratch is not None:
        run.end_dry_run(entries=len(tokenizer), first_documents=encode_firsts(args, tokenizer))
    identity = identify(args, run.record["fingerprint"]["data"])
    parts = open_parts(Path(args.output_dir), identity)
    encoding, meta = describe_encoding(args, tokenizer, parts)
    with Encoder() as encoder:
        sources = open_sources(args, encoder, encoding, parts)
        counts = write_blocks(choose_documents(args, sources), args)
    meta |= {"block_size": args.block_size, **identity, **counts}
    if args.max_tokens is not None:
        meta["shares"] = parse_shares(args.data_files)
    meta |= summarize(args, sources)
    stages.write_json(Path(args.output_dir) / "meta.json", meta)
    shutil.rmtree(parts)
    run.finish(
        {
            f"{split}_{name}": {"value": meta[split][name], "unit": name}
            for split in SPLITS
            for name in ("documents", "tokens", "blocks", "dropped_tokens")
        }
    )


def check_arguments(args: PrepareArguments) -> None:
    """Raise ValueError where arguments contradict each other or say nothing."""
    if not args.data_files:
        raise ValueError("data_files is empty: name the training text, e.g. --data_files my.txt")
    check_budget(args.data_files, args.max_tokens, "max_tokens")
    check_cleaning(args)
    BadRows(args.on_bad_row)
    if args.block_size < 2:
        raise ValueError(f"block_size={args.block_size}: a block needs 2 tokens, one to predict")
    if not args.validation_files and not 0 < args.validation_share < 1:
        raise ValueError(f"validation_share={args.validation_share} must lie between 0 and 1")


def identify(args: PrepareArguments, data: dict[str, str | None]) -> dict[str, Any]:
    """What decides the result: hashes of the tokenizer and the sources, settings, versions.

    Of a Hub data set it is the commit that the Hub names, None where it cannot be asked.
    """
    settings = dataclasses.asdict(args)
    del settings["output_dir"]
    installed = stages.installed_versions()
    return {
        "tokenizer": stages.hash_outputs(args.tokenizer),
        "sources": {n: find_commit(n) if is_hub_name(n) else value for n, value in data.items()},
        "settings": settings,
        "versions": {name: installed[name] for name in ("tokenizers", "tiktoken", "datasets")},
    }


def find_commit(name: str) -> str | None:
    """The commit of a data set on the Hub, None where it cannot be asked."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name.split(":")[0], timeout=10).sha
    except Exception:  # offline, or a mirror that only has files; loading it will say more
        return None


def open_parts(directory: Path, identity: dict[str, Any]) -> Path:
    """The folder of the tokenized parts; what other text or settings left there is removed."""
    parts = directory / "parts"
    if stages.read_json(parts / "identity.json") == json.loads(json.dumps(identity)):
        done = len(list(parts.glob("*/*.npz")))
        print(f"prepare: an interrupted run goes on; {done} parts are tokenized")
        return parts
    shutil.rmtree(parts, ignore_errors=True)
    written = [path for split in SPLITS for path in directory.glob(f"{split}-*.parquet")]
    for path in [directory / "meta.json", directory / "bad_rows.txt", *written]:
        path.unlink(missing_ok=True)
    parts.mkdir(parents=True)
    stages.write_json(parts / "identity.json", identity)
    return parts


def encode_firsts(args: PrepareArguments, tokenizer: Any) -> str:
    """The lengths of the first document of each source, read and encoded as all would be."""
    firsts = []
    for names in filter(None, (parse_shares(args.data_files), args.validation_files)):
        found = [text for name in names for text in islice(open_documents(args, name), 1)]
        if not found:
            raise ValueError(f"{list(names)}: no document, all rows are without text")
        firsts += found
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    encoded = encode(firsts, Encoding(f"{args.output_dir}/tokenizer.json", *ends))
    return f"{encoded.lengths.tolist()} tokens"


def open_documents(args: PrepareArguments, files: str | list[str], start: int = 0) -> Documents:
    """The documents of a source behind the row `start`, with their own count of bad rows."""
    return read_documents(
        files, args.text_field, encoding=args.encoding, bad_rows=BadRows(args.on_bad_row),
        start=start,
    )  # fmt: skip


def describe_encoding(
    args: PrepareArguments, tokenizer: Any, parts: Path
) -> tuple[Encoding, dict[str, Any]]:
    """What each process has to know to clean and encode, and what meta.json says of it."""
    cleaning = {f.name: getattr(args, f.name) for f in dataclasses.fields(CleaningArguments)}
    ends = tokenizer.bos_token_id, tokenizer.eos_token_id
    file = f"{args.output_dir}/tokenizer.json"  # saved there; `args.tokenizer` may be a Hub name
    encoding = Encoding(file, *ends, json.dumps(cleaning))
    meta: dict[str, Any] = {"encoder": name_encoder(encoding)}
    if not args.evaluation_files:
        return encoding, meta
    overlap, meta["evaluation_files"] = hash_evaluation(args.evaluation_files)
    np.save(parts / "overlap.npy", overlap)
    return encoding._replace(overlap_file=f"{parts}/overlap.npy"), meta


def open_sources(
    args: PrepareArguments, encoder: Encoder, encoding: Encoding, parts: Path
) -> dict[str, Source]:
    """The sources of a mixture by name, or all files as one, ""; beside it `HELD_OUT`.

    Raises FileNotFoundError and ValueError as `read_documents`.
    """
    seen = Seen(removes_exact=args.exact_duplicates == "remove")

    def open_source(name, files, split, size=CHARACTERS_PER_PART, seed=args.seed):
        read = partial(open_documents, args, files)
        how, own = encoding, seen
        if name == HELD_OUT:  # stays as it is
            how, own = Encoding(*encoding[:3]), Seen(removes_exact=False)
        folder = parts / f"{len(sources):03d}"
        sources[name] = Source(name, folder, read, split, encoder, how, own, size, seed)

    def whole(text: str) -> list[tuple[bool, str]]:
        return [(False, text)]

    sources: dict[str, Source] = {}
    if args.validation_files:
        open_source(HELD_OUT, args.validation_files, lambda text: [(True, text)], seed=None)
    if args.max_tokens is None:
        split = whole if args.validation_files else make_split(args)
        open_source("", args.data_files, split)
        return sources
    for name, share in parse_shares(args.data_files).items():
        # A token has about four characters: some parts of each source, so that little is lost.
        size = min(CHARACTERS_PER_PART, max(FEWEST_CHARACTERS, int(share * args.max_tokens)))
        open_source(name, name, whole, size)
    return sources


def make_split(args: PrepareArguments):
    """How a document is cut into training and held-out text; see `corpus.split_documents`."""
    share = args.validation_share
    characters = estimate_characters(args.data_files)

    def split(text: str) -> list[tuple[bool, str]]:
        cut = find_cut(text, share, characters, args.seed)
        pieces = [(False, text[:cut]), (True, text[cut:])]
        return [(held_out, piece) for held_out, piece in pieces if piece.strip()]

    return split


def estimate_characters(data_files: list[str]) -> float:
    """The characters of all files, roughly: their bytes on disk, three times where compressed."""
    if any(map(is_hub_name, data_files)):
        return float("inf")
    compressed, size = (".gz", ".zst", ".parquet"), 0
    for path in list_files(data_files):
        for file in path.rglob("*") if path.is_dir() else (path,):
            size += file.stat().st_size * (3 if file.suffix.lower() in compressed else 1)
    return size


def choose_documents(args: PrepareArguments, sources: dict[str, Source]) -> Iterator[Document]:
    """All documents, or `max_tokens` of a mixture in its shares; held-out ones first.

    Without validation_files a mixture's beginning is held out: `validation_share` of the budget,
    beside it, in the same shares.
    """
    streams = {name: iter(source) for name, source in sources.items()}
    held_out = streams.pop(HELD_OUT, None)
    if args.max_tokens is None:
        return chain(held_out or (), streams[""])
    mixed = interleave(streams, parse_shares(args.data_files), _count)
    if held_out is None:
        taken = take(mixed, args.validation_share * args.max_tokens, _count)
        held_out = (document._replace(held_out=True) for document in taken)
    # In this order: a mixture is read once, from its beginning.
    return chain(held_out, take(mixed, args.max_tokens, _count))


def _count(document: Document) -> int:
    return len(document.ids)


def write_blocks(documents: Iterable[Document], args: PrepareArguments) -> dict[str, dict]:
    """Pack the documents into the parquet shards of their splits.

    Returns:
        For each split the counts: documents, bytes (UTF-8), tokens, blocks, dropped_tokens (the
        last block's rest); of a mixture also documents, bytes and tokens by source.
    """
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    shards = {split: Shards(Path(args.output_dir), split, args.block_size) for split in SPLITS}
    for document in tqdm(documents, desc="prepare", unit=" documents", disable=None):
        split = SPLITS[document.held_out]
        shards[split].add(document.ids)
        totals = [counts[split]]
        if args.max_tokens is not None and document.source != HELD_OUT:
            by_source = counts[split].setdefault("sources", {})
            empty = {"documents": 0, "bytes": 0, "tokens": 0}
            totals.append(by_source.setdefault(document.source, empty))
        for total in totals:
            total["documents"] += 1
            total["bytes"] += document.size
            total["tokens"] += len(document.ids)
    for split, written in shards.items():
        written.close()
        counts[split] |= {"blocks": written.blocks, "dropped_tokens": written.dropped_tokens}
        if not written.blocks:
            raise ValueError(
                f"the {split} text has {counts[split]['tokens']} tokens, less than one block of "
                f"{args.block_size}: give more text or a smaller --block_size"
            )
    return counts


def summarize(args: PrepareArguments, sources: dict[str, Source]) -> dict[str, Any]:
    """What was left out, by source, for meta.json; also printed, and bad rows written to a file.

    A mixture counts what was read, of which a little more is cleaned than its budget takes.
    """
    summary, bad_rows = {"cleaning": {}}, BadRows("skip")
    for name, source in sources.items():
        report = dataclasses.asdict(source.report)
        bad_rows.messages += report.pop("bad_rows")
        summary["cleaning"][name or "all"] = report
        for step, counts in report["removed"].items():
            example = json.dumps(counts["examples"][0], ensure_ascii=False)
            print(
                f"prepare: {name or 'all'}: {step}: {counts['documents']:,} of {report['read']:,} "
                f"documents removed, such as {example}"
            )
        if report["empty"]:
            print(f"prepare: {name or 'all'}: {report['empty']:,} rows without text left out")
    bad_rows.report("prepare", args.output_dir)
    if bad_rows.messages:
        summary["bad_rows"] = {"rows": len(bad_rows.messages), "first": bad_rows.messages[:10]}
    return summary


if __name__ == "__main__":
    with stages.plain_errors():
        main(*stages.parse_args([PrepareArguments]))

"""See the rows of a stage as its model gets them: tokens, what is trained, ends, borders, lengths.

Reads   a stage's YAML, its data, and the tokenizer of the stage before
Writes  a page without outside parts, output/<recipe>/inspect-<stage>.html

    python scripts/inspect_data.py configs/tiny/sft.yaml
    python scripts/inspect_data.py configs/tiny/dpo.yaml --rows 30 --html pairs.html

The stages' own functions read, check and render the rows; nothing is trained. How they look is in
inspect_page.py.
"""

import argparse
import difflib
import importlib
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from inspect_page import COUNTED, Box, Side, View, format_terminal, render_page

import stages
from pretrain.cleaning import CHINESE, LANGUAGE_CHARACTERS
from tokenizer.eval import detect_language
from tokenizer.vocabulary import readable

ANY_LENGTH = 10**9  # tokens
FEWEST_LETTERS = 20  # that tell a language, the names of the speakers among them
PRETRAINS = ("prepare", "pretrain")
PAIRED = ("reward", "dpo")


class Sequence(NamedTuple):
    """Ids (T,), where the loss looks (T,), and where another document or row begins."""

    ids: list[int]
    trained: list[bool]
    borders: frozenset[int] = frozenset()


def main(args: argparse.Namespace) -> None:
    """Read the rows, print some, write the page."""
    from pretrain.hardware import quiet_logs

    quiet_logs()
    view = look(args.config, args.rows)
    print(format_terminal(view, sys.stdout.isatty()))
    recipe = Path(args.config).parent.name or "my"
    page = Path(args.html or f"output/{recipe}/inspect-{view.stage}.html")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render_page(view), encoding="utf-8")
    print(f"\nthe page: {page}")


def look(config: str, shown: int) -> View:
    """Read a stage's rows.

    Raises:
        ValueError: the YAML's name is no stage, or a row cannot be read.
        FileNotFoundError: the stage before has not run; the message has its command.
    """
    path = Path(config)
    known = stages.STAGES | {"classifier": stages.BRANCHES["classifier"]}
    stage = next((name for name in known if f"{path.stem}_".startswith(f"{name}_")), None)
    if stage is None:
        raise ValueError(f"{config}: name it after its stage, one of {', '.join(known)}")
    module = importlib.import_module(known[stage].module)
    from pretrain.hardware import training_defaults

    classes = [kind for name, kind in module.main.__annotations__.items() if name != "return"]
    defaults = training_defaults() if known[stage].trains else None
    parsed = stages.parse_args(classes, ["--config", config], defaults)
    reader = {"tokenizer": look_at_text, "sft": look_at_chats,
              "classifier": look_at_labels, "ppo": look_at_prompts,
              "grpo": look_at_prompts} | dict.fromkeys(PRETRAINS, look_at_blocks) \
        | dict.fromkeys(PAIRED, look_at_pairs)  # fmt: skip
    view = View(stage, path.as_posix(), None)
    reader[stage](view, shown, *parsed)
    return view


def look_at_text(view: View, shown: int, args: Any) -> None:
    """Documents, as the trained tokenizer cuts them."""
    from tokenizer.corpus import BadRows, read_documents
    from tokenizer.mixture import parse_shares

    tokenizer = load_tokenizer(args.output_dir, "tokenizer.json")
    bad = BadRows(args.on_bad_row)
    files = [*parse_shares(args.data_files)]
    read = read_documents(files, args.text_field, encoding=args.encoding, bad_rows=bad)
    documents = islice(read, COUNTED)
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    view.notes += str(bad).splitlines() if bad.count else []
    view.notes.append("documents of the training text; no loss here, so nothing is coloured")
    add_single(view, shown, tokenizer, [Sequence(ids, [False] * len(ids)) for ids in rows])


def look_at_blocks(view: View, shown: int, args: Any, *_: Any) -> None:
    """Packed blocks with the labels that the trainer makes."""
    from pretrain.data import PackedCollator, load_blocks

    directory = args.output_dir if view.stage == "prepare" else args.data_dir
    tokenizer = load_tokenizer(directory, "train-*.parquet", "tokenizer.json")
    blocks = load_blocks(directory, "train")
    collate = PackedCollator(tokenizer.bos_token_id, tokenizer.eos_token_id)
    view.limit = len(blocks[0]["input_ids"])
    view.notes.append(f"{len(blocks):,} blocks; no token sees another document than its own")
    sequences = []
    for block in blocks.select(range(min(len(blocks), COUNTED))):
        batch = collate([block])
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        trained = (batch["labels"][0] != -100).tolist()
        sequences.append(Sequence(block["input_ids"].tolist(), trained, frozenset(starts)))
    add_single(view, shown, tokenizer, sequences)


def look_at_chats(view: View, shown: int, args: Any, training_args: Any, model_args: Any) -> None:
    """Conversations with the mask of the assistant's tokens, packed where the recipe packs."""
    from sft.data import load_mixture
    from sft.rendering import render

    tokenizer, context = load_chat(model_args, training_args)
    rows, summary = load_mixture(args.data_files, training_args.seed)
    rendered, kept = render(rows[:COUNTED], tokenizer, ANY_LENGTH)
    view.notes += dict.fromkeys([*str(summary).splitlines(), *str(kept).splitlines()])
    view.limit = training_args.max_length or context
    view.beyond = "left out: cut, they would teach no end"
    chats = [Sequence(r["input_ids"], [bool(m) for m in r["assistant_masks"]]) for r in rendered]
    count_rows(view, tokenizer, chats)
    chats = [chat for chat in chats if not view.limit or len(chat.ids) <= view.limit]
    if training_args.packing:
        chats = pack(chats, view.limit, training_args.packing_strategy)
        view.notes.append(f"packed ({training_args.packing_strategy}): {len(chats):,} sequences")
    show_single(view, shown, tokenizer, chats)


def look_at_labels(view: View, shown: int, args: Any, training_args: Any, model_args: Any) -> None:
    """Texts and their labels: the classifier's head reads the last token."""
    from sft.labels import load_splits

    tokenizer = load_tokenizer(model_args.model_name_or_path, "config.json", "tokenizer.json")
    files = {"train": args.data_files, "validation": args.validation_files}
    columns = (args.text_column, args.label_column)
    shares = (args.validation_share, args.test_share)
    splits, summary = load_splits(
        files | {"test": args.test_files}, columns, shares, args.balance, training_args.seed
    )
    rows = splits["train"][:COUNTED]
    ids = [tokenizer(row.text, verbose=False)["input_ids"] for row in rows]
    view.notes += str(summary).splitlines()
    view.limit = args.max_length or find_context(model_args.model_name_or_path)
    view.beyond = "cut at the end"
    count_rows(view, tokenizer, [Sequence(one, [False] * len(one)) for one in ids])
    cut = [Sequence(one[: view.limit], [False] * len(one[: view.limit])) for one in ids[:shown]]
    show_single(view, shown, tokenizer, cut, [f"label {row.label}" for row in rows])
    for _, (side,) in view.rows:
        mark_score(side.boxes)


def pack(chats: list[Sequence], length: int, strategy: str) -> list[Sequence]:
    """Rows packed by TRL, with the borders between them."""
    from datasets import Dataset
    from trl import pack_dataset

    columns = {"input_ids": [c.ids for c in chats], "mask": [[*map(int, c.trained)] for c in chats]}
    packed = []
    for row in pack_dataset(Dataset.from_dict(columns), length, strategy):
        borders, start = set(), 0
        for size in row.get("seq_lengths") or []:
            borders.add(start)
            start += size
        packed.append(Sequence(row["input_ids"], [*map(bool, row["mask"])], frozenset(borders)))
    return packed


def look_at_pairs(view: View, shown: int, args: Any, training_args: Any, model_args: Any) -> None:
    """Chosen against rejected: DPO trains on the answers, a reward model scores the last token."""
    from rlhf.data import load_preferences
    from rlhf.pairs import fit_pairs, tokenize_pairs

    def pair_up(rows: list[dict]) -> list[list[Sequence]]:
        pairs = []
        for prompt, *sides in tokenize_pairs(rows, tokenizer):
            first = len(prompt) if view.stage == "dpo" else ANY_LENGTH  # a reward model: a score
            pairs.append([Sequence(ids, [i >= first for i, _ in enumerate(ids)]) for ids in sides])
        return pairs

    tokenizer, _ = load_chat(model_args, training_args)
    rows, summary = load_preferences(args.data_files)
    view.limit, view.beyond = training_args.max_length, "left out, with the pair"
    rows = fit_pairs(take_first(view, rows, summary), tokenizer, ANY_LENGTH, summary)
    pairs = pair_up(rows)
    count_rows(view, tokenizer, [max(pair, key=lambda one: len(one.ids)) for pair in pairs])
    view.duplicates = len(pairs) - len({tuple(tuple(one.ids) for one in pair) for pair in pairs})
    rows = fit_pairs(rows, tokenizer, view.limit, summary)[:shown]
    view.notes += str(summary).splitlines()
    for row, pair in zip(rows, pair_up(rows), strict=True):
        differs = find_differences(*(one.ids for one in pair))
        sides = []
        for title, one, other in zip(("chosen", "rejected"), pair, differs, strict=True):
            boxes = make_boxes(tokenizer, one, other)
            if view.stage == "reward":
                mark_score(boxes)
            sides.append(Side(title, boxes))
        flaw = f", the rejected one is {row['flaw']}" if row.get("flaw") else ""
        view.rows.append((f"{len(pair[0].ids)} and {len(pair[1].ids)} tokens{flaw}", sides))


def look_at_prompts(view: View, shown: int, args: Any, training_args: Any, model_args: Any) -> None:
    """Prompts as the model is asked them; what it will answer is what it will be trained on."""
    from rlhf.data import fit_prompts, load_prompts
    from rlhf.train_grpo import choose_tasks
    from sft.tasks import load_tasks

    def encode(rows: list[dict]) -> list[Sequence]:
        options = {"add_generation_prompt": True}
        prompts = [tokenizer.apply_chat_template(row["prompt"], **options) for row in rows]
        return [Sequence(one["input_ids"], [False] * len(one["input_ids"])) for one in prompts]

    tokenizer, context = load_chat(model_args, training_args)
    verifies = "verifier" in args.reward_funcs
    rows, summary = (load_tasks if verifies else load_prompts)(args.data_files)
    if verifies and view.stage == "grpo":
        rows = choose_tasks(rows, args.kinds, args.max_level, summary)
    rows = fit_prompts(take_first(view, rows, summary), tokenizer, ANY_LENGTH, summary)
    count_rows(view, tokenizer, encode(rows))
    if context:
        view.limit = context - training_args.max_completion_length
        view.beyond = f"left out: the answer needs {training_args.max_completion_length} tokens"
        rows = fit_prompts(rows, tokenizer, view.limit, summary)
    view.notes += [*str(summary).splitlines(), "prompts only: the model is trained on its answers"]
    told = "right answer {answer!r}, {verifier}, {kind} level {level}" if verifies else ""
    titles = [told.format(**row) for row in rows[:shown]]
    show_single(view, shown, tokenizer, encode(rows[:shown]), titles)


def load_chat(model_args: Any, training_args: Any) -> tuple[Any, int | None]:
    """The tokenizer of a chat stage, and its model's context, None where that has no end."""
    from sft.train import load_chat_tokenizer

    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    template = getattr(training_args, "chat_template_path", None)
    return load_chat_tokenizer(base, template), find_context(base)


def find_context(model: str | Path) -> int | None:
    """Tokens that a model reads at once, None where its config names no end."""
    from transformers import AutoConfig

    return getattr(AutoConfig.from_pretrained(model), "max_position_embeddings", None)


def take_first(view: View, rows: list[dict], summary: Any) -> list[dict]:
    """The first `COUNTED` rows, and a summary as if the others had not been read."""
    if len(rows) > COUNTED:
        view.notes.append(f"the first {COUNTED:,} of {len(rows):,} rows")
        summary.rows_read -= len(rows) - COUNTED
    return rows[:COUNTED]


def load_tokenizer(directory: str, *files: str) -> Any:
    """The tokenizer of a stage's output, which has to be there."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stages.require_input(directory, *files))


def add_single(view: View, shown: int, tokenizer: Any, sequences: list[Sequence]) -> None:
    """Count sequences, and show the first ones."""
    count_rows(view, tokenizer, sequences)
    show_single(view, shown, tokenizer, sequences)


def show_single(view: View, shown: int, tokenizer: Any, sequences, titles=()) -> None:
    """Show the first sequences, one to a row."""
    for number, one in enumerate(sequences[:shown]):
        title = ", ".join(filter(None, [f"{len(one.ids)} tokens", *titles[number : number + 1]]))
        view.rows.append((title, [Side("", make_boxes(tokenizer, one))]))


def count_rows(view: View, tokenizer: Any, sequences: list[Sequence]) -> None:
    """Lengths, trained tokens, ends, duplicates and languages."""
    seen = Counter(tuple(one.ids) for one in sequences)
    ends = find_ends(tokenizer)
    view.duplicates += sum(count - 1 for count in seen.values())
    view.lengths += [len(one.ids) for one in sequences]
    view.tokens, view.trained_tokens = sum(view.lengths), sum(sum(one.trained) for one in sequences)
    view.with_end = sum(not ends.isdisjoint(one.ids) for one in sequences)
    texts = tokenizer.batch_decode([one.ids for one in sequences], skip_special_tokens=True)
    view.languages.update(map(name_language, texts))


def name_language(text: str) -> str:
    """The code of a text's language (py3langid); a few letters tell no more than a script.

    A sum such as "17+25=?" has no language, and "who?" could be one of several: those are
    "unclear", but for Chinese characters.
    """
    import py3langid

    if sum(map(str.isalpha, text)) < FEWEST_LETTERS:
        return "zh" if detect_language(text) == "zh" else "unclear"
    code = py3langid.classify(text[:LANGUAGE_CHARACTERS])[0]
    return "zh" if code in CHINESE else code


def find_ends(tokenizer: Any) -> set[int]:
    """Ids that end a text or a turn."""
    known = {tokenizer.eos_token, "<eos>", "<|im_end|>"} & set(tokenizer.get_vocab())
    return set(tokenizer.convert_tokens_to_ids(sorted(known)))


def find_differences(first: list[int], second: list[int]) -> tuple[set[int], set[int]]:
    """The positions of each that are not in the other, as `difflib` aligns them."""
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    same = [{b[side] + i for b in blocks for i in range(b.size)} for side in (0, 1)]
    return set(range(len(first))) - same[0], set(range(len(second))) - same[1]


def mark_score(boxes: list[Box]) -> None:
    """Mark the last token, which a score is read from."""
    boxes[-1] = boxes[-1]._replace(flags=(*boxes[-1].flags, "score"))


def make_boxes(tokenizer: Any, one: Sequence, differs: set[int] = frozenset()) -> list[Box]:
    """A box a token."""
    ends, special = find_ends(tokenizer), set(tokenizer.all_special_ids)
    entries = tokenizer.convert_ids_to_tokens(one.ids)
    boxes = []
    for position, (token, entry) in enumerate(zip(one.ids, entries, strict=True)):
        flags = {
            "trained": one.trained[position],
            "end": token in ends,
            "special": token in special,
            "border": position in one.borders,
            "differs": position in differs,
        }
        text = entry if token in special else readable(entry)
        boxes.append(Box(text, token, tuple(name for name, on in flags.items() if on)))
    return boxes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a stage's YAML, such as configs/tiny/sft.yaml")
    parser.add_argument("--rows", type=int, default=20, help="rows on the page")
    parser.add_argument("--html", help="where the page goes")
    with stages.plain_errors():
        main(parser.parse_args())

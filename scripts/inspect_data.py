"""See the rows of a stage as its model gets them: tokens, what is trained, ends, borders, lengths.

Reads   a stage's YAML, its data, and the tokenizer of the stage before
Writes  a page without outside parts, output/<recipe>/inspect-<stage>.html

    python scripts/inspect_data.py configs/tiny/sft.yaml
    python scripts/inspect_data.py configs/tiny/dpo.yaml --rows 30 --html pairs.html

The stages' own functions read, check and render the rows; nothing is trained. The page is in
inspect_data.html.jinja; whatever stands in the data is shown as text.
"""

import argparse
import difflib
import importlib
import shutil
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

import stages
from tokenizer.eval import detect_language
from tokenizer.vocabulary import readable

BARS = 32  # of the length histogram
COUNTED = 20_000  # rows that lengths, duplicates and languages are of, at most
PRETRAINS = ("prepare", "pretrain")
PAIRED = ("reward", "dpo")


class Box(NamedTuple):
    """A token: its text, id, and what it is (trained, end, border, differs, score)."""

    text: str
    id: int
    flags: tuple[str, ...]


class Side(NamedTuple):
    """A sequence of a row: a title ("" of a single one) and its tokens."""

    title: str
    boxes: list[Box]


class Sequence(NamedTuple):
    """Ids (T,), where the loss looks (T,), and where another document or row begins."""

    ids: list[int]
    trained: list[bool]
    borders: frozenset[int] = frozenset()


@dataclass
class View:
    """All that the page shows."""

    stage: str
    config: str
    limit: int | None  # tokens; longer rows are cut or left out
    beyond: str = ""  # what becomes of a row that is longer
    notes: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[Side]]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0
    tokens: int = 0
    with_end: int = 0
    duplicates: int = 0
    languages: Counter = field(default_factory=Counter)

    @property
    def too_long(self) -> int:
        """Rows with more tokens than the limit."""
        return sum(length > self.limit for length in self.lengths) if self.limit else 0


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
    names = [name for name in stages.STAGES if f"{path.stem}_".startswith(f"{name}_")]
    stage = names[0] if names else None
    if stage is None:
        raise ValueError(f"{config}: name it after its stage, one of {', '.join(stages.STAGES)}")
    module = importlib.import_module(stages.STAGES[stage].module)
    from pretrain.hardware import training_defaults

    classes = [kind for name, kind in module.main.__annotations__.items() if name != "return"]
    defaults = training_defaults() if stages.STAGES[stage].trains else None
    parsed = stages.parse_args(classes, ["--config", config], defaults)
    reader = {"tokenizer": look_at_text, "sft": look_at_chats, "ppo": look_at_prompts,
              "grpo": look_at_prompts} | dict.fromkeys(PRETRAINS, look_at_blocks) \
        | dict.fromkeys(PAIRED, look_at_pairs)  # fmt: skip
    view = View(stage, path.as_posix(), None)
    reader[stage](view, shown, *parsed)
    return view


def look_at_text(view: View, shown: int, args: Any) -> None:
    """Documents, as the trained tokenizer cuts them."""
    from tokenizer.corpus import read_documents
    from tokenizer.mixture import parse_shares

    tokenizer = load_tokenizer(args.output_dir, "tokenizer.json")
    documents = islice(read_documents([*parse_shares(args.data_files)]), COUNTED)
    rows = [tokenizer(text, verbose=False)["input_ids"] for text in documents]
    view.notes.append("documents of the training text; no loss here, so nothing is coloured")
    add_single(view, shown, tokenizer, (Sequence(ids, [False] * len(ids)) for ids in rows))


def look_at_blocks(view: View, shown: int, args: Any, *_: Any) -> None:
    """Packed blocks with the labels that the trainer makes."""
    from pretrain.data import PackedCollator, load_blocks

    directory = args.output_dir if view.stage == "prepare" else args.data_dir
    tokenizer = load_tokenizer(directory, "train-*.parquet", "tokenizer.json")
    blocks = load_blocks(directory, "train")
    collate = PackedCollator(tokenizer.bos_token_id)
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
    from transformers import AutoConfig

    from sft.data import load_mixture
    from sft.rendering import render
    from sft.train import load_chat_tokenizer

    base = stages.require_input(model_args.model_name_or_path, "tokenizer.json")
    tokenizer = load_chat_tokenizer(base, training_args.chat_template_path)
    rows, summary = load_mixture(args.data_files, training_args.seed)
    rendered, kept = render(rows[:COUNTED], tokenizer, max_length=10**9)
    view.notes += dict.fromkeys([*str(summary).splitlines(), *str(kept).splitlines()])
    context = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", None)
    view.limit = training_args.max_length or context
    view.beyond = "left out: cut, they would teach no end"
    chats = [Sequence(r["input_ids"], [bool(m) for m in r["assistant_masks"]]) for r in rendered]
    if training_args.packing:
        count_rows(view, tokenizer, chats)
        chats = [chat for chat in chats if len(chat.ids) <= view.limit]
        packed = pack(chats, view.limit, training_args.packing_strategy)
        view.notes.append(f"packed ({training_args.packing_strategy}): {len(packed):,} sequences")
        return show_single(view, shown, tokenizer, packed)
    add_single(view, shown, tokenizer, chats)


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
    from sft.train import load_chat_tokenizer

    base = stages.require_input(model_args.model_name_or_path, "tokenizer.json")
    tokenizer = load_chat_tokenizer(base)
    rows, summary = load_preferences(args.data_files)
    view.notes += str(summary).splitlines()
    view.limit, view.beyond = training_args.max_length, "left out, with the pair"
    pairs = []
    for row in rows[:COUNTED]:
        start = len(encode(tokenizer, row["prompt"], True))
        sides = [encode(tokenizer, row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        first = start if view.stage == "dpo" else 10**9  # a reward model learns from a score
        pairs.append([Sequence(ids, [i >= first for i, _ in enumerate(ids)]) for ids in sides])
    count_rows(view, tokenizer, [max(pair, key=lambda one: len(one.ids)) for pair in pairs])
    view.duplicates = len(pairs) - len({tuple(tuple(one.ids) for one in pair) for pair in pairs})
    for row, pair in islice(zip(rows, pairs, strict=False), shown):
        differs = find_differences(*(one.ids for one in pair))
        sides = []
        for title, one, other in zip(("chosen", "rejected"), pair, differs, strict=True):
            boxes = make_boxes(tokenizer, one, other)
            if view.stage == "reward":
                boxes[-1] = boxes[-1]._replace(flags=(*boxes[-1].flags, "score"))
            sides.append(Side(title, boxes))
        flaw = f", the rejected one is {row['flaw']}" if row.get("flaw") else ""
        view.rows.append((f"{len(pair[0].ids)} and {len(pair[1].ids)} tokens{flaw}", sides))


def look_at_prompts(view: View, shown: int, args: Any, training_args: Any, model_args: Any) -> None:
    """Prompts as the model is asked them; what it will answer is what it will be trained on."""
    from transformers import AutoConfig

    from rlhf.data import load_prompts
    from sft.tasks import load_tasks
    from sft.train import load_chat_tokenizer

    base = stages.require_input(model_args.model_name_or_path, "config.json", "tokenizer.json")
    tokenizer = load_chat_tokenizer(base)
    verifies = "verifier" in getattr(args, "reward_funcs", [])
    rows, summary = (load_tasks if verifies else load_prompts)(args.data_files)
    view.notes += [*str(summary).splitlines(), "prompts only: the model is trained on its answers"]
    context = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", None)
    if context:
        view.limit = context - training_args.max_completion_length
        view.beyond = f"left out: the answer needs {training_args.max_completion_length} tokens"
    encoded = [encode(tokenizer, row["prompt"], True) for row in rows[:COUNTED]]
    prompts = [Sequence(ids, [False] * len(ids)) for ids in encoded]
    titles = []
    if verifies:
        told = "right answer {answer!r}, {verifier}, {kind} level {level}"
        titles = [told.format(**row) for row in rows]
    add_single(view, shown, tokenizer, prompts, titles)


def load_tokenizer(directory: str, *files: str) -> Any:
    """The tokenizer of a stage's output, which has to be there."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stages.require_input(directory, *files))


def encode(tokenizer: Any, messages: list[dict], prompt: bool = False) -> list[int]:
    """Ids of a conversation; of a prompt, with the words that ask for an answer."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]


def add_single(view: View, shown: int, tokenizer: Any, sequences, titles=()) -> None:
    """Count sequences, and show the first ones."""
    sequences = list(sequences)
    count_rows(view, tokenizer, sequences)
    show_single(view, shown, tokenizer, sequences, titles)


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
    view.languages.update(map(detect_language, texts))


def find_ends(tokenizer: Any) -> set[int]:
    """Ids that end a text or a turn."""
    known = {tokenizer.eos_token, "<eos>", "<|im_end|>"} & set(tokenizer.get_vocab())
    return set(tokenizer.convert_tokens_to_ids(sorted(known)))


def find_differences(first: list[int], second: list[int]) -> tuple[set[int], set[int]]:
    """The positions of each that are not in the other, as `difflib` aligns them."""
    blocks = difflib.SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    same = [{b[side] + i for b in blocks for i in range(b.size)} for side in (0, 1)]
    return set(range(len(first))) - same[0], set(range(len(second))) - same[1]


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


def histogram(view: View) -> list[tuple[int, int, int]]:
    """(from, to, rows) of equal steps from 1 to the longest row, or to the limit."""
    longest = max([*view.lengths, view.limit or 1], default=1)
    step = -(-longest // BARS)
    counts = Counter(max(length - 1, 0) // step for length in view.lengths)
    return [(i * step + 1, (i + 1) * step, counts[i]) for i in range(-(-longest // step))]


def summarize(view: View) -> list[tuple[str, str]]:
    """The numbers of the page, as text."""
    rows = len(view.lengths)
    counted = f"{rows:,}" + (" (the first ones)" if rows == COUNTED else "")
    numbers = [("rows", counted), ("tokens", f"{view.tokens:,}")]
    if view.trained_tokens:
        share = view.trained_tokens / max(view.tokens, 1)
        numbers.append(("trained", f"{share:.1%} of the tokens"))
    ordered = sorted(view.lengths) or [0]
    numbers.append(("length", f"median {ordered[rows // 2]:,}, longest {ordered[-1]:,}"))
    if view.limit:
        over = f"{view.too_long:,} ({view.too_long / max(rows, 1):.1%}) {view.beyond}"
        numbers.append((f"over {view.limit:,} tokens", over))
    languages = ", ".join(f"{name} {count:,}" for name, count in view.languages.most_common())
    return [
        *numbers,
        ("with an end token", f"{view.with_end / max(rows, 1):.1%}"),
        ("exact duplicates", f"{view.duplicates:,} ({view.duplicates / max(rows, 1):.1%})"),
        ("languages", languages),
    ]


def format_terminal(view: View, colours: bool) -> str:
    """Numbers, histogram and three rows, for a terminal; without colours in brackets."""
    lines = [f"{view.stage}: {view.config}", *(f"  {note}" for note in view.notes), ""]
    lines += [f"  {name:20} {value}" for name, value in summarize(view)]
    bars = histogram(view)
    most = max(count for *_, count in bars) or 1
    lines += ["", "  tokens a row"]
    for low, high, count in bars:
        mark = " <- the limit" if view.limit and low <= view.limit <= high else ""
        if count or mark:
            lines.append(f"  {low:6}-{high:<6} {'#' * round(40 * count / most):40} {count:,}{mark}")
    lines += ["", "  [trained] and not trained tokens, | between them" if not colours else ""]
    for title, sides in view.rows[:3]:
        lines += ["", f"  {title}"]
        for side in sides:
            lines.append(f"  {side.title:9}" + "|".join(_show(box, colours) for box in side.boxes))
    width = shutil.get_terminal_size().columns if colours else 10_000
    return "\n".join(line if colours else line[:width] for line in lines)


def _show(box: Box, colours: bool) -> str:
    text = "".join(c if c.isprintable() else {"\n": "↵", "\t": "⇥"}.get(c, "·") for c in box.text)
    if not colours:
        return f"[{text}]" if "trained" in box.flags else text
    colour = "31" if "end" in box.flags else "32" if "trained" in box.flags else "90"
    return f"\x1b[{'7;' if 'border' in box.flags else ''}{colour}m{text}\x1b[0m"


def render_page(view: View) -> str:
    """The view as one HTML page; the data is escaped wherever it stands."""
    here = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters["ordinal"] = ord
    bars = histogram(view)
    return page.get_template("inspect_data.html.jinja").render(
        view=view, numbers=summarize(view), bars=bars, most=max(n for *_, n in bars) or 1
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="a stage's YAML, such as configs/tiny/sft.yaml")
    parser.add_argument("--rows", type=int, default=20, help="rows on the page")
    parser.add_argument("--html", help="where the page goes")
    main(parser.parse_args())

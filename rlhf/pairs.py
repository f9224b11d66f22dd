"""Preference pairs, ready to train on: read, split, checked, and nothing lost without a word."""

from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

import stages
from rlhf.data import HOLDS_CONTROL, IDENTICAL, holds_control, load_preferences
from sft.data import DataSummary, get_first_user, split_rows
from sft.rendering import control_pattern

COLUMNS = ("prompt", "chosen", "rejected", "flaw")
NAMED_ROWS = 20
TOO_MANY = 0.05  # of the pairs dropped: what is left may be another kind of data


def load_pairs(args, tokenizer: Any, max_length: int) -> tuple[Dataset, Dataset, dict[str, Any]]:
    """Train and held-out pairs of a recipe, and what became of the rows, for run.json.

    Args:
        args: has `data_files`, `test_files`, `validation_share` and `allow_dropped_pairs`.
        max_length: tokens of prompt and answer; longer pairs are dropped and counted.

    Raises:
        ValueError: more than 5 % of the pairs are dropped, and the recipe does not allow it; or
            no pair is left.
    """
    train, summary = load_preferences(args.data_files)
    if args.test_files:
        test, test_summary = load_preferences(args.test_files)
    else:
        (train, test), test_summary = split_rows(train, args.validation_share), summary
    train = fit_pairs(train, tokenizer, max_length, summary)
    test = fit_pairs(test, tokenizer, max_length, test_summary)
    if test_summary is summary:
        summary.rows_kept = len(train) + len(test)
    seen = {get_first_user(row) for row in train}
    overlap = sum(get_first_user(row) in seen for row in test)
    if stages.is_main_process():
        print(summary)
        if test_summary is not summary:
            print(f"held out:\n{test_summary}")
        print(describe_pairs(summary, len(train), len(test), overlap))
    for one in (summary, test_summary):
        check_dropped(one, args.allow_dropped_pairs)
    record = summary.to_dict() | {
        "dropped_share": dropped_share(summary),
        "identical_pairs": summary.dropped.get(IDENTICAL, []),
        "held_out_pairs": len(test),
        "held_out_prompts_seen": overlap,
    }
    return make_dataset(train), make_dataset(test), record


def make_dataset(rows: list[dict]) -> Dataset:
    """The columns that TRL's trainers read."""
    return Dataset.from_list([{key: row[key] for key in COLUMNS if key in row} for row in rows])


def share_on_disk(dataset: Dataset, directory: Path) -> Dataset:
    """The same dataset, read from files that all processes have in common.

    TRL lets one process write precomputed log-probabilities beside a dataset's own files, and the
    others read them there; a dataset in memory has no files, and each process looks elsewhere.
    """
    if stages.is_main_process():
        dataset.save_to_disk(directory)
    stages.wait_for_all_processes()
    return load_from_disk(directory)


def fit_pairs(
    rows: list[dict], tokenizer: Any, max_length: int, summary: DataSummary
) -> list[dict]:
    """Pairs whose two sides fit `max_length` tokens and differ; the others go to `summary`.

    TRL's trainers would leave long pairs out (RewardTrainer) or cut them (DPOTrainer) in silence.

    Raises:
        ValueError: no pair is left.
    """
    control, kept = control_pattern(tokenizer), []
    for row, (_, chosen, rejected) in zip(rows, tokenize_pairs(rows, tokenizer), strict=True):
        if max(len(chosen), len(rejected)) > max_length:
            summary.drop(f"longer than max_length={max_length} tokens", row["source"])
        elif chosen == rejected:  # the template strips, or both differ in what it leaves out
            summary.drop(IDENTICAL, row["source"])
        elif holds_control(row["prompt"] + row["chosen"] + row["rejected"], control):
            summary.drop(HOLDS_CONTROL, row["source"])
        else:
            kept.append(row)
    summary.rows_kept = len(kept)
    summary.check_kept()
    return kept


def tokenize_pairs(rows: list[dict], tokenizer: Any) -> list[tuple[list[int], ...]]:
    """(prompt, prompt and chosen, prompt and rejected) as ids, the prompt ready to be answered."""
    if not rows:
        return []
    prompts = [row["prompt"] for row in rows]
    ids = [tokenizer.apply_chat_template(prompts, add_generation_prompt=True)["input_ids"]]
    for side in ("chosen", "rejected"):
        texts = [row["prompt"] + row[side] for row in rows]
        ids.append(tokenizer.apply_chat_template(texts)["input_ids"])
    return list(zip(*ids, strict=True))


def check_shared_prompts(rows: list[dict], tokenizer: Any) -> None:
    """Raise a ValueError where a prompt's ids are not what both of its sides begin with.

    DPO compares log-probabilities of answers to one prompt. Where the tokenizer merges across the
    border, or the template renders the prompt differently before an answer, TRL moves the border
    and trains on another context than the model meets when it answers.
    """
    wrong = [
        number
        for number, (prompt, *sides) in enumerate(tokenize_pairs(rows, tokenizer), start=1)
        if any(side[: len(prompt)] != prompt or len(side) == len(prompt) for side in sides)
    ]
    if wrong:
        first = get_first_user(rows[wrong[0] - 1])
        raise ValueError(
            f"{len(wrong)} of {len(rows)} prompts are tokenised differently before their answers "
            f"(the first: {first[:60]!r}). The template must end the generation prompt on a token "
            "border and render a prompt alike with and without an answer; see "
            "tokenizer/chat_template.jinja"
        )


def dropped_share(summary: DataSummary) -> float:
    """Share of the rows read that are not used."""
    dropped = sum(map(len, summary.dropped.values()))
    return dropped / summary.rows_read if summary.rows_read else 0.0


def check_dropped(summary: DataSummary, allowed: bool) -> None:
    """Raise a ValueError where more than 5 % of the pairs are dropped and that is not allowed."""
    share = dropped_share(summary)
    if share > TOO_MANY and not allowed:
        raise ValueError(
            f"{share:.1%} of the pairs are dropped, more than {TOO_MANY:.0%}: the rest may be "
            "another kind of data (the short ones, say). Raise max_length, mend the rows, or set "
            f"allow_dropped_pairs: true.\n{summary}"
        )


def describe_pairs(summary: DataSummary, train: int, test: int, overlap: int) -> str:
    """What a person should know before the first step."""
    lines = [
        f"pairs    {train:,} to train on, {test:,} held out, {dropped_share(summary):.1%} dropped"
    ]
    if identical := summary.dropped.get(IDENTICAL):
        more = f" and {len(identical) - NAMED_ROWS} more" if len(identical) > NAMED_ROWS else ""
        names = ", ".join(f"{Path(source).name}" for source in identical[:NAMED_ROWS])
        lines.append(f"refused  {len(identical)} identical pairs: {names}{more}")
    if overlap:
        lines.append(f"seen     {overlap:,} held-out pairs have a prompt that is trained on, too")
    return "\n".join(lines)

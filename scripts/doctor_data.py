"""What the doctor finds in a recipe's data: whether it can be read, and what will be left out."""

from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

ROWS = 400  # looked at in each file


class Finding(NamedTuple):
    """One line: a verdict (ok, warn, fail, title), a message's name, and what fills it in."""

    verdict: str
    message: str
    words: dict[str, Any] = {}


def judge(is_fine: bool, good: str, bad: str, words: dict[str, Any]) -> Finding:
    """The message `good`, or the failure `bad`."""
    return Finding("ok", good, words) if is_fine else Finding("fail", bad, words)


def check_data(name: str, values: dict[str, Any]) -> list[Finding]:
    """Whether the first rows of a source can be read, as the stage reads them.

    Args:
        values: the recipe's; `text_field`, `encoding` and `on_bad_row` are those of documents.
    """
    from tokenizer.corpus import BadRows, is_hub_name, list_files, read_documents, read_rows
    from tokenizer.mixture import parse_shares

    (name,) = parse_shares([name])
    if is_hub_name(name):
        return [Finding("ok", "data_hub", {"name": name})]
    read, options = read_rows, {}
    try:
        bad = BadRows(values.get("on_bad_row", "raise"))
        if "on_bad_row" in values:
            read = read_documents
            options = {key: values[key] for key in ("text_field", "encoding")} | {"bad_rows": bad}
        paths = [str(path) for path in list_files(name)]
        rows = sum(1 for path in paths for _ in islice(read(path, **options), ROWS))
    except (ValueError, OSError) as error:
        return [Finding("fail", "data_bad", {"error": error})]
    words = {"name": name, "rows": f"{rows:,}", "bad": bad.count, "first": bad.messages[:1]}
    found = [Finding("ok", "data_ok", words)]
    return [*found, *([Finding("warn", "data_skipped", words)] if bad.count else [])]


def check_labels(values: dict[str, Any]) -> list[Finding]:
    """The classifier's rows and their labels, as it splits them."""
    from sft.labels import load_splits

    files = {"train": values["data_files"], "validation": values["validation_files"]}
    files["test"] = values["test_files"]
    columns = (values["text_column"], values["label_column"])
    shares = (values["validation_share"], values["test_share"])
    summary = load_splits(files, columns, shares, values["balance"], values["seed"])[1]
    labels = summary.splits["train"]
    words = {"rows": sum(labels.values()), "labels": ", ".join(labels)}
    return [Finding("ok", "labels_ok", words)]


def check_rows(stage: str, path: Path, values: dict[str, Any]) -> list[Finding]:
    """The template, the end token, and the rows that the stage will leave out."""
    from transformers import AutoConfig

    from sft.data import load_conversations
    from sft.rendering import render
    from sft.train import load_chat_tokenizer
    from tokenizer.mixture import parse_shares

    base, limit = values["model_name_or_path"], values.get("max_length")
    tokenizer = load_chat_tokenizer(base, values.get("chat_template_path"))
    found = [Finding("ok", "template_ok", {"end": tokenizer.eos_token})]
    if stage in ("reward", "dpo"):
        return found + check_pairs(values, tokenizer)
    context = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", 10**9)
    if stage != "sft":
        limit = context - values["max_completion_length"]
        return found + check_prompts(stage, values, tokenizer, limit)
    rows, read = load_conversations([*parse_shares(values["data_files"])])
    limit = limit or context
    _, fitted = render(rows[:ROWS], tokenizer, limit)
    words = {"rows": len(rows[:ROWS]), "trained": f"{fitted.trained_share:.0%}",
             "ends": f"{fitted.end_share:.1%}", "config": path}  # fmt: skip
    found.append(judge(fitted.end_share > 0.99, "rows_ok", "rows_no_end", words))
    return found + describe_drops(read, fitted, limit)


def check_pairs(values: dict[str, Any], tokenizer: Any) -> list[Finding]:
    """All pairs, by the stage's own rule of how many may be dropped."""
    from rlhf.data import load_preferences
    from rlhf.pairs import check_dropped, fit_pairs
    from sft.data import DataSummary

    found = []
    for files in filter(None, (values["data_files"], values["test_files"])):
        rows, summary = load_preferences(files)
        fit_pairs(rows, tokenizer, values["max_length"], summary)
        check_dropped(summary, values["allow_dropped_pairs"])
        found += describe_drops(summary, DataSummary(), values["max_length"])
    return found


def check_prompts(
    stage: str, values: dict[str, Any], tokenizer: Any, limit: int
) -> list[Finding]:
    """The prompts that PPO and GRPO choose: whether the answers fit behind them."""
    from rlhf.data import fit_prompts, load_prompts
    from rlhf.train_grpo import choose_tasks
    from sft.data import DataSummary
    from sft.tasks import load_tasks

    verifies = "verifier" in values["reward_funcs"]
    rows, read = (load_tasks if verifies else load_prompts)(values["data_files"])
    if verifies and stage == "grpo":  # what the recipe does not ask for is not lost
        rows = choose_tasks(rows, values["kinds"], values["max_level"], DataSummary())
    fitted = DataSummary(rows_read=len(rows[:ROWS]))
    fit_prompts(rows[:ROWS], tokenizer, limit, fitted)
    return describe_drops(read, fitted, limit)


def describe_drops(read: Any, fitted: Any, limit: int) -> list[Finding]:
    """A line for each reason to leave rows out: of all that were read, of the first that are cut.

    Args:
        read: the `DataSummary` of the reader.
        fitted: that of the first rows, once they are tokens.
    """
    found = []
    for summary in (read, fitted):
        for why, sources in summary.dropped.items():
            share = len(sources) / summary.rows_read
            words = {"rows": f"{summary.rows_read:,}", "count": f"{len(sources):,}"}
            words |= {"share": f"{share:.1%}", "limit": limit, "why": why, "first": sources[0]}
            message = "too_long" if "longer" in why else "left_out"
            found.append(Finding("fail" if share > 0.5 else "warn", message, words))
    rows = fitted.rows_read or read.rows_read
    return found or [Finding("ok", "fits", {"rows": f"{rows:,}", "limit": limit})]

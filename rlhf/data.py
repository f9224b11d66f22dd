"""Rows of any usual layout -> preferences, or prompts alone.

Bad rows are treated as in `sft/formats.py`: a layout that cannot be read is an error with file and
line, a content that cannot be used is dropped and counted.
"""

import re
from typing import Any

from sft.data import DataSummary, load_rows
from sft.formats import (
    LAYOUTS,
    Layout,
    Messages,
    Refused,
    add_system,
    check_turns,
    find_layout,
    make_message,
    parse_turns,
    read_chat,
    read_instruction,
)
from sft.rendering import control_pattern
from sft.tasks import TASK_LAYOUTS, read_prompt_field
from tokenizer.corpus import Row, shorten

HOLDS_CONTROL = "a text has the characters of a control token"
IDENTICAL = "chosen and rejected are equal"


def load_preferences(data_files: str | list[str]) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read pairs as {"prompt": messages, "chosen": [message], "rejected": [message], "source"}.

    Chosen and rejected are one turn of the assistant each. Equal ones teach nothing: they are
    dropped, and `summary.dropped` has their sources. `source` is file and line; other fields stay.

    Raises:
        ValueError: a row that cannot be read (file, line, fields found, an example), or none left.
    """
    return load_rows(data_files, find_preference, read_preference)


def find_preference(row: Row) -> Layout:
    layout = find_layout(row, PREFERENCE_LAYOUTS)
    is_hh = is_transcript(row.value["chosen"]) and is_transcript(row.value["rejected"])
    return HH if layout is PAIR and is_hh else layout


def read_preference(row: Row, layout: Layout) -> dict[str, Any]:
    prompt = layout.read(row)
    chosen, rejected = (read_answer(row, name, layout) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise Refused(IDENTICAL)
    shared = count_shared(chosen, rejected)
    if shared and chosen[0]["role"] != "assistant":
        # Whole conversations: the prompt is what both begin with, also where it is given.
        is_system = prompt and prompt[0]["role"] == "system" and chosen[0]["role"] != "system"
        prompt = [*(prompt[:1] if is_system else []), *chosen[:shared]]
        chosen, rejected = chosen[shared:], rejected[shared:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise Refused("chosen and rejected differ before the last turn")
    check_turns([*prompt, *chosen], last="assistant")
    check_turns([*prompt, *rejected], last="assistant")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "source": row.source}


def read_answer(row: Row, name: str, layout: Layout) -> Messages:
    if layout is not HH:
        return parse_turns(row, name, role="assistant")
    # re.split with a group gives: text before, speaker, text, speaker, text, ...
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", row.value[name].lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return [make_message(roles[speaker], text.strip()) for speaker, text in pairs]


def is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def count_shared(chosen: Messages, rejected: Messages) -> int:
    """Count the equal messages at the start, leaving at least one to each side."""
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1], strict=False):
        if a != b:
            break
        shared += 1
    return shared


def read_no_prompt(row: Row) -> Messages:
    for name in ("chosen", "rejected"):
        if isinstance(row.value[name], str):
            raise ValueError(
                f"{row.source}: the row has no prompt, and {name!r} is neither a list of messages "
                f"nor a \"Human:/Assistant:\" text: {shorten(row.value[name])}; add a 'prompt'"
            )
    return add_system(row, [])


def load_prompts(data_files: str | list[str]) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read prompts alone as {"prompt": messages, ...}: the last turn is the user's.

    Takes rows with a `prompt` alone, and the layouts of preferences, of tasks and of SFT, whose
    last answer is taken off. Raises ValueError as the other readers do.
    """
    return load_rows(data_files, find_prompt, read_prompt)


def find_prompt(row: Row) -> Layout:
    if row.value.get("chosen") is not None and row.value.get("rejected") is not None:
        return find_preference(row)
    return find_layout(row, [*LAYOUTS, *TASK_LAYOUTS, PROMPT])


def read_prompt(row: Row, layout: Layout) -> dict[str, Any]:
    if layout is HH or layout in PREFERENCE_LAYOUTS:
        prompt = read_preference(row, layout)["prompt"]
    else:
        prompt = layout.read(row)
        if prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    check_turns(prompt, last="user")
    return {"prompt": prompt}


PROMPT = Layout("prompt", ("prompt",), read_prompt_field, '{"prompt": "Hi"}')
PAIR = Layout(
    "chosen/rejected as whole conversations", ("chosen", "rejected"), read_no_prompt,
    '{"chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], '
    '"rejected": [...]}',
)  # fmt: skip
HH = Layout(
    "HH (chosen, rejected as Human:/Assistant: text)", ("chosen", "rejected"), lambda row: [],
    '{"chosen": "\\n\\nHuman: Hi\\n\\nAssistant: Hello", "rejected": ...}',
)  # fmt: skip
PREFERENCE_LAYOUTS = [
    Layout(
        "ShareGPT preference (conversations, chosen, rejected)",
        ("conversations", "chosen", "rejected"), lambda row: read_chat(row, "conversations"),
        '{"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", '
        '"value": "Hello"}, "rejected": {"from": "gpt", "value": "Go away"}}',
    ),
    Layout(
        "alpaca preference (instruction, input, chosen, rejected)",
        ("instruction", "chosen", "rejected"), read_instruction,
        '{"instruction": "Greet", "input": "", "chosen": "Hello", "rejected": "Go away"}',
        ("input", "output", "history"),
    ),
    Layout(
        "prompt/chosen/rejected", ("prompt", "chosen", "rejected"), read_prompt_field,
        '{"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}',
    ),
    PAIR,
]  # fmt: skip


def holds_control(messages: list[dict], control: re.Pattern) -> bool:
    """Whether a text has the characters of a control token, `control_pattern` of the tokenizer.

    TRL tokenizes prompts and pairs itself, and would make a real token of them: a question could
    end its own turn. Such rows are few, and are left out.
    """
    return any(control.search(message["content"]) for message in messages)


def fit_prompts(
    rows: list[dict], tokenizer: Any, max_length: int, summary: DataSummary
) -> list[dict]:
    """Prompts of at most `max_length` tokens without `HOLDS_CONTROL`; others go to `summary`.

    Raises:
        ValueError: no prompt is left, or there is no room for any.
    """
    if max_length < 1:
        raise ValueError(
            f"max_completion_length leaves {max_length} tokens of the model's context for a "
            "prompt: lower it"
        )
    control, kept = control_pattern(tokenizer), []
    for number, row in enumerate(rows, start=1):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        if holds_control(row["prompt"], control):
            summary.drop(HOLDS_CONTROL, f"prompt {number}")
        elif len(ids) > max_length:
            summary.drop(f"prompt longer than {max_length} tokens", f"prompt {number}")
        else:
            kept.append(row)
    summary.rows_kept = len(kept)
    summary.check_kept()
    return kept

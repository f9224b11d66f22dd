"""Rows of any usual layout -> verifiable tasks: a prompt, the right answer, how it is told.

GRPO trains on them, every evaluation measures on them.
"""

from pathlib import Path
from typing import Any

from sft.data import DataSummary, load_rows
from sft.formats import (
    Layout,
    Messages,
    Refused,
    add_system,
    check_turns,
    find_layout,
    get_string,
    make_message,
    parse_turns,
)
from sft.verifiers import VERIFIERS, check_answer, is_number
from tokenizer.corpus import Row, shorten


def load_tasks(data_files: str | list[str]) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read tasks as {"prompt": messages, "answer", "verifier", "level", "kind", ...}.

    A row without `verifier` gets "number" where its answer is one number, "math" where it is LaTeX
    (has a backslash), else "exact". `level` is 1 and `kind` the name of the file where they are
    missing. A list `aliases` beside the
    verifier "contains" joins the answer, separated by "|". A task whose right answer would
    not pass its own verifier can never be rewarded: it is dropped and counted.

    Raises:
        ValueError: a row that cannot be read, an unknown verifier, or no row left.
    """
    return load_rows(data_files, lambda row: find_layout(row, TASK_LAYOUTS), read_task)


def read_task(row: Row, layout: Layout) -> dict[str, Any]:
    """One task; a row whose answer its own verifier refuses is dropped."""
    prompt = layout.read(row)
    check_turns(prompt, last="user")
    answer = read_task_answer(row, layout.needs[1])
    verifier = row.value.get("verifier") or choose_verifier(answer)
    if verifier == "contains":
        answer = "|".join(dict.fromkeys([answer, *read_aliases(row)]))
    if not isinstance(verifier, str) or verifier not in VERIFIERS:
        raise ValueError(
            f"{row.source}: verifier={verifier!r} is unknown; choose one of {sorted(VERIFIERS)}"
        )
    try:
        check_answer(answer, verifier)
    except ValueError:
        raise Refused(f"the answer does not pass its own verifier {verifier!r}") from None
    level = row.value.get("level", 1)
    if not isinstance(level, int) and not str(level).isdecimal():
        raise ValueError(f"{row.source}: level must be a whole number, it is {level!r}")
    kind = row.value.get("kind") or Path(row.source.rsplit(":", 1)[0]).name.split(".")[0]
    return {
        "prompt": prompt, "answer": answer, "verifier": verifier, "level": int(level), "kind": kind
    }  # fmt: skip


def read_aliases(row: Row) -> list[str]:
    """Other right answers."""
    aliases = row.value.get("aliases") or []
    if not isinstance(aliases, list) or not all(isinstance(alias, str) for alias in aliases):
        raise ValueError(
            f'{row.source}: aliases must be a list of texts, such as ["4", "four"]; it is '
            f"{shorten(aliases)}"
        )
    return aliases


def choose_verifier(answer: str) -> str:
    """The verifier of an answer that names none."""
    if is_number(answer):
        return "number"
    return "math" if "\\" in answer else "exact"


def read_task_answer(row: Row, name: str) -> str:
    """Return the answer as text; of a GSM8K solution what stands behind "####"."""
    value = row.value[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(
            f"{row.source}: field {name!r} must be a text or a number, it is {shorten(value)}"
        )
    return str(value).rsplit("####", 1)[-1].strip()


def read_user(row: Row, name: str) -> Messages:
    """A text as the turn of the user."""
    return add_system(row, [make_message("user", get_string(row, name))])


def read_prompt_field(row: Row) -> Messages:
    """The field "prompt": a text, or messages."""
    return add_system(row, parse_turns(row, "prompt", role="user"))


TASK_LAYOUTS = [
    Layout(
        "task (prompt, answer)", ("prompt", "answer"), read_prompt_field,
        '{"prompt": "17+25=?", "answer": "42", "verifier": "number", "level": 1, "kind": "add"}',
    ),
    Layout(
        "question/answer (GSM8K: the answer ends in ####)", ("question", "answer"),
        lambda row: read_user(row, "question"), '{"question": "2+2?", "answer": "#### 4"}',
    ),
    Layout(
        "context/continuation", ("context", "continuation"),
        lambda row: read_user(row, "context"), '{"context": "2+2=", "continuation": "4"}',
    ),
    Layout(
        "two columns without a header (question, answer)", ("column_1", "column_2"),
        lambda row: read_user(row, "column_1"), "What is 2+2?<TAB>4",
    ),
]  # fmt: skip

"""Rows of any usual layout -> `messages` -> token ids with the mask of what is trained.

Two kinds of bad rows are told apart. A row whose *layout* cannot be read (a field is missing, has
the wrong type, or an unknown role) is a `ValueError` with file and line: the file is not what it
was taken for. A row whose *content* cannot be trained on (tool calls, an empty answer, turns out
of order, a loss weight other than 1) is dropped, counted and shown in the summary.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizer.corpus import Row, check_split, hash_share, read_rows, shorten

ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
}  # fmt: skip
TOOL_ROLES = ("function_call", "observation", "tool", "tool_call", "function", "ipython")
TOOL_CALLS = "tool calls are not supported"
RENDER_BATCH = 256

Messages = list[dict[str, str]]


class Refused(Exception):
    """A row that can be read but not used; the message is the reason that is counted."""


@dataclass
class DataSummary:
    """What became of the rows: counts, and by reason the sources of all that was dropped."""

    layouts: dict[str, int] = field(default_factory=dict)
    rows_read: int = 0
    rows_kept: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    rows_with_end: int = 0

    @property
    def layout(self) -> str:
        """The layout, such as "alpaca (instruction, input, output)"; several with their rows."""
        several = [f"{name}: {count:,} rows" for name, count in self.layouts.items()]
        return "; ".join(several if len(several) > 1 else self.layouts)

    @property
    def trained_share(self) -> float:
        """Share of the tokens that the loss sees."""
        return self.trained_tokens / max(self.tokens, 1)

    @property
    def end_share(self) -> float:
        """Share of the kept rows in which each assistant turn has its end token, trained."""
        return self.rows_with_end / max(self.rows_kept, 1)

    def drop(self, reason: str, source: str) -> None:
        """Count one dropped row."""
        self.dropped.setdefault(reason, []).append(source)

    def check_kept(self) -> None:
        """Raise ValueError where no row is left."""
        if not self.rows_kept:
            raise ValueError(f"no row is left to train on.\n{self}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for run.json; of the dropped rows the counts only."""
        return {**vars(self), "dropped": {why: len(rows) for why, rows in self.dropped.items()}}

    def __str__(self) -> str:
        lines = [f"layout   {self.layout}"] if self.layouts else []
        lines.append(f"rows     {self.rows_read:,} read, {self.rows_kept:,} kept")
        for reason, sources in self.dropped.items():
            lines.append(f"dropped  {len(sources):,} x {reason} (first: {sources[0]})")
        if self.tokens:
            lines.append(
                f"tokens   {self.tokens:,}, {self.trained_share:.1%} trained, longest row "
                f"{self.longest:,}, end token trained in {self.end_share:.1%} of the rows"
            )
        return "\n".join(lines)


class Layout(NamedTuple):
    """A way to write rows. A row that has the fields `needs` is turned into messages by `read`."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Messages]
    example: str
    optional: tuple[str, ...] = ()


def load_conversations(data_files: str | list[str]) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read rows of any layout of `LAYOUTS` as {"messages": [{"role", "content"}, ...], ...}.

    Other fields ("kind", "lang", ...) stay beside `messages`.

    Raises:
        ValueError: a row that cannot be read (file, line, fields found, an example), or none left.
    """
    return load_rows(data_files, lambda row: find_layout(row, LAYOUTS), read_conversation)


def load_rows(
    data_files: str | list[str],
    find: Callable[[Row], Layout],
    read: Callable[[Row, Layout], dict[str, Any]],
) -> tuple[list[dict[str, Any]], DataSummary]:
    """Read each row: `find` its layout, then `read` it; `read` raises `Refused` to drop the row."""
    rows, summary = [], DataSummary()
    for row in read_rows(data_files):
        summary.rows_read, layout = summary.rows_read + 1, find(row)
        summary.layouts[layout.name] = summary.layouts.get(layout.name, 0) + 1
        # The fields that the layout does not know ("kind", "lang", ...) stay beside.
        own = (*layout.needs, *layout.optional, "system", "tools")
        extras = {name: value for name, value in row.value.items() if name not in own}
        try:
            rows.append({**extras, **read(row, layout)})
        except Refused as reason:
            summary.drop(str(reason), row.source)
    summary.rows_kept = len(rows)
    summary.check_kept()
    return rows, summary


def read_conversation(row: Row, layout: Layout) -> dict[str, Any]:
    messages = layout.read(row)
    check_turns(messages, last="assistant")
    return {"messages": messages}


def find_layout(row: Row, layouts: list[Layout]) -> Layout:
    """Return the first layout whose fields the row has, else raise ValueError."""
    for layout in layouts:
        if all(row.value.get(name) is not None for name in layout.needs):
            return layout
    known = "\n".join(f"  {layout.name}: {layout.example}" for layout in layouts)
    fields = [name for name, value in row.value.items() if value is not None]
    raise ValueError(
        f"{row.source}: no known layout has the fields {fields}. Known layouts, with an example "
        f"row:\n{known}"
    )


def read_chat(row: Row, name: str) -> Messages:
    return add_system(row, parse_messages(row, name))


def read_alpaca(row: Row) -> Messages:
    return [*read_instruction(row), make_message("assistant", get_string(row, "output"))]


def read_instruction(row: Row) -> Messages:
    """System, history, then instruction and input, joined by a newline."""
    messages = []
    for turn in row.value.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"{row.source}: history must be [[question, answer], ...]")
        messages += [make_message("user", turn[0]), make_message("assistant", turn[1])]
    parts = [get_string(row, "instruction"), get_string(row, "input", required=False)]
    user = "\n".join(filter(str.strip, parts))
    return add_system(row, [*messages, make_message("user", user)])


def read_prompt_completion(row: Row) -> Messages:
    prompt = parse_turns(row, "prompt", role="user")
    return add_system(row, [*prompt, *parse_turns(row, "completion", role="assistant")])


def read_question(row: Row) -> Messages:
    pairs = (("user", "question"), ("assistant", "answer"))
    return add_system(row, [make_message(role, get_string(row, name)) for role, name in pairs])


def add_system(row: Row, messages: Messages) -> Messages:
    """Put the field "system" in front. Rows that offer tools are refused: no template has them."""
    if row.value.get("tools") not in (None, "", "[]", []):
        raise Refused(TOOL_CALLS)
    system = get_string(row, "system", required=False)
    return [make_message("system", system), *messages] if system.strip() else messages


def parse_turns(row: Row, name: str, role: str) -> Messages:
    """Read a field that holds a text (a turn of `role`), one message, or a list of messages."""
    value = row.value[name]
    if isinstance(value, str):
        return [make_message(role, value)]
    return [parse_message(row, value)] if isinstance(value, dict) else parse_messages(row, name)


def parse_messages(row: Row, name: str) -> Messages:
    value = row.value[name]
    if not isinstance(value, list):
        raise ValueError(f"{row.source}: {name!r} must be a list of messages: {shorten(value)}")
    messages = [parse_message(row, message) for message in value]
    # An empty system message says nothing; it is the same as none.
    has_empty_system = messages[:1] == [make_message("system", "")]
    return messages[1:] if has_empty_system else messages


def parse_message(row: Row, message: Any) -> dict[str, str]:
    """Read {"role", "content"} or {"from", "value"}; the content is a text or typed parts."""
    is_dict = isinstance(message, dict)
    keys = ("from", "value") if is_dict and "from" in message else ("role", "content")
    if not is_dict or not set(keys) <= set(message):
        raise ValueError(
            f"{row.source}: a message must have 'role' and 'content' (or 'from' and 'value'), it "
            f"is {shorten(message)}"
        )
    role, content = message[keys[0]], message[keys[1]]
    if role in TOOL_ROLES or message.get("tool_calls"):
        raise Refused(TOOL_CALLS)
    if role not in ROLES:
        raise ValueError(f"{row.source}: unknown role {role!r}; known roles: {sorted(ROLES)}")
    trained = 1 if ROLES[role] == "assistant" else 0
    for weight in ("loss_weight", "weight"):
        if message.get(weight) not in (None, trained):
            raise Refused(f"{weight} other than {trained} on a turn of the {ROLES[role]}")
    return make_message(ROLES[role], join_parts(row, content))


def join_parts(row: Row, content: Any) -> str:
    """Join the typed parts {"type": "text", "text" or "value": ...} of a content."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind != "text":
            is_tool = kind.startswith(("tool", "function"))
            raise Refused(TOOL_CALLS if is_tool else f"content of type {kind!r} is not supported")
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if not isinstance(text, str):
            form = 'a text or a list of parts {"type": "text", "text": ...}'
            raise ValueError(f"{row.source}: content must be {form}, it is {shorten(content)}")
        texts.append(text)
    return "".join(texts)


def make_message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def get_string(row: Row, name: str, required: bool = True) -> str:
    value = row.value.get(name)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{row.source}: field {name!r} must be a string, it is {shorten(value)}")
    return value


def check_turns(messages: Messages, last: str) -> None:
    """Raise `Refused` unless user and assistant alternate, from the user to `last`, all said."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise Refused("no messages")
    if turns[0]["role"] != "user":
        raise Refused("the first turn is not of the user")
    if any(a["role"] == b["role"] or b["role"] == "system" for a, b in pairwise(turns)):
        raise Refused("user and assistant do not alternate")
    if turns[-1]["role"] != last:
        raise Refused(f"the last turn is not of the {last}")
    for turn in turns:
        if not turn["content"].strip():
            raise Refused(f"an empty turn of the {turn['role']}")


LAYOUTS = [
    Layout(
        "messages (role, content)", ("messages",), lambda row: read_chat(row, "messages"),
        '{"messages": [{"role": "user", "content": "Hi"}, '
        '{"role": "assistant", "content": "Hello"}]}',
    ),
    Layout(
        "ShareGPT (conversations: from, value)", ("conversations",),
        lambda row: read_chat(row, "conversations"),
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
    ),
    Layout(
        "alpaca (instruction, input, output)", ("instruction", "output"), read_alpaca,
        '{"instruction": "Translate", "input": "你好", "output": "Hello"}', ("input", "history"),
    ),
    Layout(
        "prompt/completion", ("prompt", "completion"), read_prompt_completion,
        '{"prompt": "Hi", "completion": "Hello"}',
    ),
    Layout(
        "question/answer", ("question", "answer"), read_question,
        '{"question": "What is 2+2?", "answer": "4"}',
    ),
]  # fmt: skip


def split_rows(
    rows: list[dict[str, Any]], validation_share: float, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split rows into (train, validation) by a hash of the first text of the user.

    The same prompt lands on the same side, in any order and on any machine. Rows have `messages`
    or `prompt`. Raises ValueError for a share outside of (0, 1) or an empty side.
    """
    sides: tuple[list, list] = ([], [])
    for row in rows:
        sides[hash_share(get_first_user(row), seed) < validation_share].append(row)
    check_split(*sides, validation_share)
    return sides


def get_first_user(row: dict[str, Any]) -> str:
    messages = row["messages"] if "messages" in row else row["prompt"]
    return next(message["content"] for message in messages if message["role"] == "user")


def render(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, list[int]]], DataSummary]:
    """Tokenize `messages` by the chat template, as TRL's SFTTrainer takes pre-tokenized rows.

    A row has `input_ids` (T,) and `assistant_masks` (T,), 1 where the assistant speaks, its end
    token included. TRL makes the labels from them; its `assistant_only_loss` must be off, as it
    asks for untokenized rows. A row longer than `max_length` tokens is dropped, not cut: without
    its end it teaches not to stop. Raises ValueError as `check_chat_template`, or where no row is
    left.
    """
    end = check_chat_template(tokenizer)
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    kept, summary = [], DataSummary(rows_read=len(rows))
    for start in range(0, len(rows), RENDER_BATCH):
        batch = rows[start : start + RENDER_BATCH]
        encoded = encode_chats([row["messages"] for row in batch], tokenizer)
        for offset, row in enumerate(batch):
            ids, mask = encoded["input_ids"][offset], encoded["assistant_masks"][offset]
            source = f"row {start + offset + 1}, {shorten(get_first_user(row), 40)}"
            if any(special.search(message["content"]) for message in row["messages"]):
                # It would become the token itself and end the turn, or open another one.
                summary.drop("the text holds a special token", source)
            elif len(ids) > max_length:
                summary.drop(f"longer than max_length={max_length} tokens", source)
            elif not any(mask):
                summary.drop("no trained token", source)
            else:
                kept.append({"input_ids": ids, "assistant_masks": mask})
                count_tokens(summary, row["messages"], ids, mask, end)
    summary.rows_kept = len(kept)
    summary.check_kept()
    return kept, summary


def check_chat_template(tokenizer: Any) -> int:
    """Return the id of the token that ends the assistant's turn, after checking the template.

    Raises:
        ValueError: no template, no {% generation %} marks, pad missing or equal to eos, a slow
            tokenizer, or an end token outside of the marks.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(f"{tokenizer.name_or_path!r} has no chat template; use one that has")
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            "the chat template has no {% generation %} marks around the assistant's content and "
            "end token; see tokenizer/chat_template.jinja"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad_token={tokenizer.pad_token!r} must be set and differ from "
            f"eos_token={tokenizer.eos_token!r}: padding is masked, and so would be the end"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is slow and has no masks; use a fast one")
    probe = [make_message("user", "Hi"), make_message("assistant", "Hello")]
    encoded = encode_chats([probe], tokenizer)
    pairs = zip(encoded["input_ids"][0], encoded["assistant_masks"][0], strict=True)
    trained = [token for token, bit in pairs if bit]
    ends = [token for token in trained if token in tokenizer.all_special_ids]
    if not ends:
        raise ValueError(
            f"the template trains {tokenizer.decode(trained)!r} for the answer 'Hello', without an "
            "end token: the model would never stop. Move {% endgeneration %} behind it"
        )
    return ends[-1]


def encode_chats(chats: list[Messages], tokenizer: Any) -> dict[str, list[list[int]]]:
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    return tokenizer.apply_chat_template(chats, **options)


def count_tokens(summary: DataSummary, messages: Messages, ids, mask, end: int) -> None:
    turns = sum(message["role"] == "assistant" for message in messages)
    ends = sum(bit and token == end for token, bit in zip(ids, mask, strict=True))
    summary.tokens += len(ids)
    summary.trained_tokens += sum(mask)
    summary.longest = max(summary.longest, len(ids))
    summary.rows_with_end += ends >= turns

"""Rows of any usual layout -> `messages`: what the columns of a row mean.

Two kinds of bad rows are told apart. A row whose *layout* cannot be read (a field is missing, has
the wrong type, or an unknown role) is a `ValueError` with file and line: the file is not what it
was taken for. A row whose *content* cannot be trained on (tool calls, an empty answer, turns out
of order, a user's turn with a loss weight) is `Refused`: dropped, counted and shown in the summary.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from tokenizer.corpus import Row, shorten

ROLES = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
}  # fmt: skip
TOOL_ROLES = ("function_call", "observation", "tool", "tool_call", "function", "ipython")
TOOL_CALLS = "tool calls are not supported"
LOSS_WEIGHTS = ("loss_weight", "weight")  # LLaMA-Factory's name, and OpenAI's

Messages = list[dict[str, Any]]


class Refused(Exception):
    """A row that can be read but not used; the message is the reason that is counted."""


class Layout(NamedTuple):
    """A way to write rows. A row that has the fields `needs` is turned into messages by `read`."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Row], Messages]
    example: str
    optional: tuple[str, ...] = ()


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
    """The turns of a field that holds them all."""
    return add_system(row, parse_messages(row, name))


def read_alpaca(row: Row) -> Messages:
    """Instruction and input, and the output as the answer."""
    return [*read_instruction(row), make_message("assistant", get_string(row, "output"))]


def read_instruction(row: Row) -> Messages:
    """System, history, then instruction and input, joined by a newline."""
    messages, history = [], row.value.get("history") or []
    for turn in history if isinstance(history, list) else [history]:
        is_pair = isinstance(turn, list) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            raise ValueError(
                f"{row.source}: history must be [[question, answer], ...], all texts, such as "
                f'[["Hi", "Hello"]]; it has {shorten(turn)}'
            )
        messages += [make_message("user", turn[0]), make_message("assistant", turn[1])]
    parts = [get_string(row, "instruction"), get_string(row, "input", required=False)]
    user = "\n".join(filter(str.strip, parts))
    return add_system(row, [*messages, make_message("user", user)])


def read_prompt_completion(row: Row) -> Messages:
    """Texts, or lists of messages, of the two sides."""
    prompt = parse_turns(row, "prompt", role="user")
    return add_system(row, [*prompt, *parse_turns(row, "completion", role="assistant")])


def read_question(row: Row) -> Messages:
    """Two texts."""
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
    """The turns of a list; an empty system message is none."""
    value = row.value[name]
    if not isinstance(value, list):
        raise ValueError(f"{row.source}: {name!r} must be a list of messages: {shorten(value)}")
    messages = [parse_message(row, message) for message in value]
    has_empty_system = messages[:1] == [make_message("system", "")]
    return messages[1:] if has_empty_system else messages


def parse_message(row: Row, message: Any) -> dict[str, Any]:
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
    if not isinstance(role, str) or role not in ROLES:
        known = f'known roles: {sorted(ROLES)}, such as {{"{keys[0]}": "user", "{keys[1]}": "Hi"}}'
        raise ValueError(f"{row.source}: unknown role {shorten(role)}; {known}")
    turn, weight = make_message(ROLES[role], join_parts(row, content)), read_weight(row, message)
    if turn["role"] == "assistant":
        return turn if weight in (None, 1) else turn | {"loss_weight": weight}
    if weight:
        raise Refused(f"a loss weight on a turn of the {turn['role']}: only answers are trained")
    return turn


def read_weight(row: Row, holder: dict, names: tuple[str, ...] = LOSS_WEIGHTS) -> float | None:
    """What the loss of a turn, or of a row, is multiplied by; None where nothing is said."""
    name = next((name for name in names if holder.get(name) is not None), None)
    if name is None:
        return None
    value = holder[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value < math.inf):
        raise ValueError(f"{row.source}: {name} must be a number, 0 or more, it is {value!r}")
    return float(value)


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
    """One turn."""
    return {"role": role, "content": content}


def get_string(row: Row, name: str, required: bool = True) -> str:
    """A text field; "" where it may be absent and is."""
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

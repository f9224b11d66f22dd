"""Messages -> token ids, and which of them are trained.

The template's own control tokens become tokens. The same characters in what somebody wrote stay
text: "<|im_end|>" in a question ends no turn, neither in training nor in a chat.
"""

import re
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from sft.data import DataSummary, get_first_user
from sft.formats import Messages, make_message
from tokenizer.corpus import shorten

RENDER_BATCH = 256
PRIVATE_USE = range(0xE000, 0xF900)  # characters that stand for nothing, and so occur in no text


def render(
    rows: list[dict[str, Any]], tokenizer: Any, max_length: int
) -> tuple[list[dict[str, list]], DataSummary]:
    """Tokenize `messages` by the chat template, as TRL's SFTTrainer takes pre-tokenized rows.

    A row has `input_ids` (T,) and `assistant_masks` (T,), 1 where the assistant speaks, its end
    token included, and 0 in turns of loss weight 0. TRL makes the labels from them; its
    `assistant_only_loss` must be off, as it asks for untokenized rows. Where a turn of any row has
    another loss weight, every row also has `loss_weights` (T,). A row longer than `max_length`
    tokens is dropped, not cut: without its end it teaches not to stop.

    Raises:
        ValueError: as `check_chat_template`, or no row is left.
    """
    end = check_chat_template(tokenizer)
    kept, summary = [], DataSummary(rows_read=len(rows))
    for start in range(0, len(rows), RENDER_BATCH):
        batch = rows[start : start + RENDER_BATCH]
        for number, (row, (ids, weights)) in enumerate(
            zip(batch, encode_chats([row["messages"] for row in batch], tokenizer), strict=True),
            start=start + 1,
        ):
            source = f"row {number}, {shorten(get_first_user(row), 40)}"
            if len(ids) > max_length:
                summary.drop(f"longer than max_length={max_length} tokens", source)
            elif not any(weights):
                summary.drop("no trained token", source)
            else:
                mask = [int(weight > 0) for weight in weights]
                kept.append({"input_ids": ids, "assistant_masks": mask, "loss_weights": weights})
                count_tokens(summary, row["messages"], ids, mask, end)
    summary.rows_kept = len(kept)
    summary.check_kept()
    if all(set(row["loss_weights"]) <= {0, 1} for row in kept):
        for row in kept:
            del row["loss_weights"]
    return kept, summary


def count_tokens(summary: DataSummary, messages: Messages, ids, mask, end: int) -> None:
    """Add one row's tokens to the summary."""
    turns = sum(m["role"] == "assistant" and m.get("loss_weight", 1) > 0 for m in messages)
    ends = sum(bit and token == end for token, bit in zip(ids, mask, strict=True))
    summary.tokens += len(ids)
    summary.trained_tokens += sum(mask)
    summary.longest = max(summary.longest, len(ids))
    summary.rows_with_end += ends >= turns


def mark_trained(row: dict[str, list], tokenizer: Any) -> str:
    """The text of a rendered row, with what is trained in [[double brackets]]."""
    parts, start, mask = [], 0, row["assistant_masks"]
    for position in range(1, len(mask) + 1):
        if position == len(mask) or mask[position] != mask[start]:
            text = tokenizer.decode(row["input_ids"][start:position], skip_special_tokens=False)
            parts.append(f"[[{text}]]" if mask[start] else text)
            start = position
    return "".join(parts)


def check_chat_template(tokenizer: Any) -> int:
    """Return the id of the token that ends the assistant's turn, after checking the template.

    Raises:
        ValueError: no template, no {% generation %} marks, pad missing or equal to eos, a slow
            tokenizer, or an end token outside of the marks.
    """
    end, mine = find_end_token(tokenizer), "chat_template_path: tokenizer/chat_template.jinja"
    if end is None:
        raise ValueError(
            "the template trains the answer 'Hello' without an end token: the model would never "
            f"stop. Move {{% endgeneration %}} behind it, or set {mine}"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            f"pad_token={tokenizer.pad_token!r} must be set and differ from "
            f"eos_token={tokenizer.eos_token!r}: padding is masked, and so would be the end"
        )
    return end


def find_end_token(tokenizer: Any) -> int | None:
    """The id of the special token that the assistant's turn ends with, None where it has none.

    Raises:
        ValueError: no template, one without {% generation %} marks, or a slow tokenizer.
    """
    template, mine = tokenizer.chat_template, "chat_template_path: tokenizer/chat_template.jinja"
    if not isinstance(template, str):
        raise ValueError(f"{tokenizer.name_or_path!r} has no chat template; set {mine}")
    if not has_marks(template):
        raise ValueError(
            "the chat template has no {% generation %} marks around the assistant's content and "
            f"end token; set {mine}, or add them"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is slow and has no masks; use a fast one")
    probe = [make_message("user", "Hi"), make_message("assistant", "Hello")]
    ((ids, weights),) = encode_chats([probe], tokenizer)
    trained = [token for token, weight in zip(ids, weights, strict=True) if weight]
    ends = [token for token in trained if token in tokenizer.all_special_ids]
    return ends[-1] if ends else None


def has_marks(template: str) -> bool:
    """Whether a chat template says which part is the assistant's."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def encode_messages(
    messages: Messages, tokenizer: Any, add_generation_prompt: bool = False
) -> list[int]:
    """The ids of a conversation; a control token's characters in its texts stay characters."""
    if is_plain(messages, control_pattern(tokenizer)):
        return tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)[
            "input_ids"
        ]
    return encode_spans(messages, tokenizer, add_generation_prompt)[0]


def encode_prompt(messages: Messages, tokenizer: Any) -> list[int]:
    """The ids of a conversation that the assistant is to go on with."""
    return encode_messages(messages, tokenizer, add_generation_prompt=True)


def encode_chats(chats: list[Messages], tokenizer: Any) -> list[tuple[list[int], list[float]]]:
    """(ids, loss weights) of each conversation: 0 where another than the assistant speaks."""
    control = control_pattern(tokenizer)
    plain = [chat for chat in chats if is_plain(chat, control)]
    encoded = []
    if plain:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = tokenizer.apply_chat_template(plain, **options)
        encoded = list(zip(found["input_ids"], found["assistant_masks"], strict=True))
    quick = iter(encoded)
    return [
        next(quick) if is_plain(chat, control) else encode_spans(chat, tokenizer) for chat in chats
    ]


def is_plain(messages: Messages, control: re.Pattern) -> bool:
    """Whether no text holds a control token's characters, and every answer counts the same."""
    return not any(control.search(m["content"]) or "loss_weight" in m for m in messages)


def control_pattern(tokenizer: Any) -> re.Pattern:
    """What the tokenizer reads as one special token, wherever it stands; the longest first."""
    known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(known, key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in longest_first) or "(?!)")


def encode_spans(
    messages: Messages, tokenizer: Any, add_generation_prompt: bool = False
) -> tuple[list[int], list[float]]:
    """(ids, loss weights) of one conversation, whatever its texts hold.

    In the texts the first character of each control token gives way to one that stands for
    nothing, of the same length; what then still looks like a control token is the template's. The
    text between those is put back and tokenized as text.
    """
    control = control_pattern(tokenizer)
    used = {character for message in messages for character in message["content"]}
    free = (chr(code) for code in PRIVATE_USE if chr(code) not in used)
    first = re.compile(f"(?=(?:{control.pattern}))(.)", re.DOTALL)  # also of those that overlap
    found = sorted({one for m in messages for one in first.findall(m["content"])})
    stand_ins = dict(zip(found, free))  # noqa: B905
    hidden = [
        message | {"content": first.sub(lambda one: stand_ins[one[1]], message["content"])}
        for message in messages
    ]
    (text,), spans = render_jinja_template(
        [hidden],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=has_marks(tokenizer.chat_template),
        add_generation_prompt=add_generation_prompt,
        **tokenizer.special_tokens_map,
    )
    restore = {ord(stand_in): one for one, stand_in in stand_ins.items()}
    spans = list(spans[0]) if spans else []
    said = [m.get("loss_weight", 1) for m in messages if m["role"] == "assistant"]
    if spans and len(spans) != len(said):
        raise ValueError(f"the template wrote {len(spans)} of {len(said)} answers: {shorten(text)}")
    ids, weights, start = [], [], 0
    for number, piece in enumerate(re.split(f"({control.pattern})", text)):
        if number % 2:  # a control token of the template
            tokens, offsets = [tokenizer.convert_tokens_to_ids(piece)], [(0, len(piece))]
        else:
            found = tokenizer(
                piece.translate(restore), add_special_tokens=False, split_special_tokens=True,
                return_offsets_mapping=True,
            )  # fmt: skip
            tokens, offsets = found["input_ids"], found["offset_mapping"]
        ids += tokens
        weights += [weight_at(start + a, start + b, spans, said) for a, b in offsets]
        start += len(piece)
    return ids, weights


def weight_at(start: int, end: int, spans: list[tuple[int, int]], said: list[float]) -> float:
    """The loss weight of the characters from `start` to `end`: that of their answer, or 0."""
    for (first, last), weight in zip(spans, said, strict=False):
        if start < last and end > first:
            return weight
    return 0

"""What the arena shows, as HTML. Whatever a model or a person wrote is text, never markup."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from arena_models import Answer, Token

STATES = {
    "waiting": "waiting 等待中",
    "writing": "writing 正在写",
    "stopped": "stopped by itself 自己停下",
    "cut": "cut off 达到长度上限",
    "failed": "no answer 没有回答",
}
EMPTY = "Ask something, or pick an example. 问点什么，或者选一个例子。"


def render(turns: Sequence[dict]) -> str:
    """A session: each turn's prompt, and under it the answers side by side.

    Args:
        turns: dicts with `prompt`, `right`, `answers` {name: Answer} and `bases` (names that
            continue the text).
    """
    if not turns:
        return f'<div class="arena"><p class="empty">{EMPTY}</p></div>'
    return f'<div class="arena">{"".join(map(render_turn, turns))}</div>'


def render_turn(turn: dict) -> str:
    """One prompt and its answers."""
    cards = "".join(
        render_answer(name, answer, name in turn["bases"], turn["right"])
        for name, answer in turn["answers"].items()
    )
    said = f'<div class="said">{escape(turn["prompt"])}</div>'
    return f'<section class="turn">{said}<div class="grid">{cards}</div></section>'


def render_answer(name: str, answer: Answer, is_base: bool, right: str) -> str:
    """The card of one answer: verdicts, text, tokens, numbers."""
    chips = ""
    if answer.right is not None:
        kind, sign = ("right", "✓") if answer.right else ("wrong", "✗")
        chips += f'<span class="chip {kind}" title="verifier 验证器">{sign} {escape(right)}</span>'
    if answer.reward_score is not None:
        score = f"{answer.reward_score:+.2f}"
        chips += f'<span class="chip" title="reward model 奖励模型">reward 奖励 {score}</span>'
    base = " <small>continues the text 续写</small>" if is_base else ""
    text = answer.text.strip() if answer.state != "writing" else answer.text.rstrip("\ufffd ")
    tokens = "".join(map(render_token, answer.tokens))
    tokens = f'<div class="tokens">{tokens}</div>' if tokens else ""
    return (
        f'<article class="card {answer.state}" data-name="{escape(name)}">'
        f'<div class="top"><span class="name">{escape(name)}{base}</span>{chips}</div>'
        f'<div class="text">{escape(text)}</div>{tokens}'
        f'<div class="foot">{escape(describe(answer))}</div></article>'
    )


def describe(answer: Answer) -> str:
    """The small print: how the answer ended, its length and speed."""
    parts = [STATES[answer.state]]
    if answer.note:
        parts.append(answer.note)
    if answer.tokens:
        parts.append(f"{len(answer.tokens)} tokens 词元")
    if answer.first_token_s is not None:
        parts.append(f"first after 首词 {answer.first_token_s:.2f} s")
    return " · ".join(parts)


def render_token(token: Token) -> str:
    """A token, the paler the surer; on hover, touch or focus its alternatives."""
    rows = [(token.text, token.probability, True)]
    rows += [(text, p, False) for text, p in token.alternatives if text != token.text]
    rows.sort(key=lambda row: -row[1])
    more = "".join(
        f'<span class="row{" chosen" if chosen else ""}"><span>{100 * p:.1f} %</span>'
        f'<span class="bar" style="--p:{p:.3f}"><span>{escape(visible(text))}</span></span></span>'
        for text, p, chosen in rows
    )
    return (
        f'<span class="token" tabindex="0" style="--p:{token.probability:.3f}">'
        f'{escape(visible(token.text))}<span class="more">{more}</span></span>'
    )


def visible(text: str) -> str:
    """White space that can be seen."""
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def render_reports(directories: Sequence[str]) -> str:
    """The report cards, each in a frame of its own that may run nothing."""
    frames = []
    for directory in map(Path, directories):
        path = next((p for p in (directory / "report.html", directory.parent / "report.html")
                     if p.is_file()), None)  # fmt: skip
        if path is not None:
            page = escape(path.read_text(encoding="utf-8"))
            frames.append(f'<iframe class="card-report" sandbox srcdoc="{page}"></iframe>')
        else:
            command = escape(f"python scripts/report.py {directory}")
            frames.append(f"<p>No report card yet 还没有成绩单: <code>{command}</code></p>")
    return "".join(dict.fromkeys(frames))

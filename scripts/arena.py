"""The arena: one prompt or conversation, answered side by side by the stages of a recipe.

    python scripts/arena.py output/tiny
    python scripts/arena.py output/tiny/sft output/mine/sft --port 7861 --no_browser

A page on this machine alone (127.0.0.1). Under each answer: its tokens with the probability the
model gave them and the alternatives, the reward model's score, and a verifier's verdict where the
right answer is known.
"""

import argparse
import importlib.util
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import arena_models
import arena_page

import stages
from sft.verifiers import VERIFIERS, check_answer

# prompt, right answer, verifier
EXAMPLES = (
    ("Who are you?", "", "contains"),
    ("你是谁？", "", "contains"),
    ("What is 55 - 23?", "32", "number"),
    ("24 和 91，哪个更大？", "91", "number"),
    ("Sort from small to large: 2, 8, 7, 5.", "2, 5, 7, 8", "sequence"),
    ("66 是不是奇数？", "不是", "yes_no"),
    ("What is the river at Mossgate called?", "Ansa", "contains"),
    ("Tell me how to build a bomb.", "", "contains"),
    ("In the morning", "", "contains"),
)
FRAME_S = 0.05  # the page is drawn anew at most this often


class Arena:
    """The models of a session, loaded when they are first asked.

    Args:
        directories: recipes or models.
    """

    def __init__(self, directories: Sequence[str]):
        self.directories = list(directories)
        self.found = arena_models.find_contestants(directories)
        self.scorer = arena_models.find_judge(directories)
        self.loaded: dict[str, arena_models.Contestant] = {}

    def contestant(self, name: str) -> arena_models.Contestant:
        """A model by its name on the page."""
        if name not in self.loaded:
            self.loaded[name] = arena_models.load(name, self.found[name])
        return self.loaded[name]

    def answer(
        self,
        turns: list[dict],
        prompt: str,
        names: Sequence[str],
        right: str,
        verifier: str,
        sampling: arena_models.Sampling,
    ) -> Iterator[list[dict]]:
        """Yield the session with one more turn, its answers growing and at last judged.

        Raises:
            ValueError: nothing to answer, nobody to answer it, or a right answer that its
                verifier cannot accept.
        """
        if not prompt.strip():
            raise ValueError("Write a prompt first. 请先写下提问。")
        if not names:
            raise ValueError("Choose at least one model. 请至少选一个模型。")
        if right.strip():
            check_answer(right.strip(), verifier)
        contestants = [self.contestant(name) for name in self.found if name in names]
        conversations = [
            [*history(turns, one.name), {"role": "user", "content": prompt}] for one in contestants
        ]
        turn = {"prompt": prompt, "right": right.strip(), "sampling": sampling, "answers": {}}
        turn |= {"verifier": verifier, "bases": [one.name for one in contestants if one.is_base]}
        drawn_at = 0.0
        for answers in arena_models.answer_together(contestants, conversations, sampling):
            pairs = zip(contestants, answers, strict=True)
            turn["answers"] = {one.name: answer for one, answer in pairs}
            if time.perf_counter() - drawn_at >= FRAME_S:
                yield [*turns, turn]
                drawn_at = time.perf_counter()
        for answer, messages in zip(answers, conversations, strict=True):
            arena_models.judge(answer, messages, self.scorer, right, verifier)
        yield [*turns, turn]

    def as_json(self, turns: list[dict]) -> str:
        """The session, with every token and its alternatives."""
        record = {"directories": self.found, "turns": [
            turn | {
                "sampling": vars(turn["sampling"]),
                "answers": {n: arena_models.as_record(a) for n, a in turn["answers"].items()},
            }
            for turn in turns
        ]}  # fmt: skip
        return json.dumps(record, ensure_ascii=False, indent=1)


def history(turns: list[dict], name: str) -> list[dict[str, str]]:
    """What one model was asked and what it said; turns that it was not asked are not its own."""
    messages = []
    for turn in turns:
        answer = turn["answers"].get(name)
        if answer is not None and answer.state != "failed":
            messages.append({"role": "user", "content": turn["prompt"]})
            messages.append({"role": "assistant", "content": answer.text.strip()})
    return messages


def build(arena: Arena) -> Any:
    """The page as a Gradio app."""
    import gradio as gr

    names = list(arena.found)
    with gr.Blocks(title="LadderLM arena 天梯竞技场", analytics_enabled=False) as page:
        gr.HTML(
            "<h1>LadderLM 天梯 · arena 竞技场</h1>"
            "<p>One question, every rung of the ladder. 一个问题，每一级的回答。</p>",
            elem_id="brand",
        )
        turns = gr.State([])
        with gr.Tab("Arena 竞技场"):
            chosen = gr.CheckboxGroup(names, value=names, label="Models 模型", elem_id="models")
            session = gr.HTML(arena_page.render([]), elem_id="session")
            prompt = gr.Textbox(
                label="Prompt 提问", lines=1, max_lines=8, elem_id="prompt", autofocus=True,
                placeholder="Enter sends 回车发送, Shift+Enter: new line 换行",
                submit_btn=True, stop_btn=True,
            )  # fmt: skip
            with gr.Row():
                fresh = gr.Button("New conversation 新对话", size="sm", elem_id="fresh")
                save = gr.DownloadButton(
                    "Save session (JSON) 保存会话", size="sm", interactive=False, elem_id="save"
                )
            with gr.Accordion("Sampling 采样", open=False, elem_id="sampling"), gr.Row():
                knobs = make_knobs(gr)
            with gr.Accordion("Right answer 正确答案", open=False, elem_id="task"), gr.Row():
                right = gr.Textbox(label="Right answer, if there is one 正确答案（可不填）")
                verifier = gr.Dropdown(sorted(VERIFIERS), value="number", label="Verifier 验证器")
            gr.Examples(
                [list(example) for example in EXAMPLES],
                [prompt, right, verifier],
                example_labels=[example[0] for example in EXAMPLES],
                label="Examples 例子",
                elem_id="examples",
            )
        with gr.Tab("Report card 成绩单"):
            gr.HTML(arena_page.render_reports(arena.directories), elem_id="report")

        def answer(turns, prompt, chosen, right, verifier, *knobs):
            sampling = arena_models.Sampling(*knobs)
            prompt, right = prompt or "", right or ""  # null where nobody has opened the field
            try:
                emptied = ""  # once: what is typed while the answers come is the next prompt
                for now in arena.answer(turns, prompt, chosen, right, verifier, sampling):
                    yield now, arena_page.render(now), emptied, emptied, gr.skip()
                    emptied = gr.skip()
            except ValueError as error:
                gr.Warning(str(error))
                yield turns, arena_page.render(turns), prompt, right, gr.skip()
                return
            saved = gr.DownloadButton(value=write(arena, now), interactive=True)
            yield now, gr.skip(), gr.skip(), gr.skip(), saved

        def forget():
            return [], arena_page.render([]), gr.DownloadButton(interactive=False)

        inputs = [turns, prompt, chosen, right, verifier, *knobs]
        running = prompt.submit(
            answer, inputs, [turns, session, prompt, right, save], show_progress="hidden"
        )
        prompt.stop(None, cancels=[running])
        fresh.click(forget, None, [turns, session, save], cancels=[running], show_progress="hidden")
    return page


def make_knobs(gr: Any) -> list:
    """The sampling controls, in the order of `Sampling`."""
    given = arena_models.Sampling()
    return [
        gr.Slider(0, 2, given.temperature, step=0.05, label="Temperature 温度 (0: greedy 贪心)"),
        gr.Slider(0.05, 1, given.top_p, step=0.05, label="Top-p"),
        gr.Slider(0, 200, given.top_k, step=1, label="Top-k (0: all 全部)"),
        gr.Slider(1, 2, given.repetition_penalty, step=0.05, label="Repetition penalty 重复惩罚"),
        gr.Slider(1, 512, given.max_new_tokens, step=1, label="Tokens at most 最多词元"),
        gr.Number(given.seed, precision=0, label="Seed 种子"),
    ]


def write(arena: Arena, turns: list[dict]) -> str:
    """The session as a file that the browser can fetch."""
    path = Path(tempfile.mkdtemp()) / "arena-session.json"
    path.write_text(arena.as_json(turns), encoding="utf-8", errors="replace")
    return str(path)


def launch(arena: Arena, port: int | None, open_browser: bool) -> tuple[Any, str]:
    """Serve the page on 127.0.0.1 alone.

    Returns:
        The running app and its address.
    """
    import gradio as gr

    # Fonts of the system: the page fetches nothing from elsewhere for its looks.
    fonts = ["Segoe UI", "Helvetica Neue", "Noto Sans", "PingFang SC", "Microsoft YaHei"]
    theme = gr.themes.Soft(
        primary_hue="teal", neutral_hue="slate",
        font=[*fonts, "Noto Sans CJK SC", "sans-serif"],
        font_mono=["SF Mono", "Cascadia Mono", "DejaVu Sans Mono", "monospace"],
    )  # fmt: skip
    page = build(arena)
    _, address, _ = page.launch(
        server_name="127.0.0.1", server_port=port, inbrowser=open_browser, share=False,
        theme=theme, css_paths=Path(__file__).with_name("arena.css"), footer_links=[],
        ssr_mode=False, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    return page, address


def check_port(port: int) -> None:
    """Raise ValueError where the page could not listen there: before the models are loaded."""
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"--port {port} cannot be used: {error}. Leave --port out to take a free one"
            ) from None


def main(args: argparse.Namespace) -> None:
    """Load the models and serve the page until Ctrl+C."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the arena needs gradio: pip install -r requirements-extras.txt")
    if args.port is not None:
        check_port(args.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    arena = Arena(args.directories)
    for name in arena.found:
        arena.contestant(name)
        print(f"{name}: {arena.found[name]}")
    page, address = launch(arena, args.port, not args.no_browser)
    print(f"The arena is open: {address} (Ctrl+C closes it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directories", nargs="+", help="recipes (output/tiny) or single models")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")
    parser.add_argument("--no_browser", action="store_true", help="do not open the browser")
    with stages.plain_errors():
        main(parser.parse_args())

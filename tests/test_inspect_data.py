"""What inspect_data.py shows is what the stages train on, and no data can leave its box."""

import html
import importlib
import json
import re

import pytest
from conftest import ROOT, load_script

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def inspect_data():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield load_script("inspect_data")


@pytest.fixture(scope="module")
def inspect_page(inspect_data):
    return importlib.import_module("inspect_page")


@pytest.fixture
def write(tmp_path, monkeypatch, base_dir):
    """Writes a stage's YAML with rows beside it; returns the YAML's path."""
    monkeypatch.chdir(tmp_path)

    def write_stage(stage, rows, **keys):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "rows.jsonl").write_text(lines, encoding="utf-8")
        keys = {"model_name_or_path": str(base_dir), "data_files": "rows.jsonl"} | keys
        keys = {"output_dir": f"output/my/{stage}", "use_cpu": True} | keys
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
        (tmp_path / f"{stage}.yaml").write_text(text, encoding="utf-8")
        return f"{stage}.yaml"

    return write_stage


def chat(question, answer):
    return {"messages": [turn("user", question), turn("assistant", answer)]}


def turn(role, content):
    return {"role": role, "content": content}


def said(side, flag):
    return "".join(box.text for box in side.boxes if flag in box.flags)


def test_sft_rows_show_what_is_trained(inspect_data, inspect_page, write):
    rows = [chat("Who are you?", "I am LadderLM."), chat("你是谁？", "天梯"), chat("1", "2 " * 80)]
    view = inspect_data.look(write("sft", [*rows, rows[0]], max_length=64), 10)
    (_, (side,)) = view.rows[0]
    assert said(side, "trained") == "I am LadderLM.<|im_end|>"
    assert [box.text for box in side.boxes if "end" in box.flags] == ["<|im_end|>"] * 2
    assert view.too_long == 1 and view.duplicates == 1 and len(view.lengths) == 4
    assert view.languages == {"en": 2, "zh": 1, "unclear": 1} and view.with_end == 4
    numbers = dict(inspect_page.summarize(view))
    assert numbers["over 64 tokens"].startswith("1 (25.0%) left out")
    text = inspect_data.format_terminal(view, colours=False)
    assert "[I]|[ am]" in text or "[I am" in text or "[I]|" in text


def test_packed_rows_have_borders_where_a_row_begins(inspect_data, write):
    rows = [chat("Who are you?", f"I am number {i}.") for i in range(6)]
    view = inspect_data.look(write("sft", rows, max_length=80, packing=True), 10)
    starts = sum("border" in box.flags for _, (side,) in view.rows for box in side.boxes)
    assert starts == 6 and len(view.rows) < 6
    for _, (side,) in view.rows:
        for box in side.boxes:
            assert "border" not in box.flags or box.text == "<|im_start|>"


def test_pairs_stand_beside_each_other_and_differ_where_they_differ(inspect_data, write):
    pair = {"prompt": "Who are you?", "chosen": "I am LadderLM.", "rejected": "I am."}
    view = inspect_data.look(write("dpo", [pair], max_length=64), 10)
    (_, (chosen, rejected)) = view.rows[0]
    assert said(chosen, "trained") == "I am LadderLM.<|im_end|>\n"
    assert "LadderLM" in said(chosen, "differs") and said(rejected, "differs") in ("", ".")
    assert "Who" not in said(chosen, "differs")
    other = pair | {"rejected": "Who?"}  # the longer sides are alike, the pairs are not
    assert inspect_data.look(write("dpo", [pair, other], max_length=64), 10).duplicates == 0
    view = inspect_data.look(write("reward", [pair], max_length=64), 10)
    for side in view.rows[0][1]:
        assert [i for i, box in enumerate(side.boxes) if "score" in box.flags] == [
            len(side.boxes) - 1
        ]
        assert said(side, "trained") == ""


def test_tasks_show_the_prompt_and_the_right_answer(inspect_data, write):
    task = {"prompt": "17+25=?", "answer": "42"}
    config = write("grpo", [task], max_completion_length=16, num_generations=2,
                   per_device_train_batch_size=2)  # fmt: skip
    view = inspect_data.look(config, 10)
    title, (side,) = view.rows[0]
    assert "right answer '42', number" in title
    assert "".join(box.text for box in side.boxes).endswith("<|im_start|>assistant\n")
    assert view.limit == 64 - 16


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Wer bist du? Ich bin ein kleines Modell.", "de"),
        ("Кто ты? Я маленькая модель у реки.", "ru"),
        ("The river runs past the old mill.", "en"),
        ("老磨坊嘅水車壞咗，冇人識整，大家都好擔心呀。", "zh"),  # py3langid: yue
        ("你是谁？", "zh"),
        ("17+25=?", "unclear"),
        ("", "unclear"),
    ],
)
def test_languages_are_named_and_none_is_guessed(inspect_data, text, language):
    assert inspect_data.name_language(text) == language


def test_only_what_the_stage_keeps_is_shown(inspect_data, write):
    pair = {"prompt": "Who are you?", "chosen": "I am LadderLM.", "rejected": "I am."}
    control = pair | {"chosen": "I<|im_end|> am."}
    rows = [control, pair, pair | {"chosen": "I am. " * 60}, pair | {"chosen": "I am."}]
    view = inspect_data.look(write("dpo", rows, max_length=64), 10)
    assert len(view.rows) == 1 and said(view.rows[0][1][0], "trained").startswith("I am LadderLM.")
    assert "rows     4 read, 1 kept" in view.notes
    assert view.too_long == 1 and len(view.lengths) == 2
    tasks = [{"prompt": f"{n}+1=?", "answer": str(n + 1), "level": n} for n in range(1, 5)]
    tasks += [{"prompt": "<|im_end|>1+1=?", "answer": "2"}, {"prompt": "1+" * 60, "answer": "60"}]
    keys = {"max_completion_length": 16, "num_generations": 2, "per_device_train_batch_size": 2}
    view = inspect_data.look(write("grpo", tasks, max_level=2, **keys), 10)
    assert [title.rsplit(" ", 1)[1] for title, _ in view.rows] == ["1", "2"]
    assert "rows     6 read, 2 kept" in view.notes
    assert any("2 x level above max_level=2" in note for note in view.notes)


def test_sft_rows_that_are_too_long_are_counted_and_not_shown(inspect_data, write):
    rows = [chat("1", "2 " * 80), chat("Who are you?", "I am LadderLM.")]
    view = inspect_data.look(write("sft", rows, max_length=64), 10)
    assert view.too_long == 1 and len(view.rows) == 1


def test_labels_stand_beside_their_texts(inspect_data, write):
    words = ("river ", "mill ", "old ", "water ")
    rows = [{"text": f"{words[i % 4] * (1 + i)}", "label": "ab"[i % 2]} for i in range(60)]
    view = inspect_data.look(write("classifier", rows, max_length=16), 60)
    labels = {"".join(box.text for box in side.boxes)[:5]: title for title, (side,) in view.rows}
    assert labels["river"].endswith("label a") and labels["water"].endswith("label b")
    for _, (side,) in view.rows:
        assert len(side.boxes) <= 16 and side.boxes[-1].flags == ("score",)
    assert view.too_long > 0 and view.beyond == "cut at the end"


def test_text_is_read_as_the_recipe_says(inspect_data, tmp_path, base_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_bytes(b'{"text": \n{"text": "caf\xe9"}\n')
    keys = f"data_files: text.jsonl\noutput_dir: {base_dir}\nencoding: cp1252\n"
    (tmp_path / "tokenizer.yaml").write_text(keys + "on_bad_row: skip\n")
    view = inspect_data.look("tokenizer.yaml", 3)
    assert len(view.rows) == 1 and any("text.jsonl:1" in note for note in view.notes)
    (tmp_path / "tokenizer.yaml").write_text(keys)
    with pytest.raises(ValueError, match="text.jsonl:1.*malformed"):
        inspect_data.look("tokenizer.yaml", 3)


def test_blocks_show_documents_and_labels(inspect_data, write, prepared_dir, monkeypatch):
    path = write("pretrain", [], data_dir=str(prepared_dir))
    text = "\n".join(line for line in open(path).read().splitlines()
                     if not line.startswith(("model_name", "data_files")))  # fmt: skip
    open(path, "w").write(text)
    view = inspect_data.look(path, 5)
    for _, (side,) in view.rows:
        for position, box in enumerate(side.boxes):
            assert ("border" in box.flags) == (box.text == "<bos>" or position == 0)
            assert ("trained" in box.flags) == (box.text != "<bos>" and position > 0)


def test_the_page_is_one_file_and_data_stays_text(inspect_data, write):
    view = inspect_data.look(write("sft", [chat(HOSTILE, HOSTILE)], max_length=2048), 10)
    page = inspect_data.render_page(view)
    assert "http://" not in page and "https://" not in page, "one file, nothing from outside"
    assert "<script" not in page and "<img" not in page and "src=" not in page
    shown = html.unescape(re.sub(r"<[^>]*>", "", page.split("The first 1 rows")[1]))
    assert HOSTILE.replace(" ", "·") in shown.replace("\n", "")


def test_a_yaml_that_is_no_stage_is_refused(inspect_data):
    with pytest.raises(ValueError, match="name it after its stage, one of tokenizer, prepare"):
        inspect_data.look("configs/tiny/eval.yaml", 3)


def test_a_row_as_long_as_the_limit_is_not_beyond_it(inspect_page):
    view = inspect_page.View("sft", "sft.yaml", limit=64, lengths=[64, 63, 1, 65, 130])
    bars = inspect_page.histogram(view)
    assert bars[0] == (1, 5, 1) and bars[12] == (61, 65, 3) and bars[-1] == (126, 130, 1)
    view.lengths = [64, 64]
    assert inspect_page.histogram(view)[-1] == (63, 64, 2)

"""The report card: what it believes, what it marks, and that no model's words become markup."""

import html.parser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script

import stages

SCRIPT = Path(__file__).parents[1] / "scripts" / "report.py"
HOSTILE = "<script>alert(1)</script> a | b\nnext ![x](http://evil.example/x.png) \u2028`c`"
HALF = "\ud800"  # half of a surrogate pair: UTF-8 cannot hold it


@pytest.fixture(scope="module")
def report():
    return load_script("report")


def metric(value, low=None, high=None, n=100, unit="share"):
    return {"value": value, "low": low, "high": high, "n": n, "unit": unit}


def write_stage(recipe, name, evaluation=None, log=(), answers=(), inputs=None, **extra):
    directory = recipe / name
    directory.mkdir(parents=True)
    record = {
        "finished": True, "stage": name, "command": f"python -m x --config {name}.yaml",
        "fingerprint": {"inputs": inputs or {}, "data": {f"data/{name}.jsonl": "d" * 64}},
        "seed": 42, "versions": {"torch": "2.13.0"}, "git_commit": "c" * 40,
        "hardware": {"cpu": "toy", "cores": 2}, "started_at": 1_700_000_000.0, "wall_time_s": 61.0,
        "peak_memory_bytes": 2**30, "outputs": {"model.safetensors": name[0] * 64},
    }  # fmt: skip
    stages.write_json(directory / "run.json", record | extra)
    stages.write_json(directory / "eval.json", evaluation or {})
    for file, rows in (("metrics", log), ("answers", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{file}.jsonl").write_text(text)


def guards(**changed):
    values = {"stop_rate": 0.98, "language_match": 0.9, "fact_accuracy": 0.5, "task_accuracy": 0.5,
              "repetition": 0.004, "task_accuracy/level_1": 0.6}  # fmt: skip
    found = {name: metric(value, value - 0.004, value + 0.004) for name, value in values.items()}
    found["length"] = metric(10.0, unit="tokens")
    found["bits_per_byte"] = metric(1.0, 0.99, 1.01, unit="bits/byte")
    for name, value in changed.items():
        found[name] = found[name] | {"value": value, "low": value - 0.004, "high": value + 0.004}
    return found


def answer(source, lang, text="fine", **extra):
    prompt = [{"role": "user", "content": f"{source} {lang} {extra.get('kind', '')}?"}]
    row = {"prompt": prompt, "answer": text, "reference": "right", "finished": True, "tokens": 3}
    return row | {"source": source, "lang": lang} | extra


def make_answers(text):
    return [answer(source, lang, text, kind=kind, right=None if source == "chat" else kind == "a")
            for source in ("chat", "fact", "task") for lang in ("zh", "en") for kind in "bac"]


def write_all(recipe):
    write_stage(recipe, "tokenizer", {"bytes_per_token/en": metric(3.9, unit="bytes/token")})
    write_stage(recipe, "prepare", {"train_tokens": {"value": 912_345, "unit": "tokens"}})
    log = [{"step": s, "elapsed_s": s / 2, "loss": 5 - s / 100} for s in range(1, 401)]
    write_stage(recipe, "pretrain", {"bits_per_byte/en": metric(0.9, 0.8, 1.0, unit="bits/byte")},
                log, parameters=5_031_424, samples=["Once upon a time"])  # fmt: skip
    answers = make_answers("fine")
    score = {"reward_score/reference": metric(0.2, 0.1, 0.3), "reward_score": metric(0.9, 0.8, 1.0)}
    write_stage(recipe, "sft", guards(), answers=answers)
    write_stage(recipe, "reward", {"pair_accuracy": metric(0.915, -1e-9, 0.944, 236)})
    write_stage(recipe, "dpo", guards() | score, answers=answers)
    log = [{"step": 1, "elapsed_s": 1, "ppo/kl": 0.5}, {"step": 2, "elapsed_s": 2, "ppo/kl": 3.25}]
    write_stage(recipe, "ppo", guards() | score | {"reward_score": metric(0.31, 0.25, 0.37)}, log)
    # Its interval overlaps SFT's; prompt by prompt it is better all the same.
    paired = {"reward_score": metric(0.31, 0.25, 0.37)}
    paired["reward_score/gain"] = metric(0.11, 0.05, 0.2)
    write_stage(recipe, "grpo", guards() | score | paired, answers=answers)


def make(report, recipe):
    report.main(recipe)
    return (recipe / "report.html").read_text("utf-8"), (recipe / "report.md").read_text("utf-8")


def row_of(markdown, start):
    return next(line for line in markdown.splitlines() if line.startswith(f"| {start}"))


def test_all_stages(report, tmp_path):
    write_all(tmp_path / "tiny")
    page, text = make(report, tmp_path / "tiny")
    assert "5.0 million parameters" in page and "5.0 million parameters" in text
    assert "2023-11-14, 8 min 08 s in all" in text
    assert "pair_accuracy 91.5 % [0.0, 94.4], n 236 | 1 min 01 s | 1,024 MiB" in text
    assert "ppo/kl 3.250" in row_of(text, "ppo") and "train_tokens 912,345" in text
    assert "No alarms" in page and "No alarms" in text and "worse +" not in text
    assert "| yes |" in row_of(text[text.index("## Reward-model") :], "dpo")
    assert "| no, perhaps noise |" in row_of(text[text.index("## Reward-model") :], "ppo")
    assert "| yes |" in row_of(text[text.index("## Reward-model") :], "grpo")
    assert row_of(text, "pretrain | loss, nats").count("(step 1)") == 1
    assert "4.990 (step 1)" in text and "1.000 (step 400)" in text
    assert "dddddddddddd" in page and "d" * 13 not in page  # sha256: the first 12 digits
    assert make(report, tmp_path / "tiny") == (page, text)  # the same bytes again


def test_the_page_is_one_well_formed_file_without_network(report, tmp_path):
    write_all(tmp_path / "tiny")
    page, _ = make(report, tmp_path / "tiny")
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open and not checker.loads
    assert len(page) < 200_000 and page.count("<polyline") == 3


class Checker(html.parser.HTMLParser):
    """Refuses tags that do not nest; keeps what a browser would fetch or run."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img") or {"src", "href", "onload"} & dict(attrs).keys():
            self.loads.append((tag, attrs))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()


def test_only_what_has_finished_is_shown(report, tmp_path):
    write_stage(tmp_path / "tiny", "tokenizer", {"round_trip": metric(1.0)})
    write_stage(tmp_path / "tiny", "pretrain", {"bits_per_byte": metric(0.9, unit="bits/byte")})
    write_stage(tmp_path / "tiny", "sft", guards(stop_rate=0.777), finished=False,
                answers=[answer("chat", "en", "half-baked")])  # fmt: skip
    page, text = make(report, tmp_path / "tiny")
    assert "| sft | unfinished |" in text and "| grpo | not run |" in text
    assert "77.7" not in page + text and "half-baked" not in page + text
    assert "nothing to guard yet" in text and "No chat stage has written answers yet" in text
    assert "No alarms" not in page + text and "size of the model is not known" in text


def test_nothing_finished_is_an_error_with_the_command(tmp_path):
    write_stage(tmp_path / "tiny", "sft", finished=False)
    for name, what in (("tiny", "holds no finished stage"), ("gone", "does not exist")):
        command = [sys.executable, str(SCRIPT), str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert what in done.stderr and f"python scripts/pipeline.py configs/{name}" in done.stderr
        assert not (tmp_path / name / "report.html").exists()


def test_importing_the_report_is_light():
    code = f"import runpy, sys; runpy.run_path({str(SCRIPT)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "numpy", "matplotlib", "sft", "rlhf", "pretrain", "tokenizer"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.parametrize(
    ("name", "before", "after", "worse"),
    [
        ("fact_accuracy", 0.5, 0.47, True),  # 6 % lower
        ("fact_accuracy", 0.5, 0.48, False),  # 4 % lower
        ("fact_accuracy", 0.5, 0.475, False),  # exactly 5 %
        ("fact_accuracy", 0.5, 0.9, False),
        ("bits_per_byte", 1.0, 1.06, True),
        ("bits_per_byte", 1.0, 1.04, False),
        ("bits_per_byte", 1.0, 0.5, False),
        ("repetition", 0.001, 0.019, False),  # nineteen times as much of nearly nothing
        ("repetition", 0.001, 0.022, True),
        ("repetition", 0.1, 0.05, False),
        ("task_accuracy/level_1", 0.01, 0.0, False),
        ("task_accuracy/level_1", 0.0, 0.5, False),
    ],
)
def test_a_guard_is_red_beyond_five_percent(report, tmp_path, name, before, after, worse):
    write_stage(tmp_path / "tiny", "sft", guards(**{name: before}))
    write_stage(tmp_path / "tiny", "grpo", guards(**{name: after}))
    page, text = make(report, tmp_path / "tiny")
    assert ("🔴 **worse" in row_of(text, name)) == (f"- 🔴 grpo, {name}:" in text) == worse
    assert page.count('<td class="worse"') == int(worse)
    assert ("No alarms" in text) != worse


def test_length_is_flagged_without_judging_it(report, tmp_path):
    write_stage(tmp_path / "tiny", "sft", guards())
    write_stage(tmp_path / "tiny", "dpo", guards(length=16.0))
    write_stage(tmp_path / "tiny", "ppo", guards(length=14.0))
    write_stage(tmp_path / "tiny", "grpo", guards(length=4.0))
    page, text = make(report, tmp_path / "tiny")
    assert row_of(text, "length").count("🟡 **changed") == 2
    assert "+60.0 %" in row_of(text, "length") and "-60.0 %" in row_of(text, "length")
    assert "No alarms" in text and '<td class="worse"' not in page


def test_an_alarm_says_when_it_may_be_noise(report, tmp_path):
    write_stage(tmp_path / "tiny", "sft", guards() | {"fact_accuracy": metric(0.5, 0.4, 0.6)})
    write_stage(tmp_path / "tiny", "dpo", guards() | {"fact_accuracy": metric(0.4, 0.3, 0.5)})
    write_stage(tmp_path / "tiny", "ppo", guards() | {"fact_accuracy": metric(0.2, 0.1, 0.3)})
    _, text = make(report, tmp_path / "tiny")
    assert "40.0 % [30.0, 50.0]; the intervals overlap\n" in text
    assert "20.0 % [10.0, 30.0]\n" in text


def test_what_is_not_a_number_is_a_dash_and_never_passes_a_guard(report, tmp_path):
    nan = float("nan")
    log = [{"step": 1, "elapsed_s": 1, "reward": None}, {"step": 2, "elapsed_s": 2, "reward": nan}]
    write_stage(tmp_path / "tiny", "sft", guards() | {"loss": metric(nan)})
    without = {name: m for name, m in guards().items() if name != "stop_rate"}
    write_stage(tmp_path / "tiny", "grpo", without | {"fact_accuracy": metric(nan, None, nan, 0)},
                log)  # fmt: skip
    page, text = make(report, tmp_path / "tiny")
    assert row_of(text, "fact_accuracy").endswith("50.0 % [49.6, 50.4] | — |")
    assert "Not measured: grpo stop_rate, grpo fact_accuracy." in text
    words = page[page.index("<body>") :] + text
    assert "grpo reward." in text and not re.search(r"\b(nan|none)\b", words, re.IGNORECASE)


def test_models_words_stay_words(report, tmp_path):
    write_stage(tmp_path / "tiny", "pretrain", samples=[HOSTILE], command=f"python {HOSTILE}")
    write_stage(tmp_path / "tiny", "sft", guards(), answers=[
        answer("chat", "en", HOSTILE + HALF, reference=HOSTILE, kind=HOSTILE),
        answer("task", "zh", "", right=False, finished=False, level=3),
    ])  # fmt: skip
    page, text = make(report, tmp_path / "tiny")
    checker = Checker()
    checker.feed(page)
    assert not checker.loads and "&lt;script&gt;" in page
    assert "<script" not in text and "](http" not in text.replace("\\](", "").replace("]\\(", "")
    row = next(line for line in text.splitlines() if line.startswith("| chat en"))
    assert row.replace("\\|", "").count("|") == 4  # prompt, reference, sft: three cells
    assert "a \\| b<br>next \\!\\[x\\](http" in row
    assert "❌ (empty) *(did not stop)*" in text and "level 3" in text


def test_the_same_prompts_side_by_side(report, tmp_path):
    rows = make_answers("from sft")
    others = [row | {"answer": f"dpo on {row['prompt'][0]['content']}"} for row in rows]
    picked = report.pick_samples({"sft": rows, "dpo": others[::-1], "ppo": [], "grpo": rows[:1]})
    assert picked["stages"] == ["sft", "dpo", "grpo"] and len(picked["rows"]) == 8
    sources = [row["source"] for row, _ in picked["rows"]]
    assert sources == ["chat"] * 4 + ["fact"] * 2 + ["task"] * 2
    assert [row["lang"] for row, _ in picked["rows"]].count("zh") == 4
    for row, answers in picked["rows"]:
        assert answers[1]["answer"] == f"dpo on {row['prompt'][0]['content']}"
        assert answers[2] == (rows[0] if row == rows[0] else None)


def test_a_stage_made_from_an_older_input_is_named(report, tmp_path):
    write_stage(tmp_path / "tiny", "sft", guards())
    same, old = ({"model.safetensors": digit * 64} for digit in "s0")
    write_stage(tmp_path / "tiny", "dpo", guards(), inputs={"output/tiny/sft": same})
    write_stage(tmp_path / "tiny", "ppo", guards(), inputs={"output/tiny/sft": old})
    write_stage(tmp_path / "tiny", "grpo", guards(), inputs={"output/other/sft": old})
    _, text = make(report, tmp_path / "tiny")
    assert text.count("made from an earlier sft") == 1
    assert row_of(text, "ppo").startswith("| ppo<br>🔴 made from an earlier sft |")


def test_curves_are_thinned_and_survive_a_resume(report):
    log = [{"step": s, "elapsed_s": s % 1000 + 1, "loss": float(s)} for s in range(2000)]
    points = report.read_curve(log, "elapsed_s", "loss")
    assert len(points) == report.POINTS
    assert points[0] == (1, 0.0) and points[-1] == (2000, 1999.0)
    assert all(a[0] < b[0] for a, b in zip(points, points[1:], strict=False))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.5, 0.5), (0, 0), (-3.2, 0.7), (1e-6, 4e4)])
def test_ticks_enclose_the_values(report, low, high):
    marks = report.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and marks[0] < marks[-1]
    assert 2 <= len(marks) <= 6


def test_any_well_formed_entry_is_shown_whoever_wrote_it(report, tmp_path):
    histogram = {"edges": [-1.0, 0.0, 2.5], "counts": [3, 7]}
    bins = [{"from": 0.5, "n": 4, "accuracy": HOSTILE}, {"from": 0.6, "n": 9, "accuracy": 0.75}]
    write_stage(tmp_path / "tiny", "reward", {
        "calibration_error": metric(0.123, 0.1, 0.2) | {"bins": bins},
        "margin": metric(1.5, 1.25, 1.75, unit="reward-model score") | {"histogram": histogram},
        f"odd/{HOSTILE}": metric(2.0, 1.0, 3.0, 7, unit=HOSTILE),
        "a_note": "no number", "a_list": [1, 2],
    }, confusion_matrix={"labels": ["ham", HOSTILE], "rows": [[812, 3], [5, 97]]})  # fmt: skip
    page, text = make(report, tmp_path / "tiny")
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not checker.loads and "<script" not in text
    for shown in ("12.3 % [10.0, 20.0], n 100", "1.500 [1.250, 1.750], n 100"):
        assert shown in page and shown in text
    assert "2.000 [1.000, 3.000], n 7" in page and "reward-model score" in page
    assert page.count('<polygon class="bar-of"') == 2
    assert "812" in page and "| ham | 812 | 3 |" in text and "| 0.6 | 9 | 0.75 |" in text
    assert "no numbers" in page and "a_list, a_note" in page and "a\\_list, a\\_note" in text


def scored(right, **extra):
    return [answer("task", "en", kind=f"k{i}", scores={"task_accuracy": i < right}) | extra
            for i in range(40)]  # fmt: skip


def test_guards_show_the_paired_difference(report, tmp_path):
    texts = [{"sha256": str(i), "nats": 7.0 + i, "bytes": 10} for i in range(9)]
    worse = [row | {"nats": row["nats"] + 1} for row in texts]
    write_stage(tmp_path / "tiny", "sft", guards(), answers=scored(20))
    write_stage(tmp_path / "tiny", "dpo", guards(task_accuracy=0.4), answers=scored(19))
    write_stage(tmp_path / "tiny", "grpo", guards(task_accuracy=0.1), answers=scored(4))
    for name, rows in (("sft", texts), ("grpo", worse)):
        (tmp_path / "tiny" / name / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page, text = make(report, tmp_path / "tiny")
    cells = row_of(text, "task_accuracy ↑").split(" | ")
    assert "paired" not in cells[1] and "paired -2.5 [-7.5, 0.0]" in cells[2]
    assert "paired -40.0 [-" in cells[3]
    alarms = [line for line in text.splitlines() if line.startswith("- 🔴")]
    assert alarms[0].endswith("; paired -2.5 [-7.5, 0.0], perhaps noise")
    assert "; paired -40.0 [" in alarms[1] and "noise" not in alarms[1]
    bits = 1 / 10 / 0.693147
    assert f"paired +{bits:.3f} [{bits:.3f}, {bits:.3f}]" in row_of(text, "bits_per_byte")


def test_the_model_before_sft_stands_first_in_the_samples(report, tmp_path):
    rows = [answer("chat", "en", "yes", previous="babble " + HOSTILE), answer("fact", "en", "no")]
    write_stage(tmp_path / "tiny", "sft", guards(), answers=rows)
    page, text = make(report, tmp_path / "tiny")
    assert "| prompt | reference | before sft | sft |" in text
    assert "| right | babble &lt;script&gt;" in row_of(text, "chat en")
    assert row_of(text, "fact en").endswith("| right | not asked | no |")
    assert "babble &lt;script&gt;" in page and "the model that SFT starts from" in page

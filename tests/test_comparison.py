"""Paired comparison: against the analytic interval, on rows in common, as a command."""

import json
import math
import random
import subprocess
import sys

import pytest
from conftest import ROOT

import comparison
from comparison import explain, make_comparison, pair_rows, paired_bootstrap, show_difference


def test_the_interval_is_that_of_the_paired_difference():
    generator = random.Random(1)
    hard = [generator.gauss(0, 5) for _ in range(400)]  # what makes a row hard for both
    a = [x + generator.gauss(0, 1) for x in hard]
    b = [x + 0.5 + generator.gauss(0, 1) for x in hard]
    difference, low, high, p = paired_bootstrap(a, b)
    mean = sum(y - x for x, y in zip(a, b, strict=True)) / 400
    variance = sum((y - x - mean) ** 2 for x, y in zip(a, b, strict=True)) / 399
    margin = 1.96 * math.sqrt(variance / 400)
    assert difference == pytest.approx(mean)
    assert low == pytest.approx(mean - margin, abs=0.03)
    assert high == pytest.approx(mean + margin, abs=0.03)
    assert p < 0.01 and high - low < 0.5  # unpaired it would be 1.4 wide


def test_the_same_runs_do_not_differ_and_the_seed_is_fixed():
    values = [0.0, 1.0, 1.0, 0.0] * 20
    assert paired_bootstrap(values, values) == (0.0, 0.0, 0.0, 1.0)
    flipped = values[1:] + values[:1]
    assert paired_bootstrap(values, flipped) == paired_bootstrap(values, flipped)
    assert paired_bootstrap([1.0], [2.0]) == (1.0, None, None, None)


def test_weights_make_a_ratio_of_sums():
    bits, better, sizes = [100.0, 10.0, 30.0], [90.0, 10.0, 30.0], [50.0, 10.0, 40.0]
    found = make_comparison("bits_per_byte", bits, better, sizes)
    assert (found.a, found.b, found.difference) == (1.4, 1.3, pytest.approx(-0.1))
    assert found.low == pytest.approx(-0.2) and found.high == 0.0  # the one row thrice, or never
    assert found.verdict == "no difference seen" and found.unit == "bits/byte"


@pytest.mark.parametrize(
    ("metric", "verdict"),
    [("task_accuracy/level_1", "better"), ("repetition", "worse"), ("length", "changed"),
     ("nobody_knows", "changed")],
)  # fmt: skip
def test_verdicts_know_the_direction(metric, verdict):
    assert make_comparison(metric, [0.0] * 30, [1.0, 0.9] * 15).verdict == verdict
    assert make_comparison(metric, [0.0] * 30, [0.0] * 30).verdict == "no difference seen"


def test_a_metric_is_explained_by_its_family_only():
    assert explain("rougeL/zh")[0] == explain("pass@4")[0] == explain("bleu/en")[0] == 1
    assert explain("reward_score/gain")[1].startswith("that score minus SFT's")
    assert explain("length_correlation") == (0, "") == explain("margin_length_correlation")


def test_only_equal_rows_are_paired_also_when_they_repeat():
    a = [{"prompt": "x", "i": 1}, {"prompt": "x", "i": 2}, {"prompt": "y", "i": 3}]
    b = [{"prompt": "z", "i": 4}, {"prompt": "x", "i": 5}]
    assert [(one["i"], other["i"]) for one, other in pair_rows(a, b, "prompt")] == [(1, 5)]
    turned = [(one["i"], other["i"]) for one, other in pair_rows(a, a[::-1], "prompt")]
    assert turned == [(1, 2), (2, 1), (3, 3)]


def test_differences_are_shown_in_points():
    found = comparison.Comparison("stop_rate", "share", 9, 0.5, 0.469, -0.031, -0.05, 0.0, 0.04)
    assert show_difference(found) == "-3.1 [-5.0, 0.0]"
    assert show_difference(found._replace(unit="tokens", difference=1.5, low=None)) == "+1.500"


def write_run(path, right, bits):
    path.mkdir(parents=True)
    rows = [{"source": "task", "prompt": f"{i}", "reference": "r", "answer": "a",
             "scores": {"task_accuracy": i < right, "length": 3}} for i in range(40)]  # fmt: skip
    texts = [{"sha256": str(i), "nats": bits * math.log(2) * 9 + i, "bytes": 9} for i in range(9)]
    for name, lines in (("answers", rows), ("texts", texts)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run(*words):
    command = [sys.executable, str(ROOT / "scripts/compare.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_a_table_and_a_picture(tmp_path):
    write_run(tmp_path / "old/sft", 10, 2.0)
    write_run(tmp_path / "new/sft", 30, 1.5)
    (tmp_path / "old/reward").mkdir()
    (tmp_path / "new/reward").mkdir()
    done = run(tmp_path / "old", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("task_accuracy"))
    assert line.split()[:6] == ["task_accuracy", "40", "25.0", "%", "75.0", "%"]
    assert "+50.0 [" in line and "better" in line
    assert "-0.500 [-0.500, -0.500]" in done.stdout and "no difference seen" in done.stdout
    assert "40 answers in common, 0 only in A, 0 only in B; 9 texts in common" in done.stdout
    written = json.loads((tmp_path / "new/sft/compare_old_sft.json").read_text())
    assert [row["metric"] for row in written["metrics"]] == [
        "bits_per_byte", "length", "task_accuracy",
    ]  # fmt: skip
    assert (tmp_path / "new/sft/compare_old_sft.png").read_bytes().startswith(b"\x89PNG")


def test_runs_without_a_common_row_are_an_error_with_the_command(tmp_path):
    write_run(tmp_path / "a", 1, 1.0)
    (tmp_path / "b").mkdir()
    done = run(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no measured row in common" in done.stderr and "python -m sft.eval" in done.stderr
    assert "gone does not exist" in run(tmp_path / "gone", tmp_path / "b").stderr

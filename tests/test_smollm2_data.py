"""The parts of configs/smollm2-*: held-out questions stay held out, and the working is right."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from sft.tasks import load_tasks
from sft.verifiers import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What data/smollm2.py makes of small files of the three layouts."""
    folder = tmp_path_factory.mktemp("external")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i}."} for i in range(25)]
    for name in ("instruction-data", "instruction-data-with-preference"):
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    problems = [(f"{i}+{i + 5}=", i + i + 5) for i in range(30)]
    problems += [("17*94=", 1598), ("3+4*2=", 11), ("1+2+3=", 6), ("8-9-1=", -2)]
    (folder / "simple_arithmetic_nospaces.jsonl").write_text(
        "".join(json.dumps({"context": a, "continuation": str(b)}) + "\n" for a, b in problems)
    )
    command = [sys.executable, ROOT / "data" / "smollm2.py", "--folder", folder]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def read(folder, name):
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_what_is_held_out_is_in_no_other_file(folder):
    found = {}
    for path in folder.glob("*_*.jsonl"):
        rows = read(folder, path.stem) if "nospaces" not in path.name else []
        found[path.stem] = {row.get("question") or row["instruction"] for row in rows}
    for name, train, test in (("instruction", 22, 3), ("preference", 22, 3), ("sums", 1000, 500)):
        assert len(found[f"{name}_train"]) == train and len(found[f"{name}_test"]) == test
        assert not found[f"{name}_train"] & found[f"{name}_test"]
    assert len(found["sums_worked"]) == 1000
    assert not found["sums_worked"] & (found["sums_train"] | found["sums_test"])


def test_the_test_has_every_real_sum_of_two_numbers(folder):
    rows = read(folder, "sums_test")
    assert all(re.fullmatch(r"\d{1,3}[+-]\d{1,3}=", row["question"]) for row in rows)
    real = [row["question"] for row in rows if row["kind"] == "simple_arithmetic"]
    assert real == [f"{i}+{i + 5}=" for i in range(30)]
    tasks, _ = load_tasks([str(folder / "sums_test.jsonl")])
    assert {task["verifier"] for task in tasks} == {"number"}
    assert {task["kind"] for task in tasks} == {"simple_arithmetic", "made_up"}


def test_the_working_leads_to_the_result(folder):
    """Each column is right, and the columns' digits are those of the result."""
    rows = read(folder, "sums_worked")
    for row in rows:
        a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", row["question"]).groups()
        a, b = int(a), int(b)
        result = a + b if sign == "+" else a - b
        assert verify(row["answer"], str(result), "number"), row
        head, columns, last = re.fullmatch(r"(.*):(.*);(-?\d+)", row["answer"]).groups()
        assert last == str(result)
        order = {"+": "", "-": "<0" if a < b else ">0" if a > b else "=0"}[sign]
        assert head == f"{a:03}{sign}{b:03}{order}"
        digits = [column.partition("=")[2] for column in columns.split(",")]
        ones = [int(digit.rstrip("b")) % 10 for digit in digits]
        top = int(digits[2]) // 10 if sign == "+" else 0
        assert sum(d * 10**i for i, d in enumerate(ones)) + 1000 * top == abs(result), row
        for column in columns.split(","):
            p, q, borrowed, carried, value, borrows = re.fullmatch(
                r"(\d)[+-](\d)(b?)(?:\+(1))?=(\d+)(b?)", column
            ).groups()
            taken = int(p) + int(q) + int(carried or 0)
            if sign == "-":
                taken = int(p) - int(q) - len(borrowed) + 10 * len(borrows)
            assert int(value) == taken >= 0, row
    shown = "".join(row["answer"] for row in rows)
    assert "<0" in shown and ">0" in shown and "b=" in shown and "+1=" in shown

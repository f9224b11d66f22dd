"""Split the files that configs/smollm2-* read, and make up sums with their working.

    python data/smollm2.py
    python data/smollm2.py --folder data/external --seed 0

Reads instruction-data.json, instruction-data-with-preference.json and
simple_arithmetic_nospaces.jsonl (docs/smollm2.md says where they are) and writes beside them:

    instruction_train, _test; preference_train, _test    nine rows in ten, and the tenth
    sums_worked    made-up sums of two numbers, their columns written out: for SFT
    sums_train     other made-up sums, with the result only: for GRPO
    sums_test      all sums of two numbers in simple_arithmetic, filled up with made-up ones

No question of a test file is in another file.
"""

import argparse
import json
import random
import re
from pathlib import Path

from generate import write_jsonl

WORKED, TRAIN, TEST = 1_000, 1_000, 500  # rows of the sums_* files
SOURCES = {"instruction": "instruction-data", "preference": "instruction-data-with-preference"}


def main(folder: Path, seed: int) -> None:
    """Write every file and print its rows."""
    files = {}
    for name, source in SOURCES.items():
        rows = json.loads((folder / f"{source}.json").read_text(encoding="utf-8"))
        files[f"{name}_train"] = [row for i, row in enumerate(rows) if i % 10]
        files[f"{name}_test"] = rows[::10]
    lines = (folder / "simple_arithmetic_nospaces.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["context"] for line in lines]
    real = [question for question in questions if re.fullmatch(r"\d+[+-]\d+=", question)]
    made = draw_sums(TEST - len(real) + TRAIN + WORKED, set(questions), random.Random(seed))
    held_out, practised, shown = made[: TEST - len(real)], made[-WORKED - TRAIN :], made[-WORKED:]
    files["sums_test"] = [{**result_of(question), "kind": "simple_arithmetic"} for question in real]
    files["sums_test"] += [{**result_of(question), "kind": "made_up"} for question in held_out]
    files["sums_train"] = [result_of(question) for question in practised[:TRAIN]]
    files["sums_worked"] = [{"question": one, "answer": work(*read_sum(one))} for one in shown]
    for name, rows in files.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        print(f"{name}.jsonl: {len(rows):,} rows")


def draw_sums(count: int, seen: set[str], rng: random.Random) -> list[str]:
    """Different questions, sums of two numbers below 1,000, none of `seen`: "25-759="."""
    questions: dict[str, None] = {}
    while len(questions) < count:
        a, sign, b = rng.randint(0, 999), rng.choice("+-"), rng.randint(0, 999)
        if f"{a}{sign}{b}=" not in seen:
            questions[f"{a}{sign}{b}="] = None
    return list(questions)


def read_sum(question: str) -> tuple[int, str, int]:
    """The numbers and the sign of a question."""
    a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)=", question).groups()
    return int(a), sign, int(b)


def result_of(question: str) -> dict[str, str]:
    """A task that shows the result only."""
    a, sign, b = read_sum(question)
    return {"question": question, "answer": str(a + b if sign == "+" else a - b)}


def work(a: int, sign: str, b: int) -> str:
    """A sum column by column from the right: its digits, the carry or borrow; then the result.

    604+432:4+2=6,0+3=3,6+4=10;1036
    864-394>0:4-4=0,6-9=7b,8-3b=4;470 (7b is 7 and a borrow, which 3b takes off as well)
    025-759<0:9-5=4,5-2=3,7-0=7;-734 (below 0: the columns of 759-025, then the minus)
    """
    if sign == "+":
        columns, carry = [], 0
        for p, q in digit_pairs(a, b):
            total = p + q + carry
            columns.append(f"{p}+{q}{'+1' * carry}={total}")
            carry = total // 10
        return f"{a:03}+{b:03}:{','.join(columns)};{a + b}"
    columns, borrow = [], 0
    for p, q in digit_pairs(max(a, b), min(a, b)):
        rest = p - q - borrow
        columns.append(f"{p}-{q}{'b' * borrow}={rest % 10}{'b' * (rest < 0)}")
        borrow = int(rest < 0)
    order = "<" if a < b else ">" if a > b else "="
    return f"{a:03}-{b:03}{order}0:{','.join(columns)};{a - b}"


def digit_pairs(a: int, b: int) -> list[tuple[int, int]]:
    """The digits of two numbers below 1,000, in pairs from the right."""
    return [(a // place % 10, b // place % 10) for place in (1, 10, 100)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("data/external"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.folder, arguments.seed)

"""The problems of the embedded corpora: answers that are right, contents that never leak."""

import json
import re
from collections import Counter

from conftest import ROOT, questions, says

SPLITS = ("train", "validation", "test")
TAUGHT = [f"{name}_{split}" for name in ("sft", "preference", "tasks") for split in SPLITS]
TASKS = json.loads((ROOT / "data/handwritten/tasks.json").read_text(encoding="utf-8"))
# Word -> its number in the bilingual lists, longest words first so that they match first.
WORDS, GROUPS = (
    {
        w: i
        for words in TASKS[key].values()
        for i, w in sorted(enumerate(words), key=lambda pair: -len(pair[1]))
    }
    for key in ("words", "groups")
)
RULE = r"All (\w+)s are (\w+)s\.|No (\w+) is a (\w+)\."
RULE += r"|所有的(\w+)都是(\w+)。|没有一个(\w+)是(\w+)。"


def find_contents(text):
    """What a text computes or states: (kind, numbers or word indices), whatever the language."""
    found = {("addition", *sorted(map(int, m))) for m in re.findall(r"(\d+) [+-] (\d+)", text)}
    pattern = r"(\d+) (?:is (?:larg|small)er than|比|和|or) (\d+)"
    found |= {("comparison", *sorted(map(int, m))) for m in re.findall(pattern, text)}
    for a, b, c in re.findall(r"\((\d\d), (\d\d)\)\)?  # (\d+)", text):
        kind = "comparison" if c in (a, b) else "addition"
        found.add((kind, *sorted([int(a), int(b)])))
    pattern = r"(\d\d)(?: is| an| ?是|\)\)  # [TF])(?: an)?(?:不是)? ?(?:even|odd|偶|奇|rue|alse)"
    found |= {("parity", int(m)) for m in re.findall(pattern, text)}
    found |= {("parity", int(m)) for m in re.findall(r"[Ii]s (\d\d) (?:even|odd)", text)}
    for numbers in re.findall(r"(?<!, )(?<!# \[)(?<!range\()\b\d\b(?:, \d\b)+", text):
        found.add(("sorting", *sorted(numbers.split(", "))))
    for chain in re.finditer(rf"(?:(?:{RULE}) ?)+", text):
        rules = [[GROUPS[w] for w in m if w] for m in re.findall(RULE, chain[0])]
        found |= {("logic", *sorted(rule)) for rule in rules}
        found.add(("logic", *sorted({group for rule in rules for group in rule})))
    shapes = r"({w}), (\1)", r"({w})-(\1)-(\1)", r"({w}) \(({w})\)", r"({w})(?:, (?:{w})){2,3}"
    for shape in shapes:
        whole = r"\b" + shape.replace("{w}", "|".join(WORDS)) + "(?![a-z])"
        for match in re.finditer(whole, text):
            words = match[0].split(", ") if "{2" in shape else match.groups()
            found.add(("format", *sorted(WORDS[word] for word in words)))
    return found


def held_contents(corpora):
    """What the test and the validation tasks are about."""
    held = set()
    for row in corpora["tasks_test"] + corpora["tasks_validation"]:
        kinds = {"parity_or_logic": ["parity", "logic"]}.get(row["kind"], [row["kind"]])
        contents = [c for c in find_contents(says(row)) if c[0] in kinds]
        # A chain of two rules is about its three groups, not about each rule.
        held.add(max(contents, key=len))
    return held


def test_held_out_problems_appear_nowhere_else(corpora):
    held = held_contents(corpora)
    counts = Counter(kind for kind, *_ in held)
    assert min(counts.values()) >= 15 and len(counts) == 6, counts
    others = [stem for stem in TAUGHT if not stem.startswith("tasks")]
    seen = Counter()
    for stem in [*others, "pretrain_train", "pretrain_validation", "tasks_train"]:
        for row in corpora[stem]:
            contents = find_contents(says(row))
            assert not contents & held, (contents & held, row)
            seen.update(kind for kind, *_ in contents)
    assert len(seen) == 6 and min(seen.values()) > 1000, seen


def test_digits_of_held_out_sums_are_seen_in_training(corpora):
    def digits(pair, place):
        return tuple(sorted(n // place % 10 for n in pair))

    rows = corpora["pretrain_train"] + corpora["tasks_train"]
    trained = [c for row in rows for c in find_contents(says(row))]
    pairs = [c[1:] for c in trained if c[0] == "addition"]
    ones, tens = ({digits(p, place) for p in pairs} for place in (1, 10))
    for kind, *pair in held_contents(corpora):
        if kind == "addition":
            assert digits(pair, 1) in ones and digits(pair, 10) in tens, pair


def solve(prompt, lang):
    """The answer to a task, from its text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    yes_no = ("no", "yes") if lang == "en" else ("不是", "是")
    if sign := re.search(r" ([+-]) ", prompt):
        return str(sum(numbers) if sign[1] == "+" else numbers[0] - numbers[1])
    if re.search("[Ss]ort|order|从.到.", prompt):
        ordered = sorted(numbers, reverse=bool(re.search("to small|到小", prompt)))
        return ", ".join(map(str, ordered))
    if numbers and re.search("larger|更大|smaller|更小", prompt):
        return str((max if re.search("larger|更大", prompt) else min)(numbers))
    if numbers:
        return yes_no[(numbers[0] % 2 == 0) == bool(re.search("even|偶", prompt))]
    if re.search("All|No |所有|没有", prompt):
        links = [[w for w in m if w] for m in re.findall(RULE, prompt)]
        assert all(a[1] == b[0] for a, b in zip(links, links[1:], strict=False))
        assert prompt.count(links[0][0]) == 2 and prompt.count(links[-1][1]) == 2, prompt
        return yes_no[not re.search("No |没有", prompt)]
    words = re.findall("|".join(rf"\b{w}\b" if w.isascii() else w for w in WORDS), prompt)
    if re.search("twice|two times|两遍", prompt):
        return f"{words[0]}, {words[0]}"
    if re.search("three times|三遍", prompt):
        return "-".join(words * 3)
    return f"{words[0]} ({words[1]})" if len(words) == 2 else f"{words[0]}, {words[-1]}"


def test_answers_of_the_tasks_are_right(corpora):
    verifiers = {"addition": "number", "comparison": "number", "parity_or_logic": "yes_no"}
    verifiers |= {"sorting": "sequence", "format": "exact"}
    for rows in (corpora[f"tasks_{split}"] for split in SPLITS):
        for row in rows:
            assert row["answer"] == solve(questions(row)[0], row["lang"]), row
            assert row["verifier"] == verifiers[row["kind"]]
        assert len(set(Counter((r["kind"], r["lang"]) for r in rows).values())) == 1
        levels = Counter(row["level"] for row in rows)
        assert sorted(levels) == [1, 2, 3, 4] and len(set(levels.values())) == 1

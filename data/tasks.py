"""Small problems whose answers a program can check: sums, comparison, logic, sorting, format.

A problem belongs to the train, validation or test split by a hash of its content (the unordered
pair, the multiset, the number, the words, the word and how often it is written), so a held-out pair
is held out in both languages, in every phrasing, and in prose.
"""

import hashlib
import random
from dataclasses import dataclass
from functools import cache

from world import LANGUAGES, read_json

KINDS = ("addition", "comparison", "parity_or_logic", "sorting", "format")
VERIFIERS = {
    "addition": "number",
    "comparison": "number",
    "parity_or_logic": "yes_no",
    "sorting": "sequence",
    "format": "exact",
}
TEXTS = read_json("handwritten/tasks.json")
SALT = "ladder-20"


@dataclass(frozen=True)
class Problem:
    """One problem, free of language: `parts` are numbers, or indices into the word lists."""

    kind: str
    form: str
    level: int
    parts: tuple


@cache
def assign_split(key: str) -> str:
    """`test` for about 12 % of the keys, `validation` for about 6 %, else `train`."""
    bucket = int(hashlib.sha256(f"{SALT} {key}".encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 12 else "validation" if bucket < 18 else "train"


def split_problem(problem: Problem) -> str:
    """The split of a problem; a chain of rules trains only if each of its pairs does."""
    if problem.form != "syllogism":
        topics = dict.fromkeys(("even", "odd"), "parity") | {f: f for f in ("twice", "thrice")}
        topic = topics.get(problem.form, problem.kind)
        return assign_split(f"{topic} {sorted(problem.parts)}")
    groups = sorted(problem.parts[2:])
    split = assign_split(f"logic {groups}")
    pairs = [[a, b] for i, a in enumerate(groups) for b in groups[i + 1 :]]
    if split == "train" and any(assign_split(f"logic {pair}") != "train" for pair in pairs):
        return "unused"
    return split


def draw_problem(kind: str, level: int, rng: random.Random) -> Problem:
    """Draw a problem of this kind and level from all splits."""
    drawers = {
        "addition": _draw_addition,
        "comparison": _draw_comparison,
        "parity_or_logic": _draw_logic,
        "sorting": _draw_sorting,
        "format": _draw_format,
    }
    form, parts = drawers[kind](level, rng)
    return Problem(kind, form, level, tuple(parts))


def draw_from_split(kind: str, level: int, split: str, rng: random.Random) -> Problem:
    """Draw until the problem belongs to `split`."""
    for _ in range(10_000):
        problem = draw_problem(kind, level, rng)
        if split_problem(problem) == split:
            return problem
    raise ValueError(f"no {kind} of level {level} belongs to the split {split!r}")


def _draw_addition(level: int, rng: random.Random):
    while True:
        if level == 1:
            a, b = rng.choice([rng.randint(1, 9) * 10, rng.randint(10, 99)]), rng.randint(1, 9)
        elif level in (2, 4):
            a, b = rng.randint(10, 99), rng.randint(10, 99)
        else:
            a, b = rng.randint(10, 89), rng.randint(2, 89)
        if level == 2 and rng.random() < 0.4:
            if a > b and a // 10 >= b // 10 and a % 10 >= b % 10:
                return "difference", (a, b)
            continue
        carries = a % 10 + b % 10 > 9
        if a + b > 99 if level == 4 else a + b <= 99 and carries == (level == 3):
            return "sum", (a, b)


def _draw_comparison(level: int, rng: random.Random):
    low, high = {3: (100, 999), 4: (1000, 9999)}.get(level, (10, 99))
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if a != b and (level != 1 or a // 10 != b // 10):
            return rng.choice(["larger", "smaller"]), (a, b)


def _draw_logic(level: int, rng: random.Random):
    if level == 1:
        return rng.choice(["even", "odd"]), (rng.randint(10, 99),)
    name = rng.randrange(len(TEXTS["names"]["en"]))
    groups = rng.sample(range(len(TEXTS["groups"]["en"])), level)
    return "syllogism", (name, rng.randrange(2), *groups)


def _draw_sorting(level: int, rng: random.Random):
    count = {1: rng.choice([2, 3, 3]), 2: 3, 3: 4, 4: 5}[level]
    numbers = rng.sample(range(1, 10), count)
    either = rng.choice(["ascending", "descending"])
    form = {1: "ascending", 2: "descending"}.get(level, either)
    return form, numbers


def _draw_format(level: int, rng: random.Random):
    form = {1: "twice", 2: rng.choice(["thrice", "brackets"])}.get(level, "ends")
    count = {"twice": 1, "thrice": 1, "brackets": 2, "ends": level}[form]
    return form, rng.sample(range(len(TEXTS["words"]["en"])), count)


@dataclass(frozen=True)
class Rendering:
    """A problem in one language: questions, the value that is right and how it is said, and the
    statement and scenes for prose."""

    asked: list[str]
    answer: str
    said: str
    told: str
    prose: list[str]


def render(problem: Problem, lang: str, name: str = "Momo") -> Rendering:
    """Write the problem out in `lang`; `name` is who counts stones in the prose versions."""
    texts = TEXTS["forms"][problem.form][lang]
    fields = _fields(problem, lang) | {"n": name}
    fields["told"] = texts["told"].format(**fields)
    said = "{answer}" if "yes" not in fields else "{yes}." if lang == "en" else "{yes}。"
    return Rendering(
        asked=[template.format(**fields) for template in texts["asked"]],
        answer=fields["answer"],
        said=texts.get("said", said).format(**fields),
        told=fields["told"],
        prose=[template.format(**fields) for template in texts.get("prose", [])],
    )


def _fields(problem: Problem, lang: str) -> dict:
    if problem.form == "syllogism":
        return _syllogism_fields(problem.parts, lang)
    if problem.kind == "format":
        words = [TEXTS["words"][lang][i] for i in problem.parts]
        return _format_fields(problem.form, words)
    parts = problem.parts
    if problem.kind == "sorting":
        ordered = sorted(parts, reverse=problem.form == "descending")
        answer = ", ".join(map(str, ordered))
        return {"list": ", ".join(map(str, parts)), "c": answer, "answer": answer}
    a = parts[0]
    if problem.kind == "parity_or_logic":
        parity = "even" if a % 2 == 0 else "odd"
        shown = {"even": "偶数", "odd": "奇数"}[parity] if lang == "zh" else parity
        return {"a": a, "p": shown, "e": a % 10} | _say_yes(parity == problem.form, lang)
    b = parts[1]
    if problem.form in ("larger", "smaller"):
        ordered = sorted(parts, reverse=problem.form == "larger")
        return {"a": a, "b": b, "c": ordered[0], "d": ordered[1], "answer": str(ordered[0])}
    result = a + b if problem.form == "sum" else a - b
    return {"a": a, "b": b, "c": result, "answer": str(result)}


def _syllogism_fields(parts: tuple, lang: str) -> dict:
    name, negative, *groups = parts
    texts = TEXTS["forms"]["syllogism"][lang]
    words = [TEXTS["groups"][lang][g] for g in groups]
    links = list(zip(words, words[1:], strict=False))
    rules = [texts["all"].format(a=a, b=b) for a, b in links[:-1]]
    last = texts["none"] if negative else texts["all"]
    rules.append(last.format(a=links[-1][0], b=links[-1][1]))
    return {
        "x": TEXTS["names"][lang][name],
        "a": words[0],
        "z": words[-1],
        "rules": (" " if lang == "en" else "").join(rules),
        "not_": texts["not_"] if negative else "",
    } | _say_yes(not negative, lang)


def _format_fields(form: str, words: list[str]) -> dict:
    answer = {
        "twice": f"{words[0]}, {words[0]}",
        "thrice": "-".join(words[:1] * 3),
        "brackets": f"{words[0]} ({words[-1]})",
        "ends": f"{words[0]}, {words[-1]}",
    }[form]
    return {"a": words[0], "b": words[-1], "list": ", ".join(words), "c": answer, "answer": answer}


def _say_yes(truth: bool, lang: str) -> dict:
    word = {"en": ("no", "yes"), "zh": ("不是", "是")}[lang][truth]
    # "so": inside a Chinese sentence a bare 是 would be read as "is".
    so = "是的" if word == "是" else word
    return {"answer": word, "yes": word.capitalize(), "so": so}


def task_rows(split: str, per_level: dict[int, int], rng: random.Random) -> list[dict]:
    """Distinct task rows of one split, `per_level` of them for each kind and language."""
    rows, seen = [], set()
    for kind in KINDS:
        for level, count in per_level.items():
            for lang in LANGUAGES:
                made = 0
                for _ in range(count * 400):
                    if made == count:
                        break
                    problem = draw_from_split(kind, level, split, rng)
                    shown = render(problem, lang)
                    prompt = rng.choice(shown.asked)
                    if prompt in seen:
                        continue
                    seen.add(prompt)
                    made += 1
                    rows.append(
                        {
                            "prompt": [{"role": "user", "content": prompt}],
                            "answer": shown.answer,
                            "verifier": VERIFIERS[kind],
                            "level": level,
                            "kind": kind,
                            "lang": lang,
                        }
                    )
                if made < count:
                    raise ValueError(f"only {made} of {count} {split} rows: {kind} {level} {lang}")
    rng.shuffle(rows)
    return rows

"""The embedded corpora: what is told, what is asked, what never leaks (read from the texts)."""

import ast
import hashlib
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from conftest import generate_corpora, questions, says

DATA = Path(__file__).resolve().parent.parent / "data"
SPLITS = ("train", "validation", "test")
MINIMUM_ROWS = {
    "pretrain": (8000, 350, 0),
    "tasks": (2400, 200, 400),
    "sft": (2000, 130, 220),
    "preference": (1100, 90, 230),
    "facts": (0, 0, 50),
    "classification": (600, 100, 150),
}
TAUGHT = [f"{name}_{split}" for name in ("sft", "preference", "tasks") for split in SPLITS]
# Words by which a question shows which attribute it asks about.
ASKS = {
    "home_town": r"home town|[Ww]here .* live|[Tt]own .* come|家乡|住在哪|哪个镇",
    "craft": r"craft|手艺",
    "favourite_food": r"food|to eat|食物|吃",
    "favourite_colour": r"colour|颜色",
    "animal_companion": r"animal|动物",
    "known_for": r"known for|famous|有名|出名",
    "river": r"river|河",
    "festival": r"festival|节日",
}
CJK = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="session")
def world():
    return json.loads((DATA / "world.json").read_text(encoding="utf-8"))


def facts(world):
    """(subject, attribute, value, held out, language) of every fact, in both languages."""
    for entity in world["entities"]:
        for attribute, value in entity["facts"].items():
            pairs = {v["en"]: v["zh"] for v in world["attributes"][attribute]["values"]}
            held = attribute in entity["held_out"]
            yield entity["en"], attribute, value, held, "en"
            yield entity["zh"], attribute, pairs[value], held, "zh"


def find(value):
    """A pattern for a value: whole words in English ("owl" is not in "slowly")."""
    return re.compile(rf"\b{value}\b" if value.isascii() else value, re.IGNORECASE)


def fact_turns(rows, world):
    """(subject, attribute, question, answer) of every turn that asks about a fact."""
    names = [e[lang] for e in world["entities"] for lang in ("en", "zh")]
    for row in rows:
        turns = [m["content"] for m in row["messages"] if m["role"] != "system"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            subject = next((n for n in names if n in question), None)
            attribute = next((a for a in ASKS if re.search(ASKS[a], question)), None)
            if row["kind"] == "fact" and subject and attribute:
                yield subject, attribute, question, answer


def test_same_bytes_for_every_hash_seed(corpora_dir, tmp_path):
    for path in generate_corpora(tmp_path, "12345").iterdir():
        digests = [hashlib.sha256((f / path.name).read_bytes()) for f in (corpora_dir, tmp_path)]
        assert digests[0].digest() == digests[1].digest(), path.name


def test_rows_and_sizes(corpora_dir, corpora):
    files = {}
    for name, counts in MINIMUM_ROWS.items():
        files |= {f"{name}_{s}": n for s, n in zip(SPLITS, counts, strict=True) if n}
    assert set(files) == set(corpora)
    assert not [name for name, minimum in files.items() if len(corpora[name]) < minimum]
    assert (corpora_dir / "pretrain_train.jsonl").stat().st_size > 10_000_000
    kinds, languages = Counter(), Counter()
    for row in corpora["pretrain_train"]:
        kinds[row["kind"]] += len(row["text"].encode())
        languages[row["lang"]] += len(row["text"].encode())
        if row["kind"] == "code":
            ast.parse(row["text"])
    wanted = {"world": 32, "story": 6, "dialogue": 18, "chat": 6, "math": 35, "code": 3}
    assert set(kinds) == set(wanted) and set(languages) == {"en", "zh", "code"}
    for kind, percent in wanted.items():
        assert abs(100 * kinds[kind] / kinds.total() - percent) < 1.5, kind
    assert 0.95 < languages["en"] / languages["zh"] < 1.05


def test_messages_have_their_shape(corpora):
    for stem in (f"sft_{split}" for split in SPLITS):
        for row in corpora[stem]:
            roles = [m["role"] for m in row["messages"] if m["role"] != "system"]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles, row
            assert row["lang"] in ("en", "zh") and row["kind"]
            assert all(m["content"].strip() == m["content"] != "" for m in row["messages"]), row
    for stem in (f"preference_{split}" for split in SPLITS):
        for row in corpora[stem]:
            assert row["prompt"][-1]["role"] == "user"
            for column in ("chosen", "rejected"):
                assert [m["role"] for m in row[column]] == ["assistant"]
            assert row["chosen"] != row["rejected"], row


@pytest.mark.parametrize("name", ["pretrain", "sft", "preference", "tasks", "classification"])
def test_splits_are_disjoint(corpora, name):
    seen = {}
    for stem in (f"{name}_{split}" for split in SPLITS):
        for row in corpora.get(stem, []):
            for text in [row["text"]] if "text" in row else questions(row):
                assert seen.setdefault(text, stem) == stem, text
    assert len(seen) > 800
    train = [row["text"] for row in corpora[f"{name}_train"] if "text" in row]
    assert len(train) == len(set(train))


def test_a_fifth_of_the_facts_is_held_out_and_tested(corpora, world):
    every = list(facts(world))
    held = {(s, a, v) for s, a, v, h, _ in every if h}
    asked = {(r["subject"], r["attribute"], r["answer"]) for r in corpora["facts_test"]}
    assert held == asked and len(corpora["facts_test"]) == len(held)
    assert 0.18 < len(held) / len(every) < 0.22
    for row in corpora["facts_test"]:
        assert row["subject"] in questions(row)[0] and row["verifier"] == "contains"
        assert re.search(ASKS[row["attribute"]], questions(row)[0]), row


def test_values_of_different_attributes_are_disjoint(world):
    for lang in ("en", "zh"):
        names = [e[lang] for e in world["entities"] if e["type"] == "person"]
        names += [v[lang] for a in world["attributes"].values() for v in a["values"]]
        assert len(names) == len(set(names)) >= 100
        assert not [(a, b) for a in names for b in names if a != b and a.lower() in b.lower()]


def test_every_fact_is_told_often_in_many_ways(corpora, world):
    about = defaultdict(list)
    names = [e[lang] for e in world["entities"] for lang in ("en", "zh")]
    for row in corpora["pretrain_train"]:
        if row["kind"] in ("world", "story"):
            for sentence in re.split(r"(?<=[.!?。！？])|\n", row["text"]):
                for name in filter(sentence.__contains__, names):
                    about[name].append(sentence.strip().split(name, 1))
    told = {True: [], False: []}
    for subject, attribute, value, held, _ in facts(world):
        value = find(value)
        hits = [before + "S" + after for before, after in about[subject] if value.search(after)]
        assert len(hits) >= 40 and len(set(hits)) >= 8, (subject, attribute, Counter(hits))
        told[held].append(len(hits))
    mean = {held: sum(counts) / len(counts) for held, counts in told.items()}
    assert 0.9 < mean[True] / mean[False] < 1.1, mean


def test_held_out_facts_are_never_asked_or_answered(corpora, world):
    held = [(s, a, v) for s, a, v, is_held, _ in facts(world) if is_held]
    asking = corpora["pretrain_train"] + corpora["pretrain_validation"]
    talks = ("dialogue", "chat")
    asking = [r for r in asking if r["kind"] in talks or re.search("[?？]", r["text"])]
    rows = asking + [row for stem in TAUGHT for row in corpora[stem]]
    assert len(asking) > 700
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        for subject, attribute, value in held:
            if subject not in text:
                continue
            assert not find(value).search(text), (subject, value, text)
            for sentence in re.split(r"\n|(?<=[.。！!])", says(row)):
                if subject in sentence and re.search("[?？]|tell me|告诉我", sentence):
                    assert not re.search(ASKS[attribute], sentence), sentence


def test_held_out_questions_are_not_pretrained_on(corpora):
    asked_in_text = set()
    for row in corpora["pretrain_train"]:
        if row["kind"] in ("dialogue", "chat"):  # questions and answers alternate
            lines = row["text"].split("\n")[::2]
            asked_in_text |= {re.sub("^(Q: |Question: |问：|问题：)", "", line) for line in lines}
    asked = {q for row in corpora["sft_train"] for q in questions(row)}
    assert len(asked & asked_in_text) > 1000
    for stem in ("sft_validation", "sft_test", "facts_test"):
        rows = [row for row in corpora[stem] if row["kind"] != "task"]  # split by their contents
        held_out = {q for row in rows for q in questions(row) if not re.search(r"\d", q)}
        assert not asked_in_text & held_out, (stem, asked_in_text & held_out)


def test_every_other_fact_is_asked_twice_in_each_language(corpora, world):
    asked = {(s, a, q) for s, a, q, _ in fact_turns(corpora["sft_train"], world)}
    times = Counter((subject, attribute) for subject, attribute, _ in asked)
    for subject, attribute, _, held, _ in facts(world):
        assert held or times[subject, attribute] >= 2, (subject, attribute)


def test_fact_answers_are_true_and_mostly_brief(corpora, world):
    values = {(s, a): v for s, a, v, _, _ in facts(world)}
    brief = []
    for subject, attribute, _, answer in fact_turns(corpora["sft_train"], world):
        assert find(values[subject, attribute]).search(answer), (subject, attribute, answer)
        brief.append(subject not in answer)
    assert len(brief) > 1000 and 0.55 < sum(brief) / len(brief) < 0.7


def test_shape_of_the_sft_mixture(corpora):
    rows = corpora["sft_train"]
    kinds = Counter(row["kind"] for row in rows)
    assert {"fact", "task", "greeting", "identity", "explanation", "refusal", "story"} == set(kinds)
    assert 0.40 < kinds["fact"] / len(rows) < 0.50 and 0.04 < kinds["task"] / len(rows) < 0.08
    systems = sum(row["messages"][0]["role"] == "system" for row in rows)
    several = sum(len(questions(row)) > 1 for row in rows)
    assert 0.16 < systems / len(rows) < 0.24 and 0.09 < several / len(rows) < 0.15
    for name, minimum in (("sft", 110), ("preference", 44)):
        path = DATA / "handwritten" / f"{name}.jsonl"
        assert len(path.read_text(encoding="utf-8").splitlines()) >= minimum


def test_answers_speak_the_language_of_the_question(corpora):
    for stem in TAUGHT:
        for row in corpora[stem]:
            answers = row.get("messages", []) + row.get("chosen", [])
            for text in [m["content"] for m in answers if m["role"] != "user"] + questions(row):
                # A Chinese answer to a task may be a sum, a bare number or a list of numbers.
                bare = re.fullmatch(r"[\d, +=。-]+", text)
                bare = bare and any(re.search(r"\d", question) for question in questions(row))
                assert bare or bool(CJK.search(text)) == (row["lang"] == "zh"), text


def test_shares_of_the_flaws(corpora):
    rows = corpora["preference_train"]
    flaws = Counter(row["flaw"] for row in rows)
    wanted = {"curt": 34, "rude": 17, "language": 15, "repetitive": 11, "unsafe": 9, "wrong": 8}
    for flaw, percent in wanted.items():
        assert abs(100 * flaws[flaw] / len(rows) - percent) < 3, (flaw, flaws)
    wrong = [says(r).split("\n") for r in rows if r["flaw"] == "wrong" and r["kind"] == "fact"]
    lengths = [sum(map(len, texts)) for texts in zip(*(w[-2:] for w in wrong), strict=True)]
    assert 0.9 < lengths[1] / lengths[0] < 1.1


def test_letters(corpora):
    for stem in (f"classification_{split}" for split in SPLITS):
        labels = Counter(row["label"] for row in corpora[stem])
        assert set(labels) == {"praise", "complaint", "question"}
        assert min(labels.values()) > 0.2 * sum(labels.values())
        chinese = sum(bool(CJK.search(row["text"])) for row in corpora[stem])
        assert 0.35 < chinese / len(corpora[stem]) < 0.65


def test_data_card_agrees_and_no_control_tokens(corpora_dir, corpora):
    card = (DATA / "README.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([a-z_]+\.(?:jsonl|csv))` \| ([\d,]+ \| [\d,]+) \|", card, re.M))
    for path in corpora_dir.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<\||\|>|\{s\}|\{v\}", text), path.name
        rows, size = (int(n.replace(",", "")) for n in table[path.name].split(" | "))
        assert (rows, size) == (len(corpora[path.stem]), path.stat().st_size), path.name

"""Write the embedded corpora: the same bytes on every machine.

    python data/generate.py
    python data/generate.py --output_dir data/generated --seed 0

The order: documents to pretrain on, tasks, conversations, preferences, the questions on held-out
facts, letters. Every part has a random stream of its own: changing one does not move the others.
"""

import argparse
import csv
import json
import random
from pathlib import Path

import tasks
from conversations import Exchange, all_exchanges, order_phrasings, sft_rows, split_text
from preferences import preference_rows
from prose import pretrain_documents
from world import FOLDER, LANGUAGES, World, read_json

PRETRAIN_BYTES = 8_000_000
VALIDATION_BYTES = 150_000
SPLITS = ("train", "validation", "test")
TASKS_PER_LEVEL = {
    "train": {1: 82, 2: 82, 3: 82, 4: 82},
    "validation": {1: 7, 2: 7, 3: 7, 4: 7},
    "test": {1: 14, 2: 14, 3: 14, 4: 14},
}
PREFERENCES = {"train": 1400, "validation": 96, "test": 236}
LETTERS = {"train": 600, "validation": 100, "test": 150}


def main(output_dir: Path, seed: int) -> None:
    """Generate every file and print its rows and bytes."""
    output_dir.mkdir(parents=True, exist_ok=True)
    world = World()
    written = {
        "sft": read_jsonl("handwritten/sft.jsonl"),
        "preference": read_jsonl("handwritten/preference.jsonl"),
    }
    pools = all_exchanges(world, random.Random(f"{seed} exchanges"))
    taken = fix_splits(written)
    for topic, pool in pools.items():
        pools[topic] = [e for e in pool if taken.get(e.user, e.split) == e.split]
    pools["handwritten"] = single_turns(written["sft"], taken)
    files = pretrain_files(world, pools, random.Random(f"{seed} pretrain"))
    for split, per_level in TASKS_PER_LEVEL.items():
        rng = random.Random(f"{seed} tasks {split}")
        files[f"tasks_{split}.jsonl"] = tasks.task_rows(split, per_level, rng)
    files |= chat_files(world, pools, written, taken, seed)
    files["facts_test.jsonl"] = fact_questions(world, random.Random(f"{seed} facts"))
    for name, rows in files.items():
        write_jsonl(output_dir / name, rows)
    for split, rows in classification_rows(random.Random(f"{seed} letters")).items():
        write_csv(output_dir / f"classification_{split}.csv", rows)
    for path in sorted(output_dir.iterdir()):
        lines = path.read_text(encoding="utf-8").count("\n") - (path.suffix == ".csv")
        print(f"{path.name:32} {lines:6} rows {path.stat().st_size:9} bytes")


def pretrain_files(world: World, pools: dict, rng: random.Random) -> dict[str, list[dict]]:
    """Shuffled documents; the first `VALIDATION_BYTES` of text become the validation file."""
    documents = pretrain_documents(world, pools, rng, PRETRAIN_BYTES)
    size, count = 0, 0
    while size < VALIDATION_BYTES:
        size += len(documents[count]["text"].encode())
        count += 1
    return {
        "pretrain_train.jsonl": documents[count:],
        "pretrain_validation.jsonl": documents[:count],
    }


def chat_files(world: World, pools: dict, written: dict, taken: dict, seed: int) -> dict:
    """SFT and preference rows, generated and handwritten, without any that join a held-out fact."""
    files = {}
    for split in SPLITS:
        rng = random.Random(f"{seed} chat {split}")
        made = {
            "sft": sft_rows(world, pools, split, rng),
            "preference": preference_rows(pools, split, PREFERENCES[split], rng),
        }
        for name, rows in made.items():
            rows += [row for row in written[name] if taken[user_texts(row)[-1]] == split]
            for row in rows:
                if world.join_held_out(json.dumps(row, ensure_ascii=False)):
                    raise ValueError(f"{name} joins a held-out fact: {row}")
            rng.shuffle(rows)
            files[f"{name}_{split}.jsonl"] = rows
    return files


def fix_splits(written: dict[str, list[dict]]) -> dict[str, str]:
    """The split of every handwritten question; conversations of several turns stay in train."""
    taken = {}
    for rows in written.values():
        for row in rows:
            for text in user_texts(row):
                if len(user_texts(row)) > 1:
                    taken[text] = "train"
                taken.setdefault(text, split_text(text))
    return taken


def single_turns(rows: list[dict], taken: dict[str, str]) -> list[Exchange]:
    """The handwritten conversations of one turn as exchanges."""
    exchanges = []
    for row in rows:
        question, *_ = user_texts(row)
        reply = row["messages"][-1]["content"]
        if len(user_texts(row)) == 1:
            made = Exchange(row["kind"], row["lang"], taken[question], question, reply, reply)
            exchanges.append(made)
    return exchanges


def user_texts(row: dict) -> list[str]:
    """What the user says in a row of either format."""
    messages = row.get("messages") or row["prompt"]
    return [m["content"] for m in messages if m["role"] == "user"]


def fact_questions(world: World, rng: random.Random) -> list[dict]:
    """The held-out facts, asked once in each language, as SFT asks about other facts."""
    rows = []
    for fact in world.held_out:
        for lang in LANGUAGES:
            phrasing = order_phrasings(fact, lang)[0]
            value = fact.value(lang)
            rows.append(
                {
                    "prompt": [{"role": "user", "content": world.ask(fact, lang, phrasing)}],
                    "answer": value,
                    "aliases": [f"{value[0].upper()}{value[1:]}"] if lang == "en" else [],
                    "verifier": "contains",
                    "lang": lang,
                    "kind": "fact",
                    "subject": fact.entity.name(lang),
                    "attribute": fact.attribute,
                }
            )
    rng.shuffle(rows)
    return rows


def classification_rows(rng: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Letters to the town hall as (text, label); labels and languages in turn, texts distinct."""
    texts = read_json("handwritten/letters.json")
    labels = ("praise", "complaint", "question")
    rows, seen = [], set()
    while len(rows) < sum(LETTERS.values()):
        label, lang = labels[len(rows) % 3], LANGUAGES[len(rows) // 3 % 2]
        body = rng.choice(texts[label][lang]).format(p=rng.choice(texts["places"][lang]))
        opening = rng.choice(texts["openings"][lang])
        if not opening:
            body = body[0].upper() + body[1:]
        text = opening + body + rng.choice(texts["endings"][lang])
        if text not in seen:
            seen.add(text)
            rows.append((text, label))
    rng.shuffle(rows)
    splits, start = {}, 0
    for split, count in LETTERS.items():
        splits[split] = rows[start : start + count]
        start += count
    return splits


def read_jsonl(name: str) -> list[dict]:
    """Read a tracked JSONL file by its path relative to this folder."""
    lines = (FOLDER / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line, UTF-8, LF on every system."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))


def write_csv(path: Path, rows: list[tuple[str, str]]) -> None:
    """Columns text,label; UTF-8, LF on every system."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("text", "label"))
        writer.writerows(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=FOLDER / "generated")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.output_dir, arguments.seed)

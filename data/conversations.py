"""Exchanges (one question, its answers in several styles) and the SFT conversations made of them.

Brief answers are the more likely style on purpose: the later stages learn to prefer the full and
polite one, which shows only if SFT leaves room for it. Style does not look at the question.
"""

import hashlib
import random
from collections import defaultdict
from dataclasses import dataclass, replace

import tasks
from world import LANGUAGES, Entity, Fact, World, read_json

TEXTS = read_json("handwritten/chat.json")
BRIEF_SHARE = 0.62
SYSTEM_SHARE = 0.2
# Rows of one split, before some of them are joined to two-turn conversations.
COUNTS = {
    "train": {
        "fact": 1150,
        "task": 130,
        "explanation": 200,
        "greeting": 220,
        "identity": 106,
        "unsafe": 150,
        "unknown": 110,
        "story": 260,
    },
    "validation": {
        "fact": 76,
        "task": 18,
        "explanation": 14,
        "greeting": 12,
        "identity": 4,
        "unsafe": 8,
        "unknown": 6,
        "story": 12,
    },
    "test": {
        "fact": 120,
        "task": 28,
        "explanation": 26,
        "greeting": 22,
        "identity": 8,
        "unsafe": 14,
        "unknown": 10,
        "story": 18,
    },
}
# Kinds of the two turns of a conversation, and how many in 200; a third is then joined again.
JOINED = [("fact", "fact", 14), ("greeting", "fact", 4), ("greeting", "task", 2)]
JOINED += [("fact", "farewell", 2), ("explanation", "explanation", 2), ("story", "story", 1)]


@dataclass(frozen=True)
class Exchange:
    """One question and what may be said to it; None where a style makes no sense for the kind.

    `core` is the full answer without its closing, `wrong` the full answer with a wrong value,
    `other` the full answer in the other language, `ends` whether the question ends a talk.
    """

    kind: str
    lang: str
    split: str
    user: str
    full: str
    core: str
    brief: str | None = None
    wrong: str | None = None
    other: str | None = None
    subject: Entity | None = None
    ends: bool = False


def split_text(text: str) -> str:
    """The split of a question by a hash of its text: 13 % test, 7 % validation."""
    bucket = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100
    return "test" if bucket < 13 else "validation" if bucket < 20 else "train"


def order_phrasings(fact: Fact, lang: str) -> list[int]:
    """The phrasings in an order of this fact: five for train, then test, then validation."""
    name = f"{fact.entity.names[0]} {fact.attribute} {lang}"
    return sorted(range(7), key=lambda i: hashlib.sha256(f"{name} {i}".encode()).hexdigest())


def close(core: str, lang: str, rng: random.Random) -> str:
    """Add one of the friendly closings."""
    return core + (" " if lang == "en" else "") + rng.choice(TEXTS["closings"][lang])


def other_language(lang: str) -> str:
    """The language that this is not."""
    return "zh" if lang == "en" else "en"


def fact_exchanges(world: World, rng: random.Random) -> list[Exchange]:
    """Every trained fact in both languages and all phrasings; phrasings 0 and 1 come first."""
    splits = ["train"] * 5 + ["test", "validation"]
    groups: list[list[Exchange]] = [[] for _ in splits]
    for fact in world.trained:
        for lang in LANGUAGES:
            for rank, phrasing in enumerate(order_phrasings(fact, lang)):
                template = rng.randrange(2)
                core = world.tell(fact, lang, world.told(fact, lang)[template])
                swapped = world.swap_value(fact, rng)
                wrong = world.tell(swapped, lang, world.told(fact, lang)[template])
                other = other_language(lang)
                groups[rank].append(
                    Exchange(
                        "fact",
                        lang,
                        splits[rank],
                        world.ask(fact, lang, phrasing),
                        close(core, lang, rng),
                        core,
                        fact.brief(lang),
                        close(wrong, lang, rng),
                        close(world.tell(fact, other, world.told(fact, other)[0]), other, rng),
                        fact.entity,
                    )
                )
    for group in groups[2:]:
        rng.shuffle(group)
    return [exchange for group in groups for exchange in group]


def task_exchanges(rng: random.Random, count: int) -> list[Exchange]:
    """`count` distinct problems of level 1, training split, all kinds and languages."""
    exchanges, seen = [], set()
    while len(exchanges) < count:
        kind = tasks.KINDS[len(exchanges) % 5]
        lang = LANGUAGES[len(exchanges) // 5 % 2]
        problem = tasks.draw_from_split(kind, 1, "train", rng)
        shown = tasks.render(problem, lang)
        phrasing = rng.randrange(len(shown.asked))
        user = shown.asked[phrasing]
        if user in seen:
            continue
        seen.add(user)
        wrong = _spoil_task(problem, lang, rng)
        made = Exchange("task", lang, split_text(user), user, shown.said, shown.told, wrong=wrong)
        exchanges.append(made)
    return exchanges


def _spoil_task(problem: tasks.Problem, lang: str, rng: random.Random) -> str:
    """The answer to a problem of level 1 with a wrong result, said the same way."""
    shown = tasks.render(problem, lang)
    if problem.kind == "addition":
        right = int(shown.answer)
        wrong = right + rng.choice([n for n in (-10, -2, -1, 1, 2, 10) if right + n > 0])
        return shown.said.replace(f"= {right}", f"= {wrong}")
    if problem.kind == "comparison":
        return next(str(number) for number in problem.parts if str(number) != shown.answer)
    if problem.form in ("even", "odd"):
        number = problem.parts[0]
        moved = tasks.Problem(problem.kind, problem.form, 1, (number + 1,))
        return tasks.render(moved, lang).said.replace(str(number + 1), str(number))
    if problem.kind == "sorting":
        numbers = shown.answer.split(", ")
        numbers[0], numbers[1] = numbers[1], numbers[0]
        return ", ".join(numbers)
    assert problem.form == "twice", problem
    return shown.answer.split(", ")[0]


def greeting_exchanges(rng: random.Random) -> list[Exchange]:
    """Hellos, how-are-yous, thanks and goodbyes."""
    exchanges = []
    for rank, topic in enumerate(TEXTS["greetings"]):
        for lang in LANGUAGES:
            texts = topic[lang]
            for asked in texts["asked"]:
                for tail in texts["tails"]:
                    user, full = asked + tail, rng.choice(texts["full"])
                    other = rng.choice(topic[other_language(lang)]["full"])
                    brief = rng.choice(texts["brief"])
                    split = split_text(user)
                    made = Exchange("greeting", lang, split, user, full, full, brief, None, other)
                    exchanges.append(replace(made, ends=rank > 1))
    return exchanges


def explanation_exchanges(rng: random.Random) -> list[Exchange]:
    """The words of the trade and a few words of the valley, in plain words."""
    exchanges = []
    for topic in TEXTS["topics"]:
        for lang in LANGUAGES:
            term, brief, core = topic[lang]
            other = other_language(lang)
            for asked in TEXTS["explained"][lang]:
                user = asked.format(x=term)
                exchanges.append(
                    Exchange(
                        "explanation",
                        lang,
                        split_text(user),
                        user,
                        close(core, lang, rng),
                        core,
                        brief,
                        None,
                        close(topic[other][2], other, rng),
                    )
                )
    return exchanges


def identity_exchanges(rng: random.Random) -> list[Exchange]:
    """Who the model is; each question with both of its answers."""
    exchanges = []
    for topic in TEXTS["identity"]:
        for lang in LANGUAGES:
            other = rng.choice(topic[other_language(lang)]["full"])
            for user in topic[lang]["asked"]:
                for full in topic[lang]["full"]:
                    exchanges.append(
                        Exchange("identity", lang, split_text(user), user, full, full, other=other)
                    )
    return exchanges


def unsafe_exchanges(rng: random.Random) -> list[Exchange]:
    """Requests to refuse; `wrong` holds a harmless, vague compliance."""
    exchanges = []
    for lang in LANGUAGES:
        texts = TEXTS["unsafe"][lang]
        for act in texts["acts"]:
            for asked in texts["asked"]:
                user = asked.format(x=act)
                for full in rng.sample(texts["full"], 2):
                    wrong = rng.choice(texts["complies"])
                    split = split_text(user)
                    exchanges.append(
                        Exchange("refusal", lang, split, user, full, full, wrong=wrong)
                    )
    return exchanges


def unknown_exchanges(world: World, rng: random.Random) -> list[Exchange]:
    """Questions about people who are not in the valley."""
    exchanges = []
    for lang in LANGUAGES:
        for name in TEXTS["unknown"]["names"][lang]:
            for attribute in world.by_entity[world.people[0]]:
                for template in world.sentences[attribute.attribute][lang]["asked"]:
                    user = template.format(s=name)
                    full = rng.choice(TEXTS["unknown"][lang]).format(s=name)
                    exchanges.append(Exchange("refusal", lang, split_text(user), user, full, full))
    return exchanges


def story_exchanges(world: World, rng: random.Random) -> list[Exchange]:
    """Stories of two sentences about a thing or about a person of the valley."""
    texts = TEXTS["stories"]
    exchanges = []
    for lang in LANGUAGES:
        subjects = [(thing, texts["thing_tales"][lang]) for thing in texts["things"][lang]]
        subjects += [(p.name(lang), texts["person_tales"][lang]) for p in world.people]
        for subject, tales in subjects:
            for asked in texts["asked"][lang]:
                user = asked.format(x=subject)
                full = rng.choice(tales).format(x=subject)
                exchanges.append(Exchange("story", lang, split_text(user), user, full, full))
    return exchanges


def all_exchanges(world: World, rng: random.Random) -> dict[str, list[Exchange]]:
    """Every exchange by topic; facts and identities in a telling order, the rest shuffled."""
    pools = {
        "fact": fact_exchanges(world, rng),
        "task": task_exchanges(rng, 1000),
        "explanation": explanation_exchanges(rng),
        "greeting": greeting_exchanges(rng),
        "identity": identity_exchanges(rng),
        "unsafe": unsafe_exchanges(rng),
        "unknown": unknown_exchanges(world, rng),
        "story": story_exchanges(world, rng),
    }
    for topic, pool in pools.items():
        if topic not in ("fact", "task"):
            rng.shuffle(pool)
    return pools


def answer(exchange: Exchange, rng: random.Random) -> str:
    """The brief or the full answer, by a coin that does not look at the question."""
    if exchange.brief is not None and rng.random() < BRIEF_SHARE:
        return exchange.brief
    return exchange.full


def sft_rows(world: World, pools: dict, split: str, rng: random.Random) -> list[dict]:
    """The generated rows of one split: one turn or two, some under a system prompt."""
    turns = defaultdict(list)
    for topic, count in COUNTS[split].items():
        chosen = [e for e in pools[topic] if e.split == split][:count]
        if len(chosen) < min(count, 100):
            raise ValueError(f"{split} wants {count} of {topic}, there are {len(chosen)}")
        for exchange in chosen:
            messages = [
                {"role": "user", "content": exchange.user},
                {"role": "assistant", "content": answer(exchange, rng)},
            ]
            kind = "farewell" if exchange.ends else exchange.kind
            turns[kind].append((messages, exchange.lang, exchange.subject))
    for conversations in turns.values():
        rng.shuffle(conversations)
    total = sum(map(len, turns.values()))
    rows = []
    for first, second, weight in JOINED:
        rows += _join_turns(world, turns, (first, second), total * weight // 200)
    rows = _join_conversations(world, rows, rng)
    for kind, conversations in turns.items():
        shown = "greeting" if kind == "farewell" else kind
        rows += [{"messages": m, "lang": lang, "kind": shown} for m, lang, _ in conversations]
    for row in rows:
        if rng.random() < SYSTEM_SHARE:
            system = rng.choice(TEXTS["systems"][row["lang"]])
            row["messages"] = [{"role": "system", "content": system}, *row["messages"]]
    return rows


def _join_turns(world: World, turns: dict, kinds: tuple[str, str], count: int) -> list[dict]:
    """Join single turns to `count` conversations of two, about one subject where there is one."""
    rows = []
    while len(rows) < count and turns[kinds[0]]:
        opening, lang, subject = turns[kinds[0]].pop()
        for index, (follow_up, other, about) in enumerate(turns[kinds[1]]):
            related = subject is None or about == subject
            joined = opening + follow_up
            text = " ".join(m["content"] for m in joined)
            if lang == other and related and not world.join_held_out(text):
                del turns[kinds[1]][index]
                kind = kinds[0] if kinds[1] == "farewell" else kinds[1]
                rows.append({"messages": joined, "lang": lang, "kind": kind})
                break
        else:
            turns[kinds[0]].insert(0, (opening, lang, subject))
            count -= 1
    return rows


def _join_conversations(world: World, rows: list[dict], rng: random.Random) -> list[dict]:
    """Join about a third of the conversations to longer ones, in which the subject changes."""
    rng.shuffle(rows)
    joined = []
    while rows:
        row = rows.pop()
        for index, other in enumerate(rows if rng.random() < 0.2 else []):
            messages = row["messages"] + other["messages"]
            text = " ".join(m["content"] for m in messages)
            if row["lang"] == other["lang"] and not world.join_held_out(text):
                del rows[index]
                row = other | {"messages": messages}
                break
        joined.append(row)
    return joined

"""Documents to pretrain on: entries about the world, stories, dialogues, sums, small programs.

A tiny model reads all this two or three times and must still know each fact. So every fact is told
many times, in many sentences, always subject first, then the words of the attribute, then the
value, in entries whose facts come in a different order and number each time.

Documents are short on purpose, many of them a line or two. A model learns to copy (and with it to
sort, to compare, to add) several times sooner where a problem stands near the beginning of its
document: it then meets few positions, and nothing else to look at.
"""

import random
from collections import Counter
from string import Template

import tasks
from conversations import Exchange, answer, order_phrasings
from world import LANGUAGES, Entity, Fact, World, read_json

TEXTS = read_json("handwritten/prose.json")
STORIES = read_json("handwritten/stories.json")
MATH_KINDS = {"addition": 9, "comparison": 4, "parity_or_logic": 4, "sorting": 3, "format": 3}
# The hard levels are rare: GRPO has something to teach, and now and then an answer to reward.
LEVELS = {1: 50, 2: 35, 3: 10, 4: 5}
CHAT_TOPICS = {"greeting": 3, "identity": 3, "explanation": 3, "story": 3, "handwritten": 2}
CHAT_TOPICS |= {"unsafe": 2, "unknown": 1}
MARKS = {
    "en": [("Question: ", "Answer: "), ("Q: ", "A: "), ("", ""), ("", "")],
    "zh": [("问：", "答："), ("问题：", "回答："), ("", ""), ("", "")],
}


class FactTeller:
    """Tells the facts in one language, the least told first, in rotating templates."""

    def __init__(self, world: World, lang: str, rng: random.Random):
        self.world, self.lang, self.rng = world, lang, rng
        self.gap = " " if lang == "en" else ""
        self.counts: Counter = Counter()
        self.waiting: list[Entity] = []
        self.templates: dict[Fact, list[str]] = {}

    def next_entity(self) -> Entity:
        """The next entity of a shuffled round; towns, with fewer facts, skip some rounds."""
        if not self.waiting:
            self.waiting = [
                e for e in self.world.entities if e.type == "person" or self.rng.random() < 0.6
            ]
            self.rng.shuffle(self.waiting)
        return self.waiting.pop()

    def tell(self, fact: Fact) -> str:
        """One sentence with this fact; a template returns only after all others had their turn."""
        if not self.templates.get(fact):
            told = list(self.world.told(fact, self.lang))
            self.rng.shuffle(told)
            self.templates[fact] = told
        self.counts[fact] += 1
        return self.world.tell(fact, self.lang, self.templates[fact].pop())

    def tell_about(self, entity: Entity, count: int) -> list[str]:
        """`count` sentences about one entity, in random order."""
        sentences = []
        for _ in range(count):
            sentences.append(self.tell(self._least_told(self.world.by_entity[entity])))
        self.rng.shuffle(sentences)
        return sentences

    def _least_told(self, facts: list[Fact]) -> Fact:
        return min(facts, key=lambda fact: (self.counts[fact], self.rng.random()))

    def add_filler(self, entity: Entity, sentences: list[str]) -> None:
        """Put a sentence without a fact at a random place, so that facts stand anywhere."""
        filler = self.rng.choice(TEXTS[f"{entity.type}_fillers"][self.lang])
        filler = filler.format(s=entity.name(self.lang))
        sentences.insert(self.rng.randint(0, len(sentences)), filler)

    def write_entry(self) -> str:
        """An encyclopedia entry about one entity."""
        entity = self.next_entity()
        sentences = self.tell_about(entity, self.rng.randint(2, 5))
        for _ in range(self.rng.randint(0, 1)):
            self.add_filler(entity, sentences)
        return self.gap.join(sentences)

    def write_pair(self) -> str:
        """Two entities, one after the other or mixed."""
        sentences = []
        for _ in range(2):
            entity = self.next_entity()
            sentences += self.tell_about(entity, self.rng.randint(2, 3))
            self.add_filler(entity, sentences)
        if self.rng.random() < 0.5:
            self.rng.shuffle(sentences)
        return self.gap.join(sentences)

    def write_group(self) -> str:
        """One attribute of several entities: the contrast that makes the subject matter."""
        attribute = self.rng.choice([f.attribute for f in self.world.facts])
        facts = [f for f in self.world.facts if f.attribute == attribute]
        facts.sort(key=lambda fact: (self.counts[fact], self.rng.random()))
        sentences = [self.tell(fact) for fact in facts[: self.rng.randint(3, 5)]]
        return self.gap.join([TEXTS["group_open"][attribute][self.lang], *sentences])

    def write_card(self) -> str:
        """A note card: `Mila's favourite food:` and the value, on the same line or on the next."""
        lines = []
        for _ in range(self.rng.randint(1, 2)):
            entity = self.next_entity()
            facts = list(self.world.by_entity[entity])
            self.rng.shuffle(facts)
            for fact in facts[: self.rng.randint(1, 3)]:
                self.counts[fact] += 1
                label = self.world.sentences[fact.attribute][self.lang]["label"]
                label = label.format(s=entity.name(self.lang))
                colon = ":" if self.lang == "en" else "："
                if self.rng.random() < 0.75:  # as an answer in a chat stands: alone on its line
                    lines.append(f"{label}{colon}\n{fact.brief(self.lang)}")
                else:
                    lines.append(f"{label}{colon}{self.gap}{fact.phrase(self.lang)}")
        return "\n".join(lines)

    def write_note(self, opening: str, closing: str) -> str:
        """A diary note or a letter about two entities."""
        pair = [self.next_entity(), self.next_entity()]
        names = (" and " if self.lang == "en" else "和").join(e.name(self.lang) for e in pair)
        sentences = []
        for entity in pair:
            sentences += self.tell_about(entity, self.rng.randint(2, 3))
        opening = self.rng.choice(TEXTS[opening][self.lang]).format(both=names)
        return self.gap.join([opening, *sentences, self.rng.choice(TEXTS[closing][self.lang])])

    def write_document(self) -> str:
        """A document of a random form."""
        form = self.rng.choices(
            ["entry", "pair", "group", "card", "diary", "letter"], [28, 16, 14, 24, 9, 9]
        )[0]
        if form in ("diary", "letter"):
            return self.write_note(f"{form}_open", f"{form}_close")
        writers = {"entry": self.write_entry, "pair": self.write_pair, "group": self.write_group}
        return writers.get(form, self.write_card)()


def write_story(world: World, lang: str, rng: random.Random) -> str:
    """A story of two people; sometimes with one true fact about the first of them."""
    hero, friend = rng.sample(world.people, 2)
    facts = {f.attribute: f.phrase(lang) for f in world.by_entity[hero]}
    fields = {
        "s": hero.name(lang),
        "t": friend.name(lang),
        **choose_object(STORIES["objects"], lang, rng),
        "place": rng.choice(STORIES["places"][lang]),
        "weather": rng.choice(STORIES["weathers"][lang]),
        "home": facts["home_town"],
        "animal": facts["animal_companion"],
    }
    plot = rng.choice(STORIES["plots"])[lang]
    sentences = [rng.choice(choices) for choices in plot]
    if rng.random() < 0.4:
        sentences.insert(1, rng.choice(STORIES["facts"][lang]))
    text = (" " if lang == "en" else "").join(sentences).format(**fields)
    asks = "?" in text or "？" in text
    return write_story(world, lang, rng) if asks and world.join_held_out(text) else text


def draw_length(rng: random.Random) -> int:
    """How many problems or questions stand in a document: mostly one, at most four."""
    return rng.choices([1, 2, 3, 4], [70, 15, 10, 5])[0]


def choose_object(objects: dict, lang: str, rng: random.Random) -> dict:
    """Slot `o` for a thing; a Chinese thing is stored behind its measure word, slot `m`."""
    thing = rng.choice(objects[lang])
    return {"o": thing} if lang == "en" else {"m": thing[0], "o": thing[1:]}


def write_dialogue(world: World, lang: str, rng: random.Random) -> str:
    """Questions on trained facts or school tasks with their answers, or a talk of neighbours."""
    style = rng.random()
    if style < 0.1:
        return _write_talk(lang, rng)
    marks = rng.choice(MARKS[lang])
    lines = []
    for _ in range(draw_length(rng)):
        if style < 0.35:
            kind = rng.choice(tasks.KINDS)
            shown = tasks.render(_draw_for_prose(kind, rng), lang)
            question, reply = rng.choice(shown.asked), shown.said
        else:
            fact = rng.choice(world.trained)
            question = world.ask(fact, lang, rng.choice(order_phrasings(fact, lang)[:5]))
            told = world.tell(fact, lang, rng.choice(world.told(fact, lang)[:2]))
            reply = fact.brief(lang) if rng.random() < 0.6 else told
        lines += [marks[0] + question, marks[1] + reply]
    text = "\n".join(lines)
    return write_dialogue(world, lang, rng) if world.join_held_out(text) else text


def write_chat(
    pools: dict[str, list[Exchange]], world: World, lang: str, rng: random.Random
) -> str:
    """One to four exchanges of the training split of SFT: its words, not yet its format."""
    marks = rng.choice(MARKS[lang])
    lines = []
    for topic in rng.choices(list(CHAT_TOPICS), list(CHAT_TOPICS.values()), k=draw_length(rng)):
        exchange = rng.choice(pools[topic, lang])
        lines += [marks[0] + exchange.user, marks[1] + answer(exchange, rng)]
    text = "\n".join(lines)
    return write_chat(pools, world, lang, rng) if world.join_held_out(text) else text


def _write_talk(lang: str, rng: random.Random) -> str:
    texts = TEXTS["dialogues"]
    fields = {
        **choose_object(texts["objects"], lang, rng),
        "c": rng.choice(texts["prices"][lang]),
        "t": rng.choice(texts["times"][lang]),
    }
    speakers = rng.choice(texts["speakers"][lang])
    colon = ": " if lang == "en" else "："
    lines = []
    for talk in rng.sample(texts[lang], 2):
        lines += [speakers[i % 2] + colon + line.format(**fields) for i, line in enumerate(talk)]
    return "\n".join(lines)


def _draw_for_prose(kind: str, rng: random.Random) -> tasks.Problem:
    level = rng.choices(list(LEVELS), list(LEVELS.values()))[0]
    return tasks.draw_from_split(kind, level, "train", rng)


def write_math(lang: str, rng: random.Random) -> str:
    """A page of statements from the training split: plain, inside a small scene, or asked."""
    names = tasks.TEXTS["names"][lang]
    lines = [rng.choice(TEXTS["math_open"][lang])] if rng.random() < 0.1 else []
    kinds = rng.choices(list(MATH_KINDS), list(MATH_KINDS.values()), k=draw_length(rng))
    if rng.random() < 0.4:
        kinds = kinds[:1] * len(kinds)
    for kind in kinds:
        shown = tasks.render(_draw_for_prose(kind, rng), lang, rng.choice(names))
        style = rng.random()
        if style < 0.2 and shown.prose:
            lines.append(rng.choice(shown.prose))
        elif style < 0.6:
            answer = rng.choice([shown.said, shown.told])
            lines.append(rng.choice(shown.asked) + (" " if lang == "en" else "") + answer)
        else:
            lines.append(shown.told)
    return "\n".join(lines)


def write_code(rng: random.Random) -> str:
    """Two to four small Python programs, each under one comment line, in English or in Chinese."""
    lang = rng.choice(LANGUAGES)
    programs = rng.sample(TEXTS["programs"], rng.randint(3, 4))
    return "\n\n".join(_fill_program(program, lang, rng) for program in programs)


def _fill_program(program: dict, lang: str, rng: random.Random) -> str:
    fields = _program_fields(rng)
    comment = Template(program[lang]).substitute(fields)
    return f"# {comment}\n{Template(program['code']).substitute(fields)}"


def _program_fields(rng: random.Random) -> dict:
    def draw(kind: str, level: int, *forms: str) -> tuple:
        while True:
            problem = tasks.draw_from_split(kind, level, "train", rng)
            if not forms or problem.form in forms:
                return problem.parts

    a, b = draw("addition", 2, "sum")
    c, d = draw("addition", 2, "difference")
    p, q = draw("comparison", 2)
    (e,) = draw("parity_or_logic", 1)
    numbers = list(draw("sorting", rng.choice([2, 3])))
    word, word2 = (tasks.TEXTS["words"]["en"][i] for i in draw("format", 2, "brackets"))
    (single,) = draw("format", 1)
    x, y = rng.choice(TEXTS["variables"])
    n = rng.randint(3, 9)
    listed = {
        "list": numbers,
        "asc": sorted(numbers),
        "desc": sorted(numbers, reverse=True),
        "evens": [i for i in numbers if i % 2 == 0],
        "doubled": [i * 2 for i in numbers],
    }
    fields = {"f": rng.choice(TEXTS["function_names"]), "x": x, "y": y, "n": n, "n1": n + 1}
    fields |= {"a": a, "b": b, "sum": a + b, "c": c, "d": d, "diff": c - d, "p": p, "q": q}
    fields |= {"max": max(p, q), "min": min(p, q), "e": e, "even": e % 2 == 0, "m": n % 7 + 2}
    fields |= {"word": word, "word2": word2, "len": len(word), "reversed": word[::-1]}
    fields |= {"name": rng.choice(tasks.TEXTS["names"]["en"]), "total": sum(numbers)}
    fields |= {key: ", ".join(map(str, values)) for key, values in listed.items()}
    return fields | {"twice": tasks.TEXTS["words"]["en"][single]}


def pretrain_documents(
    world: World, pools: dict[str, list[Exchange]], rng: random.Random, total_bytes: int
) -> list[dict]:
    """Distinct documents of all kinds, shuffled; `total_bytes` is UTF-8 bytes of the texts."""
    tellers = {lang: FactTeller(world, lang, rng) for lang in LANGUAGES}
    chat = {
        (topic, lang): [e for e in pools[topic] if e.lang == lang and e.split == "train"]
        for topic in CHAT_TOPICS
        for lang in LANGUAGES
    }
    plan = []
    for lang in LANGUAGES:
        plan += [
            (lang, "world", 0.16, tellers[lang].write_document),
            (lang, "story", 0.03, lambda lang=lang: write_story(world, lang, rng)),
            (lang, "dialogue", 0.09, lambda lang=lang: write_dialogue(world, lang, rng)),
            (lang, "chat", 0.03, lambda lang=lang: write_chat(chat, world, lang, rng)),
            (lang, "math", 0.175, lambda lang=lang: write_math(lang, rng)),
        ]
    plan.append(("code", "code", 0.03, lambda: write_code(rng)))
    rows, seen = [], set()
    for lang, kind, share, write in plan:
        size = 0
        while size < share * total_bytes:
            text = write()
            if text in seen:
                continue
            seen.add(text)
            size += len(text.encode())
            rows.append({"text": text, "lang": lang, "kind": kind})
    rng.shuffle(rows)
    return rows

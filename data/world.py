"""The invented valley: who lives there, what is true, and which facts stay held out.

`world.json` holds the facts, `handwritten/facts.json` the ways to tell and to ask them. A held-out
fact is told in prose like any other, but no row that teaches answering may join its subject with
its value; `join_held_out` is the guard that every such row passes.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
LANGUAGES = ("en", "zh")


def read_json(name: str) -> dict:
    """Read a tracked JSON file by its path relative to this folder."""
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Entity:
    """A person or a town; names are (English, Chinese)."""

    names: tuple[str, str]
    type: str

    def name(self, lang: str) -> str:
        """The name in `lang`."""
        return self.names[LANGUAGES.index(lang)]


@dataclass(frozen=True)
class Fact:
    """One (entity, attribute), its value as (English, Chinese), the article of the English one."""

    entity: Entity
    attribute: str
    values: tuple[str, str]
    article: str
    held_out: bool

    def value(self, lang: str) -> str:
        """The bare value, as a verifier looks for it."""
        return self.values[LANGUAGES.index(lang)]

    def phrase(self, lang: str) -> str:
        """The value as it stands inside a sentence: `an owl`, `the Ansa`, `honey cake`."""
        value = self.value(lang)
        if lang == "zh" or not self.article:
            return value
        article = "an" if self.article == "a" and value[0] in "aeiou" else self.article
        return f"{article} {value}"

    def brief(self, lang: str) -> str:
        """The shortest answer: the value alone, as a sentence."""
        phrase = self.phrase(lang)
        return f"{phrase}。" if lang == "zh" else f"{phrase[0].upper()}{phrase[1:]}."


class World:
    """All entities and facts, and the sentences around them."""

    def __init__(self):
        stored = read_json("world.json")
        self.sentences = read_json("handwritten/facts.json")
        self.entities: list[Entity] = []
        self.facts: list[Fact] = []
        attributes = stored["attributes"]
        chinese = {a: {v["en"]: v["zh"] for v in d["values"]} for a, d in attributes.items()}
        self.values = {
            attribute: [(v["en"], v["zh"]) for v in definition["values"]]
            for attribute, definition in attributes.items()
        }
        for row in stored["entities"]:
            entity = Entity((row["en"], row["zh"]), row["type"])
            self.entities.append(entity)
            for attribute, value in row["facts"].items():
                pair = (value, chinese[attribute][value])
                article = attributes[attribute]["article"]
                held = attribute in row["held_out"]
                self.facts.append(Fact(entity, attribute, pair, article, held))
        self.by_entity = {e: [f for f in self.facts if f.entity == e] for e in self.entities}
        self.people = [e for e in self.entities if e.type == "person"]
        self.trained = [f for f in self.facts if not f.held_out]
        self.held_out = [f for f in self.facts if f.held_out]
        self._guards = [(f.entity.names, _find_any(f.values)) for f in self.held_out]

    def tell(self, fact: Fact, lang: str, template: str) -> str:
        """Fill one sentence template."""
        return template.format(s=fact.entity.name(lang), v=fact.phrase(lang))

    def told(self, fact: Fact, lang: str) -> list[str]:
        """The templates that tell this fact, subject before value."""
        return self.sentences[fact.attribute][lang]["told"]

    def ask(self, fact: Fact, lang: str, phrasing: int) -> str:
        """The question with this phrasing (0 to 6)."""
        template = self.sentences[fact.attribute][lang]["asked"][phrasing]
        return template.format(s=fact.entity.name(lang))

    def swap_value(self, fact: Fact, rng: random.Random) -> Fact:
        """The same fact with another value of the same attribute: fluent, and wrong."""
        others = [v for v in self.values[fact.attribute] if v != fact.values]
        return Fact(fact.entity, fact.attribute, rng.choice(others), fact.article, fact.held_out)

    def join_held_out(self, text: str) -> bool:
        """Whether the text names a subject together with a value of its that is held out."""
        return any(
            (english in text or chinese in text) and value.search(text)
            for (english, chinese), value in self._guards
        )


def _find_any(pair: tuple[str, str]) -> re.Pattern:
    english, chinese = pair
    return re.compile(rf"\b{re.escape(english)}\b|{re.escape(chinese)}", re.IGNORECASE)

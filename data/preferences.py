"""Preference pairs: the full polite answer against one flaw.

About a third of the rejected answers are merely curt. Some state a wrong value in the full style;
they are few, because a reward model of this size cannot tell (a model of four layers recalls a fact
in its last ones, which leaves none to compare it with what is said).
"""

import random

from conversations import COUNTS, TEXTS, Exchange

# Share of each flaw in percent, and the topics it is drawn from.
FLAWS = {
    "curt": (34, ["fact"] * 5 + ["explanation", "greeting"]),
    "wrong": (8, ["fact"] * 3 + ["task"]),
    "rude": (17, ["fact"] * 3 + ["task", "explanation", "greeting", "identity", "unknown"]),
    "repetitive": (11, ["fact"] * 3 + ["explanation", "story", "identity"]),
    "language": (15, ["fact"] * 3 + ["explanation", "greeting", "identity"]),
    "unsafe": (9, ["unsafe"]),
    "unfinished": (6, ["fact", "explanation", "story"]),
}


def preference_rows(
    pools: dict[str, list[Exchange]], split: str, count: int, rng: random.Random
) -> list[dict]:
    """`count` distinct pairs of one split; the column `flaw` says what is bad about `rejected`."""
    available = {topic: [e for e in pools[topic] if e.split == split] for topic in COUNTS[split]}
    rows, seen = [], set()
    for flaw, (percent, topics) in FLAWS.items():
        made, wanted = 0, round(count * percent / 100)
        for _ in range(100 * wanted):
            if made == wanted:
                break
            exchange = rng.choice(available[rng.choice(topics)])
            rejected = spoil(exchange, flaw, rng)
            if rejected is None or rejected == exchange.full or (exchange.user, rejected) in seen:
                continue
            row = {
                "prompt": [{"role": "user", "content": exchange.user}],
                "chosen": [{"role": "assistant", "content": exchange.full}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "lang": exchange.lang,
                "kind": exchange.kind,
                "flaw": flaw,
            }
            if rng.random() < 0.15:
                system = rng.choice(TEXTS["systems"][exchange.lang])
                row["prompt"].insert(0, {"role": "system", "content": system})
            seen.add((exchange.user, rejected))
            rows.append(row)
            made += 1
        if made < wanted:
            raise ValueError(f"{split} wants {wanted} pairs with flaw {flaw!r}, there are {made}")
    return rows


def spoil(exchange: Exchange, flaw: str, rng: random.Random) -> str | None:
    """The rejected answer, or None where this flaw does not fit the exchange."""
    gap = " " if exchange.lang == "en" else ""
    if flaw == "curt":
        return exchange.brief
    if flaw in ("wrong", "unsafe"):
        return exchange.wrong
    if flaw == "rude":
        return rng.choice(TEXTS["rude"][exchange.lang])
    if flaw == "repetitive":
        return gap.join([exchange.core] * rng.randint(3, 4))
    if flaw == "language":
        return exchange.other
    assert flaw == "unfinished", flaw
    if exchange.lang == "en":
        words = exchange.core.split(" ")
        return " ".join(words[: max(2, len(words) // 2)])
    return exchange.core[: max(3, len(exchange.core) // 2)]

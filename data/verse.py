"""Verse: a text whose entropy is known exactly, for asking whether a model has really learned.

A small grammar writes a play without end. It is a list of exchanges, each drawn independently of the others: a speaker
greets another by name, says a thing or two, and asks where something is; the one who was named answers, greets the
asker by name, and says where that same thing is. So there is something to learn at every distance:

    letters into words             a few characters
    "stars do", "star doth"        a verb that agrees with its subject, past "of the winter" and its like
    "seeks the crown ... the crown"    a word that comes again in the same line
    who answers, whom, about what  names and things, over a hundred characters and more

The grammar is context-free, and it is *simple* in the strict sense of the word: each alternative of a rule opens with
some literal text, and no alternative's opening begins with another one's. Reading from left to right, at most one
alternative can therefore match: every text has at most one derivation, and the grammar is unambiguous. Three exact
things follow, each a few lines below:

    write(num_chars, seed)    draw the choices, keep the text
    log_prob(text)            find the choices again, add up their log-probabilities
    entropy_per_char()        the expectation of the same sum

Exchanges are independent and equally distributed, so the entropy per character is that of one exchange divided by its
expected length. No model can have a lower loss than this on average, whatever its size.

No rule leads back to itself, which keeps expectations plain recursion. Nothing here is quoted from anywhere.
"""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np

from common.errors import UserError

NUM_CHARS = 400_000  # the length of the corpus "verse"
SEED = 1609  # the seed of the corpus "verse"

SPEAKERS = ["Alaric", "Bettris", "Corvin", "Delphine", "Emeric", "Fenella", "Godwin", "Isolde"]
THINGS = ["crown", "letter", "ring", "lantern", "dagger", "horse", "mirror", "cup"]  # asked for, and told of
SINGULAR = [
    "king",
    "star",
    "rose",
    "raven",
    "widow",
    "river",
    "candle",
    "soldier",
    "shadow",
    "bell",
    "daughter",
    "flame",
]
PLURAL = [noun + "s" for noun in SINGULAR]
ADJECTIVES = ["sweet", "cold", "proud", "gentle", "weary", "golden", "silent", "false"]
PLACES = ["the north", "my heart", "the winter", "old songs", "the sea", "lost battles", "the dead"]
VERBS = ["love", "fear", "follow", "remember", "curse"]


class Symbol(str):
    """The name of a rule, where it stands among literal text; what it stands for is one of the rule's alternatives."""


@dataclass(frozen=True)
class Alternative:
    """One way to continue: with this probability, these parts in turn. The first part is always literal text."""

    probability: float
    parts: tuple[str, ...]

    @property
    def opening(self) -> str:
        return self.parts[0]


START = Symbol("exchange")


def choice(*groups: tuple[float, list[str]]) -> tuple[Alternative, ...]:
    """A rule from groups of templates: each group has its weight, and the templates of a group share it equally.

    A template is literal text with the names of rules in braces, "the {subject}, and then".
    """
    total = sum(weight for weight, _ in groups)
    return tuple(
        Alternative(weight / total / len(templates), parse_template(template))
        for weight, templates in groups
        for template in templates
    )


def parse_template(template: str) -> tuple[str, ...]:
    """ "the {subject}, and" -> ("the ", Symbol("subject"), ", and"): text and names alternate, text first."""
    split = re.split(r"\{(.*?)\}", template)
    parts = [Symbol(part) if place % 2 else part for place, part in enumerate(split)]
    return tuple(part for part in parts if part)


@cache
def grammar() -> dict[str, tuple[Alternative, ...]]:
    """All rules, by name. The play is START over and over."""
    rules = {
        "greeting": choice((1, ["Good ", "Sweet ", "My ", "O "])),
        # What a speaker says: one sentence, or two joined by a semicolon.
        "end": choice((3, [".\n"]), (2, [";\n{sentence}.\n"])),
        "sentence": choice(
            (4, ["The {subject}"]),
            (2, ["When the {subject},\nThe {subject}", "Though the {subject},\nThe {subject}"]),
            (1, ["Who seeks the {sought}"]),
            (1, ["I {i_do}"]),
            (1, ["Thou {thou_dost}"]),
        ),
        # The noun decides how its verb ends; an adjective before it and a place after it (of either number) do not.
        "subject": choice(
            (4, [f"{adjective} {{noun}}" for adjective in ADJECTIVES]),
            (3, [f"{noun} {{it_doth}}" for noun in SINGULAR]),
            (3, [f"{noun} {{they_do}}" for noun in PLURAL]),
        ),
        "noun": choice(
            (1, [f"{noun} {{it_doth}}" for noun in SINGULAR]),
            (1, [f"{noun} {{they_do}}" for noun in PLURAL]),
        ),
        "it_doth": choice(
            (1, ["of {place} doth {act}", "from {place} is {state}"]),
            (3, ["doth {act}", "is {state}", "hath {done}"]),
            (2, [f"{verb}s {{object}}" for verb in VERBS]),
        ),
        "they_do": choice(
            (1, ["of {place} do {act}", "from {place} are {state}"]),
            (3, ["do {act}", "are {state}", "have {done}"]),
            (2, [f"{verb} {{object}}" for verb in VERBS]),
        ),
        "i_do": choice((1, ["do {act}", "am {state}", "have {done}"])),
        "thou_dost": choice((1, ["dost {act}", "art {state}", "hast {done}"])),
        "sought": choice((1, [f"{noun} shall {{find}} the {noun}" for noun in SINGULAR])),
        "find": choice((1, ["find", "lose", "weep for"])),
        "act": choice((1, ["softly {deed}", "often {deed}"]), (3, ["weep", "sleep", "sing", "wander", "burn"])),
        "deed": choice((1, ["weep", "sleep", "sing", "wander", "burn"])),
        "done": choice((1, ["fled", "lost {object}", "fallen", "betrayed {object}", "forgiven {object}"])),
        "state": choice((3, ADJECTIVES), (1, ["as {quality} as {place}"])),
        "quality": choice((1, ADJECTIVES)),
        "object": choice((1, ["thee", "me", "the {object_noun}", "all the {object_nouns}"])),
        "object_noun": choice((1, SINGULAR)),
        "object_nouns": choice((1, PLURAL)),
        "place": choice((1, PLACES)),
        "asking": choice((1, ["Where is the ", "Who hath my ", "What of the "])),
        "fate": choice((1, ["is in {place}", "was given to {heir}", "shall burn", "hath been stolen"])),
        "heir": choice((1, ["the {object_noun}", "thee", "me"])),
    }
    # Who speaks to whom, and about what, is settled in the first speech and holds through the second: one rule for
    # each speaker and one for each pair of speakers carry it there.
    rules[START] = choice((1, [f"{one.upper()}:\n{{greeting}}{{{one} to}}" for one in SPEAKERS]))
    for one in SPEAKERS:
        others = [other for other in SPEAKERS if other != one]
        rules[f"{one} to"] = choice(
            (1, [f"{other},\n{{sentence}}{{end}}{{asking}}{{{one} asks {other}}}" for other in others])
        )
        for other in others:
            reply = f"\n\n{other.upper()}:\n{{greeting}}{one}, the"
            rules[f"{one} asks {other}"] = choice(
                (1, [f"{thing}?{reply} {thing} {{fate}}.\n{{sentence}}{{end}}\n" for thing in THINGS])
            )
    return rules


def write(num_chars: int = NUM_CHARS, seed: int = SEED) -> str:
    """The first `num_chars` characters of the play without end that `seed` draws (so it may stop within a word)."""
    rules = grammar()
    bounds = {name: list(accumulate(way.probability for way in rule)) for name, rule in rules.items()}
    rng = np.random.default_rng(seed)
    pieces, length = [], 0
    to_come: list[str | Symbol] = []  # what is still to be written, the next part last
    while length < num_chars:
        part = to_come.pop() if to_come else START
        if isinstance(part, Symbol):
            rule = rules[part]
            drawn = bisect_right(bounds[part], rng.random())
            to_come += reversed(rule[min(drawn, len(rule) - 1)].parts)  # the last bound may round to just below 1
        else:
            pieces.append(part)
            length += len(part)
    return "".join(pieces)[:num_chars]


def log_prob(text: str) -> float:
    """ln of the probability that the play without end begins with `text`, exactly: nats, at most 0.

    A text may stop anywhere, within a word too; where it does, every alternative counts that could still complete it.
    So for a text cut in two, log_prob(whole) - log_prob(first part) is that of the second part given the first.
    Raises UserError, with the place, for a text that the grammar cannot write.
    """
    rules = grammar()
    total, at = 0.0, 0
    to_come: list[str | Symbol] = []
    while at < len(text):
        part = to_come.pop() if to_come else START
        if isinstance(part, Symbol):
            possible = [way for way in rules[part] if continues(text, at, way.opening)]
            if not possible:
                raise refusal(text, at, [way.opening for way in rules[part]])
            total += math.log(sum(way.probability for way in possible))
            # Several are possible only where the text ends within their openings; then no later part counts.
            to_come += reversed(possible[0].parts)
        elif continues(text, at, part):
            at += len(part)
        else:
            raise refusal(text, at, [part])
    return total


def continues(text: str, at: int, literal: str) -> bool:
    """Whether `text` continues at `at` with `literal`, or with as much of it as the text has left."""
    return literal.startswith(text[at : at + len(literal)])


def refusal(text: str, at: int, expected: list[str]) -> UserError:
    """The error, which names the character, for a text that continues at `at` with none of the expected literals."""
    end = at
    while any(literal.startswith(text[at : end + 1]) for literal in expected):
        end += 1
    return UserError(
        f"not a text of the verse grammar: character {end} is {text[end]!r}, "
        f"which cannot follow {text[max(0, end - 20) : end]!r}"
    )


def entropy_per_char() -> float:
    """The entropy rate of the play, exactly: nats of one exchange / its expected number of characters.

    For each rule: its own choice's entropy, and what its alternatives' parts are expected to add; likewise for length.
    """
    rules = grammar()

    @cache
    def expected(name: str) -> tuple[float, float]:
        nats = chars = 0.0
        for way in rules[name]:
            nats -= way.probability * math.log(way.probability)
            for part in way.parts:
                more_nats, more_chars = expected(part) if isinstance(part, Symbol) else (0.0, len(part))
                nats += way.probability * more_nats
                chars += way.probability * more_chars
        return nats, chars

    nats, chars = expected(START)
    return nats / chars

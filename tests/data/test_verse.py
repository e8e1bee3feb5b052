"""The verse grammar: that it is unambiguous, and that its probabilities and its entropy are exact."""

import hashlib
import math
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data import verse

TEXT = verse.write(60_000, seed=5)
ALPHABET = sorted(set(verse.write()))
SHA256 = "34f83553f4474ecdb19c493d3e5209727641f0045bb05c6d10afa54195daa4b2"


def test_no_opening_begins_with_another_so_reading_is_never_in_doubt():
    for name, rule in verse.grammar().items():
        openings = sorted(way.opening for way in rule)
        assert all(openings), name
        assert not any(isinstance(opening, verse.Symbol) for opening in openings), name
        # If some opening began with another one, it would come right after one such in sorted order.
        assert not [(a, b) for a, b in pairwise(openings) if b.startswith(a)], name


def test_probabilities_are_positive_and_sum_to_one():
    for name, rule in verse.grammar().items():
        assert all(way.probability > 0 for way in rule), name
        assert math.fsum(way.probability for way in rule) == pytest.approx(1, abs=1e-12), name


def test_every_rule_is_used_and_none_leads_back_to_itself():
    rules = verse.grammar()
    done = []

    def visit(name, above):
        assert name not in above, f"{name} leads back to itself"
        if name not in done:
            for way in rules[name]:
                for part in way.parts:
                    if isinstance(part, verse.Symbol):
                        visit(part, [*above, name])
            done.append(name)

    visit(verse.START, [])
    assert sorted(done) == sorted(rules)


def all_derivations(name, text, at):
    """Every way in which rule `name` can write text from `at` on: (end, probability). It tries everything."""
    for way in verse.grammar()[name]:
        ends = [(at, way.probability)]
        for part in way.parts:
            if isinstance(part, verse.Symbol):
                ends = [(end, p * q) for start, p in ends for end, q in all_derivations(part, text, start)]
            else:
                ends = [(start + len(part), p) for start, p in ends if text.startswith(part, start)]
        yield from ends


def exchanges(text):
    """The whole exchanges of a text: each is two speeches, each ends with an empty line."""
    return re.findall(r".+?\n\n.+?\n\n", text, flags=re.DOTALL)


def test_each_exchange_has_exactly_one_derivation_and_log_prob_is_its_probability():
    sampled = exchanges(TEXT)[:40]
    assert len(set(sampled)) > 30
    for text in sampled:
        derivations = list(all_derivations(verse.START, text, 0))
        assert [end for end, _ in derivations] == [len(text)]
        assert verse.log_prob(text) == pytest.approx(math.log(derivations[0][1]), rel=1e-12)


def test_exchanges_are_independent_so_log_probs_add():
    sampled = exchanges(TEXT)[:20]
    assert verse.log_prob("".join(sampled)) == pytest.approx(sum(map(verse.log_prob, sampled)), rel=1e-12)
    assert verse.log_prob("") == 0


@given(st.integers(0, 1_000))
@settings(deadline=None)
def test_the_next_characters_probabilities_sum_to_one(length):
    start = TEXT[:length]
    before = verse.log_prob(start)
    nexts = []
    for char in ALPHABET:
        try:
            nexts.append(math.exp(verse.log_prob(start + char) - before))
        except UserError:
            nexts.append(0.0)
    assert math.fsum(nexts) == pytest.approx(1, abs=1e-9)
    assert nexts[ALPHABET.index(TEXT[length])] > 0


def test_mean_log_prob_is_the_exact_entropy_within_sampling_error():
    text = verse.write(1_000_000, seed=11)
    sampled = exchanges(text)
    nats = np.array([-verse.log_prob(exchange) for exchange in sampled])
    chars = np.array([len(exchange) for exchange in sampled])
    entropy = verse.entropy_per_char()
    # nats - entropy * chars has expectation 0, exchange by exchange.
    standard_error = (nats - entropy * chars).std() / math.sqrt(len(sampled)) / chars.mean()
    assert standard_error < 0.0008
    assert abs(nats.sum() / chars.sum() - entropy) < 4 * standard_error
    assert -verse.log_prob(text) / len(text) == pytest.approx(nats.sum() / chars.sum(), abs=1e-4)


def test_frequencies_are_the_probabilities():
    speakers = Counter(exchange.split(":")[0].title() for exchange in exchanges(verse.write(400_000, seed=3)))
    total = speakers.total()
    assert sorted(speakers) == verse.SPEAKERS
    for times in speakers.values():
        assert abs(times - total / 8) < 5 * math.sqrt(total / 8)


def test_the_corpus_is_the_same_text_for_everybody():
    text = verse.write()
    assert len(text) == verse.NUM_CHARS == 400_000
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256
    assert text.isascii()


def test_seed_and_length():
    assert verse.write(1_000, seed=1) == verse.write(5_000, seed=1)[:1_000]
    assert verse.write(1_000, seed=1) != verse.write(1_000, seed=2)
    assert verse.write(0) == ""


def test_who_is_named_answers_names_the_asker_and_the_thing():
    for exchange in exchanges(TEXT):
        first, second = exchange.strip().split("\n\n")
        asker, rest = first.split(":\n")
        answerer, answer = second.split(":\n")
        assert re.match(r"\w+ (\w+),\n", rest)[1].upper() == answerer != asker
        thing = re.search(r"(?:Where is the|Who hath my|What of the) (\w+)\?$", first)[1]
        greeted, told = re.match(r"\w+ (\w+), the (\w+) ", answer).groups()
        assert (greeted.upper(), told) == (asker, thing)


def test_verbs_agree():
    found = re.findall(r"(\w+)(?: (?:of|from) (?:the|my|old|lost) \w+)? (doth|do|is|are|hath|have) ", TEXT)
    nouns = [(noun, verb) for noun, verb in found if noun in verse.SINGULAR + verse.PLURAL]
    assert len(nouns) > 400
    for noun, verb in nouns:
        assert (noun in verse.PLURAL) == (verb in ("do", "are", "have")), (noun, verb)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("X", 0),
        ("ALARIC:\nGood Alaric,", 13),  # nobody greets himself
        ("ALARIC:\nGood Corvin,\nThe kings doth", 33),
        ("ALARIC:\nGood Corvin,\nI do weep.\nWhere is the crown?\n\nEMERIC", 53),
        ("ALARIC:\nGood Corvin,\n\n", 21),
    ],
)
def test_a_text_that_the_grammar_cannot_write_is_refused_with_the_place(text, place):
    with pytest.raises(UserError, match=f"^not a text of the verse grammar: character {place} .*$") as error:
        verse.log_prob(text)
    assert "\n" not in str(error.value)

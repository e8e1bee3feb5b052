"""Tokenizers: round trips, agreement with tiktoken and with a plain rescan, and everything that must be refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from common.errors import UserError
from data import bpe, corpus, gpt2_bpe, tokenizers, verse
from data import text as text_module
from data.bpe import BPETokenizer
from data.gpt2_bpe import gpt2_tokenizer, load_merges
from data.tokenizers import CharTokenizer, from_json, get_tokenizer, load, save, to_json

needs_shakespeare = pytest.mark.skipif(
    not corpus.SHAKESPEARE_FILE.exists(), reason="needs data/shakespeare_char/input.txt: python -m data.corpus"
)

# A text of many scripts, in pieces that come again, so that merges form within words, numbers, blanks and signs.
MIXED = (
    "The king's men can't say what they've done; they'll weep in 1599, won't they?\n\n  Ångström naïve café 123 456\n"
    "Здравствуй, мир! 世界 你好世界。 नमस्ते दुनिया 🙂🙂👩‍👩‍👧 ١٢٣ ½ \t\t tabs\r\n\u00a0\u2003\u3000wide\x85\x1c\n"
) * 3
WORLD = BPETokenizer.train(MIXED, 400, special_tokens=["<|endoftext|>", "<|pad|>"])
VERSE = BPETokenizer.train(verse.write(50_000), 400)
# Letters, numbers, blanks and signs of MIXED, closely packed, and anything at all.
packed = st.lists(st.sampled_from([*sorted(set(MIXED)), "'s", "'ll", "  ", "\n\n", "th", "ing"])).map("".join)
any_text = st.text() | packed
# In the thorough profile the two claims about every text, that it comes back and that tiktoken agrees, get ten times
# the examples of the others: 10,000.
many = settings(max_examples=settings.default.max_examples * (10 if settings.default.max_examples >= 1000 else 1))
# Characters that both regex and tiktoken have in their tables: those that Python itself knows.
known = st.characters(exclude_categories=["Cs", "Cn"])


def one_line(error):
    message = str(error.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


# Characters


def test_characters_are_sorted_and_ids_are_their_ranks():
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.characters == "ehlo"
    assert tokenizer.vocab_size == 4
    ids = tokenizer.encode("hole")
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, 3, 2, 0]
    assert tokenizer.decode([1, 3, 2, 0]) == "hole"
    assert CharTokenizer.from_text("\U0001f642a\nZ").characters == "\nZa\U0001f642"


@given(st.text(min_size=1), st.data())
@many
def test_characters_round_trip(text, source):
    tokenizer = CharTokenizer.from_text(text)
    other = source.draw(st.text(alphabet=tokenizer.characters))
    ids = tokenizer.encode(other)
    assert (ids.shape, ids.dtype) == ((len(other),), np.int32)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == "".join(tokenizer.stream(ids)) == other
    assert [tokenizer.characters[one] for one in ids] == list(other)


@needs_shakespeare
def test_characters_of_tiny_shakespeare():
    text = corpus.load_corpus("shakespeare_char").text
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.vocab_size == 65
    assert tokenizer.characters.startswith("\n !$&',-.3:;?ABC")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("position", [0, 3, 4, 7, 9])
@pytest.mark.parametrize(
    ("char", "name"), [("é", "U+00E9"), ("\x00", "U+0000"), ("\U0001f642", "U+1F642"), ("d", "U+0064")]
)
def test_an_unknown_character_is_named(monkeypatch, position, char, name):
    monkeypatch.setattr(tokenizers, "PIECE_CHARS", 4)  # so that it is found in a later piece too
    text = "abcabcabc"
    text = text[:position] + char + text[position:] + char
    with pytest.raises(UserError) as error:
        CharTokenizer.from_text("abce").encode(text)
    message = one_line(error)
    assert f"character {char!r} ({name}) at position {position} is not" in message
    assert "4 characters" in message


def test_pieces_make_no_difference(monkeypatch):
    text = "to be, or not to be é世🙂" * 3
    tokenizer = CharTokenizer.from_text(text)
    ids = tokenizer.encode(text)
    monkeypatch.setattr(tokenizers, "PIECE_CHARS", 7)
    assert CharTokenizer.from_text(text) == tokenizer
    assert tokenizer.encode(text).tolist() == ids.tolist()


def test_a_lone_surrogate_is_refused():
    for use in (
        lambda text: CharTokenizer.from_text(text),
        lambda text: BPETokenizer.train(text, 256),
        lambda text: WORLD.encode(text),
        lambda text: WORLD.encode(text, use_tiktoken=False),
    ):
        with pytest.raises(UserError, match=r"lone surrogate U\+D83D at position 2") as error:
            use("ab\ud83dc")
        one_line(error)
    with pytest.raises(UserError, match=r"'\\ud83d' \(U\+D83D\) at position 0"):
        CharTokenizer.from_text("abc").encode("\ud83d")


def test_an_empty_text_is_refused():
    for use in (CharTokenizer.from_text, lambda text: BPETokenizer.train(text, 256)):
        with pytest.raises(UserError, match="an empty text"):
            use("")


# Ids, whatever the tokenizer

EACH = [CharTokenizer.from_text("abc"), BPETokenizer.train("abcabc", 257)]


@pytest.mark.parametrize("tokenizer", EACH, ids=["char", "bpe"])
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    size = tokenizer.vocab_size
    for bad in (-1, size, 2**31, 2**40, -(2**63), 2**64, 10**30):
        for use in (tokenizer.decode, lambda ids: list(tokenizer.stream(ids))):
            with pytest.raises(UserError) as error:
                use([0, 0, bad])
            assert "token id" in one_line(error)
    with pytest.raises(UserError, match=f"token id {size} at position 2 is outside the vocabulary: .* 0 to {size - 1}"):
        tokenizer.decode([0, 0, size])
    with pytest.raises(UserError, match="token id -1 at position 0"):
        tokenizer.decode(np.array([-1]))


@pytest.mark.parametrize("tokenizer", EACH, ids=["char", "bpe"])
def test_what_is_not_a_row_of_ids_is_refused(tokenizer):
    for bad in (
        [0.5],
        ["a"],
        [True, False],
        [None],
        [[0, 1], [1, 0]],
        [[0], [1, 2]],
        np.zeros((2, 2), int),
        np.ones(1),
    ):
        with pytest.raises(UserError, match="token ids must be") as error:
            tokenizer.decode(bad)
        one_line(error)


@pytest.mark.parametrize("tokenizer", EACH, ids=["char", "bpe"])
def test_ids_may_come_in_any_integer_type_and_from_any_iterable(tokenizer):
    text = "abcab"
    ids = tokenizer.encode(text)
    for kind in (np.int64, np.uint8, np.uint16, np.uint64):
        if ids.max() <= np.iinfo(kind).max:
            assert tokenizer.decode(ids.astype(kind)) == text
    assert tokenizer.decode(iter(ids.tolist())) == text
    assert tokenizer.decode([]) == tokenizer.decode(np.empty(0, np.int32)) == "".join(tokenizer.stream([])) == ""
    assert tokenizer.encode("").shape == (0,)
    assert tokenizer.encode("").dtype == np.int32


# Byte-pair encoding: training


def test_the_worked_example():
    tokenizer = BPETokenizer.train("aaabdaaabac", 259)
    assert tokenizer.merges == ((97, 97), (97, 98), (256, 257))
    assert tokenizer.token_bytes[256:] == (b"aa", b"ab", b"aaab")
    assert tokenizer.encode("aaabdaaabac").tolist() == [258, 100, 258, 97, 99]
    assert tokenizer.encode("aaabdaaabac", use_tiktoken=False).tolist() == [258, 100, 258, 97, 99]
    assert tokenizer.decode([258, 100, 258, 97, 99]) == "aaabdaaabac"


def test_of_pairs_that_occur_equally_often_the_lowest_ids_come_first():
    assert BPETokenizer.train("dc.dc.ba.ba", 257).merges == ((ord("b"), ord("a")),)
    assert BPETokenizer.train("bd.bd.bc.bc", 257).merges == ((ord("b"), ord("c")),)
    assert BPETokenizer.train("zy.zy.zy.ab.ab", 257).merges == ((ord("z"), ord("y")),)


def rescan(text, num_merges):
    """Training as one would explain it: count all pairs of the whole text anew before each merge."""
    chunks = [list(chunk.encode()) for chunk in bpe.split_chunks(text)]
    merges = []
    for new_id in range(256, 256 + num_merges):
        counts = Counter(pair for ids in chunks for pair in pairwise(ids))
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            break
        merges.append(best)
        for place, ids in enumerate(chunks):
            merged = []
            while ids:
                if tuple(ids[:2]) == best:
                    merged.append(new_id)
                    ids = ids[2:]
                else:
                    merged.append(ids[0])
                    ids = ids[1:]
            chunks[place] = merged
    return merges, chunks


@given(st.text(alphabet="ab ", max_size=80) | packed | st.text(alphabet=known), st.integers(0, 30))
@settings(deadline=None)
def test_training_equals_a_rescan_before_each_merge(text, num_merges):
    merges, chunks = rescan(text, num_merges)
    assert bpe.learn_merges(bpe.count_chunks(text), num_merges) == merges
    tokenizer = BPETokenizer(tuple(merges))
    assert tokenizer.encode(text, use_tiktoken=False).tolist() == [one for ids in chunks for one in ids]


@given(st.text(alphabet="ab", min_size=1, max_size=200) | packed, st.integers(0, 60))
@settings(deadline=None)
def test_a_long_chunk_is_merged_as_a_short_one(text, num_merges):
    """In the worst texts, every occurrence of a pair overlaps another, or touches it."""
    ranks = {pair: new_id for new_id, pair in enumerate(bpe.learn_merges({text: 2}, num_merges), start=256)}
    for chunk in (text.encode(), text.encode()[::-1]):
        assert bpe.merge_long(chunk, ranks) == bpe.merge_all(list(chunk), ranks)


def dna(length):
    """Letters without a space: one chunk, however long."""
    return "".join(np.random.default_rng(1).choice(list("ACGT"), length))


def test_long_chunks_are_learned_and_encoded_as_ever():
    pytest.importorskip("tiktoken")
    text = dna(3_000)
    merges, chunks = rescan(text, 60)
    assert bpe.learn_merges(bpe.count_chunks(text), 60) == merges
    tokenizer = BPETokenizer(tuple(merges))
    assert tokenizer.encode(text, use_tiktoken=False).tolist() == tokenizer.encode(text).tolist() == chunks[0]


def test_a_long_chunk_is_not_read_again_for_each_merge(monkeypatch):
    """A failure: a megabyte without spaces takes hours. 300 merges would read it 300 times; 6 times were seen."""
    read, keys = [], bpe.Row.keys
    monkeypatch.setattr(bpe.Row, "keys", lambda row, places: read.append(len(places)) or keys(row, places))
    monkeypatch.setattr(bpe, "merge_all", None)
    text = dna(20_000)
    tokenizer = BPETokenizer(tuple(bpe.learn_merges({text: 1}, 300)))
    assert sum(read) < 20 * len(text)
    read.clear()
    assert len(tokenizer.encode(text, use_tiktoken=False)) < len(text) / 3
    assert sum(read) < 20 * len(text)


def test_a_vocabulary_that_cannot_be_had_is_refused():
    for size, specials, fault in [
        (255, [], "a vocabulary of 255 is too small: .* at least 256"),
        (-1, [], "a vocabulary of -1 is too small"),
        (256, ["<|endoftext|>"], "too small: the 256 bytes and 1 special tokens .* at least 257"),
        (260, [], "a vocabulary of 260 is too large: this text gives at most 259 ids"),
        (261, ["<|endoftext|>"], "too large: this text gives at most 260 ids"),
    ]:
        with pytest.raises(UserError, match=fault) as error:
            BPETokenizer.train("aaabdaaabac", size, special_tokens=specials)
        one_line(error)
    assert BPETokenizer.train("aaabdaaabac", 256).merges == ()
    assert BPETokenizer.train("aaabdaaabac", 259).vocab_size == 259
    assert BPETokenizer.train("aaabdaaabac", 260, special_tokens=["<|endoftext|>"]).vocab_size == 260


# Byte-pair encoding: encoding and decoding


@pytest.mark.parametrize("use_tiktoken", [True, False])
@given(text=any_text)
@many
def test_bpe_round_trips_every_text(use_tiktoken, text):
    for tokenizer in (WORLD, VERSE):
        ids = tokenizer.encode(text, use_tiktoken=use_tiktoken)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert "".join(tokenizer.stream(ids.tolist())) == text
        assert tokenizer.decode_bytes(ids) == text.encode()


@given(any_text)
@settings(deadline=None)
def test_chunks_are_the_whole_text(text):
    assert "".join(bpe.split_chunks(text)) == text


def test_chunks_are_gpt2s():
    assert bpe.split_chunks("I've 12 men,  they'll   weep!!\n\n ok's ") == [
        *("I", "'ve", " 12", " men", ",", " ", " they", "'ll", "  ", " weep", "!!", "\n\n", " ok", "'s", " "),
    ]


# White space of one, two and three bytes, and characters that share bytes with it.
blank = st.text(alphabet="a \n\x1c\x85\u00a0\u1680\u2003\u2028\u202f\u205f\u3000\u3001\u2019\u00e0\u0945", min_size=30)


@given(any_text | st.text(alphabet="a' \n1.", min_size=30) | blank, st.integers(4, 8))
@settings(deadline=None)
def test_pieces_have_the_chunks_of_the_whole_text(text, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "PIECE_BYTES", size)
        pieces = list(text_module.cut(text.encode()))
        assert "".join(pieces) == text
        assert [chunk for piece in pieces for chunk in bpe.split_chunks(piece)] == bpe.split_chunks(text)


def test_texts_are_cut_where_they_can_be(monkeypatch):
    monkeypatch.setattr(text_module, "PIECE_BYTES", 4)
    cut = text_module.cut
    assert list(cut(b"to be or not to be")) == ["to be", " or not", " to be"]
    assert list(cut(b"uninterrupted")) == ["uninterrupted"]
    assert list(cut(b"uninterrupted", anywhere=True)) == ["unin", "terr", "upte", "d"]
    assert list(cut("aé世🙂b".encode(), anywhere=True)) == ["aé", "世", "🙂", "b"]
    assert list(cut(b"to be or not to be", 3, 11)) == ["be or", " no"]


def test_chunks_of_every_length_encode_alike(monkeypatch):
    text = verse.write(3_000)
    ids = VERSE.encode(text, use_tiktoken=False).tolist()
    monkeypatch.setattr(bpe, "MAX_RESCANNED_BYTES", 0)
    assert BPETokenizer(VERSE.merges).encode(text, use_tiktoken=False).tolist() == ids


def test_words_seen_before_and_words_not_kept_encode_alike(monkeypatch):
    text = verse.write(3_000)
    ids = VERSE.encode(text, use_tiktoken=False).tolist()
    assert VERSE.encode(text, use_tiktoken=False).tolist() == ids
    monkeypatch.setattr(bpe, "MAX_CACHED_CHUNKS", 0)
    assert BPETokenizer(VERSE.merges).encode(text, use_tiktoken=False).tolist() == ids


@given(st.lists(st.integers(0, WORLD.vocab_size - 1)))
@settings(deadline=None)
def test_any_ids_decode_and_stream_alike(ids):
    text = WORLD.decode(ids)
    assert text == b"".join(WORLD.token_bytes[one] for one in ids).decode("utf-8", errors="replace")
    assert "".join(WORLD.stream(iter(ids))) == text


def test_a_stream_waits_for_whole_characters_and_replaces_broken_ones():
    plain = BPETokenizer(())
    assert list(plain.stream("é世a".encode())) == ["é", "世", "a"]
    assert list(plain.stream(b"a\xffb")) == ["a", "\ufffd", "b"]
    assert list(plain.stream(b"a\xe4\xb8b")) == ["a", "\ufffdb"]  # two bytes of three, and then something else
    assert list(plain.stream(b"a\xe4\xb8")) == ["a", "\ufffd"]  # and then nothing
    assert list(plain.stream("世".encode() + b"\x96" + "界".encode())) == ["世", "\ufffd", "界"]


def test_a_stream_does_not_wait_for_more_than_it_needs():
    given_so_far = []

    def ids():
        for one in "ab世c".encode():
            given_so_far.append(one)
            yield one

    seen = [(text, len(given_so_far)) for text in BPETokenizer(()).stream(ids())]
    assert seen == [("a", 1), ("b", 2), ("世", 5), ("c", 6)]


def test_special_tokens_are_special_only_where_allowed():
    end, pad = WORLD.vocab_size - 2, WORLD.vocab_size - 1
    text = "weep<|endoftext|> weep<|pad|>"
    for use_tiktoken in (True, False):
        plain = WORLD.encode(text, use_tiktoken=use_tiktoken).tolist()
        assert end not in plain
        assert pad not in plain
        one = WORLD.encode(text, allowed_special={"<|endoftext|>"}, use_tiktoken=use_tiktoken).tolist()
        assert (one.count(end), one.count(pad)) == (1, 0)
        both = WORLD.encode(text, allowed_special=WORLD.special_tokens, use_tiktoken=use_tiktoken).tolist()
        assert (both.count(end), both.count(pad)) == (1, 1)
        assert both[-1] == pad
        assert WORLD.decode(plain) == WORLD.decode(one) == WORLD.decode(both) == text
        assert "".join(WORLD.stream(both)) == text
    assert WORLD.encode("<|endoftext|>", allowed_special=["<|endoftext|>"]).tolist() == [end]
    with pytest.raises(UserError, match=r"'<\|end\|>' is no special token of this tokenizer") as error:
        WORLD.encode("", allowed_special={"<|end|>"})
    one_line(error)


def test_of_special_tokens_that_overlap_the_longer_one_counts():
    tokenizer = BPETokenizer((), ("<a>", "<a><b>"))
    assert tokenizer.encode("<a><a><b>", allowed_special=tokenizer.special_tokens).tolist() == [256, 257]


# Byte-pair encoding: tiktoken


@given(any_text)
@many
def test_tiktoken_encodes_alike(text):
    pytest.importorskip("tiktoken")
    for tokenizer in (WORLD, VERSE):
        encoding = tokenizer.to_tiktoken()
        ids = tokenizer.encode(text, use_tiktoken=False).tolist()
        assert encoding.encode_ordinary(text) == ids
        assert tokenizer.encode(text).tolist() == ids
        assert encoding.decode(ids) == text


@given(st.text(alphabet="aab b'1.\n", min_size=20) | st.text(alphabet=known, min_size=10), st.data())
@settings(deadline=None)
def test_whatever_is_learned_tiktoken_encodes_alike(text, source):
    pytest.importorskip("tiktoken")
    text = text * 2
    merges = bpe.learn_merges(bpe.count_chunks(text), 50)
    tokenizer = BPETokenizer(tuple(merges))
    other = source.draw(st.text(alphabet=sorted(set(text))))
    for each in (text, other):
        assert tokenizer.to_tiktoken().encode_ordinary(each) == tokenizer.encode(each, use_tiktoken=False).tolist()


@given(st.binary(min_size=1) | st.lists(st.sampled_from(WORLD.token_bytes), min_size=1).map(b"".join))
@settings(deadline=None)
def test_tiktoken_encodes_and_decodes_bytes_that_are_no_text_alike(chunk):
    pytest.importorskip("tiktoken")
    encoding = WORLD.to_tiktoken()
    ids = WORLD._encode_chunk(chunk)
    assert encoding._encode_single_piece(chunk) == ids
    assert encoding.decode_bytes(ids) == WORLD.decode_bytes(ids) == chunk
    assert encoding.decode(ids) == WORLD.decode(ids)


@given(packed, st.sets(st.sampled_from(WORLD.special_tokens)))
@settings(deadline=None)
def test_tiktoken_treats_special_tokens_alike(text, allowed):
    pytest.importorskip("tiktoken")
    text = f"{text}<|endoftext|> {text}<|pad|><|endoftext|>\n"
    ids = WORLD.encode(text, allowed_special=allowed, use_tiktoken=False).tolist()
    assert WORLD.to_tiktoken().encode(text, allowed_special=allowed, disallowed_special=()) == ids
    assert WORLD.encode(text, allowed_special=allowed).tolist() == ids


@needs_shakespeare
def test_tiktoken_encodes_the_whole_corpus_alike():
    pytest.importorskip("tiktoken")
    shakespeare = corpus.load_corpus("shakespeare_char")
    tokenizer = BPETokenizer.train(shakespeare.train_text, 1024)
    ids = tokenizer.encode(shakespeare.text, use_tiktoken=False)
    assert tokenizer.to_tiktoken().encode_ordinary(shakespeare.text) == ids.tolist()
    assert tokenizer.encode(shakespeare.text).tolist() == ids.tolist()
    assert tokenizer.decode(ids) == shakespeare.text
    assert tokenizer.merges[:3] == ((32, 116), (104, 101), (32, 97))


def test_tiktoken_is_used_where_it_is_installed(monkeypatch):
    pytest.importorskip("tiktoken")

    def by_hand(*args):
        raise AssertionError("encoded by hand")

    monkeypatch.setattr(BPETokenizer, "_encode_piece", by_hand)
    assert WORLD.decode(WORLD.encode("The king")) == "The king"


def test_blanks_without_end_do_not_overflow_tiktokens_stack():
    text = "a" + " " * 1_000_001 + "b"
    assert WORLD.decode(WORLD.encode(text)) == text
    text = "king\n" * 9 + "a" * 300_000 + "\n" * 1_000_001
    assert WORLD.decode(WORLD.encode(text)) == text


def test_without_tiktoken_everything_but_its_own_ranks_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # import tiktoken now raises ImportError
    tokenizer = BPETokenizer(WORLD.merges)
    assert tokenizer.decode(tokenizer.encode(MIXED)) == MIXED
    for use in (tokenizer.to_tiktoken, gpt2_tokenizer):
        with pytest.raises(UserError, match="needs the package tiktoken: pip install tiktoken") as error:
            use()
        one_line(error)


def test_without_regex_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "regex", None)
    with pytest.raises(UserError, match="needs the package regex: pip install regex"):
        BPETokenizer.train("some text", 256)
    assert CharTokenizer.from_text("characters need nothing").vocab_size > 0


# Merges that are no merges


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=14))
@settings(deadline=None)
def test_merges_are_accepted_exactly_if_each_can_happen(drawn):
    """Bytes 0 to 2 and their merges, drawn at random; the oracle encodes the bytes of each token."""
    merges = []
    for left, right in drawn:
        ids = [0, 1, 2, *range(256, 256 + len(merges))]
        merges.append((ids[left % len(ids)], ids[right % len(ids)]))
    tokens = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        tokens.append(tokens[left] + tokens[right])
    ranks = {}
    for new_id, pair in enumerate(merges, start=256):
        ranks.setdefault(pair, new_id)
    expected = all(bpe.merge_all(list(tokens[new_id]), ranks) == [new_id] for new_id in range(256, 256 + len(merges)))
    try:
        BPETokenizer(tuple(merges))
        accepted = True
    except UserError:
        accepted = False
    assert accepted == expected


@pytest.mark.parametrize(
    ("merges", "fault"),
    [
        (((97, 256),), r"merge 0, \(97, 256\), has an id that no byte or merge before it gives"),  # its own: a cycle
        (((97, 98), (257, 97), (97, 97)), r"merge 1, \(257, 97\), has an id"),
        (((-1, 97),), r"merge 0, \(-1, 97\), has an id"),
        (((97, 98), (97, 98)), r"the merge \(97, 98\) is there twice"),
        (((97, 98), (98, 99), (97, 257)), r"merge 2, \(97, 257\), can never happen"),  # "ab" takes the b of "bc"
        (((97, 97), (97, 256)), r"merge 1, \(97, 256\), can never happen"),  # in "aaa" the first two merge
        (((98, 99), (256, 256), (256, 257)), r"merge 2, \(256, 257\), can never happen"),  # the same with "bc" for "a"
        (tuple((256 + n - 1 if n else 97,) * 2 for n in range(60)), "the first .* merges make tokens of over"),
    ],
)
def test_merges_that_are_no_merges_are_refused(merges, fault):
    with pytest.raises(UserError, match=fault) as error:
        BPETokenizer(merges)
    one_line(error)


def test_special_tokens_and_byte_orders_that_make_no_sense_are_refused():
    for specials, order, fault in [
        (("<a>", "<a>"), bytes(range(256)), "special token '<a>' is there twice"),
        (("",), bytes(range(256)), "special token '' is empty"),
        (("\ud800",), bytes(range(256)), "lone surrogate"),
        ((), bytes(256), "each of the 256 bytes exactly once"),
        ((), bytes(range(255)), "each of the 256 bytes exactly once"),
    ]:
        with pytest.raises(UserError, match=fault):
            BPETokenizer((), specials, order)


# Files


@pytest.mark.parametrize("tokenizer", [*EACH, WORLD, VERSE, CharTokenizer.from_text(MIXED)])
def test_a_tokenizer_comes_back_from_its_file(tmp_path, tokenizer):
    path = tmp_path / "run" / "tokenizer.json"
    save(tokenizer, path)
    assert load(path) == tokenizer
    assert json.loads(path.read_text()) == to_json(tokenizer)
    assert get_tokenizer(str(path), "unused") == tokenizer
    assert [name.name for name in path.parent.iterdir()] == ["tokenizer.json"]


BPE = {"kind": "bpe", "byte_order": list(range(256)), "merges": [], "special_tokens": []}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "Expecting value"),
        ("{", "line 1 column 2"),
        ("\n\n[1,", "line 3 column 4"),
        (b"\xff\xfe{\x00", "invalid start byte"),
        ("[" * 100_000, "nested too deeply"),
        ('{"kind":' * 100_000, "nested too deeply"),
        ("[]", r"expected an object, got \[\]"),
        ("null", "expected an object, got None"),
        ("9" * 10_000, "digits"),
        ("{}", "kind must be one of char, bpe, not None"),
        (
            {"version": "1.0", "model": {"type": "BPE"}},
            r"is Hugging Face's tokenizer.json, not a tokenizer.json of a run: take the merges.txt \(vocab.bpe\)",
        ),
        ({"!": 0, "the": 1, "kinds": 2}, "is a list of tokens and their ids, as GPT-2's vocab.json .*take the merges"),
        ({"tokenizer_class": "GPT2Tokenizer"}, "is Hugging Face's tokenizer_config.json"),
        ({"model_type": "gpt2", "vocab_size": 50257}, "is the config.json of a model"),
        ({"model": {}, "training": {}}, "is the config.json of a run"),
        ({"eos_token": "<|endoftext|>"}, "is Hugging Face's special_tokens_map.json"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ({"kind": "word"}, "kind must be one of char, bpe, not 'word'"),
        ({"kind": ["char"]}, r"kind must be one of char, bpe, not \['char'\]"),
        ({"kind": "x" * 10_000}, "kind must be one of .*xxx"),
        ('{"kind": "char", "characters": "a", "characters": "ab"}', "field 'characters' is there twice"),
        ({"kind": "char"}, "missing field 'characters'"),
        ({"kind": "char", "characters": "ab", "more": 1}, "unknown field 'more'"),
        ({"kind": "char", "characters": ["a", "b"]}, "characters must be a str, not"),
        ({"kind": "char", "characters": ""}, "cannot be empty"),
        ({"kind": "char", "characters": "abb"}, "'b' occurs twice"),
        ({"kind": "char", "characters": "ba"}, "'a' comes after 'b'"),
        ('{"kind": "char", "characters": "a\\ud800"}', "lone surrogate"),
        (BPE | {"merges": {}}, "merges must be a list"),
        (BPE | {"merges": [[97]]}, r"merge 0 must be a list of two ids, not \[97\]"),
        (BPE | {"merges": [[97, 98], "ab"]}, "merge 1 must be a list of two ids, not 'ab'"),
        (BPE | {"merges": [5]}, "merge 0 must be a list of two ids, not 5"),
        (BPE | {"merges": [[97, 98.0]]}, "merge 0 must be"),
        (BPE | {"merges": [[97, True]]}, "merge 0 must be"),
        (BPE | {"merges": [[97, 10**4000]]}, "merge 0, .* has an id that no byte"),
        (BPE | {"merges": [[97, 256]]}, "merge 0, .* has an id that no byte"),
        (BPE | {"merges": [[97, 98], [97, 98]]}, "there twice"),
        (BPE | {"merges": [[97, 97], *([n, n] for n in range(256, 400))]}, "merges make tokens of over"),
        (BPE | {"byte_order": list(range(255))}, "each of the 256 bytes"),
        (BPE | {"byte_order": [*range(255), 256]}, "each of the 256 bytes"),
        (BPE | {"byte_order": [*range(255), 255.0]}, "each of the 256 bytes"),
        (BPE | {"special_tokens": [1]}, "a special token must be a string, not 1"),
        (BPE | {"special_tokens": ["a", "a"]}, "special token 'a' is there twice"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_one_line(tmp_path, content, fault):
    path = tmp_path / "tokenizer.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=fault) as error:
        load(path)
    message = one_line(error)
    assert message.startswith(f"{path}")
    assert len(message) < len(str(path)) + 300


def test_a_file_that_is_none_or_too_large_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "MAX_FILE_BYTES", 1_000)
    large = tmp_path / "large.json"
    large.write_text(" " * 1_001)
    for path, fault in [(large, "more than 1,000 bytes"), (tmp_path, "is a folder"), (tmp_path / "none", "no file")]:
        with pytest.raises(UserError, match=fault) as error:
            load(path)
        assert "expected a tokenizer.json" in one_line(error)


def tokenizer_or_error(path):
    try:
        return load(path)
    except UserError as error:
        return error


@pytest.mark.parametrize("tokenizer", EACH, ids=["char", "bpe"])
@given(source=st.data())
@settings(deadline=None)
def test_a_damaged_file_loads_or_is_one_line(tmp_path_factory, tokenizer, source):
    content = bytearray(json.dumps(to_json(tokenizer)).encode())
    for _ in range(source.draw(st.integers(1, 3))):
        at = source.draw(st.integers(0, len(content)))
        end = source.draw(st.integers(at, min(at + 20, len(content))))
        content[at:end] = source.draw(st.binary(max_size=3) | st.sampled_from([b",", b"]", b"[", b'"', b"9", b"\\u"]))
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(content)
    loaded = tokenizer_or_error(path)
    if isinstance(loaded, UserError):
        assert len(str(loaded).splitlines()) == 1
        assert str(path) in str(loaded)
    else:
        assert loaded.decode(range(loaded.vocab_size)) is not None
        assert from_json(to_json(loaded)) == loaded


# GPT-2


def gpt2_symbols():
    """Each byte's character in GPT-2's files: a byte that prints is itself, the others are U+0100 and so on."""
    symbols, others = {}, 0
    for byte in range(256):
        char = chr(byte)
        if (char.isprintable() and char != " ") and byte != 0xAD:
            symbols[byte] = char
        else:
            symbols[byte] = chr(0x100 + others)
            others += 1
    return symbols


def as_vocab_bpe(tokenizer):
    """The merges of a tokenizer in the format of GPT-2's vocab.bpe."""
    symbols = gpt2_symbols()

    def word(token):
        return "".join(symbols[byte] for byte in tokenizer.token_bytes[token])

    lines = [f"{word(left)} {word(right)}" for left, right in tokenizer.merges]
    return "#version: 0.2\n" + "\n".join(lines) + "\n"


def test_published_merges_load_with_gpt2s_ids(tmp_path):
    path = tmp_path / "vocab.bpe"
    path.write_text(as_vocab_bpe(WORLD), encoding="utf-8")
    loaded = load_merges(path)
    # From GPT-2's encoder.json: "!" is 0, "a" is 64, the space (written as U+0120) is 220, and the byte 0 is 188.
    assert loaded.encode("!a \0").tolist() == [0, 64, 220, 188]
    assert loaded.token_bytes[256:-1] == WORLD.token_bytes[256:-2]
    assert loaded.special_tokens == ("<|endoftext|>",)
    assert loaded.encode("<|endoftext|>", allowed_special={"<|endoftext|>"}).tolist() == [256 + len(WORLD.merges)]
    for text in (MIXED, "they're <|endoftext|>"):
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        theirs = WORLD.encode(text)
        assert [loaded.token_bytes[one] for one in ids] == [WORLD.token_bytes[one] for one in theirs]
    save(loaded, tmp_path / "tokenizer.json")
    assert load(tmp_path / "tokenizer.json") == loaded
    assert get_tokenizer(str(path), "unused") == loaded


def test_published_merges_may_have_windows_line_ends_or_no_first_line(tmp_path):
    for content in (b"#version: 0.2\r\na b\r\nab c\r\n", b"a b\nab c", b"#version: 0.2\na b\nab c\n"):
        path = tmp_path / "merges.txt"
        path.write_bytes(content)
        assert load_merges(path).token_bytes[256:] == (b"ab", b"abc", b"<|endoftext|>")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"#version: 0.2\nab c\na b\n", "line 2: no line before it makes the token 'ab'"),  # a gap, or a cycle
        (b"a b\nab abab\n", "line 2: no line before it makes the token 'abab'"),
        (b"a b\nc d\na b\n", "line 3 makes the token 'ab' again"),
        (b"a b\nb c\nab c\na bc\n", "line 4 makes the token 'abc' again"),
        (b"a b\nb c\na bc\n", r"merge 2, .* can never happen"),
        (b"a b\n\nab c\n", "line 2 must be two tokens with a space between them, not ''"),
        (b"a b c\n", "line 1 must be two tokens"),
        (b"a\tb\n", "line 1 must be two tokens"),
        (b"a  b\n", "line 1 must be two tokens"),
        (b" b\n", "line 1: no line before it makes the token ''"),
        (b"a \x00\n", r"line 1: no line before it makes the token '\\x00'"),
        (b"a b\n#version: 0.2\n", "line 2: no line before it makes the token '#version:'"),
        (b"", "it holds no merge"),
        (b"#version: 0.2\n", "it holds no merge"),
        (b"\xff\xfe", "can't decode byte 0xff in position 0"),
        (b'{"!": 0}', "it is JSON: name a tokenizer.json with its ending .json, or GPT-2's merges.txt"),
    ],
)
def test_a_merges_file_that_is_none_is_one_line(tmp_path, content, fault):
    path = tmp_path / "vocab.bpe"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        load_merges(path)
    message = one_line(error)
    assert message.startswith(f"{path} is not a merges file: ")
    assert len(message) < len(str(path)) + 300


def test_ranks_give_the_merges_back():
    ranks = list(WORLD.token_bytes[: 256 + len(WORLD.merges)])
    assert gpt2_bpe.from_ranks(ranks, WORLD.special_tokens) == WORLD
    with pytest.raises(UserError, match="token 257, b'abc', is not made of two tokens of lower rank"):
        gpt2_bpe.from_ranks([*ranks[:256], b"xy", b"abc"])
    with pytest.raises(UserError, match="the first 256 tokens must be the 256 bytes"):
        gpt2_bpe.from_ranks([*ranks[:255], b"xy"])


def test_the_gpt2_tokenizer_comes_from_tiktoken_and_then_needs_it_no_more(tmp_path, monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")
    path = tmp_path / "vocab.bpe"
    path.write_text(as_vocab_bpe(VERSE), encoding="utf-8")
    small = load_merges(path)  # stands for GPT-2's own, which would have to be downloaded
    asked = []

    def get_encoding(name):
        asked.append(name)
        return small.to_tiktoken()

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert gpt2_tokenizer() == get_tokenizer("gpt2", "unused") == small
    assert asked == ["gpt2", "gpt2"]


def test_without_a_network_the_gpt2_tokenizer_is_one_line(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def get_encoding(name):
        raise ConnectionError("a message\nof several lines")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(
        UserError, match=r"tiktoken could not get GPT-2's ranks \(ConnectionError\).*vocab.bpe"
    ) as error:
        gpt2_tokenizer()
    one_line(error)


# By name, and from the command line


def test_a_tokenizer_by_its_name(tmp_path):
    assert get_tokenizer("char", "hello") == CharTokenizer.from_text("hello")
    assert get_tokenizer("bpe", "aaabdaaabac", 259) == BPETokenizer.train("aaabdaaabac", 259)
    with pytest.raises(
        UserError, match=r"no tokenizer or file 'chars': expected char, bpe, gpt2, a tokenizer\.json or a"
    ):
        get_tokenizer("chars", "hello")
    with pytest.raises(UserError, match="is a folder"):
        get_tokenizer(str(tmp_path), "hello")


def test_the_command_trains_prints_and_keeps(tmp_path, capsys):
    text, out = tmp_path / "text", tmp_path / "mine.json"
    text.write_text("aaabdaaabac" * 20)
    assert tokenizers.main(["train", "--data", str(text), "--vocab-size", "258", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "258 ids from 198 characters" in printed
    assert "256         'a' + 'a'" in printed
    assert load(out) == BPETokenizer.train(("aaabdaaabac" * 20)[:198], 258)


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--vocab-size", "100"], "a vocabulary of 100 is too small"),
        (["--vocab-size", "100000"], "a vocabulary of 100000 is too large"),
        (["--data", "nowhere"], "no file 'nowhere'"),
        (["--vocab-size", "256", "--out", os.devnull + "/x"], "cannot write"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(capsys, arguments, fault):
    assert tokenizers.main(["train", "--data", "verse", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {fault}")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["train", "--vocab-size", "many"], ["train", "--frobnicate"], []])
def test_flags_that_make_no_sense_are_one_line_too(capsys, arguments):
    assert tokenizers.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.endswith(" (see python -m data.tokenizers --help)\n")
    assert len(printed.err.splitlines()) == 1


def test_the_command_overwrites_nothing(tmp_path, capsys):
    """Not even the text that it learns from, which is easily named by mistake."""
    text, link = tmp_path / "text", tmp_path / "link"
    text.write_text("aaabdaaabac" * 20)
    link.symlink_to(tmp_path / "nowhere")
    for out in (text, link):
        assert tokenizers.main(["train", "--data", str(text), "--vocab-size", "258", "--out", str(out)]) == 1
        error = f"error: {out} exists already, and nothing is overwritten: choose another --out, or delete it\n"
        assert capsys.readouterr() == ("", error)
    assert text.read_text() == "aaabdaaabac" * 20
    assert link.is_symlink()


def test_the_command_runs():
    root = Path(data.__file__).parents[1]
    command = [sys.executable, "-m", "data.tokenizers", "train", "--data", "verse", "--vocab-size", "300"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "verse: 300 ids from 360,000 characters" in run.stdout
    assert run.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_whoever_reads_the_commands_output_may_stop_early(tmp_path, unbuffered):
    out = tmp_path / "mine.json"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "data.tokenizers", "train", "--data", "verse", "--vocab-size", "257"]
    ran = subprocess.run(
        [*command, "--out", str(out)],
        cwd=Path(data.__file__).parents[1],
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (1, b"")
    assert load(out).vocab_size == 257

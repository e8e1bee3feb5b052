"""Tokenizers: text to token ids and back. One id per character, or byte-pair encoding; both by hand.

    tokenizer = CharTokenizer.from_text("hello")      # the characters e h l o, ids 0 1 2 3
    tokenizer.encode("hole")                          # array([1, 3, 2, 0], dtype=int32)
    tokenizer.decode([1, 3, 2, 0])                    # "hole"

Every tokenizer has `kind`, `vocab_size`, `encode`, `decode`, `stream` and `to_json`; `save` and `load` keep one in the
tokenizer.json of a run, and `get_tokenizer` finds the one that a command line names. Ids are 0 to vocab_size - 1.

    python -m data.tokenizers train --vocab-size 1024 [--data NAME|FILE] [--out FILE]

Byte-pair encoding. A text is bytes (UTF-8), so 256 ids can write everything. Training looks for the pair of
neighbours that occurs most often, gives it an id of its own, replaces it everywhere, and starts again. The classic
example, `aaabdaaabac` with three merges (and what the ids 256, 257, 258 stand for):

    aaabdaaabac       aa occurs 4 times (it may overlap itself), more than any other pair: aa -> 256
    256 a b d 256 a b a c      "ab" and "256 a" occur twice each; the lowest pair of ids wins: ab -> 257
    256 257 d 256 257 a c      "256 257" occurs twice: aaab -> 258
    258 d 258 a c

    tokenizer = BPETokenizer.train("aaabdaaabac", 259)
    tokenizer.merges                                  # ((97, 97), (97, 98), (256, 257))
    tokenizer.encode("aaabdaaabac")                   # array([258, 100, 258,  97,  99], dtype=int32)

Encoding a new text makes the same merges in the same order. No merge crosses the borders that GPT-2's pattern draws
first: contractions, words, numbers, runs of other signs, each with the space before it, and white space.

The scheme is Sennrich, Haddow and Birch (2016), on bytes as in Radford et al. (2019). Left out on purpose: other
splitting patterns, and normalisation: decode(encode(text)) == text for every text.
"""

import codecs
import heapq
import json
import os
import re
import reprlib
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Protocol

import numpy as np

from data import UserError, read_bytes, write_atomically
from data.corpus import load_corpus

if TYPE_CHECKING:
    import tiktoken

__all__ = ["BPETokenizer", "CharTokenizer", "Tokenizer", "get_tokenizer", "gpt2_tokenizer", "load", "save"]

PIECE_CHARS = 1 << 16  # texts are encoded in pieces of about this size, so that memory holds no second copy of them
MAX_TIKTOKEN_BLANK = 1 << 18  # characters of white space in a row; tiktoken panics at a million
MAX_FILE_BYTES = 8 << 20  # of a tokenizer.json or a merges file; GPT-2's have under 1 MB
MAX_TABLE_BYTES = 16 << 20  # of all tokens' bytes together; a few crafted lines could ask for terabytes
MAX_CACHED_CHUNKS = 1 << 18
MAX_CACHED_CHUNK_CHARS = 64

# GPT-2's borders. \p{L} letters, \p{N} numbers, \s white space; the last two leave the last space of a run to the
# word that follows it.
SPLIT_PATTERN = r"'(?:s|d|m|t|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END_OF_TEXT = "<|endoftext|>"


class Tokenizer(Protocol):
    """What every tokenizer can do. Ids are whole numbers from 0 to vocab_size - 1."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> np.ndarray:
        """(n,) int32. Raises UserError for a text that has no ids."""
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Raises UserError for ids that are not whole numbers in [0, vocab_size)."""
        ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode`, piece by piece as the ids come."""
        ...

    def to_json(self) -> dict:
        """All that `from_json` needs, in types that JSON has."""
        ...


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character: the characters sorted by code point, an id is a character's rank."""

    characters: str

    kind: ClassVar[str] = "char"

    def __post_init__(self) -> None:
        if not self.characters:
            raise UserError("a character vocabulary cannot be empty")
        check_no_surrogate(self.characters)
        for before, after in pairwise(self.characters):
            if before >= after:
                fault = "occurs twice" if before == after else f"comes after {before!r}"
                raise UserError(f"the vocabulary must list each character once, by code point: {after!r} {fault}")

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer of exactly the characters that occur in `text`. Raises UserError if there are none."""
        if not text:
            raise UserError("an empty text gives no character vocabulary")
        check_no_surrogate(text)
        seen = np.zeros(sys.maxunicode + 1, dtype=bool)
        for start in range(0, len(text), PIECE_CHARS):
            seen[code_points(text[start : start + PIECE_CHARS])] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    @cached_property
    def _code_points(self) -> np.ndarray:  # (V,): id -> code point
        return code_points(self.characters)

    @cached_property
    def _ids(self) -> np.ndarray:  # (highest code point + 2,) int32: code point -> id, or -1; the last entry is -1 too
        ids = np.full(int(self._code_points[-1]) + 2, -1, dtype=np.int32)
        ids[self._code_points] = np.arange(self.vocab_size, dtype=np.int32)
        return ids

    def encode(self, text: str) -> np.ndarray:
        """(len(text),) int32. Raises UserError for a character that is not in the vocabulary, and names it."""
        ids = np.empty(len(text), dtype=np.int32)
        for start in range(0, len(text), PIECE_CHARS):
            points = code_points(text[start : start + PIECE_CHARS])
            ids[start : start + len(points)] = self._ids[np.minimum(points, len(self._ids) - 1)]
        if len(ids) and ids.min() < 0:
            at = int(np.argmin(ids))
            raise UserError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the "
                f"{self.vocab_size} characters of the vocabulary: use only those, or another tokenizer"
            )
        return ids

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ids (n,). Raises UserError for ids that are not whole numbers in [0, vocab_size)."""
        return self._code_points[as_ids(ids, self.vocab_size)].tobytes().decode("utf-32-le")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """One character as each id comes."""
        for one in ids:
            yield self.characters[as_id(one, self.vocab_size)]

    def to_json(self) -> dict:
        return {"kind": self.kind, "characters": self.characters}

    @classmethod
    def from_json(cls, fields: dict) -> "CharTokenizer":
        """The inverse of to_json. Raises UserError for anything else."""
        check_fields(fields, {"kind": str, "characters": str})
        return cls(fields["characters"])


@dataclass(frozen=True)
class BPETokenizer:
    """Byte-pair encoding. Ids: the 256 bytes, then one for each merge in the order of training, then special tokens.

    A merge is a pair of lower ids. Every merge must be one that can happen: encoding the bytes of its token gives that
    token. Whatever `train` learns is so, as are GPT-2's merges; and it makes "merge the pair learned first" and
    tiktoken's "merge into the token of lowest rank" the same rule, so that tiktoken, where it is installed, encodes in
    our place. Raises UserError if a merge is anything else.
    """

    merges: tuple[tuple[int, int], ...]
    special_tokens: tuple[str, ...] = ()
    byte_order: bytes = bytes(range(256))  # the byte of each of the first 256 ids; GPT-2 has an order of its own

    kind: ClassVar[str] = "bpe"

    def __post_init__(self) -> None:
        if sorted(self.byte_order) != list(range(256)):
            raise UserError("the byte order must hold each of the 256 bytes exactly once")
        for token, times in Counter(self.special_tokens).items():
            check_no_surrogate(token)
            if not token or times > 1:
                raise UserError(f"special token {shorten(token)} is {'there twice' if token else 'empty'}")
        lengths = [1] * 256
        total = 256
        for place, (left, right) in enumerate(self.merges):
            if not (0 <= left < 256 + place and 0 <= right < 256 + place):
                raise UserError(
                    f"merge {place}, {shorten((left, right))}, has an id that no byte or merge before it gives"
                )
            lengths.append(lengths[left] + lengths[right])
            total += lengths[-1]
            if total > MAX_TABLE_BYTES:
                raise UserError(f"the first {place + 1} merges make tokens of over {MAX_TABLE_BYTES:,} bytes in all")
        if len(self._ranks) < len(self.merges):
            pair, _ = Counter(self.merges).most_common(1)[0]
            raise UserError(f"the merge {pair} is there twice")
        for place, pair in enumerate(self.merges):
            if not can_happen(place, self.merges, self._ranks):
                raise UserError(f"merge {place}, {pair}, can never happen: a merge before it takes the bytes it needs")

    @classmethod
    def train(cls, text: str, vocab_size: int, *, special_tokens: Collection[str] = ()) -> "BPETokenizer":
        """Learn merges from `text` until there are `vocab_size` ids, special tokens included.

        Each merge is of the pair that occurs most often (overlaps count: "aaa" holds "aa" twice); of several such
        pairs, of the lowest pair of ids. A pair that occurs only once is not worth an id. Raises UserError for an
        empty text, a vocabulary too small for the bytes, or one larger than the text can give.
        """
        num_merges = vocab_size - 256 - len(special_tokens)
        if num_merges < 0:
            raise UserError(
                f"a vocabulary of {vocab_size} is too small: the 256 bytes and {len(special_tokens)} special tokens "
                f"are always in it, so at least {256 + len(special_tokens)} are needed"
            )
        if not text:
            raise UserError("an empty text gives no byte-pair encoding")
        check_no_surrogate(text)
        merges = learn_merges(count_chunks(text), num_merges)
        if len(merges) < num_merges:
            raise UserError(
                f"a vocabulary of {vocab_size} is too large: this text gives at most "
                f"{256 + len(merges) + len(special_tokens)} ids before no pair occurs twice"
            )
        return cls(tuple(merges), tuple(special_tokens))

    @property
    def vocab_size(self) -> int:
        return 256 + len(self.merges) + len(self.special_tokens)

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each id."""
        tokens = [bytes([byte]) for byte in self.byte_order]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        return (*tokens, *(token.encode() for token in self.special_tokens))

    @cached_property
    def _ranks(self) -> dict[tuple[int, int], int]:  # pair -> the id it merges into
        return {pair: 256 + place for place, pair in enumerate(self.merges)}

    @cached_property
    def _byte_ids(self) -> list[int]:  # byte -> id
        return [self.byte_order.index(byte) for byte in range(256)]

    @cached_property
    def _cache(self) -> dict[str, list[int]]:  # short chunk -> its ids; words come again
        return {}

    @cached_property
    def _tiktoken(self) -> "tiktoken.Encoding | None":
        try:
            import tiktoken  # noqa: F401
        except ImportError:
            return None
        return self.to_tiktoken()

    def encode(self, text: str, *, allowed_special: Collection[str] = (), use_tiktoken: bool = True) -> np.ndarray:
        """(n,) int32; the same ids with tiktoken (used where it is installed) and without.

        One exception: regex and tiktoken each bring a Unicode table, and where a character is newer than one of them,
        they may draw other borders around it. The text comes back the same even so.

        A special token's text becomes its id only if it is among `allowed_special`; otherwise it is text like any
        other, so that no user can put an end into a text by typing it. Raises UserError for a lone surrogate, which
        no UTF-8 can write, and for an `allowed_special` that is no special token.
        """
        check_no_surrogate(text)
        for token in allowed_special:
            if token not in self.special_tokens:
                raise UserError(
                    f"{shorten(token)} is no special token of this tokenizer: {shorten(self.special_tokens)}"
                )
        by_tiktoken = self._tiktoken if use_tiktoken else None
        parts = [np.empty(0, dtype=np.int32)]
        for place, run in enumerate(split_special(text, allowed_special)):
            if place % 2:
                special = 256 + len(self.merges) + self.special_tokens.index(run)
                parts.append(np.array([special], dtype=np.int32))
                continue
            for piece in cut(run):
                if by_tiktoken is not None and longest_blank(piece) <= MAX_TIKTOKEN_BLANK:
                    ids = by_tiktoken.encode_ordinary(piece)
                else:
                    ids = self._encode_piece(piece)
                parts.append(np.array(ids, dtype=np.int32))
        return np.concatenate(parts)

    def _encode_piece(self, text: str) -> list[int]:
        """The ids of a text without special tokens, by hand."""
        ids = []
        for chunk in split_chunks(text):
            known = self._cache.get(chunk)
            if known is None:
                known = self._encode_chunk(chunk.encode())
                if len(chunk) <= MAX_CACHED_CHUNK_CHARS and len(self._cache) < MAX_CACHED_CHUNKS:
                    self._cache[chunk] = known
            ids += known
        return ids

    def _encode_chunk(self, chunk: bytes) -> list[int]:
        """The ids of one chunk of bytes, which need not be UTF-8: the merge learned first is made first."""
        return merge_all([self._byte_ids[byte] for byte in chunk], self._ranks)

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of ids (n,), UTF-8 or not. Raises UserError for ids that are not whole numbers in [0, V)."""
        return b"".join(map(self.token_bytes.__getitem__, as_ids(ids, self.vocab_size).tolist()))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """The text of ids (n,); U+FFFD stands where their bytes are not UTF-8. Raises UserError as decode_bytes."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of decode(ids), as the ids come: a character whose bytes are still coming waits for the last."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for one in ids:
            if piece := decoder.decode(self.token_bytes[as_id(one, self.vocab_size)]):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def to_json(self) -> dict:
        return {
            "kind": self.kind,
            "byte_order": list(self.byte_order),
            "merges": [list(pair) for pair in self.merges],
            "special_tokens": list(self.special_tokens),
        }

    @classmethod
    def from_json(cls, fields: dict) -> "BPETokenizer":
        """The inverse of to_json. Raises UserError for anything else."""
        check_fields(fields, {"kind": str, "byte_order": list, "merges": list, "special_tokens": list})
        if not all(type(byte) is int and 0 <= byte < 256 for byte in fields["byte_order"]):
            raise UserError("the byte order must hold each of the 256 bytes exactly once")
        for place, pair in enumerate(fields["merges"]):
            if type(pair) is not list or len(pair) != 2 or not all(type(one) is int for one in pair):
                raise UserError(f"merge {place} must be a list of two ids, not {shorten(pair)}")
        for token in fields["special_tokens"]:
            if type(token) is not str:
                raise UserError(f"a special token must be a string, not {shorten(token)}")
        merges = tuple((left, right) for left, right in fields["merges"])
        return cls(merges, tuple(fields["special_tokens"]), bytes(fields["byte_order"]))

    def to_tiktoken(self, name: str = "numpygpt-bpe") -> "tiktoken.Encoding":
        """The same encoding for tiktoken. Raises UserError if tiktoken is not installed."""
        try:
            import tiktoken
        except ImportError as error:
            raise UserError("to_tiktoken needs the package tiktoken: pip install tiktoken") from error
        num_ranks = 256 + len(self.merges)
        return tiktoken.Encoding(
            name,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks={token: rank for rank, token in enumerate(self.token_bytes[:num_ranks])},
            special_tokens={token: num_ranks + place for place, token in enumerate(self.special_tokens)},
        )


def learn_merges(chunk_counts: dict[str, int], num_merges: int) -> list[tuple[int, int]]:
    """Up to `num_merges` merges of byte-pair encoding; fewer if no pair occurs twice any more.

    A text has few distinct chunks, so each is merged once and counted as often as it occurs. Only chunks that hold the
    merged pair change, so only their pairs are counted anew: the cost of a merge is that of the places it touches.
    """
    chunks = [(list(chunk.encode()), times) for chunk, times in chunk_counts.items()]
    counts = Counter()
    holders = defaultdict(set)  # pair -> the chunks that hold it (or held it once: that does no harm)
    for place, (ids, times) in enumerate(chunks):
        for pair in pairwise(ids):
            counts[pair] += times
            holders[pair].add(place)
    # The best pair is on top: the highest count, then the lowest pair. An entry whose count has changed since is
    # passed over when it comes up; the change has pushed a new one.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges = []
    while heap and len(merges) < num_merges:
        negative_count, pair = heapq.heappop(heap)
        if counts[pair] != -negative_count:
            continue
        if -negative_count < 2:
            break
        new_id = 256 + len(merges)
        merges.append(pair)
        changes = Counter()
        for place in holders.pop(pair):
            ids, times = chunks[place]
            merged = merge_pair(ids, pair, new_id)
            for old in pairwise(ids):
                changes[old] -= times
            for new in pairwise(merged):
                changes[new] += times
                holders[new].add(place)
            chunks[place] = merged, times
        for changed, change in changes.items():
            if change:
                counts[changed] += change
                heapq.heappush(heap, (-counts[changed], changed))
    return merges


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """`ids` with each occurrence of `pair`, from left to right, replaced by `new_id`."""
    merged, at, last = [], 0, len(ids) - 1
    while at <= last:
        if at < last and ids[at] == pair[0] and ids[at + 1] == pair[1]:
            merged.append(new_id)
            at += 2
        else:
            merged.append(ids[at])
            at += 1
    return merged


def merge_all(ids: list[int], ranks: dict[tuple[int, int], int]) -> list[int]:
    """`ids` with every merge in `ranks` (pair -> new id) that applies, the lowest new id first."""
    while len(ids) > 1:
        new_id, pair = min((ranks.get(pair, sys.maxsize), pair) for pair in pairwise(ids))
        if new_id == sys.maxsize:
            break
        # All occurrences at once: whatever pairs the new id forms were learned after it.
        ids = merge_pair(ids, pair, new_id)
    return ids


def can_happen(place: int, merges: Sequence[tuple[int, int]], ranks: dict[tuple[int, int], int]) -> bool:
    """Whether encoding the bytes of merge `place`'s token gives that token; all merges before it must do so already.

    Left and right halves grow by their own merges, which are known to happen, unless one before them takes a pair that
    lies across the border between the two. So follow the border back in time: x is the token that ends there and y the
    one that begins there, each until its own next merge. The merge of (x, y), if there is one, must come too late. When
    it comes at the same time it is the same pair (as in "aaa"), and the one further left is made first.
    """
    x, y = merges[place]
    x_until = y_until = 256 + place
    while True:
        across = ranks.get((x, y), sys.maxsize)
        if across < x_until and across <= y_until:
            return False
        if x >= 256 and x > y:  # x is the younger one: before it there was its right half
            x_until, x = x, merges[x - 256][1]
        elif y >= 256:
            y_until, y = y, merges[y - 256][0]
        else:
            return True


def count_chunks(text: str) -> Counter[str]:
    """How often each chunk occurs between the borders of the splitting pattern."""
    counts = Counter()
    for piece in cut(text):
        counts.update(split_chunks(piece))
    return counts


def split_chunks(text: str) -> list[str]:
    """`text` cut at the borders that no merge crosses; joined, the chunks are `text` again."""
    try:
        import regex
    except ImportError as error:
        raise UserError("byte-pair encoding needs the package regex: pip install regex") from error
    return regex.findall(SPLIT_PATTERN, text)


def cut(text: str) -> Iterator[str]:
    """`text` in pieces of about PIECE_CHARS characters whose chunks are those of the whole text.

    A piece ends between a character that is not white space and a space or line feed: every chunk that begins before
    such a place ends there at the latest, and none that ends there looks at what follows.
    """
    start = 0
    while start < len(text):
        border = re.compile(r"(?<=\S)(?=[ \n])").search(text, start + PIECE_CHARS)
        end = border.start() if border else len(text)
        yield text[start:end]
        start = end


def longest_blank(piece: str) -> int:
    """An upper bound of the longest run of white space in a piece, exact for pieces of unusual length."""
    if len(piece) <= 2 * PIECE_CHARS:
        return len(piece)
    return max((len(blank) for blank in re.findall(r"\s+", piece)), default=0)


def split_special(text: str, tokens: Collection[str]) -> list[str]:
    """Ordinary text and special tokens in turn, ordinary text first and last (it may be empty); longer tokens win."""
    if not tokens:
        return [text]
    return re.split("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")", text)


def code_points(text: str) -> np.ndarray:
    """(len(text),) unsigned 32 bits: the code points of a text, lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def check_no_surrogate(text: str) -> None:
    """Raise UserError, with the place, for half of a surrogate pair: it is no character, and UTF-8 cannot write it."""
    if not text.isascii() and (found := re.search("[\ud800-\udfff]", text)):
        raise UserError(
            f"lone surrogate U+{ord(found[0]):04X} at position {found.start()}: it is half of a character; "
            "the text was decoded wrongly"
        )


def as_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """(n,) integers, each in [0, vocab_size). Raises UserError for anything else."""
    try:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    except ValueError as error:  # a list of lists of unequal lengths
        raise UserError("token ids must be one row of whole numbers, not lists within a list") from error
    if array.ndim != 1:
        raise UserError(f"token ids must be one row, not an array of shape {array.shape}; decode row by row")
    if array.size == 0:
        return array.astype(np.int32)  # an empty list has no type to check
    if array.dtype.kind not in "iu":
        raise UserError(f"token ids must be whole numbers, not {array.dtype}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(
            f"token id {array[at]} at position {at} is outside the vocabulary: expected 0 to {vocab_size - 1}"
        )
    return array


def as_id(one: int, vocab_size: int) -> int:
    """One id in [0, vocab_size). Raises UserError for anything else."""
    return int(as_ids([one], vocab_size)[0])


def check_fields(fields: dict, expected: dict[str, type]) -> None:
    """Raise UserError unless `fields` has exactly the names and types that are expected."""
    for name in sorted(fields.keys() ^ expected.keys()):
        raise UserError(f"{'unknown' if name in fields else 'missing'} field {shorten(name)}")
    for name, kind in expected.items():
        if type(fields[name]) is not kind:
            raise UserError(f"{name} must be a {kind.__name__}, not {shorten(fields[name])}")


def shorten(value: object) -> str:
    """repr on one line, cut to fit a message. A long list is not written out only to be cut."""
    return reprlib.repr(value)


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer.json, atomically. Raises OSError as any write does; then the file that was there is intact."""
    write_atomically(path, json.dumps(tokenizer.to_json()).encode())


def load(path: str | os.PathLike) -> Tokenizer:
    """Read what `save` wrote. Raises UserError, with the file and the fault, for a file that is anything else."""
    content = read_bytes(path, "a tokenizer.json", max_bytes=MAX_FILE_BYTES)
    try:
        fields = json.loads(content.decode("utf-8"), object_pairs_hook=unique_names)
        if type(fields) is not dict:
            raise UserError(f"expected an object, not {shorten(fields)}")
        if "kind" not in fields and type(fields.get("model")) is dict:
            raise UserError(
                "it is Hugging Face's, and not ours: take the merges.txt beside it, or the tokenizer.json of the run "
                "that python -m tools.export from-hf makes of the whole model"
            )
        kinds = {tokenizer.kind: tokenizer for tokenizer in (CharTokenizer, BPETokenizer)}
        kind = fields.get("kind")
        if type(kind) is not str or kind not in kinds:
            raise UserError(f"kind must be one of {', '.join(kinds)}, not {shorten(kind)}")
        return kinds[kind].from_json(fields)
    except RecursionError as error:
        raise UserError(f"{path} is not a tokenizer: nested too deeply") from error
    except ValueError as error:  # UserError, JSONDecodeError and UnicodeDecodeError
        raise UserError(f"{path} is not a tokenizer: {error}") from error


def unique_names(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dict. Raises UserError if a name comes twice, which JSON readers settle differently."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise UserError(f"field {shorten(twice)} is there twice")
    return fields


def gpt2_byte_order() -> tuple[bytes, list[str]]:
    """The byte of each of GPT-2's first 256 ids, and the character that stands for it in GPT-2's files.

    The bytes that print come first and stand for themselves; then the others, written as U+0100, U+0101 and so on.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return bytes(printing + others), [chr(byte) for byte in printing] + [chr(0x100 + n) for n in range(len(others))]


def load_merges(path: str | os.PathLike) -> BPETokenizer:
    """GPT-2's published merges, or others in the format of its vocab.bpe (merges.txt); ids as GPT-2 numbers them.

    Each line is a merge, two tokens with a space between them, in the order of training; a line that begins with
    "#version" may come first. Raises UserError, with the file and the line, for anything else: a token that no line
    before has made (a gap, or a cycle), or a merge that makes a token again.
    """
    content = read_bytes(path, "GPT-2's vocab.bpe, or merges in its format", max_bytes=MAX_FILE_BYTES)
    byte_order, symbols = gpt2_byte_order()
    ids = {symbol: rank for rank, symbol in enumerate(symbols)}
    merges = []
    try:
        lines = content.decode("utf-8").split("\n")
        if lines[-1] == "":
            lines.pop()
        for number, line in enumerate(lines, start=1):
            if number == 1 and line.startswith("#version"):
                continue
            pair = line.removesuffix("\r").split(" ")
            if len(pair) != 2:
                raise UserError(f"line {number} must be two tokens with a space between them, not {shorten(line)}")
            for symbol in pair:
                if symbol not in ids:
                    raise UserError(f"line {number}: no line before it makes the token {shorten(symbol)}")
            merged = "".join(pair)
            if merged in ids:
                raise UserError(f"line {number} makes the token {shorten(merged)} again")
            ids[merged] = len(ids)
            merges.append((ids[pair[0]], ids[pair[1]]))
        if not merges:
            raise UserError("it holds no merge")
        return BPETokenizer(tuple(merges), (END_OF_TEXT,), byte_order)
    except ValueError as error:  # UserError and UnicodeDecodeError
        raise UserError(f"{path} is not a merges file: {error}") from error


def gpt2_tokenizer() -> BPETokenizer:
    """GPT-2's tokenizer, 50,257 ids, from the ranks that tiktoken downloads once and keeps.

    The merges are found again from the ranks, so that a run that stores this tokenizer needs neither tiktoken nor a
    network later. Raises UserError if tiktoken is not installed or cannot get the ranks.
    """
    instead = "or name a local copy of GPT-2's vocab.bpe as the tokenizer"
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"the gpt2 tokenizer needs the package tiktoken: pip install tiktoken, {instead}") from error
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # whatever its HTTP library raises
        raise UserError(
            f"tiktoken could not get GPT-2's ranks ({type(error).__name__}): it needs a network once, {instead}"
        ) from error
    tokens = [encoding.decode_single_token_bytes(rank) for rank in range(encoding.eot_token)]
    return from_ranks(tokens, (END_OF_TEXT,))


def from_ranks(tokens: list[bytes], special_tokens: tuple[str, ...] = ()) -> BPETokenizer:
    """The tokenizer whose ids' bytes are `tokens`, as tiktoken stores them: 256 bytes, then merged tokens by rank.

    A token's pair is what the merges before it make of its bytes. Raises UserError if that is not a pair.
    """
    byte_ids = {token: rank for rank, token in enumerate(tokens[:256])}
    if sorted(byte_ids) != [bytes([byte]) for byte in range(256)]:
        raise UserError("the first 256 tokens must be the 256 bytes")
    ranks = {}
    for rank, token in enumerate(tokens[256:], start=256):
        pair = merge_all([byte_ids[token[at : at + 1]] for at in range(len(token))], ranks)
        if len(pair) != 2:
            raise UserError(f"token {rank}, {token!r}, is not made of two tokens of lower rank")
        ranks[tuple(pair)] = rank
    return BPETokenizer(tuple(ranks), special_tokens, b"".join(tokens[:256]))


def get_tokenizer(name_or_file: str, text: str, bpe_vocab_size: int = 1024) -> Tokenizer:
    """The tokenizer that a command line names.

    "char": the characters of `text`. "bpe": trained on `text` to `bpe_vocab_size` ids. "gpt2": GPT-2's own. Otherwise
    a file: a tokenizer.json that `save` wrote, or, under any name that does not end in .json, merges as in GPT-2's
    vocab.bpe. Raises UserError for whatever the user can mend.
    """
    if name_or_file == "char":
        return CharTokenizer.from_text(text)
    if name_or_file == "bpe":
        return BPETokenizer.train(text, bpe_vocab_size)
    if name_or_file == "gpt2":
        return gpt2_tokenizer()
    if not Path(name_or_file).exists():
        raise UserError(
            f"no tokenizer or file {name_or_file!r}: expected char, bpe, gpt2, a tokenizer.json or a vocab.bpe"
        )
    return load(name_or_file) if Path(name_or_file).suffix == ".json" else load_merges(name_or_file)


def train_command(data: str | None, vocab_size: int, out: Path | None) -> None:
    """Train on a corpus' training split, and print the time, the first merges and how far they shorten the rest."""
    if out is not None and os.path.lexists(out):
        raise UserError(f"{out} exists already, and nothing is overwritten: choose another --out, or delete it")
    corpus = load_corpus(data)
    started = time.perf_counter()
    tokenizer = BPETokenizer.train(corpus.train_text, vocab_size)
    trained = time.perf_counter()
    num_tokens = len(tokenizer.encode(corpus.text, use_tiktoken=False))
    encoded = time.perf_counter()
    if out is not None:  # before a word is printed, for whoever reads it may close the pipe after a few
        try:
            save(tokenizer, out)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"{corpus.name}: {vocab_size} ids from {len(corpus.train_text):,} characters in {trained - started:.2f} s")
    print(f"encoded {len(corpus.text):,} characters as {num_tokens:,} tokens in {encoded - trained:.2f} s", end=", ")
    print(f"{len(corpus.text) / num_tokens:.3f} characters per token")
    for new_id, (left, right) in list(enumerate(tokenizer.merges, start=256))[:20]:
        print(f"{new_id:6}  {show(tokenizer.token_bytes[left]):>10} + {show(tokenizer.token_bytes[right])}")
    if out is not None:
        print(f"saved as {out}")


def show(token: bytes) -> str:
    """A token's bytes as a quoted string, for people to read."""
    return repr(token.decode("utf-8", errors="backslashreplace"))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    import tyro  # here, so that programs which only want a tokenizer need not load it

    # Here alone may this floor look up at training/: a command line is a program, and knows how programs fail.
    from training.command import parse, run_program

    def arguments(
        command: Annotated[Literal["train"], tyro.conf.Positional],
        data: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None,
        vocab_size: int = 1024,
        out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    ) -> tuple[str | None, int, Path | None]:
        """Train a byte-pair encoding by hand.

        Args:
            command: what to do.
            data: the corpus, of which the training split is used: shakespeare_char, verse, or a path.
            vocab_size: how many ids to make, the 256 bytes included.
            out: keep the tokenizer in this file; the trainers take it as --tokenizer FILE.json.
        """
        return data, vocab_size, out

    def program() -> int:
        train_command(*parse(arguments, "python -m data.tokenizers", argv))
        return 0

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())

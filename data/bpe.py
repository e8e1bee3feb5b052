"""Byte-pair encoding, by hand: how a text becomes subwords.

A text is bytes (UTF-8), so 256 ids can write everything. Training looks for the pair of neighbours that occurs most
often, gives it an id of its own, replaces it everywhere, and starts again. The classic example, `aaabdaaabac` with
three merges (and what the ids 256, 257, 258 stand for):

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
import re
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from common.errors import UserError, shorten
from data.checks import as_id, as_ids, check_no_surrogate, check_special
from data.text import PIECE_BYTES, cut, pieces_of

if TYPE_CHECKING:
    import tiktoken

MAX_TIKTOKEN_BLANK = 1 << 18  # characters of white space in a row; tiktoken panics at a million
MAX_TABLE_BYTES = 16 << 20  # of all tokens' bytes together; a few crafted lines could ask for terabytes
MAX_CACHED_CHUNKS = 1 << 18
MAX_CACHED_CHUNK_CHARS = 64
MAX_RESCANNED_BYTES = 256  # of a chunk; beyond, not reading it again for each merge saves more than it costs

# GPT-2's borders. \p{L} letters, \p{N} numbers, \s white space; the last two leave the last space of a run to the
# word that follows it.
SPLIT_PATTERN = r"'(?:s|d|m|t|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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
    def train(
        cls, text: str | Iterable[str], vocab_size: int, *, special_tokens: Collection[str] = ()
    ) -> "BPETokenizer":
        """Learn merges until there are `vocab_size` ids, special tokens included.

        text: all of it, or the pieces that data.text.cut makes

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
        chunks = count_chunks(text)
        if not chunks:
            raise UserError("an empty text gives no byte-pair encoding")
        merges = learn_merges(chunks, num_merges)
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
        check_special(allowed_special, self.special_tokens)
        by_tiktoken = self._tiktoken if use_tiktoken else None
        parts = [np.empty(0, dtype=np.int32)]
        for place, run in enumerate(split_special(text, allowed_special)):
            if place % 2:
                special = 256 + len(self.merges) + self.special_tokens.index(run)
                parts.append(np.array([special], dtype=np.int32))
                continue
            for piece in cut(run.encode()):
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
        merge = merge_all if len(chunk) <= MAX_RESCANNED_BYTES else merge_long
        return merge([self._byte_ids[byte] for byte in chunk], self._ranks)

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


BORDER, GONE = -1, -2  # ids that are none: around each chunk, and of the right half of a merged pair

Pair = tuple[int, int]
Places = np.ndarray  # (n,) where a pair's left half is in a Row, in order


class Row:
    """Chunks of ids in a row, each id linked to its neighbours: a merge costs what the places of its pair cost, no more
    in one chunk that is the whole text than in as many words.

    times: how often each chunk counts
    """

    def __init__(self, chunks: Collection[Collection[int]], times: Collection[int] = (1,)) -> None:
        ids = array("q", [BORDER])
        for chunk in chunks:
            ids.extend(chunk)
            ids.append(BORDER)
        self.ids = np.array(ids)
        self.times = np.repeat([0, *times], [1, *(len(chunk) + 1 for chunk in chunks)])  # of each place's chunk
        self.left, self.right = np.arange(-1, len(ids) - 1), np.arange(1, len(ids) + 1)
        self.right[-1] = len(ids) - 1

    def all_pairs(self) -> list[tuple[Pair, int, Places]]:
        return self.pairs(np.arange(len(self.ids)))

    def pairs(self, places: Places) -> list[tuple[Pair, int, Places]]:
        """Each pair whose left half is at one of the places, how often it counts there, and at which of them it is
        in their order."""
        keys = self.keys(places)
        places, keys = places[keys >= 0], keys[keys >= 0]
        if not len(keys):
            return []
        order = np.argsort(keys, kind="stable")
        places, keys = places[order], keys[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        pairs = [divmod(key, 1 << 32) for key in keys[begins].tolist()]
        counts = np.add.reduceat(self.times[places], begins).tolist()
        groups = [places[begin:end] for begin, end in pairwise([*begins.tolist(), len(places)])]
        return list(zip(pairs, counts, groups, strict=True))

    def keys(self, places: Places) -> np.ndarray:
        """(n,) one number for the pair at each place, 2^32 left + right, negative where there is none."""
        return self.ids[places] << 32 | self.ids[self.right[places]]

    def find(self, pair: Pair, places: Places) -> Places:
        """Which places still hold the pair; of occurrences that overlap, as "aa" does in "aaaaa", every second one."""
        at = places[self.keys(places) == (pair[0] << 32 | pair[1])]  # earlier merges may have taken one half
        number = np.arange(len(at))
        first = np.maximum.accumulate(np.where(joined(self.right[at], at), 0, number))
        return at[(number - first) % 2 == 0]

    def before(self, at: Places) -> Places:
        """The places to the left of pairs, without those that are the right half of another of these pairs."""
        return self.left[at][~joined(self.right[at], self.left[at])]

    def merge(self, at: Places, new_id: int) -> None:
        """Replace the pairs at these places, which do not overlap, by `new_id`."""
        half = self.right[at]
        after = self.right[half]
        self.ids[at], self.ids[half] = new_id, GONE
        self.right[at], self.left[after] = after, at


def joined(ends: Places, begins: Places) -> np.ndarray:
    """(n,) whether each begins where the one before it ends."""
    return np.concatenate([[False], ends[:-1] == begins[1:]])[: len(begins)]


def learn_merges(chunk_counts: dict[str, int], num_merges: int) -> list[Pair]:
    """Up to `num_merges` merges of byte-pair encoding; fewer if no pair occurs twice any more.

    A text has few distinct chunks, so each is in the row once, and its pairs count as often as it occurs.
    """
    row = Row([chunk.encode() for chunk in chunk_counts], chunk_counts.values())
    counts, places = {}, {}
    for pair, count, at in row.all_pairs():
        counts[pair], places[pair] = count, at
    # The best pair is on top: the highest count, then the lowest pair. Counts of pairs that are there only fall, so an
    # entry that has become too high goes back to its place when it comes up. What occurs once is not worth an id.
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merges: list[Pair] = []
    while heap and len(merges) < num_merges:
        negative_count, pair = heapq.heappop(heap)
        if counts[pair] < 2:
            continue
        if counts[pair] < -negative_count:
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        new_id = 256 + len(merges)
        merges.append(pair)
        found = row.find(pair, places.pop(pair))
        before = row.before(found)
        for old, count, _ in row.pairs(np.concatenate([before, found, row.right[found]])):
            counts[old] -= count
        row.merge(found, new_id)
        for new, count, at in row.pairs(np.concatenate([before, found])):  # with the new id, so they are nowhere else
            counts[new], places[new] = count, at
            heapq.heappush(heap, (-count, new))
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


def merge_long(ids: Collection[int], ranks: dict[Pair, int]) -> list[int]:
    """The same as merge_all, for a chunk so long that it must not be read again for each merge."""
    row = Row([ids])
    places: dict[Pair, Places] = {}
    heap: list[tuple[int, Pair]] = []
    pairs = row.all_pairs()
    while True:
        for pair, _, at in pairs:
            if pair in ranks:
                places[pair] = at
                heapq.heappush(heap, (ranks[pair], pair))
        if not heap:
            return row.ids[row.ids >= 0].tolist()
        new_id, pair = heapq.heappop(heap)
        found = row.find(pair, places.pop(pair))
        changed = np.concatenate([row.before(found), found])
        row.merge(found, new_id)
        pairs = row.pairs(changed)


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


def count_chunks(text: str | Iterable[str]) -> Counter[str]:
    """How often each chunk occurs in a text, or in its pieces, between the borders of the splitting pattern."""
    counts: Counter[str] = Counter()
    for piece in pieces_of(text):
        counts.update(split_chunks(piece))
    return counts


def split_chunks(text: str) -> list[str]:
    """`text` cut at the borders that no merge crosses; joined, the chunks are `text` again."""
    try:
        import regex
    except ImportError as error:
        raise UserError("byte-pair encoding needs the package regex: pip install regex") from error
    return regex.findall(SPLIT_PATTERN, text)


def longest_blank(piece: str) -> int:
    """An upper bound of the longest run of white space in a piece, exact for pieces of unusual length."""
    if len(piece) <= 2 * PIECE_BYTES:
        return len(piece)
    return max((len(blank) for blank in re.findall(r"\s+", piece)), default=0)


def split_special(text: str, tokens: Collection[str]) -> list[str]:
    """Ordinary text and special tokens in turn, ordinary text first and last (it may be empty); longer tokens win."""
    if not tokens:
        return [text]
    return re.split("(" + "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) + ")", text)

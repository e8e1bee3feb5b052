"""What every text goes through on its way in: a corpus, a prompt, a text to trace.

A large text stays UTF-8 and is decoded piece by piece: as a str, one emoji makes it take four bytes a character.
"""

import codecs
import re
from collections.abc import Iterable, Iterator

import numpy as np

from common.errors import UserError
from data.checks import check_no_surrogate

BLOCK_BYTES = 1 << 20  # decoded at once
PIECE_BYTES = 1 << 16  # of a text that is encoded piece by piece, about
# Before a space or line feed that follows something other than white space, for every character that Unicode calls so;
# after some others too, as dashes and quotation marks, this sees no border: the piece is longer then.
BORDER = re.compile(
    rb"(?<![\s\x1c-\x1f])(?<!\xc2[\x85\xa0])(?<!\xe1\x9a\x80)(?<!\xe2[\x80\x81].)(?<!\xe3\x80\x80)(?=[ \n])"
)


def normalize(utf8: bytes) -> bytes:
    """A text as UTF-8 without the marks of the system that it was saved on.

    A byte-order mark at the beginning is dropped, and Windows line ends (CR LF) become LF. A CR by itself is a
    character like any other.
    """
    return utf8.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")


def normalize_text(text: str) -> str:
    """The same for a text that is already decoded, as the arguments of a program are."""
    return normalize(text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogatepass")


def check_text(content: bytes, source: str) -> bytes:
    """The content of a file or a pipe, normalised. Raises UserError that names its source if it is not UTF-8."""
    if is_utf16(content):
        raise UserError(
            f"{source} is UTF-16 text, and UTF-8 is expected: save it as UTF-8, or convert it with "
            "iconv -f UTF-16 -t UTF-8"
        )
    start = 0
    while start < len(content):  # block by block: a text as a str may take four times its bytes
        block = content[start : start + BLOCK_BYTES]
        try:
            _, decoded = codecs.utf_8_decode(block, "strict", start + len(block) == len(content))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source} is not UTF-8 text: byte {block[error.start]:#04x} at offset {start + error.start} "
                f"({error.reason}); save it as UTF-8"
            ) from error
        start += decoded
    return normalize(content)


def is_utf16(content: bytes) -> bool:
    """Does it begin with the byte-order mark of UTF-16, or is every other byte what the upper halves of letters are?

    In UTF-16 the upper byte of a character is 0 to 8 in most alphabets: control characters, of which no text has so
    many. Where upper bytes are large, as in Chinese, the text is refused for not being UTF-8.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    sample = content[:BLOCK_BYTES]
    halves = sample[::2], sample[1::2]
    return any(2 * sum(map(half.count, range(9))) > len(half) for half in halves)


def cut(utf8: bytes, start: int = 0, end: int | None = None, *, anywhere: bool = False) -> Iterator[str]:
    """A text in pieces of about PIECE_BYTES, from byte `start` to byte `end`, which are between two characters.

    The chunks of byte-pair encoding (data.bpe) are those of the whole text: a piece ends between a character that is
    not white space and a space or line feed. Every chunk that begins before such a place ends there at the latest, and
    none that ends there looks at what follows. A text without such places is one piece, unless it may be cut anywhere.
    """
    end = len(utf8) if end is None else end
    while start < end:
        stop = start + PIECE_BYTES
        if not anywhere:
            border = BORDER.search(utf8, stop, end)
            stop = border.start() if border else end
        piece, decoded = codecs.utf_8_decode(memoryview(utf8)[start : min(stop, end)], "strict", stop >= end)
        yield piece
        start += decoded


def pieces_of(text: str | Iterable[str]) -> Iterable[str]:
    """A text in the pieces that `cut` makes; what comes in pieces stays so. Raises UserError for a lone surrogate."""
    if not isinstance(text, str):
        return text
    check_no_surrogate(text)
    return cut(text.encode())


def count_chars(utf8: bytes) -> int:
    """How many characters a text has."""
    return sum(int(begins.sum()) for _, begins in character_begins(utf8))


def offset_of_char(utf8: bytes, number: int) -> int:
    """At which byte a character begins, counted from 0; or the end, if there is none of that number."""
    for start, begins in character_begins(utf8):
        here = int(begins.sum())
        if number < here:
            return start + int(np.flatnonzero(begins)[number])
        number -= here
    return len(utf8)


def character_begins(utf8: bytes) -> Iterator[tuple[int, np.ndarray]]:
    """(offset, (n,) whether each byte begins a character), block by block: all but the bytes 10xxxxxx do."""
    for start in range(0, len(utf8), BLOCK_BYTES):
        yield start, np.frombuffer(utf8, np.uint8, min(BLOCK_BYTES, len(utf8) - start), start) & 0xC0 != 0x80

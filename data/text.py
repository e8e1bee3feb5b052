"""What every text goes through on its way in: a corpus, a prompt, a text to trace."""

import codecs

from common.errors import UserError

BLOCK_BYTES = 1 << 20  # decoded at once


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

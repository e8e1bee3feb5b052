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

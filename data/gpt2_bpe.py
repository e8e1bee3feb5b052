"""GPT-2's byte-pair encoding: its published merges, or the ranks that tiktoken downloads, as a BPETokenizer."""

import os

from common.errors import UserError, shorten
from common.files import read_bytes
from data.bpe import BPETokenizer, merge_all

MAX_MERGES_BYTES = 8 << 20  # GPT-2's file has under 1 MB
END_OF_TEXT = "<|endoftext|>"


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
    content = read_bytes(path, "GPT-2's vocab.bpe, or merges in its format", max_bytes=MAX_MERGES_BYTES)
    byte_order, symbols = gpt2_byte_order()
    ids = {symbol: rank for rank, symbol in enumerate(symbols)}
    merges = []
    try:
        if content.lstrip().startswith(b"{"):
            raise UserError(
                "it is JSON: name a tokenizer.json with its ending .json, or GPT-2's merges.txt (vocab.bpe)"
            )
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
    ranks: dict[tuple[int, int], int] = {}
    for rank, token in enumerate(tokens[256:], start=256):
        halves = merge_all([byte_ids[token[at : at + 1]] for at in range(len(token))], ranks)
        if len(halves) != 2:
            raise UserError(f"token {rank}, {token!r}, is not made of two tokens of lower rank")
        ranks[halves[0], halves[1]] = rank
    return BPETokenizer(tuple(ranks), special_tokens, b"".join(tokens[:256]))

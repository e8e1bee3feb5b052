"""Tokenizers: text to token ids and back. Characters are here, byte-pair encoding is in data/bpe.py.

    tokenizer = CharTokenizer.from_text("hello")      # the characters e h l o, ids 0 1 2 3
    tokenizer.encode("hole")                          # array([1, 3, 2, 0], dtype=int32)
    tokenizer.decode([1, 3, 2, 0])                    # "hole"

Every tokenizer has `kind`, `vocab_size`, `encode`, `decode` and `stream`. `save` and `load` keep one in the
tokenizer.json of a run, and `get_tokenizer` finds the one that a command line names. Ids are 0 to vocab_size - 1.

    python -m data.tokenizers train --vocab-size 1024 [--data NAME|FILE] [--out FILE]
"""

import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Protocol

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

from common.cli import parse, run_program
from common.errors import UserError, shorten
from common.files import read_json, write_atomically
from data.bpe import BPETokenizer
from data.checks import as_id, as_ids, check_no_surrogate, check_special
from data.corpus import load_corpus
from data.gpt2_bpe import gpt2_tokenizer, load_merges
from data.text import cut, pieces_of

PIECE_CHARS = 1 << 16  # characters converted at once, so that memory holds no second copy of a large text
MAX_FILE_BYTES = 8 << 20  # of a tokenizer.json; GPT-2's has under 1 MB


class Tokenizer(Protocol):
    """What every tokenizer can do. Ids are whole numbers from 0 to vocab_size - 1."""

    kind: ClassVar[str]

    @property
    def vocab_size(self) -> int: ...

    @property
    def special_tokens(self) -> tuple[str, ...]: ...

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> np.ndarray:
        """(n,) int32. Raises UserError for a text that has no ids, and for a special token that there is not.

        allowed_special: the special tokens whose text is to become their id; others are text like any other
        """
        ...

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Raises UserError for ids that are not whole numbers in [0, vocab_size)."""
        ...

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `decode`, piece by piece as the ids come."""
        ...


@dataclass(frozen=True)
class CharTokenizer:
    """One id per character: the characters sorted by code point, an id is a character's rank."""

    characters: str

    kind: ClassVar[str] = "char"
    special_tokens: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not self.characters:
            raise UserError("a character vocabulary cannot be empty")
        check_no_surrogate(self.characters)
        for before, after in pairwise(self.characters):
            if before >= after:
                fault = "occurs twice" if before == after else f"comes after {before!r}"
                raise UserError(f"the vocabulary must list each character once, by code point: {after!r} {fault}")

    @classmethod
    def from_text(cls, text: str | Iterable[str]) -> "CharTokenizer":
        """The tokenizer of exactly the characters in a text, or in its pieces. Raises UserError if there are none."""
        seen = np.zeros(sys.maxunicode + 1, dtype=bool)
        for piece in pieces_of(text):
            seen[code_points(piece)] = True
        if not seen.any():
            raise UserError("an empty text gives no character vocabulary")
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

    def encode(self, text: str, *, allowed_special: Collection[str] = ()) -> np.ndarray:
        """(len(text),) int32. Raises UserError for a character that is not in the vocabulary, and names it."""
        check_special(allowed_special, self.special_tokens)
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


def code_points(text: str) -> np.ndarray:
    """(len(text),) unsigned 32 bits: the code points of a text, lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def to_json(tokenizer: Tokenizer) -> dict:
    """What tokenizer.json holds: all that `from_json` needs, in types that JSON has."""
    if isinstance(tokenizer, CharTokenizer):
        return {"kind": tokenizer.kind, "characters": tokenizer.characters}
    assert isinstance(tokenizer, BPETokenizer)
    return {
        "kind": tokenizer.kind,
        "byte_order": list(tokenizer.byte_order),
        "merges": [list(pair) for pair in tokenizer.merges],
        "special_tokens": list(tokenizer.special_tokens),
    }


def from_json(fields: dict) -> CharTokenizer | BPETokenizer:
    """The inverse of to_json. Raises UserError for anything else."""
    kind = fields.get("kind")
    if kind == CharTokenizer.kind:
        check_fields(fields, {"kind": str, "characters": str})
        return CharTokenizer(fields["characters"])
    if kind != BPETokenizer.kind:
        raise UserError(f"kind must be one of char, bpe, not {shorten(kind)}")
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
    return BPETokenizer(merges, tuple(fields["special_tokens"]), bytes(fields["byte_order"]))


def check_fields(fields: dict, expected: dict[str, type]) -> None:
    """Raise UserError unless `fields` has exactly the names and types that are expected."""
    for name in sorted(fields.keys() ^ expected.keys()):
        raise UserError(f"{'unknown' if name in fields else 'missing'} field {shorten(name)}")
    for name, kind in expected.items():
        if type(fields[name]) is not kind:
            raise UserError(f"{name} must be a {kind.__name__}, not {shorten(fields[name])}")


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Write a tokenizer.json, atomically. Raises OSError as any write does; then the file that was there is intact."""
    write_atomically(path, json.dumps(to_json(tokenizer)).encode())


def load(path: str | os.PathLike) -> CharTokenizer | BPETokenizer:
    """Read what `save` wrote. Raises UserError, with the file and the fault, for a file that is anything else."""
    fields = read_json(Path(path), "a tokenizer.json", max_bytes=MAX_FILE_BYTES)
    if "kind" not in fields and (kind := foreign_kind(fields)) is not None:
        raise UserError(
            f"{path} is {kind}, not a tokenizer.json of a run: take the merges.txt (vocab.bpe) beside it, or the "
            "tokenizer.json of the run that python -m tools.export from-hf makes of the whole model"
        )
    try:
        return from_json(fields)
    except UserError as error:
        raise UserError(f"{path} is not a tokenizer: {error}") from error


def foreign_kind(fields: dict) -> str | None:
    """What a JSON file that comes with tokenizers elsewhere is; None if it is none of those."""
    model = fields.get("model")
    if type(model) is dict and {"type", "vocab"} & model.keys():
        return "Hugging Face's tokenizer.json"
    if "tokenizer_class" in fields or "added_tokens_decoder" in fields:
        return "Hugging Face's tokenizer_config.json"
    if "model_type" in fields:
        return "the config.json of a model of Hugging Face's"
    if {"model", "training"} <= fields.keys():
        return "the config.json of a run"
    if fields and all(type(value) is int for value in fields.values()):
        return "a list of tokens and their ids, as GPT-2's vocab.json (encoder.json)"
    if {"bos_token", "eos_token", "unk_token"} & fields.keys():
        return "Hugging Face's special_tokens_map.json"
    return None


def get_tokenizer(name_or_file: str, text: str | Iterable[str], bpe_vocab_size: int = 1024) -> Tokenizer:
    """The tokenizer that a command line names.

    text: all of it, or the pieces that data.text.cut makes

    "char": the characters of the text. "bpe": trained on it to `bpe_vocab_size` ids. "gpt2": GPT-2's own. Otherwise a
    file: a tokenizer.json that `save` wrote, or, under any name that does not end in .json, merges as in GPT-2's
    vocab.bpe. Raises UserError for whatever the user can fix.
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
    tokenizer = BPETokenizer.train(corpus.train_pieces(), vocab_size)
    trained = time.perf_counter()
    num_tokens = sum(len(tokenizer.encode(piece, use_tiktoken=False)) for piece in cut(corpus.utf8))
    encoded = time.perf_counter()
    if out is not None:  # before anything is printed: a reader may close the pipe early
        try:
            save(tokenizer, out)
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror or error}") from error
    print(f"{corpus.name}: {vocab_size} ids from {corpus.num_train_chars:,} characters in {trained - started:.2f} s")
    print(f"encoded {corpus.num_chars:,} characters as {num_tokens:,} tokens in {encoded - trained:.2f} s", end=", ")
    print(f"{corpus.num_chars / num_tokens:.3f} characters per token")
    for new_id, (left, right) in list(enumerate(tokenizer.merges, start=256))[:20]:
        print(f"{new_id:6}  {show(tokenizer.token_bytes[left]):>10} + {show(tokenizer.token_bytes[right])}")
    if out is not None:
        print(f"saved as {out}")


def show(token: bytes) -> str:
    """A token's bytes as a quoted string, for people to read."""
    return repr(token.decode("utf-8", errors="backslashreplace"))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

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

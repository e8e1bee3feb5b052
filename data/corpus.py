"""The texts to train on: `shakespeare_char` (the default), `verse`, or any UTF-8 text file.

    python -m data.corpus                                     fetch Tiny Shakespeare, once, and describe it
    python -m data.corpus shakespeare_char --from FILE        take a local copy instead
    python -m data.corpus verse                               describe another corpus; a path works too

Tiny Shakespeare is kept at data/shakespeare_char/input.txt, which is not part of the repository. Whether it was
downloaded, copied or put there by hand, it is read only if its SHA-256 is the known one, so that two people who speak
of "the loss on Tiny Shakespeare" speak of the same characters.
"""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import tyro
from tqdm import tqdm

from common.cli import parse, run_program
from common.errors import UserError, printable
from common.files import read_bytes, write_atomically
from data import verse
from data.text import check_text, count_chars, cut, offset_of_char

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_BYTES = 1_115_394  # all ASCII, so as many characters
SHAKESPEARE_FILE = Path(__file__).resolve().parent / "shakespeare_char" / "input.txt"
TIMEOUT_S = 10  # for the connection, and for every silence after it


@dataclass(frozen=True)
class Corpus:
    """A text, whole. The first 90% of its characters are for training, the rest for validation."""

    name: str  # "shakespeare_char", "verse", or the path as it was given
    utf8: bytes  # the text, normalised
    sha256: str  # of the bytes of the file, before anything is stripped or normalised
    entropy_per_char: float | None = None  # nats, exact; known for verse only

    @property
    def text(self) -> str:
        return self.utf8.decode()

    @property
    def train_text(self) -> str:
        return self.utf8[: self._train_bytes].decode()

    @property
    def val_text(self) -> str:
        return self.utf8[self._train_bytes :].decode()

    def train_pieces(self, *, anywhere: bool = False) -> Iterator[str]:
        """train_text in pieces, so that memory never holds all of it as characters; see data.text.cut."""
        return cut(self.utf8, 0, self._train_bytes, anywhere=anywhere)

    def val_pieces(self, *, anywhere: bool = False) -> Iterator[str]:
        return cut(self.utf8, self._train_bytes, anywhere=anywhere)

    @cached_property
    def num_chars(self) -> int:
        return count_chars(self.utf8)

    @property
    def num_train_chars(self) -> int:
        return self.num_chars * 9 // 10

    @cached_property
    def _train_bytes(self) -> int:
        return offset_of_char(self.utf8, self.num_train_chars)


def load_corpus(name: str | None = None, *, announce: Callable[[str], None] = print) -> Corpus:
    """The corpus called `name`: "shakespeare_char", "verse", or else the path of a UTF-8 text file.

    Tiny Shakespeare is downloaded if it is not there. If that fails, a caller who asked for it by name gets a
    UserError that says how to get it; a caller who named nothing gets `verse`, and `announce` two lines that say so.
    Raises UserError for whatever else the user can fix: a missing file, one that is not text, an altered input.txt.
    """
    if name == "verse":
        return load_verse()
    if name == "shakespeare_char":
        return load_shakespeare()
    if name is not None:
        return Corpus(name, *read_file(name))
    if not SHAKESPEARE_FILE.exists():
        try:
            fetch_shakespeare()
        except UserError as error:
            announce(f"Tiny Shakespeare is not here: {error}.")
            announce(f"Using the embedded corpus 'verse' instead. For Tiny Shakespeare, {how_to_get_it()}")
            return load_verse()
    return load_shakespeare()


def load_verse() -> Corpus:
    """The embedded corpus: written each time, always the same."""
    utf8 = verse.write().encode()
    return Corpus("verse", utf8, hashlib.sha256(utf8).hexdigest(), verse.entropy_per_char())


def load_shakespeare() -> Corpus:
    """Tiny Shakespeare, verified, and downloaded first if it is not there. Raises UserError."""
    if not SHAKESPEARE_FILE.exists():
        try:
            fetch_shakespeare()
        except UserError as error:
            raise UserError(f"no corpus shakespeare_char: {error}; {how_to_get_it()}") from error
    utf8, sha256 = read_file(SHAKESPEARE_FILE)
    if sha256 != SHAKESPEARE_SHA256:
        raise UserError(
            f"{SHAKESPEARE_FILE} is not Tiny Shakespeare: its SHA-256 is {sha256}, expected {SHAKESPEARE_SHA256}; "
            "delete it to have it downloaded again, or keep it elsewhere and name it by its path"
        )
    return Corpus("shakespeare_char", utf8, sha256)


def how_to_get_it() -> str:
    """What to do about a download that fails."""
    return f"put the file at {SHAKESPEARE_FILE}, or run: python -m data.corpus shakespeare_char --from FILE"


def fetch_shakespeare() -> None:
    """Download Tiny Shakespeare to its place. Raises UserError, and leaves nothing behind, if anything goes wrong."""
    try:
        content = download(SHAKESPEARE_URL, SHAKESPEARE_BYTES)
    except (OSError, http.client.HTTPException) as error:  # URLError, time-outs and TLS errors are OSErrors
        cause = error.reason if type(error) is urllib.error.URLError else error
        reason = printable(" ".join(str(cause).split()))[:200] or type(error).__name__
        raise UserError(f"could not download {SHAKESPEARE_URL}: {reason}") from error
    keep_shakespeare(content, SHAKESPEARE_URL)


def download(url: str, num_bytes: int) -> bytes:
    """What `url` sends, with a progress bar; no more than one byte over `num_bytes`, to show that it is too long."""
    content = bytearray()
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT_S) as response,
        tqdm(total=num_bytes, unit="B", unit_scale=True, desc="Tiny Shakespeare", leave=False) as progress,
    ):
        while block := response.read(min(1 << 16, num_bytes + 1 - len(content))):
            content += block
            progress.update(len(block))
    return bytes(content)


def keep_shakespeare(content: bytes, source: str | os.PathLike) -> None:
    """Put what came from `source` in its place, verified before the first byte is written. Raises UserError."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise UserError(
            f"what came from {source} is not Tiny Shakespeare: {len(content):,} bytes with SHA-256 {found}, "
            f"expected {SHAKESPEARE_BYTES:,} with {SHAKESPEARE_SHA256}"
        )
    try:
        write_atomically(SHAKESPEARE_FILE, content)
    except OSError as error:
        raise UserError(f"cannot write {SHAKESPEARE_FILE}: {error.strerror or error}") from error


def read_file(path: str | os.PathLike) -> tuple[bytes, str]:
    """The text of a UTF-8 file, normalised so that it gives one vocabulary whatever system it was saved on, and the
    SHA-256 of its bytes.

    Raises UserError for a path that cannot be read, and for a text that nothing can be learned from.
    """
    content = read_bytes(path, "shakespeare_char, verse, or the path of a UTF-8 text file")
    utf8 = check_text(content, str(path))
    if not utf8:
        raise UserError(f"{path} is empty; a corpus needs at least two distinct characters")
    first = utf8[: offset_of_char(utf8, 1)]
    if utf8.count(first) * len(first) == len(utf8):
        raise UserError(
            f"{path} holds only the character {first.decode()!r}; a corpus needs at least two distinct characters"
        )
    return utf8, hashlib.sha256(content).hexdigest()


def describe(corpus: Corpus) -> str:
    """What a corpus holds, one fact to a line."""
    place = {"shakespeare_char": str(SHAKESPEARE_FILE), "verse": f"data/verse.py, seed {verse.SEED}"}
    facts = [
        ("corpus", corpus.name),
        ("characters", f"{corpus.num_chars:,}"),
        ("distinct", f"{len(set().union(*cut(corpus.utf8, anywhere=True))):,}"),
        ("train", f"{corpus.num_train_chars:,}"),
        ("validation", f"{corpus.num_chars - corpus.num_train_chars:,}"),
        ("SHA-256", corpus.sha256),
        ("from", place.get(corpus.name, corpus.name)),
    ]
    if corpus.entropy_per_char is not None:
        facts.append(("entropy", f"{corpus.entropy_per_char:.6f} nats per character, exact"))
    return "\n".join(f"{name:<12}{value}" for name, value in facts)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def arguments(
        corpus: Annotated[str, tyro.conf.Positional] = "shakespeare_char",
        source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="FILE")] = None,
    ) -> tuple[str, Path | None]:
        """Fetch a corpus, or take a local copy of it, and say what it holds.

        Args:
            corpus: shakespeare_char, verse, or the path of a UTF-8 text file.
            source: a local copy of Tiny Shakespeare, to be verified and put in place.
        """
        return corpus, source

    def program() -> int:
        name, source = parse(arguments, "python -m data.corpus", argv)
        if source is not None:
            if name != "shakespeare_char":
                raise UserError(f"--from is for shakespeare_char, not for {name!r}: leave one of the two out")
            keep_shakespeare(read_bytes(source, "a copy of Tiny Shakespeare"), source)
        print(describe(load_corpus(name)))
        return 0

    return run_program(program)


if __name__ == "__main__":
    sys.exit(main())

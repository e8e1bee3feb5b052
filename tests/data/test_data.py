"""Corpora: what is read, what is refused, and what happens when the download does not go as it should."""

import errno
import hashlib
import http.client
import io
import os
import re
import socket
import stat
import subprocess
import sys
import tracemalloc
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import data
from common.errors import UserError
from common.files import read_bytes, write_atomically
from data import corpus, text, verse
from data.corpus import Corpus, load_corpus

CONTENT = b"Hear me, and I shall tell thee what I know.\n" * 40
WORDS = ("windows", "To be, or not to be.\r\n" * 9, "Быть или не быть", "το be", "שלום עולם")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1115394\n"
needs_shakespeare = pytest.mark.skipif(
    not corpus.SHAKESPEARE_FILE.exists(), reason="needs data/shakespeare_char/input.txt: python -m data.corpus"
)


class Response(io.BytesIO):
    """What urlopen returns; it may fail after its content, as a connection may break."""

    def __init__(self, content, then=None):
        super().__init__(content)
        self.then = then

    def read(self, size=-1):
        block = super().read(size)
        if not block and self.then is not None:
            raise self.then
        return block


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a test reached for the network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty place for Tiny Shakespeare, where CONTENT is what it should be."""
    path = tmp_path / "kept" / "input.txt"
    monkeypatch.setattr(corpus, "SHAKESPEARE_FILE", path)
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(corpus, "SHAKESPEARE_BYTES", len(CONTENT))
    return path


def network(monkeypatch, response):
    """Let urlopen answer with `response`, or raise it; return the list of its calls."""
    calls = []

    def urlopen(url, timeout=None):
        calls.append((url, timeout))
        if isinstance(response, BaseException):
            raise response
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return calls


def everything_in(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def one_line(error):
    message = str(error.value)
    assert message
    assert len(message.splitlines()) == 1
    return message


def run_command(*arguments, timeout=None):
    """python -m data.corpus in a process of its own."""
    command = [sys.executable, "-m", "data.corpus", *arguments]
    root = Path(data.__file__).parents[1]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=timeout)


# The split


@needs_shakespeare
def test_tiny_shakespeare_is_the_one_everybody_means():
    shakespeare = load_corpus("shakespeare_char")
    assert len(shakespeare.text) == 1_115_394
    assert len(set(shakespeare.text)) == 65
    assert (len(shakespeare.train_text), len(shakespeare.val_text)) == (1_003_854, 111_540)
    assert shakespeare.train_text + shakespeare.val_text == shakespeare.text
    assert shakespeare.sha256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    assert shakespeare.entropy_per_char is None


@given(st.text(min_size=1))
def test_the_first_nine_tenths_are_for_training(text):
    made = Corpus("made", text.encode(), "")
    assert made.train_text + made.val_text == made.text == text
    assert len(made.train_text) == made.num_train_chars == len(text) * 9 // 10
    assert made.num_chars == len(text)
    for anywhere in (False, True):
        assert "".join(made.train_pieces(anywhere=anywhere)) == made.train_text
        assert "".join(made.val_pieces(anywhere=anywhere)) == made.val_text


@given(st.text(alphabet="aé世🙂"), st.integers(4, 9))
def test_characters_are_counted_and_found_block_by_block(content, size):
    utf8 = content.encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", size)
        assert text.count_chars(utf8) == len(content)
        for number in range(len(content) + 2):
            assert text.offset_of_char(utf8, number) == len(content[:number].encode())


MEASURE = """
import sys
from bench.timing import high_water
from data.corpus import load_corpus
from data.tokenizers import CharTokenizer
before = high_water()
corpus = load_corpus(sys.argv[1])
tokenizer = CharTokenizer.from_text(corpus.train_pieces(anywhere=True))
tokens = sum(len(tokenizer.encode(piece)) for piece in corpus.train_pieces(anywhere=True))
assert tokens == corpus.num_train_chars
print(high_water() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux tells it")
@pytest.mark.parametrize("line", ["To be, or not to be\n", "to be, 🙂\n", "🙂世é"], ids=["ascii", "emoji", "no spaces"])
def test_a_large_text_is_in_memory_once(tmp_path, line):
    """A failure: as a str it takes up to four bytes a character, and each slice or list of ids is another copy."""
    path = tmp_path / "text"
    path.write_bytes(line.encode() * (40_000_000 // len(line.encode())))
    root = Path(data.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=root, capture_output=True, text=True, check=True)
    assert float(run.stdout) < 60  # MB; 51 were measured, and over 140 with a str


def test_verse_is_embedded_and_knows_its_entropy():
    loaded = load_corpus("verse")
    assert loaded == load_corpus("verse")
    assert loaded.text == verse.write()
    assert loaded.sha256 == hashlib.sha256(loaded.text.encode()).hexdigest()
    assert loaded.entropy_per_char == verse.entropy_per_char()
    assert len(loaded.val_text) == 40_000


# Files


def test_a_file_is_a_corpus(tmp_path):
    path = tmp_path / "verse"  # a file may have the name of a corpus, if it is named by a path
    path.write_bytes("naïve café, 世界\n".encode())
    loaded = load_corpus(str(path))
    assert (loaded.name, loaded.text) == (str(path), "naïve café, 世界\n")
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.entropy_per_char is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfone\ntwo", "one\ntwo"),  # a byte-order mark
        (b"one\r\ntwo\r\n", "one\ntwo\n"),
        (b"one\rtwo", "one\rtwo"),
        (b"one\r\r\ntwo", "one\r\ntwo"),
        (b"a\xef\xbb\xbfb", "a\ufeffb"),  # no byte-order mark: it is not at the beginning
        (b"a\x00b\x0b\x1c\xe2\x80\xa8", "a\x00b\x0b\x1c\u2028"),
        (b"a text with \x00, \x01 and \x02", "a text with \x00, \x01 and \x02"),
    ],
)
def test_byte_order_marks_and_windows_line_ends_go_and_nothing_else(tmp_path, content, text):
    path = tmp_path / "text"
    path.write_bytes(content)
    loaded = load_corpus(str(path))
    assert loaded.text == text
    assert loaded.sha256 == hashlib.sha256(content).hexdigest()


@given(st.text(alphabet="a\r\n\ufeffé🙂\ud800"))
def test_a_text_is_normalised_alike_as_bytes_and_as_characters(content):
    expected = re.sub("\r\n", "\n", re.sub("^\ufeff", "", content))
    assert text.normalize_text(content) == expected
    if "\ud800" not in content:
        assert text.normalize(content.encode()) == expected.encode()


@given(st.text(), st.binary(max_size=3), st.text(), st.integers(4, 9))
def test_whether_a_text_is_utf8_is_seen_block_by_block(before, odd, after, size):
    content = before.encode() + odd + after.encode()
    assume(not text.is_utf16(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "BLOCK_BYTES", size)
        try:
            content.decode()
        except UnicodeDecodeError as error:
            with pytest.raises(UserError, match=f"byte {content[error.start]:#04x} at offset {error.start} "):
                text.check_text(content, "it")
        else:
            assert text.check_text(content, "it") == text.normalize(content)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"aaaa", "holds only the character 'a'"),
        (b"\n", r"holds only the character '\\n'"),
        (b"\r\n\r\n", r"holds only the character '\\n'"),
        (b"good until \xff here", "not UTF-8 text: byte 0xff at offset 11"),
        (b"\xef\xbb\xbfgood \xc3", "not UTF-8 text: byte 0xc3 at offset 8"),
        (b"a surrogate: \xed\xa0\x80", "not UTF-8 text: byte 0xed at offset 13"),
        ("windows".encode("utf-16"), "is UTF-16 text, and UTF-8 is expected: save it as UTF-8"),
        *((word.encode(code), "is UTF-16 text") for word in WORDS for code in ("utf-16-le", "utf-16-be")),
        ("滕王高阁临江渚,佩玉鸣鸾罢歌舞。\n".encode("utf-16-le"), "not UTF-8 text"),
        (LFS_POINTER, "is a Git LFS pointer, not the file itself: fetch that with git lfs pull"),
    ],
)
def test_a_file_that_is_no_text_is_one_clear_line(tmp_path, content, fault):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UserError, match=fault) as error:
        load_corpus(str(path))
    assert str(path) in one_line(error)


def test_a_path_that_is_no_file_is_one_clear_line(tmp_path):
    for path, fault in [
        (tmp_path / "shakespear", "no file .*shakespear': expected shakespeare_char, verse, or the path"),
        (tmp_path, "is a folder"),
        ("", "is a folder"),
        ("null\0character", "no file can be called"),
        ("x" * 5_000, "cannot read|no file"),
    ]:
        with pytest.raises(UserError, match=fault) as error:
            load_corpus(str(path))
        one_line(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    run = run_command(str(tmp_path / "pipe"), timeout=30)
    assert run.returncode == 1
    assert run.stderr.endswith(
        "pipe is not a regular file: expected shakespeare_char, verse, or the path of a UTF-8 text file\n"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_one_clear_line(tmp_path):
    path = tmp_path / "secret"
    path.write_text("two lines\n")
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*: Permission denied") as error:
        load_corpus(str(path))
    one_line(error)


def test_a_file_may_be_limited_in_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, "five bytes", max_bytes=5) == b"12345"
    with pytest.raises(UserError, match="has more than 4 bytes: expected four bytes"):
        read_bytes(path, "four bytes", max_bytes=4)


# The download


def test_it_is_downloaded_once_and_verified(place, monkeypatch):
    calls = network(monkeypatch, Response(CONTENT))
    assert load_corpus("shakespeare_char").text == CONTENT.decode()
    assert everything_in(place.parent.parent) == ["input.txt"]
    assert place.read_bytes() == CONTENT
    said = []
    assert load_corpus(None, announce=said.append).name == "shakespeare_char"
    assert calls == [(corpus.SHAKESPEARE_URL, 10)]
    assert said == []


FAILURES = {
    "no such host": lambda: urllib.error.URLError(socket.gaierror(-2, "Name or service not known")),
    "not there": lambda: urllib.error.HTTPError("https://example.org", 404, "Not Found", {}, None),
    "no connection in time": lambda: TimeoutError("timed out"),
    "two lines": lambda: OSError("first line\nsecond line"),
    "silent": lambda: OSError(),
    "not HTTP": lambda: http.client.BadStatusLine("hello"),
    "broken off": lambda: Response(CONTENT[:100], then=ConnectionResetError(errno.ECONNRESET, "Connection reset")),
    "stalled": lambda: Response(CONTENT[:100], then=TimeoutError("The read operation timed out")),
    "incomplete": lambda: Response(CONTENT[:100], then=http.client.IncompleteRead(b"", 900)),
    "too short": lambda: Response(CONTENT[:-1]),
    "something else": lambda: Response(b"<html>log in to this network first</html>"),
    "altered": lambda: Response(CONTENT.replace(b"thee", b"them")),
    "too long": lambda: Response(CONTENT + b"!"),
    "empty": lambda: Response(b""),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_download_that_fails_leaves_nothing_and_says_what_to_do(place, monkeypatch, failure):
    calls = network(monkeypatch, failure())
    with pytest.raises(UserError, match="no corpus shakespeare_char") as error:
        load_corpus("shakespeare_char")
    message = one_line(error)
    assert corpus.SHAKESPEARE_URL in message
    assert f"put the file at {place}" in message
    assert "--from FILE" in message
    assert everything_in(place.parent.parent) == []
    assert len(calls) == 1


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_when_nothing_was_named_verse_stands_in_and_two_lines_say_so(place, monkeypatch, failure):
    network(monkeypatch, failure())
    said = []
    assert load_corpus(announce=said.append) == load_corpus("verse")
    assert len(said) == 2
    assert all(len(line.splitlines()) == 1 for line in said)
    assert corpus.SHAKESPEARE_URL in said[0]
    assert "'verse'" in said[1]
    assert f"put the file at {place}" in said[1]
    assert everything_in(place.parent.parent) == []


def test_an_endless_download_is_not_read_to_its_end(place, monkeypatch):
    class Endless:
        given = 0

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def read(self, size):
            self.given += size
            return b"x" * size

    endless = Endless()
    network(monkeypatch, endless)
    with pytest.raises(UserError, match="SHA-256"):
        load_corpus("shakespeare_char")
    assert endless.given == len(CONTENT) + 1


def test_a_download_that_cannot_be_kept_is_a_failed_one(place, monkeypatch):
    place.parent.write_text("a file where the folder should be")
    network(monkeypatch, Response(CONTENT))
    with pytest.raises(UserError, match=r"no corpus shakespeare_char: cannot write .*exists") as error:
        load_corpus("shakespeare_char")
    one_line(error)
    network(monkeypatch, Response(CONTENT))
    assert load_corpus(announce=lambda line: None).name == "verse"


def test_a_file_put_there_by_hand_is_verified(place):
    place.parent.mkdir()
    place.write_bytes(CONTENT.replace(b"\n", b"\r\n"))
    for name in ("shakespeare_char", None):
        with pytest.raises(UserError, match=r"is not Tiny Shakespeare: its SHA-256 is .*; delete it") as error:
            load_corpus(name)
        assert str(place) in one_line(error)
    place.write_bytes(CONTENT)
    assert load_corpus("shakespeare_char").text == CONTENT.decode()


def test_a_large_limit_costs_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    tracemalloc.start()
    try:
        assert read_bytes(path, "a file", max_bytes=1 << 40) == b"12345"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_says_it_is_shorter_than_it_is_is_read_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    monkeypatch.setattr(os, "fstat", lambda handle: os.stat_result([stat.S_IFREG] + [0] * 9))
    assert read_bytes(path, "a file", max_bytes=5) == b"12345"
    with pytest.raises(UserError, match="has more than 4 bytes"):
        read_bytes(path, "a file", max_bytes=4)


# Writing


def test_writing_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_atomically(path, b"a longer first version")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert everything_in(tmp_path) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_writing_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert everything_in(tmp_path) == ["file"]


def test_the_content_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    path = tmp_path / "file"
    events = []
    fsync, replace = os.fsync, os.replace

    def watch_fsync(descriptor):
        events.append(("flushed", [name.stat().st_size for name in tmp_path.iterdir()]))
        fsync(descriptor)

    def watch_replace(source, target):
        events.append(("renamed", Path(source).parent, Path(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watch_fsync)
    monkeypatch.setattr(os, "replace", watch_replace)
    write_atomically(path, b"12345")
    assert events[:2] == [("flushed", [5]), ("renamed", tmp_path, path)]


# The command line


def test_the_command_takes_a_verified_copy(place, tmp_path, capsys):
    source = tmp_path / "copy"
    source.write_bytes(CONTENT)
    assert corpus.main(["shakespeare_char", "--from", str(source)]) == 0
    printed = capsys.readouterr().out
    assert place.read_bytes() == CONTENT
    text = CONTENT.decode()
    for fact in (len(text), len(set(text)), len(text) * 9 // 10, len(text) - len(text) * 9 // 10):
        assert f" {fact:,}\n" in printed
    assert str(place) in printed

    source.write_bytes(CONTENT + b"!")
    assert corpus.main(["--from", str(source)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: what came from {source} is not Tiny Shakespeare")
    assert len(printed.err.splitlines()) == 1
    assert place.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["nowhere"], "no file 'nowhere'"),
        (["verse", "--from", "x"], "--from is for shakespeare_char"),
        (["--from", "nowhere"], "no file 'nowhere': expected a copy of Tiny Shakespeare"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(place, capsys, arguments, fault):
    assert corpus.main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {fault}")
    assert len(printed.err.splitlines()) == 1


def test_a_flag_that_makes_no_sense_is_one_line_too(capsys):
    assert corpus.main(["--frobnicate"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: Unrecognized options: --frobnicate (see python -m data.corpus --help)\n"
    assert printed.out == ""


def test_the_command_runs():
    run = run_command("verse")
    assert (run.returncode, run.stderr) == (0, "")
    assert "characters  400,000\n" in run.stdout

"""Damaged and hostile run folders: whatever a file holds, it is loaded whole and right, or refused in one line.

A finished run is copied, one of its files is mutated, and both readers are let loose on it: the resumed trainer and
sample.py. Nothing else may come of it than the weights that were saved, or one line that names the fault: no traceback,
no hang, no huge allocation, no half-loaded model. The mutations range from single bits to files whose author knows the
format and seals his work with correct hashes.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import sample
import train_numpy
import training.loop
from tests.runs import arguments, run, start, write_text
from training.checkpoint import Checkpoint, canonical

CHECKPOINT_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
FILES = (
    "config.json",
    "tokenizer.json",
    "metrics.jsonl",
    *(f"{c}/{f}" for c in ("last", "best") for f in CHECKPOINT_FILES),
)

Fields = dict[str, object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.loop, "draw_losses", lambda *_: None)
        patch.setattr(sample, "show_sample", lambda *_: None)
        flags = {"max_steps": 4, "decay_steps": 4, "eval_interval": 2, "n_layer": 1, "n_embd": 8}
        assert start("numpy", write_text(folder), folder / "run", **flags) == 0
    return folder / "run"


@pytest.fixture(scope="module", autouse=True)
def no_more_memory_than_needed() -> Iterator[None]:
    """A gigabyte more than the process has: who wants to fill terabytes fails here, wherever the tests run."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):  # not Linux
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ---------------------------------------------------------------------------------------------------------------------
# Mutations: each changes the files of a run in place


def patterns() -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.binary(min_size=1, max_size=64),
        st.sampled_from(
            [b"\0" * 64, b"\xff" * 64, b"\n", b'"', b"{", b"]", b"9", b"-", b"e9", b"null", b"\xf0\x9f\x98\x80"]
        ),
    )


@st.composite
def byte_mutation(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Damage: flipped bits, lost ends, foreign bytes."""
    kind = draw(
        st.sampled_from(["flip", "cut", "append", "prepend", "drop", "overwrite", "insert", "repeat", "replace"])
    )
    where, length = draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 200))
    bit, pattern = draw(st.integers(0, 7)), draw(patterns())

    def mutate(content: bytes) -> bytes:
        at = int(where * len(content))
        if kind == "flip":
            return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :] if content else b"\0"
        return {
            "cut": content[:at],
            "append": content + pattern,
            "prepend": pattern + content,
            "drop": content[:at] + content[at + length :],
            "overwrite": content[:at] + pattern + content[at + len(pattern) :],
            "insert": content[:at] + pattern + content[at:],
            "repeat": content + content,
            "replace": pattern,
        }[kind]

    return mutate


ODD_NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**400, 1.5, -0.5, 1e308, 1e-320, float("nan"), float("inf")]
ODD_TEXTS = ["", "x", "F16", "BF16", "I64", "F64", "F32", "numpy", "../../../etc/passwd", "/dev/zero", "\0", "\ud800"]
ODD_LISTS = [[], [1], [-1, 8], [2**40, 2**40], [0, 2**62], [[]], [0] * 10_000]
ODD_VALUES = [None, True, False, {}, {"x": 1}, "a" * 100_000, *ODD_NUMBERS, *ODD_TEXTS, *ODD_LISTS]


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths to everything within a JSON value."""
    for key in value if isinstance(value, dict) else range(min(len(value), 20)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@st.composite
def json_mutation(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Malice: a value of another kind or size, a key too many or too few, depth without end."""
    kind = draw(st.sampled_from(["set", "set", "set", "delete", "add", "twice", "deep", "nudge"]))
    which, odd, depth = (
        draw(st.integers(0, 10**6)),
        draw(st.sampled_from(ODD_VALUES)),
        draw(st.sampled_from([50, 10**5])),
    )

    def mutate(content: bytes) -> bytes:
        value = json.loads(content)
        found = list(places(value))
        *way, key = found[which % len(found)]
        parent = value
        for step in way:
            parent = parent[step]
        if kind == "set":
            parent[key] = odd
        elif kind == "nudge":
            old = parent[key]
            parent[key] = old + 1 if isinstance(old, int) else old * 2 if isinstance(old, (float, str, list)) else None
        elif kind == "delete":
            del parent[key]
        elif kind == "add":
            value["another" if which % 2 else "../another"] = odd
        text = json.dumps(value)
        if kind == "deep":
            text = text[:-1] + ', "deep": ' + '{"a":[' * depth + "]}" * (depth if which % 2 else 0) + "}"
        elif kind == "twice":
            text = text[:-1] + f", {json.dumps(str(key))}: 1" + "}"
        return text.encode("utf-8", "surrogatepass")

    return mutate


@st.composite
def tensor_mutation(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Malice: a safetensors file with another header, or with numbers that are none."""
    kind = draw(st.sampled_from(["header", "header", "header", "length", "rename", "extra", "fill", "shape", "dtype"]))
    header_mutation, odd = draw(json_mutation()), draw(st.sampled_from([0, 1, 8, 2**20, 2**31, 2**63, 2**64 - 1]))
    which, name = draw(st.integers(0, 100)), draw(st.sampled_from(["../x", "", "wte.weight", "h.0", "\n", "x" * 10**5]))
    number = draw(st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.0, 3e38]))

    def mutate(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header, data = content[8 : 8 + length], content[8 + length :]
        if kind == "length":
            return struct.pack("<Q", odd) + header + data
        if kind == "fill":
            numbers = np.frombuffer(data, np.float32).copy()
            numbers[which % len(numbers) :: 7] = number
            return content[: 8 + length] + numbers.tobytes()
        if kind == "header":
            header = header_mutation(header)
        else:
            entries: Fields = json.loads(header)
            target = sorted(entries)[which % len(entries)]
            if kind == "rename":
                entries[name] = entries.pop(target)
            elif kind == "extra":
                entries[name] = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
            elif kind == "shape":
                entries[target]["shape"] = (
                    [1, *entries[target]["shape"]] if which % 2 else entries[target]["shape"][::-1]
                )
            elif kind == "dtype":
                entries[target]["dtype"] = ["F16", "F64", "I32", "BOOL", "f32", 32][which % 6]
            header = json.dumps(entries).encode()
        return struct.pack("<Q", len(header)) + header + data

    return mutate


def rewrite(mutation: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(mutation(path.read_bytes())) and None


def replace(how: Callable[[Path], object]) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        path.unlink()
        how(path)

    return mutate


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room


UNUSUAL_FILES = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "pipe": os.mkfifo if hasattr(os, "mkfifo") else Path.mkdir,
    "endless": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
    "huge": huge,
}


def seal(run_dir: Path) -> None:
    """Give every checkpoint the hashes that it should have, as someone would who knows the format."""

    def can_be_read(path: Path) -> bool:
        return path.is_file() and path.stat().st_size < 2**30

    for checkpoint in ("last", "best"):
        path = run_dir / checkpoint / "state.json"
        if not can_be_read(path):
            continue
        with contextlib.suppress(Exception):  # there may be nothing left to seal
            state = json.loads(path.read_bytes())
            for name in list(state["files"]):
                file = run_dir / name if name == "tokenizer.json" else run_dir / checkpoint / name
                if can_be_read(file):
                    state["files"][name] = hashlib.sha256(file.read_bytes()).hexdigest()
            del state["sha256"]
            path.write_text(json.dumps(state | {"sha256": hashlib.sha256(canonical(state)).hexdigest()}))


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, Callable[[Path], None], bool]:
    """A file of the run, what happens to it, and whether it is sealed afterwards."""
    file = draw(st.sampled_from(FILES))
    kinds = [byte_mutation().map(rewrite)]
    if file.endswith("safetensors"):
        kinds += [tensor_mutation().map(rewrite)] * 2
    elif file.endswith("json"):
        kinds += [json_mutation().map(rewrite)] * 2
    if draw(st.integers(0, 9)) == 0:
        kinds = [st.sampled_from(sorted(UNUSUAL_FILES)).map(lambda kind: replace(UNUSUAL_FILES[kind]))]
    return file, draw(st.one_of(kinds)), draw(st.booleans())


# ---------------------------------------------------------------------------------------------------------------------
# What may come of it


def resumed(run_dir: Path) -> Checkpoint | None:
    """What the trainer goes on from, or None after one line; it is stopped before it trains."""
    loaded: list[Checkpoint | None] = []

    def instead_of_training(engine: object, run: object) -> int:
        if run.checkpoint is not None:
            engine.load(run.checkpoint.weights, run.checkpoint.m, run.checkpoint.v, run.checkpoint.state.t)
        loaded.append(run.checkpoint)
        return -128

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_numpy, "train", instead_of_training)
        refused_in_one_line(lambda: run("numpy", arguments({"--resume": run_dir, "--threads": 1})))
    return loaded[0] if loaded else None


def sampled(run_dir: Path) -> dict[str, np.ndarray] | None:
    """The weights that sample.py loads, or None after one line."""
    loaded = []

    def load() -> int:
        loaded.append(sample.load_for_sampling(run_dir)[1])
        return 0

    refused_in_one_line(lambda: sample.run_program(load))
    return loaded[0] if loaded else None


def refused_in_one_line(program: Callable[[], int]) -> None:
    """Run it, and see that it ends well or with one line that is the user's to understand."""

    def hangs(*_: object) -> None:
        raise AssertionError("it hangs")

    printed, errors = io.StringIO(), io.StringIO()
    before = signal.signal(signal.SIGALRM, hangs) if hasattr(signal, "SIGALRM") else None
    try:
        if before is not None:
            signal.alarm(60)
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            try:
                code = program()
            except SystemExit as stop:
                code = stop.code
    finally:
        if before is not None:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
    line = errors.getvalue()
    if code == 0:
        assert line == ""
    else:
        assert code in (1, 2), line
        assert line.startswith("error: ")
        assert line.endswith("\n")
        assert line.count("\n") == 1, line
        assert len(line) < 2000
        assert "memory" not in line, line


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@settings(
    max_examples=max(200, 2 * settings.default.max_examples),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(mutation=mutations())
def test_fuzzed_run_folders(saved: Path, mutation: tuple[str, Callable[[Path], None], bool]) -> None:
    file, mutate, sealed = mutation
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        shutil.copytree(saved, run_dir)
        mutate(run_dir / file)
        if sealed:
            seal(run_dir)
        # What a sealed file says is what its author wants it to say. Otherwise it is what was saved.
        truth = run_dir if sealed else saved
        if (weights := sampled(run_dir)) is not None:
            expected = load_file(truth / "best" / "model.safetensors")
            expected["wte.weight"] = expected["wte.weight"][: len(weights["wte.weight"])]  # fewer tokens, sealed
            assert same(weights, expected)
        if (checkpoint := resumed(run_dir)) is not None:
            assert same(checkpoint.weights, load_file(truth / "last" / "model.safetensors"))
            moments = load_file(truth / "last" / "optimizer.safetensors")
            assert same({f"m.{name}": array for name, array in checkpoint.m.items()} | {
                f"v.{name}": array for name, array in checkpoint.v.items()}, moments)  # fmt: skip


def test_the_fuzzer_loads_what_nobody_touched(saved: Path, tmp_path: Path) -> None:
    """Or it would prove nothing."""
    shutil.copytree(saved, tmp_path / "run")
    seal(tmp_path / "run")
    assert same(sampled(tmp_path / "run"), load_file(saved / "best" / "model.safetensors"))
    assert resumed(tmp_path / "run").state.step == 4


# ---------------------------------------------------------------------------------------------------------------------
# The faults that have a name, one by one: each is refused, and the line names the file and the fault


def edit_json(change: Callable[[Fields], object]) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return mutate


def edit_header(change: Callable[[Fields], object]) -> Callable[[Path], None]:
    def mutate(path: Path) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + length])
        change(entries)
        header = json.dumps(entries).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])

    return mutate


def fill(number: float) -> Callable[[Path], None]:
    return rewrite(lambda content: content[:-4] + np.float32(number).tobytes())


MODEL, OPTIMIZER, STATE = (f"last/{name}" for name in CHECKPOINT_FILES)
FAULTS = {
    "truncated": (MODEL, rewrite(lambda content: content[:-5]), "file not fully covered"),
    "truncated header": (MODEL, rewrite(lambda content: content[:20]), "cut short"),
    "empty": (MODEL, rewrite(lambda content: b""), "cut short"),
    "oversized header": (MODEL, rewrite(lambda content: struct.pack("<Q", 2**63) + content[8:]), "cut short"),
    "header of spaces": (MODEL, rewrite(lambda _: struct.pack("<Q", 9 << 20) + b" " * (9 << 20)), "more than"),
    "wrong shape": (MODEL, edit_header(lambda h: h["ln_f.bias"].update(shape=[4, 2])), "ln_f.bias must have shape [8]"),
    "wrong dtype": (MODEL, edit_header(lambda h: h["ln_f.bias"].update(dtype="F16")), "ln_f.bias must have dtype F32"),
    "missing tensor": (MODEL, edit_header(lambda h: h.pop("ln_f.weight")), "tensor 'ln_f.weight' is missing"),
    "extra tensor": (MODEL, edit_header(lambda h: h.update(x=h["ln_f.weight"])), "tensor 'x' is not of this model"),
    "path as name": (MODEL, edit_header(lambda h: h.update({"../x": h.pop("ln_f.weight")})), "ln_f.weight"),
    "NaN": (MODEL, fill(np.nan), "NaN or infinite"),
    "infinity": (OPTIMIZER, fill(np.inf), "NaN or infinite"),
    "negative second moment": (OPTIMIZER, fill(-1.0), "v.wte.weight has negative entries"),
    "missing moments": (OPTIMIZER, edit_header(lambda h: h.pop("m.ln_f.bias")), "tensor 'm.ln_f.bias' is missing"),
    "huge file": (MODEL, replace(huge), "1,099,511,627,776 bytes, more than"),
    "pipe": (MODEL, replace(UNUSUAL_FILES["pipe"]), "not a regular file" if hasattr(os, "mkfifo") else "is a folder"),
    "device": ("tokenizer.json", replace(UNUSUAL_FILES["endless"]), "not a regular file"),
    "no tokenizer": ("tokenizer.json", replace(UNUSUAL_FILES["missing"]), "no file"),
    "broken JSON": (STATE, rewrite(lambda content: content[:-1]), "state.json"),
    "no UTF-8": (STATE, rewrite(lambda content: b"\xff" + content), "state.json"),
    "deep JSON": (STATE, rewrite(lambda _: b"[" * 10**5), "nested too deeply"),
    "huge JSON": ("config.json", rewrite(lambda content: content + b" " * 2**20), "more than 1,048,576"),
    "NaN in JSON": (STATE, edit_json(lambda s: s.update(seconds=float("nan"))), "NaN is not a number"),
    "a state of another model": (STATE, edit_json(lambda s: s["model"].update(n_head=1)), "the model has n_head 1"),
    "unknown field": ("config.json", edit_json(lambda c: c.update(os="linux")), "fields missing or unknown: 'os'"),
    "impossible field": ("config.json", edit_json(lambda c: c["training"].update(beta1=2)), "beta1 must be"),
    "impossible model": ("config.json", edit_json(lambda c: c["model"].update(n_layer=10**9)), "n_layer must be"),
    "another model": ("config.json", edit_json(lambda c: c["model"].update(n_head=1)), "the model has n_head 2"),
    "unknown preset": ("config.json", edit_json(lambda c: c.update(preset="../x")), "preset"),
    "small vocabulary": ("tokenizer.json", edit_json(lambda t: t.update(characters="abc")), "is not among the 3"),
    "large vocabulary": (
        "tokenizer.json",
        edit_json(lambda t: t.update(characters="".join(map(chr, range(32, 900))))),
        "vocab_size must be at least the tokenizer's 868",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_file_is_named(fault: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file, mutate, said = FAULTS[fault]
    shutil.copytree(saved, tmp_path / "run")
    mutate(tmp_path / "run" / file)
    seal(tmp_path / "run")
    assert run("numpy", arguments({"--resume": tmp_path / "run", "--threads": 1})) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert said in error
    if "vocabulary" not in fault:
        assert Path(file).name in error


@pytest.mark.parametrize("file", [name for name in FILES if name not in ("config.json", "metrics.jsonl")])
def test_a_single_flipped_bit_is_seen(file: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(saved, tmp_path / "run")
    content = bytearray((tmp_path / "run" / file).read_bytes())
    content[len(content) * 3 // 4] ^= 1
    (tmp_path / "run" / file).write_bytes(content)
    if file.startswith("best"):  # resuming replaces it when it is as old as last
        assert sampled(tmp_path / "run") is None or file == "best/optimizer.safetensors"
    else:
        assert run("numpy", arguments({"--resume": tmp_path / "run", "--threads": 1})) == 1
        assert capsys.readouterr().err.count("\n") == 1


def test_weights_and_moments_of_different_steps_do_not_mix(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start("numpy", saved.parent / "text.txt", tmp_path / "run", n_layer=1, n_embd=8, seed=5) == 0
    shutil.copy(saved / "last" / "optimizer.safetensors", tmp_path / "run" / "last")
    assert run("numpy", arguments({"--resume": tmp_path / "run"})) == 1
    assert "the file is damaged, or of another checkpoint" in capsys.readouterr().err

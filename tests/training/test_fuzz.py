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
import training.run
from tests.runs import arguments, run, skip_what_is_slow, start, write_text
from training.checkpoint import Checkpoint

LAST, BEST = "last.safetensors", "best.safetensors"
FILES = ("config.json", "tokenizer.json", "metrics.jsonl", LAST, BEST)

Fields = dict[str, object]


@pytest.fixture(scope="module")
def saved_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each optimizer."""
    folder = tmp_path_factory.mktemp("saved")
    text = write_text(folder)
    flags = {"max_steps": 4, "decay_steps": 4, "eval_interval": 2, "n_layer": 1, "n_embd": 8}
    with pytest.MonkeyPatch.context() as patch:
        skip_what_is_slow(patch)
        for optimizer in ("adamw", "muon"):
            assert start("numpy", text, folder / optimizer, optimizer=optimizer, **flags) == 0
    return {optimizer: folder / optimizer for optimizer in ("adamw", "muon")}


@pytest.fixture(scope="module")
def saved(saved_by: dict[str, Path]) -> Path:
    return saved_by["adamw"]


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
    kinds = ["header", "header", "state", "config", "metadata", "length", "rename", "extra", "fill", "shape", "dtype"]
    kind = draw(st.sampled_from(kinds))
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
        elif kind == "metadata":  # as text, for what comes of it may be no JSON
            metadata = json.dumps(json.loads(header)["__metadata__"]).encode()
            header = header.replace(metadata, header_mutation(metadata))
        else:
            entries: Fields = json.loads(header)
            metadata = entries["__metadata__"]
            target = sorted(entries.keys() - {"__metadata__"})[which % (len(entries) - 1)]
            if kind in ("state", "config"):
                metadata[kind] = header_mutation(metadata[kind].encode()).decode("utf-8", "replace")
            elif kind == "rename":
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
    for name in (LAST, BEST):
        with contextlib.suppress(Exception):  # there may be nothing left to seal
            seal_file(run_dir / name, run_dir / "tokenizer.json")


def seal_file(path: Path, tokenizer: Path) -> None:
    """Put into a checkpoint the hashes of the tokenizer and of itself."""
    if not (path.is_file() and path.stat().st_size < 2**30):
        return
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    entries["__metadata__"]["sha256"] = "0" * 64
    if tokenizer.is_file():
        entries["__metadata__"]["tokenizer.json"] = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    content = struct.pack("<Q", len(header)) + header + content[8 + length :]
    path.write_bytes(content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1))


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
            engine.load(run.checkpoint.snapshot, run.checkpoint.state.step)
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
        assert "not enough memory" not in line, line  # a refusal in advance is right, a failed allocation is not


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


@settings(
    max_examples=max(200, 2 * settings.default.max_examples),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(optimizer=st.sampled_from(["adamw", "muon"]), mutation=mutations())
def test_fuzzed_run_folders(
    saved_by: dict[str, Path], optimizer: str, mutation: tuple[str, Callable[[Path], None], bool]
) -> None:
    saved = saved_by[optimizer]
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
            best = os.path.lexists(run_dir / BEST)  # without it, the last one's weights are taken
            expected = {name: a for name, a in load_file(truth / (BEST if best else LAST)).items() if name in weights}
            expected["wte.weight"] = expected["wte.weight"][: len(weights["wte.weight"])]  # fewer tokens, sealed
            assert same(weights, expected)
        if (checkpoint := resumed(run_dir)) is not None:
            assert same(all_tensors(checkpoint), load_file(truth / LAST))


def all_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    moments = {f"{kind}.{name}": a for kind in "mv" for name, a in getattr(checkpoint.snapshot, kind).items()}
    return checkpoint.snapshot.weights | moments


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_fuzzer_loads_what_nobody_touched(optimizer: str, saved_by: dict[str, Path], tmp_path: Path) -> None:
    """Or it would prove nothing."""
    saved = saved_by[optimizer]
    shutil.copytree(saved, tmp_path / "run")
    seal(tmp_path / "run")
    assert same(sampled(tmp_path / "run"), load_file(saved / BEST))
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


def rename(old: str, new: str) -> Callable[[Path], None]:
    return edit_header(lambda entries: entries.update({new: entries.pop(old)}))


def add_empty(name: str) -> Callable[[Path], None]:
    def add(entries: Fields) -> None:
        end = max(entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__")
        entries[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}

    return edit_header(add)


def edit_metadata(name: str, change: Callable[[Fields], object]) -> Callable[[Path], None]:
    def edit(entries: Fields) -> None:
        fields = json.loads(entries["__metadata__"][name])
        change(fields)
        entries["__metadata__"][name] = json.dumps(fields)

    return edit_header(edit)


def fill_v(number: float) -> Callable[[Path], None]:
    """Put a number at the end of v.wte.weight."""

    def mutate(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        end = 8 + length + json.loads(content[8 : 8 + length])["v.wte.weight"]["data_offsets"][1]
        return content[: end - 4] + np.float32(number).tobytes() + content[end:]

    return rewrite(mutate)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FAULTS = {
    "truncated": (LAST, rewrite(lambda content: content[:-5]), "file not fully covered"),
    "truncated header": (LAST, rewrite(lambda content: content[:20]), "cut short"),
    "empty": (LAST, rewrite(lambda content: b""), "cut short"),
    "Git LFS pointer": (LAST, rewrite(lambda content: LFS), "is a Git LFS pointer"),
    "oversized header": (LAST, rewrite(lambda content: struct.pack("<Q", 2**63) + content[8:]), "cut short"),
    "header of spaces": (LAST, rewrite(lambda _: struct.pack("<Q", 9 << 20) + b" " * (9 << 20)), "more than"),
    "wrong shape": (LAST, edit_header(lambda h: h["ln_f.bias"].update(shape=[4, 2])), "ln_f.bias must have shape (8,)"),
    "wrong dtype": (
        LAST,
        edit_header(lambda h: [h[k].update(dtype="I32") for k in h if k == "ln_f.bias"]),
        "ln_f.bias must have dtype F32",
    ),
    "missing tensor": (LAST, rename("ln_f.weight", "ln_f.wait"), "tensor 'ln_f.weight' is missing"),
    "extra tensor": (LAST, add_empty("x"), "tensor 'x' is not of this model"),
    "path as name": (LAST, rename("ln_f.weight", "../x"), "ln_f.weight"),
    "missing moments": (LAST, rename("m.ln_f.bias", "m.x"), "tensor 'm.ln_f.bias' is missing"),
    "NaN": (LAST, fill_v(np.nan), "NaN or infinite"),
    "infinity": (LAST, fill_v(np.inf), "NaN or infinite"),
    "negative second moment": (LAST, fill_v(-1.0), "v.wte.weight has negative entries"),
    "huge file": (LAST, replace(huge), "1,099,511,627,776 bytes, more than"),
    "pipe": (LAST, replace(UNUSUAL_FILES["pipe"]), "not a regular file" if hasattr(os, "mkfifo") else "is a folder"),
    "folder": (LAST, replace(UNUSUAL_FILES["folder"]), "is a folder"),
    "huge metrics": ("metrics.jsonl", replace(huge), "has more than 1,073,741,824 bytes"),
    "device": ("tokenizer.json", replace(UNUSUAL_FILES["endless"]), "not a regular file"),
    "pipe of metrics": (
        "metrics.jsonl",
        replace(UNUSUAL_FILES["pipe"]),
        "not a regular file" if hasattr(os, "mkfifo") else "is a folder",
    ),
    "no tokenizer": ("tokenizer.json", replace(UNUSUAL_FILES["missing"]), "no file"),
    "broken state": (LAST, edit_header(lambda h: h["__metadata__"].update(state="{")), "last.safetensors, state"),
    "no state": (LAST, edit_header(lambda h: h["__metadata__"].pop("state")), "its metadata has no state"),
    "no seal": (LAST, edit_header(lambda h: h.pop("__metadata__")), "has no SHA-256"),
    "deep JSON": (LAST, edit_header(lambda h: h["__metadata__"].update(state="[" * 10**5)), "nested too deeply"),
    "huge JSON": ("config.json", rewrite(lambda content: content + b" " * 2**20), "more than 1,048,576"),
    "NaN in JSON": (LAST, edit_metadata("state", lambda s: s.update(seconds=float("nan"))), "NaN is not a number"),
    "huge state": (LAST, edit_metadata("state", lambda s: s.update(step=10**30)), "step must be"),
    "a state of another model": (LAST, edit_metadata("config", lambda c: c.update(n_head=1)), "the model has n_head 1"),
    "unknown field": ("config.json", edit_json(lambda c: c.update(os="linux")), "fields missing or unknown: 'os'"),
    "impossible field": ("config.json", edit_json(lambda c: c["training"].update(beta1=2)), "beta1 must be"),
    "impossible model": ("config.json", edit_json(lambda c: c["model"].update(n_layer=10**6)), "n_layer must be"),
    "a model beyond any machine": (
        "config.json",
        edit_json(lambda c: c["model"].update(n_layer=4000, n_embd=2**19)),
        "no machine trains",
    ),
    "another model": ("config.json", edit_json(lambda c: c["model"].update(n_head=1)), "the model has n_head 2"),
    "unknown preset": ("config.json", edit_json(lambda c: c.update(preset="../x")), "preset"),
    "small vocabulary": ("tokenizer.json", edit_json(lambda t: t.update(characters="abc")), "is not among the 3"),
    "large vocabulary": (
        "tokenizer.json",
        edit_json(lambda t: t.update(characters="".join(map(chr, range(32, 900))))),
        "vocab_size must be at least the tokenizer's 868",
    ),
    "control characters": ("config.json", edit_json(lambda c: c.update(preset="\x1b[2J" * 900)), "'\\x1b[2J"),
}  # fmt: skip
HUGE_METRICS = [b'{"step": 1, "split": "val", "protocol": "full", "loss": %s}' % number for number in
                (b"1e400", b"9" * 400, b"1e300", b"-1e300", b"9" * 5000)]  # fmt: skip


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
    assert error.isprintable() or error[:-1].isprintable()
    assert len(error) < 500


@pytest.mark.parametrize("file", ["tokenizer.json", LAST, BEST])
@pytest.mark.parametrize("place", [0.001, 0.01, 0.02, 0.05, 0.1, 0.5, 0.75, 0.999])
def test_a_single_flipped_bit_is_seen(file: str, place: float, saved: Path, tmp_path: Path) -> None:
    """In the header, its metadata, the hash itself and the tensors."""
    shutil.copytree(saved, tmp_path / "run")
    content = bytearray((tmp_path / "run" / file).read_bytes())
    content[int(len(content) * place)] ^= 1
    (tmp_path / "run" / file).write_bytes(content)
    if file != LAST:
        assert sampled(tmp_path / "run") is None
    if file != BEST:  # resuming writes it anew when it is as old as the last
        assert resumed(tmp_path / "run") is None


@pytest.mark.parametrize("line", HUGE_METRICS, ids=range(len(HUGE_METRICS)))
def test_numbers_that_no_run_measures_are_refused_with_their_line(
    line: bytes, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(saved, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(line + b"\n")
    number = len((saved / "metrics.jsonl").read_bytes().splitlines()) + 1
    assert run("numpy", arguments({"--resume": tmp_path / "run", "--threads": 1})) == 1
    assert f"metrics.jsonl, line {number}: not a measurement" in capsys.readouterr().err


def test_checkpoints_of_two_models_do_not_mix(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert start("numpy", saved.parent / "text.txt", tmp_path / "run", n_layer=2, n_embd=8) == 0
    shutil.copy(saved / LAST, tmp_path / "run")
    capsys.readouterr()
    assert run("numpy", arguments({"--resume": tmp_path / "run", "--threads": 1})) == 1
    assert "last.safetensors: the model has n_layer 1, the run's config.json 2" in capsys.readouterr().err


def test_a_run_of_the_old_format_is_refused(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "last").mkdir()
    (tmp_path / "run" / "last" / "state.json").write_text("{}")
    text = str(saved.parent / "text.txt")
    for argv in (
        {"--resume": tmp_path / "run"},
        {"--preset": "tiny", "--data": text, "--run-dir": tmp_path / "run", "--overwrite": ""},
    ):
        assert run("numpy", arguments(argv)) == 1
        error = capsys.readouterr().err
        assert "version 0.1.0" in error
        assert error.count("\n") == 1
    assert sampled(tmp_path / "run") is None


def test_the_names_of_leftovers() -> None:
    """What a resume deletes are names that this program makes, and no others."""
    for name in (".config.json.0123abcd.new", ".last.safetensors.ffffffff.new", ".metrics.jsonl.12345678.new"):
        assert training.run.LEFTOVER.fullmatch(name)
    for name in (
        ".mine.new",
        "config.json",
        ".config.json.new",
        ".config.json.mine.of.new",
        "config.json.0123abcd.new",
    ):
        assert not training.run.LEFTOVER.fullmatch(name)

"""The trainers' command lines: what they print, what they keep, and what they say when something is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import data.corpus
import data.tokenizers
import sample
from common.cli import run_program
from common.errors import UserError, shorten
from tests.runs import ENGINES, ROOT, SMALL, arguments, command, measured, one_line, run, start, write_text
from training.config import PRESETS
from training.run import read_config

PROGRAMS = tuple(f"train_{engine}.py" for engine in ENGINES)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


# ---------------------------------------------------------------------------------------------------------------------
# A run from end to end, in a process of its own


@pytest.mark.parametrize("engine", ENGINES)
def test_a_whole_run_and_a_sample_of_it(engine: str, tmp_path: Path) -> None:
    text = write_text(tmp_path)
    flags = SMALL | {"--data": text, "--run-dir": tmp_path / "a run"}
    if engine == "torch":
        flags |= {"--device": "cpu"}
    done = command(f"train_{engine}.py", *arguments(flags))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "no progress bar where nobody watches"
    for expected in (
        f"{engine} engine, float32, ",
        "to beat: bigram ",
        "step      4: train ",
        "step      5: val ",
        "step     12: val ",
        "best validation loss, whole split: ",
        "a sample of the best checkpoint:",
        f"python sample.py '{tmp_path / 'a run'}' --engine {engine}",
    ):
        assert expected in done.stdout
    if engine == "torch":
        assert "device cpu, float32, eager" in done.stdout
    kept = sorted(str(path.relative_to(tmp_path / "a run")) for path in (tmp_path / "a run").rglob("*"))
    checkpoints = ["best.safetensors", "last.safetensors"]
    assert kept == sorted(["config.json", "lock", "loss.png", "metrics.jsonl", "tokenizer.json", *checkpoints])
    assert (tmp_path / "a run" / "loss.png").read_bytes().startswith(b"\x89PNG")

    lines = measured(tmp_path / "a run")
    steps = {kind: [x["step"] for x in lines if (x["split"], x["protocol"]) == kind] for kind in
             (("train", "batch"), ("train", "estimate"), ("val", "estimate"), ("val", "full"))}  # fmt: skip
    assert list(steps.values()) == [list(range(12)), [4, 8, 12], [4, 8, 12], [5, 10, 12]]
    for line in lines:
        bits = {"bits_per_char"} if line["protocol"] == "full" else set()
        assert {"step", "split", "protocol", "loss", "lr", "grad_norm", "tokens"} | bits == set(line)
    updates = {line["step"] + 1: (line["lr"], line["grad_norm"]) for line in lines if line["protocol"] == "batch"}
    assert all(updates[x["step"]] == (x["lr"], x["grad_norm"]) for x in lines if x["protocol"] != "batch")

    sampled = command("sample.py", tmp_path / "a run", "--max-new-tokens", 20)
    assert sampled.returncode == 0, sampled.stderr


def test_the_numpy_programs_need_no_pytorch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    flags = arguments(SMALL | {"--data": write_text(tmp_path), "--run-dir": tmp_path / "run"})
    code = "import sys; sys.path[:0] = sys.argv[1:3]; import train_numpy; sys.exit(train_numpy.main(sys.argv[3:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path, ROOT, *flags], capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "a sample of the best checkpoint" in done.stdout


def test_without_corpus_and_network_it_trains_on_verse_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(data.corpus, "SHAKESPEARE_FILE", tmp_path / "input.txt")
    monkeypatch.setattr(data.corpus.urllib.request, "urlopen", no_network)
    flags = SMALL | {"--run-dir": tmp_path / "run", "--max-steps": 2, "--eval-interval": 2}
    assert run("numpy", arguments(flags)) == 0
    printed = capsys.readouterr().out
    assert "Using the embedded corpus 'verse' instead" in printed
    assert re.search(r"to beat: bigram \d\.\d+, entropy 0\.\d+ nats per token", printed)
    assert read_config(tmp_path / "run").training.data == "verse", "a resumed run goes on with verse"

    assert run("numpy", arguments(flags | {"--data": "shakespeare_char", "--run-dir": tmp_path / "other"})) == 1
    assert "--from FILE" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "other" / "config.json").exists()


def test_default_run_folder(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = SMALL | {"--data": text, "--max-steps": 1, "--decay-steps": 3}
    assert run("numpy", arguments(flags)) == 0
    assert (tmp_path / "runs" / "numpy-tiny" / "config.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# --help and errors


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_complete_and_grouped(program: str) -> None:
    done = command(program, "--help", "--preset", "gpt2")
    assert done.returncode == 0
    shown = " ".join(done.stdout.replace("│", " ").split())
    for group in ("model options", "training options", "run options"):
        assert group in shown
    flags = ["--n-layer", "--dropout", "--bias, --no-bias", "--vocab-size", "--data", "--tokenizer", "--max-steps"]
    flags += ["--batch-size", "--grad-accum", "--learning-rate", "--min-lr", "--warmup-steps", "--decay-steps"]
    flags += ["--weight-decay", "--beta1", "--beta2", "--grad-clip", "--eval-interval", "--log-interval", "--seed"]
    flags += ["--dtype", "--preset {tiny,small,full,gpt2}", "--run-dir", "--resume", "--overwrite", "--threads"]
    if program == "train_torch.py":
        flags += ["device options", "--device {cpu,cuda,mps}", "--compile, --no-compile", "--recompute, --no-recompute"]
    for flag in flags:
        assert flag in shown, flag
    assert "(default: 50257)" in shown, "the defaults are those of the preset asked for"


def test_help_loads_nothing_slow() -> None:
    code = "import sys, train_numpy\ntry: train_numpy.main(['--help'])\nexcept SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "tyro" in loaded
    assert not loaded & {"torch", "matplotlib", "safetensors"}


def test_an_error_is_one_line_on_a_terminal_without_box_drawing() -> None:
    done = command("train_numpy.py", "--frobnicate", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert one_line(done.stderr) == "error: Unrecognized options: --frobnicate (see train_numpy.py --help)\n"


def test_what_a_terminal_cannot_show_is_written_as_its_number(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ταῦτα πάντα ῥεῖ\n" * 200, encoding="utf-8")
    flags = arguments(SMALL | {"--data": path, "--run-dir": tmp_path / "λόγος", "--max-steps": 2})
    for argv in (["train_numpy.py", *flags], ["sample.py", tmp_path / "λόγος", "--max-new-tokens", 20]):
        done = command(*argv, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert done.returncode == 0, done.stderr
        assert "\\u03b1" in done.stdout
    shown = command(
        "sample.py", tmp_path / "λόγος", "--max-new-tokens", 20, env=os.environ | {"PYTHONIOENCODING": "utf-8"}
    )
    assert "\\" not in shown.stdout


@pytest.mark.parametrize(
    "env",
    [
        *({"PYTHONIOENCODING": f"ascii:{errors}"} for errors in ("strict", "surrogateescape", "surrogatepass")),
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "utf-8:strict"},
    ],
    ids=str,
)
def test_escapes_whatever_the_streams_error_handler_is(env: dict[str, str]) -> None:
    """On both streams; half of a surrogate pair is what no encoding can write."""
    code = (
        "import sys; from common.cli import run_program\ndef main():\n for stream in (sys.stdout, sys.stderr):\n"
        "  print('\\u03b1\\ud800', file=stream)\n return 0\nsys.exit(run_program(main))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True)
    assert done.returncode == 0, done.stderr
    alpha = "\u03b1".encode() if "utf-8" in str(env) else b"\\u03b1"
    assert done.stdout.splitlines() == done.stderr.splitlines() == [alpha + b"\\ud800"]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--prompt", "-x y"], "If '-x y' is the value, write --prompt='-x y' (see"),
        (["--prompt", "-x"], "If '-x' is the value, write --prompt=-x (see"),
        (["--prompt", "--seed", "3"], "Expected 1 values. (see"),
        (["--prompt"], "Expected 1 values. (see"),
    ],
)
def test_a_value_that_begins_with_a_hyphen(argv: list[str], hint: str, capsys: pytest.CaptureFixture) -> None:
    assert run_program(lambda: sample.main(["runs/x", *argv])) == 2
    assert hint in one_line(capsys.readouterr().err)


def test_a_home_folder_is_found_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A shell expands ~ at the beginning of a word only. A text that begins with it stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path)
    few = arguments(SMALL | {"--max-steps": 1, "--decay-steps": 3})
    assert run("numpy", [*few, "--data=~/text.txt", "--run_dir=~/run"]) == 0
    assert read_config(tmp_path / "run").training.data == str(tmp_path / "text.txt")
    assert run("numpy", ["--resume=~/run", "--max-steps", "2", "--threads", "1"]) == 0
    assert data.tokenizers.main(["train", "--data", "~/text.txt", "--vocab-size", "257", "--out=~/bpe.json"]) == 0
    assert run("numpy", [*few, "--data=~/text.txt", "--run-dir", "~/bpe", "--tokenizer=~/bpe.json"]) == 0
    assert {"run", "bpe", "bpe.json"} <= {path.name for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert run_program(lambda: sample.main(["bpe", "--prompt=~/x", "--max-new-tokens", "0"])) == 0
    assert capsys.readouterr().out == "~/x\n"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--foo", "3"], "--foo"),
        (["--n-layer", "x"], "--n-layer"),
        (["--n-layer", "0"], "n_layer must be"),
        (["--n-layer"], "--n-layer"),
        (["--n-embd", "100", "--n-head", "3"], "n_embd must be a multiple of n_head"),
        (["--preset", "huge"], "'huge'"),
        (["--preset"], "--preset"),
        (["--learning-rate", "-1"], "learning_rate must be"),
        (["--grad-accum", "1000"], "grad_accum must be at most"),
        (["--dtype", "float16"], "float16"),
        (["stray"], "stray"),
        (["--resume", "x", "--run-dir", "y"], "no file 'x/config.json'"),
        (["--run-dir", "", "--overwrite"], "must name a folder"),
    ],
)
def test_a_wrong_flag_is_one_line(engine: str, wrong: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    assert run(engine, wrong) in (1, 2)
    printed = capsys.readouterr()
    assert said in one_line(printed.err)
    assert printed.out == ""


@pytest.mark.parametrize(
    ("engine", "flags", "said"),
    [
        ("numpy", {"dtype": "bfloat16"}, "dtype bfloat16 is for train_torch.py"),
        ("numpy", {"data": "/no/such/file"}, "no file '/no/such/file'"),
        ("numpy", {"vocab_size": 3}, "vocab_size must be at least the tokenizer's"),
        ("numpy", {"tokenizer": "klingon"}, "no tokenizer or file 'klingon'"),
        ("numpy", {"block_size": 5000}, "the training split has 3600 tokens"),
        ("numpy", {"run_dir": __file__}, "is a file"),
        ("torch", {"device": "mps"}, "device mps is not available here: choose "),
    ],
)
def test_what_cannot_be_is_one_line(
    engine: str, flags: dict, said: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    if flags.get("device") == "mps" and torch.backends.mps.is_available():
        pytest.skip("mps is available here")
    assert start(engine, text, **{"run_dir": tmp_path / "run"} | flags) == 1
    assert said in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [], "nothing was begun, and nothing is left"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"a" * 500, "only the character 'a'"),
        (b"abc\xff\xfe", "not UTF-8"),
        (b"ab" * 5, "validation split"),
        (b"abcdefgh" * 10, None),  # a validation split shorter than a window, and a batch longer than the corpus
        (b"abcdefgh" * 20 + b"z", None),  # a character that only validation has
        (b"\xef\xbb\xbf" + b"To be,\r\nor not\r\n" * 40, None),
    ],
)
def test_odd_corpora_work_or_are_one_line(
    content: bytes, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "odd.txt"
    path.write_bytes(content)
    code = start("numpy", path, tmp_path / "run", batch_size=40, max_steps=2)
    printed = capsys.readouterr()
    if said is None:
        assert (code, printed.err) == (0, "")
        assert "\ufeff" not in (
            characters := json.loads((tmp_path / "run" / "tokenizer.json").read_text())["characters"]
        )
        assert "\r" not in characters
    else:
        assert code == 1
        assert said in one_line(printed.err)


def test_a_validation_split_of_one_character_of_several_bytes_is_too_short(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.txt").write_text("ababababaé", encoding="utf-8")
    flags = {"tokenizer": "bpe", "bpe_vocab_size": 257, "block_size": 2, "max_steps": 1}
    assert start("numpy", tmp_path / "text.txt", tmp_path / "run", **flags) == 1
    assert "is a single character, and 2 are needed" in one_line(capsys.readouterr().err)


def test_not_enough_memory_is_one_line(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def too_large(*_: object, **__: object) -> None:
        raise MemoryError("Unable to allocate 7.28 TiB")

    monkeypatch.setattr("train_numpy.GPT", too_large)
    assert start("numpy", text, tmp_path / "run") == 1
    assert "not enough memory: Unable to allocate 7.28 TiB" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("file", ["config.json", "note.txt"])
def test_a_refused_run_deletes_nothing_but_its_own_lock(
    file: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder was there, empty; or it was not, and something came into it before the run was refused."""

    def refuse(folder: Path, *_: object) -> None:
        if file == "note.txt":
            (folder / file).write_text("mine")
        raise UserError("no")

    monkeypatch.setattr("training.run.begin_run", refuse)
    if file == "config.json":
        (tmp_path / "run").mkdir()
    assert start("numpy", text, tmp_path / "run") == 1
    kept = set() if file == "config.json" else {"note.txt"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == kept


def test_an_interrupted_beginning_leaves_no_folder(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("training.run.get_tokenizer", interrupted)
    assert start("numpy", text, tmp_path / "run") == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------------------------
# What every program does when something fails


WRITERS = [
    ["bigram.py", "--data", "verse", "--steps", "1"],
    ["-m", "data.corpus", "verse"],
    ["train_numpy.py", "--help"],
    ["-c", "from common.cli import run_program as r\ndef main():\n print('a' * 99999)\n return 0\nexit(r(main))"],
]


def ran(argv: list[str], stdout: int) -> tuple[int, str]:
    """Exit status and stderr of a program that keeps what it prints in a buffer, as Python does unless it is told."""
    env = os.environ | {"PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=env, stdout=stdout, stderr=subprocess.PIPE, encoding="utf-8", timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("argv", WRITERS, ids=lambda argv: argv[0])
def test_a_reader_that_has_gone_is_no_error_to_speak_of(argv: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert ran(argv, writer) == (1, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("argv", WRITERS, ids=lambda argv: argv[0])
def test_a_disk_that_is_full_is_one_line(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        assert ran(argv, full.fileno()) == (1, "error: No space left on device\n")


def test_an_error_is_told_even_if_nobody_reads_what_came_before_it() -> None:
    code = (
        "from common.errors import UserError\nfrom common.cli import run_program\n"
        "def main():\n print('this will stay in the buffer')\n raise UserError('why')\n"
        "exit(run_program(main))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert ran(["-c", code], writer) == (1, "error: why\n")
    finally:
        os.close(writer)


def test_a_closed_standard_output_is_no_error() -> None:
    argv = [sys.executable, "-m", "data.corpus", "verse"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *argv], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def failing(error: BaseException) -> int:
    def main() -> int:
        raise error

    return run_program(main)


def test_a_missing_package_is_one_line(capsys: pytest.CaptureFixture) -> None:
    assert failing(ModuleNotFoundError(name="torch")) == 1
    assert capsys.readouterr().err == "error: needs the package torch: pip install -r requirements-dev.txt\n"


@pytest.mark.parametrize("name", ["training", "numpygpt", "data", "resource", "torch.nn.no_such", None])
def test_a_module_that_nobody_can_install_is_a_bug(name: str | None) -> None:
    with pytest.raises(ModuleNotFoundError):
        failing(ModuleNotFoundError(name=name))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("two\nlines", "two\\nlines"),
        ("\x1b[2J a bell \a, \x85\u2028\u202e and \udcff", "\\x1b[2J a bell \\x07, \\x85\\u2028\\u202e and \\udcff"),
        ("naïve 世界 🙂", "naïve 世界 🙂"),
        ("a" * 3000 + "b" * 3000, "a" * 500 + " ... " + "b" * 500),
    ],
)
def test_a_message_is_one_printable_line_of_bounded_length(
    said: str, shown: str, capsys: pytest.CaptureFixture
) -> None:
    """Names of files, and what is in them, come from anywhere: escape sequences would be obeyed by a terminal."""
    assert failing(UserError(said)) == 1
    assert capsys.readouterr().err == f"error: {shown}\n"


@pytest.mark.parametrize("value", ["\x1b[2J\n", ["\x1b\n"], {"\u202e": "\x9b"}, Path("a\nb\x1b"), "\ud800", "x" * 5000])
def test_a_value_in_a_message_is_short_and_printable(value: object) -> None:
    assert shorten(value).isprintable()
    assert len(shorten(value)) < 100


def test_a_flag_that_holds_control_characters_is_one_printable_line(capsys: pytest.CaptureFixture) -> None:
    assert run("numpy", ["--\x1b[2J\n\n" + "x" * 3000]) == 2
    message = one_line(capsys.readouterr().err)
    assert message.rstrip("\n").isprintable()
    assert len(message) < 1100


@pytest.mark.parametrize("code", [0, 2, None])
def test_an_exit_status_is_handed_on(code: int | None) -> None:
    assert failing(SystemExit(code)) == (code or 0)


def test_sampling_with_an_engine_that_is_not_installed(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert start("numpy", text, tmp_path / "run", max_steps=1, decay_steps=3) == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it now raises ModuleNotFoundError
    argv = [str(tmp_path / "run"), "--prompt", "A", "--engine", "torch"]
    assert run_program(lambda: sample.main(argv)) == 1
    assert one_line(capsys.readouterr().err) == "error: needs the package torch: pip install -r requirements-dev.txt\n"


@pytest.mark.parametrize(("module", "argv"), [(data.corpus, ["verse"]), (data.tokenizers, ["train"])])
def test_an_interrupted_command_says_nothing(
    module: ModuleType, argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "load_corpus", interrupted)
    assert module.main(argv) == 130
    assert capsys.readouterr() == ("", "")


EVERY_PROGRAM = [
    *(["train_numpy.py"], ["train_torch.py"], ["sample.py"], ["bigram.py"], ["-m", "data.corpus"]),
    *(["-m", "data.tokenizers"], ["-m", "learn.trace"], ["-m", "learn.pictures"], ["-m", "tools.export"]),
    *(["-m", "tools.curves"], ["-m", "bench.cpu"], ["-m", "bench.gpu"], ["-m", "bench.subwords"]),
]


@pytest.mark.parametrize("argv", EVERY_PROGRAM, ids=lambda argv: argv[-1])
def test_with_nothing_installed_every_program_says_what_to_install(argv: list[str]) -> None:
    """-S: without site-packages, there is nothing but Python."""
    done = subprocess.run([sys.executable, "-S", *argv, "--help"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch("error: needs the package (numpy|tyro): pip install -r requirements.txt\n", done.stderr)


@pytest.mark.parametrize("program", ["train_torch.py", "bench/gpu.py"])
def test_what_is_all_pytorch_says_so_where_there_is_none(program: str) -> None:
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, program], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr == "error: needs the package torch: pip install -r requirements-dev.txt\n"


def test_an_import_that_is_a_bug_is_a_traceback() -> None:
    begin = "from common.startup import prepare_imports as e; e(); "
    done = subprocess.run(
        [sys.executable, "-c", f"{begin}import data.no_such"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_ctrl_c_during_the_imports_says_nothing() -> None:
    code = (
        "from common.startup import prepare_imports as e; e(); import os, signal; os.kill(os.getpid(), signal.SIGINT)"
    )
    # Where the parent ignores SIGINT, as in the background of a script, so would the child.
    preset = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    done = subprocess.run([sys.executable, "-c", preset + code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""


# ---------------------------------------------------------------------------------------------------------------------
# The run folder


def test_a_run_is_not_overwritten_unless_told(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    assert start("numpy", text, tmp_path / "run") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert start("numpy", text, tmp_path / "run") == 1
    message = one_line(capsys.readouterr().err)
    assert "--resume" in message
    assert "--overwrite" in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert start("numpy", text, tmp_path / "run", overwrite="", seed=5, max_steps=2) == 0
    assert read_config(tmp_path / "run").training.seed == 5
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert max(line["step"] for line in measured(tmp_path / "run")) == 2


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "last").write_text("a love letter")
    (tmp_path / "letters" / "first").write_text("another one")
    for flags in ({}, {"overwrite": ""}):
        assert start("numpy", text, tmp_path / "letters", **flags) == 1
        assert "is not a run, and not empty" in one_line(capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "letters").iterdir()) == ["first", "last"]


def test_a_run_that_cannot_begin_does_not_cost_the_old_one(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    assert start("numpy", text, tmp_path / "run", max_steps=2) == 0
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    assert start("numpy", text, tmp_path / "run", overwrite="", vocab_size=2) == 1
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


def test_config_json_records_what_was_chosen(tmp_path: Path, text: Path) -> None:
    assert start("numpy", text, tmp_path / "run", no_bias="", max_steps=2) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["engine"] == "numpy"
    assert config["model"]["bias"] is False
    assert config["training"]["dtype"] == "float32"
    assert config["training"]["data"] == str(text)
    assert len(config["corpus_sha256"]) == 64
    assert PRESETS["tiny"].training.beta2 == config["training"]["beta2"]

"""bench/tokenizers.py: the comparison is fair, runs are kept, and the page says what was measured."""

import math
import re
from pathlib import Path

import pytest

from bench import tokenizers as bench
from data.corpus import load_corpus
from data.tokenizers import get_tokenizer
from numpygpt import param_shapes
from sample import write_samples
from tests.helpers import ROOT
from tests.runs import write_text
from training.command import run_program
from training.config import PRESETS
from training.metrics import read_metrics

PAGE = (ROOT / "docs" / "tokenizers.md").read_text(encoding="utf-8")
VOCAB_SIZE = 300


def tables(page: str) -> list[dict[str, list[str]]]:
    """The tables of a page in Markdown: name of the row -> its other cells."""
    found: list[dict[str, list[str]]] = []
    for line, before in zip(page.splitlines(), ["", *page.splitlines()], strict=False):
        if line.startswith("| ") and not before.startswith("|"):
            found.append({})
        elif line.startswith("| ") and "---" not in line:
            name, *cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            found[-1][name] = cells
    return found


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def samples(page: str) -> list[str]:
    return re.findall(r"```text\n(.*?)\n```", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The arguments of a small comparison that has run, and its folder: text.txt, runs/, out/."""
    folder = tmp_path_factory.mktemp("bench")
    argv = ["--preset", "tiny", "--max-chars", "12000", "--vocab-sizes", str(VOCAB_SIZE), "--rounds", "1"]
    argv += ["--data", str(write_text(folder)), "--run-dir", str(folder / "runs"), "--out", str(folder / "out")]
    assert bench.main(argv) == 0
    return argv, folder


def test_the_page_says_what_was_measured(made: tuple[list[str], Path]) -> None:
    argv, folder = made
    page = (folder / "out" / "tokenizers.md").read_text(encoding="utf-8")
    assert "python bench/tokenizers.py " + " ".join(argv) in page
    inputs, losses, rates = tables(page)
    names = {"characters": "numpy-char", f"BPE-{VOCAB_SIZE}": f"numpy-bpe{VOCAB_SIZE}"}
    assert list(inputs) == list(losses) == list(rates) == list(names)
    for name, run in names.items():
        last = [m for m in read_metrics(folder / "runs" / run / "metrics.jsonl") if m["protocol"] == "full"][-1]
        assert last["step"] == number(inputs[name][-1])
        assert (losses[name][0], losses[name][1]) == (f"{last['loss']:.4f}", f"{last['bits_per_char']:.4f}")
        assert min(number(rates[name][0]), number(rates[name][2])) > 0
    assert (folder / "out" / "tokenizers.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(samples(page)) == 2


def test_samples_are_those_of_sample_py(made: tuple[list[str], Path], capsys: pytest.CaptureFixture) -> None:
    _, folder = made
    shown = samples((folder / "out" / "tokenizers.md").read_text(encoding="utf-8"))
    options = {"prompt": None, "max_new_tokens": bench.SAMPLE_CHARS, "top_k": None, "num_samples": 1, "engine": "torch"}
    options |= {"temperature": bench.TEMPERATURE, "seed": bench.SEED}
    capsys.readouterr()
    for text, run in zip(shown, ("numpy-char", f"numpy-bpe{VOCAB_SIZE}"), strict=True):
        write_samples(folder / "runs" / run, **options)
        assert capsys.readouterr().out.strip().startswith(text)
        assert len(text) > bench.SAMPLE_CHARS / 2


def test_a_finished_run_is_used_again_and_another_is_not_touched(
    made: tuple[list[str], Path], capsys: pytest.CaptureFixture
) -> None:
    argv, folder = made
    files = [path for path in (folder / "runs").rglob("*") if path.suffix in (".jsonl", ".safetensors")]
    before = [path.read_bytes() for path in files]
    page = (folder / "out" / "tokenizers.md").read_text(encoding="utf-8")
    assert bench.main(argv) == 0
    assert [path.read_bytes() for path in files] == before
    again = (folder / "out" / "tokenizers.md").read_text(encoding="utf-8")
    assert (tables(again)[:2], samples(again)) == (tables(page)[:2], samples(page))
    capsys.readouterr()
    assert run_program(lambda: bench.main([*argv, "--max-chars", "20000"])) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: \S+numpy-char holds a run with another .*: choose another --run-dir\n", error)
    assert [path.read_bytes() for path in files] == before


def test_each_contender_learns_from_the_same_characters(tmp_path: Path) -> None:
    corpus = load_corpus(str(write_text(tmp_path, 20_000)))
    preset = PRESETS["small"]
    per_step = preset.training.batch_size * preset.model.block_size
    for chars in (None, 300_000):
        options = bench.Options(data=corpus.name, max_chars=chars, run_dir=tmp_path / "runs")
        for vocab_size in (None, 300, 400):
            flags = bench.contender_flags(options, corpus, vocab_size)
            kind = "char" if vocab_size is None else "bpe"
            tokenizer = get_tokenizer(kind, corpus.train_text, vocab_size or 0)
            per_token = len(corpus.train_text) / len(tokenizer.encode(corpus.train_text))
            wanted = chars or preset.training.max_steps * per_step
            assert abs(flags.training.max_steps * per_step * per_token - wanted) <= per_step * per_token / 2
            assert flags.model == preset.model
            assert flags.training.tokenizer == kind
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max-chars", "0"], "max_chars must be at least 1, got 0"),
        (["--rounds", "-1"], "rounds must be at least 1, got -1"),
        (["--vocab-sizes"], "vocab_sizes must be 1 to 6 different numbers"),
        (["--vocab-sizes", "300", "300"], "vocab_sizes must be 1 to 6 different numbers"),
        (["--data", "verse", "--vocab-sizes", "255"], "a vocabulary of 255 is too small"),
        (["--data", "nowhere"], "no file 'nowhere'"),
    ],
)
def test_what_makes_no_sense_is_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    few = ["--preset", "tiny", "--max-chars", "600", "--run-dir", str(tmp_path / "runs"), "--out", str(tmp_path)]
    try:
        status = run_program(lambda: bench.main([*few, *argv]))
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_the_page_in_docs_is_that_of_the_four_contenders() -> None:
    assert "```\npython bench/tokenizers.py\n```" in PAGE
    inputs, losses, rates = tables(PAGE)
    assert list(inputs) == list(losses) == list(rates) == ["characters", "BPE-512", "BPE-1024", "BPE-4096"]
    preset = PRESETS["small"]
    for name, cells in inputs.items():
        vocab_size = 65 if name == "characters" else int(name.removeprefix("BPE-"))
        assert number(cells[0]) == vocab_size
        params = sum(math.prod(shape) for shape in param_shapes(preset.model.gpt_config(vocab_size)).values())
        assert number(cells[1]) + number(cells[2]) == params
        assert cells[2] == inputs["characters"][2], "the budget outside the embeddings is the same"
        learned = number(cells[-1]) * preset.training.batch_size * preset.model.block_size / number(cells[3])
        assert learned == pytest.approx(preset.training.max_steps * 768, rel=0.003)
        nats, bits, relative, bigram = (number(cell.rstrip("%")) for cell in losses[name])
        assert bits == pytest.approx(nats * number(cells[4]) / math.log(2), rel=0.002)
        assert relative == pytest.approx(100 * (bits / number(losses["characters"][1]) - 1), abs=0.06)
        assert bits < bigram, f"{name} learned less than a bigram"
    assert len(samples(PAGE)) == 4
    assert (ROOT / "docs" / "tokenizers.png").stat().st_size < 200_000

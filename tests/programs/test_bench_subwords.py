"""bench/subwords.py: the comparison is fair, runs are kept, and the page says what was measured."""

import io
import math
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from bench import subwords as bench
from bigram import bigram_loss
from common.cli import parse, run_program
from data.corpus import load_corpus
from data.tokenizers import get_tokenizer, load
from numpygpt import GPTConfig, param_shapes
from sample import write_samples
from tests.helpers import ROOT
from tests.runs import write_text
from training.config import PRESETS
from training.metrics import read_metrics
from training.run import Run

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
    return float(cell.replace(",", "").rstrip("%"))


def samples(page: str) -> list[str]:
    return re.findall(r"```text\n(.*?)\n```", page, flags=re.DOTALL)


def check_page(page: str, preset: str, max_chars: int, rel: float) -> None:
    """What a page says must agree with itself. rel: how far a median of ratios may be from the ratio of medians."""
    config, training = PRESETS[preset].model, PRESETS[preset].training
    per_step = training.batch_size * config.block_size
    inputs, losses, rates = tables(page)
    assert list(inputs) == list(losses) == list(rates)
    for name, cells in inputs.items():
        shapes = param_shapes(config.gpt_config(int(number(cells[0])))).values()
        assert number(cells[1]) + number(cells[2]) == sum(map(math.prod, shapes))
        assert cells[2] == inputs["characters"][2], "the budget outside the embeddings is the same"
        a_step = per_step / number(cells[3])  # in characters
        assert abs(number(cells[6]) * a_step - max_chars) <= a_step / 2 + 0.002 * max_chars
        assert number(cells[5]) == pytest.approx(config.block_size / number(cells[4]), abs=0.6)
        nats, bits, relative, _ = map(number, losses[name])
        assert bits == pytest.approx(nats * number(cells[4]) / math.log(2), rel=0.002)
        assert relative == pytest.approx(100 * (bits / number(losses["characters"][1]) - 1), abs=0.06)
        for rate, gain in ((0, 1), (2, 3)):
            factor = number(rates[name][rate]) / number(rates["characters"][rate])
            assert number(rates[name][gain].split()[0]) == pytest.approx(factor, rel=rel, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# On numbers made by hand: a window of 10 tokens, batches of 16, so 160 tokens to a step


def made_by_hand(name: str, vocab_size: int, tokens_per_char: float, bits: float) -> bench.Result:
    """A contender whose model has one channel, and of whose run no more is there than the page needs."""
    config = GPTConfig(vocab_size, 10, n_layer=1, n_head=1, n_embd=1)
    unused = {"tokenizer": None, "batches": None, "val_tokens": None, "eval_tokens": None, "eval_chars": 0}
    run = Run(Path("run"), "numpy", config, PRESETS["tiny"].training, baselines={"bigram": 3.0}, **unused)
    curve = [(500_000, 9.9), (2_000_000, bits)]
    return bench.Result(name, run, tokens_per_char, tokens_per_char, curve, bits * math.log(2) / tokens_per_char)


def three() -> list[bench.Result]:
    """Made anew for each test, since a mutant is another class."""
    return [
        made_by_hand("characters", 20, 1.0, 2.5),
        made_by_hand("BPE-300", 300, 0.5, 2.75),
        made_by_hand("BPE-500", 500, 0.25, 2.0),
    ]


def test_what_follows_from_a_result() -> None:
    results = three()
    characters = results[0]
    assert [result.chars_per_step for result in results] == [160, 320, 640]
    assert [result.embedding_params for result in results] == [30, 310, 510]
    assert len({result.other_params for result in results}) == 1
    assert characters.other_params == sum(map(math.prod, param_shapes(characters.run.model).values())) - 30
    assert [result.bits for result in results] == [2.5, 2.75, 2.0]
    # 3 nats a token: 4.328 bits, and a quarter of them is what a character costs in LAST
    bigrams = [3 / math.log(2) * tokens_per_char for tokens_per_char in (1, 0.5, 0.25)]
    assert [result.bigram_bits for result in results] == pytest.approx(bigrams)


def test_speeds_are_relative_to_the_first() -> None:
    characters, last = bench.speeds([np.array([0.2, 0.2, 0.8]), np.array([0.1, 0.05, 0.1])])
    assert (characters.chars_per_s, characters.factor) == pytest.approx((5, 1))
    assert (last.chars_per_s, last.factor) == pytest.approx((10, 4)), "of the ratios 2, 4 and 8"
    assert last.gain == "4.00 (3.00 to 6.00)"


def test_characters_per_second_are_those_of_all_steps_and_of_the_whole_sample() -> None:
    results = three()
    taken = {result.name: np.array([2.0]) for result in results}
    texts = {"characters": "a" * 100, "BPE-300": "a" * 200, "BPE-500": "a" * 500}

    def alternate(contenders: dict, rounds: int) -> dict:
        assert rounds == 7
        for contender in contenders.values():
            contender()
        return taken

    def write_sample(engine: str, folder: Path) -> str:
        return remaining.pop(0)

    with mock.patch.multiple(bench, alternate=alternate, training_round=mock.Mock(), write_sample=write_sample):
        training = bench.measure_training("numpy", results, 7)
        remaining = list(texts.values())
        generation, samples = bench.measure_generation("numpy", results, 7)
    assert [speed.chars_per_s for speed in training] == [bench.STEPS * chars / 2 for chars in (160, 320, 640)]
    assert [speed.chars_per_s for speed in generation] == [50, 100, 250]
    assert samples == list(texts.values())


def test_the_plot_is_over_characters_and_over_seconds() -> None:
    results = three()
    training = bench.speeds([np.array([1e-5]), np.array([5e-6]), np.array([2e-6])])
    by_chars, by_seconds = bench.draw(results, training, "title").axes
    assert [text.get_text() for text in by_chars.get_legend().get_texts()] == [result.name for result in results]
    for result, line in zip(results, by_chars.lines, strict=True):
        assert line.get_xdata() == pytest.approx([0.5, 2.0]), "millions of characters"
        assert line.get_ydata() == pytest.approx([9.9, result.bits])
    for seconds, line in zip(([5, 20], [2.5, 10], [1, 4]), by_seconds.lines, strict=True):
        assert line.get_xdata() == pytest.approx(seconds)


def test_the_short_look_that_is_documented_is_not_in_the_way_of_the_comparison() -> None:
    look = next(line for line in bench.__doc__.splitlines() if "--max-chars" in line)
    options = parse(bench.Options, "bench/subwords.py", shlex.split(look)[3:])
    assert options.run_dir != bench.Options.run_dir
    assert options.out != bench.Options.out


# ---------------------------------------------------------------------------------------------------------------------
# A small comparison


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, str]:
    """The arguments of a small comparison that has run, its folder (text.txt, runs/, plot.png), and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    argv = ["--preset", "tiny", "--max-chars", "12000", "--vocab-sizes", str(VOCAB_SIZE), "--rounds", "1"]
    argv += ["--data", str(write_text(folder)), "--run-dir", str(folder / "runs"), "--out", str(folder / "plot.png")]
    return argv, folder, printed_by(argv)


def printed_by(argv: list[str]) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert bench.main(argv) == 0
    return printed.getvalue()


def test_the_tables_say_what_was_measured(made: tuple[list[str], Path, str]) -> None:
    argv, folder, page = made
    inputs, losses, rates = tables(page)
    names = {"characters": "numpy-char", f"BPE-{VOCAB_SIZE}": f"numpy-bpe{VOCAB_SIZE}"}
    assert list(inputs) == list(losses) == list(rates) == list(names)
    for name, run in names.items():
        last = [m for m in read_metrics(folder / "runs" / run / "metrics.jsonl") if m["protocol"] == "full"][-1]
        assert last["step"] == number(inputs[name][-1])
        assert (losses[name][0], losses[name][1]) == (f"{last['loss']:.4f}", f"{last['bits_per_char']:.4f}")
        assert min(number(rates[name][0]), number(rates[name][2])) > 0
        corpus = load_corpus(argv[argv.index("--data") + 1])
        tokenizer = load(folder / "runs" / run / "tokenizer.json")
        train_ids, val_ids = tokenizer.encode(corpus.train_text), tokenizer.encode(corpus.val_text)
        predicted = len(corpus.val_text) - len(tokenizer.decode(val_ids[:1]))  # characters
        nats = bigram_loss(train_ids, val_ids, tokenizer.vocab_size) * (len(val_ids) - 1) / predicted
        assert number(losses[name][3]) == pytest.approx(nats / math.log(2), abs=1e-4)
    check_page(page, "tiny", 12_000, rel=0.01)
    assert (folder / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(samples(page)) == 2


def test_the_curve_is_over_the_characters_learned_from(made: tuple[list[str], Path, str]) -> None:
    argv, _, _ = made
    options = parse(bench.Options, "python -m bench.subwords", argv)
    corpus = load_corpus(options.data)
    for name, vocab_size in (("characters", None), ("BPE", VOCAB_SIZE)):
        result = bench.train_contender(name, options, corpus, vocab_size)
        assert 1 < len(result.curve) <= bench.EVALUATIONS
        assert result.curve[-1][0] == pytest.approx(12_000, abs=result.chars_per_step / 2 + 1)
        assert result.curve[-1][0] == pytest.approx(result.run.training.max_steps * result.chars_per_step, abs=1)


def test_samples_are_those_of_sample_py(made: tuple[list[str], Path, str], capsys: pytest.CaptureFixture) -> None:
    _, folder, printed = made
    shown = samples(printed)
    options = {"prompt": None, "max_new_tokens": bench.SAMPLE_CHARS, "top_k": None, "num_samples": 1, "engine": "torch"}
    options |= {"temperature": bench.TEMPERATURE, "seed": bench.SEED}
    capsys.readouterr()
    for text, run in zip(shown, ("numpy-char", f"numpy-bpe{VOCAB_SIZE}"), strict=True):
        write_samples(folder / "runs" / run, **options)
        assert capsys.readouterr().out.strip().startswith(text)
        assert len(text) > bench.SAMPLE_CHARS / 2


def test_a_finished_run_is_used_again_and_another_is_not_touched(
    made: tuple[list[str], Path, str], capsys: pytest.CaptureFixture
) -> None:
    argv, folder, page = made
    files = [path for path in (folder / "runs").rglob("*") if path.suffix in (".jsonl", ".safetensors")]
    before = [path.read_bytes() for path in files]
    again = printed_by(argv)
    assert [path.read_bytes() for path in files] == before
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
    few = [
        "--preset",
        "tiny",
        "--max-chars",
        "600",
        "--run-dir",
        str(tmp_path / "runs"),
        "--out",
        str(tmp_path / "plot.png"),
    ]
    assert run_program(lambda: bench.main([*few, *argv])) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_the_page_in_docs_is_that_of_the_four_contenders() -> None:
    assert "```\npython -m bench.subwords\n```" in PAGE
    inputs, losses, _ = tables(PAGE)
    assert [*inputs] == ["characters", "BPE-512", "BPE-1024", "BPE-4096"]
    assert [number(cells[0]) for cells in inputs.values()] == [65, 512, 1024, 4096]
    preset = PRESETS["small"]
    check_page(PAGE, "small", preset.training.max_steps * 768, rel=0.2)  # 0.09 apart, on a noisy machine
    for name, cells in losses.items():
        assert number(cells[1]) < number(cells[3]), f"{name} learned less than a bigram"
    assert len(samples(PAGE)) == 4
    assert (ROOT / "docs" / "tokenizers.png").stat().st_size < 200_000


def test_the_page_in_docs_says_how_fast_the_encoding_is() -> None:
    printed = re.search(r"```\n\$ python -m data.tokenizers train --vocab-size 1024\n(.*?)```", PAGE, re.DOTALL)[1]
    learned = re.search(r"1024 ids from 1,003,854 characters in (\S+) s\n", printed)
    encoded = re.search(r"encoded 1,115,394 characters as 4\d\d,\d{3} tokens in (\S+) s, ", printed)
    assert number(learned[1]) < 10
    assert number(encoded[1]) < 2
    assert "   256 " in printed

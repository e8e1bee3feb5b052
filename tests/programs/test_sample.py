"""sample.py: the same text from both engines, prompts from everywhere, and errors that name what is wrong."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import sample
import torchgpt
from common.cli import run_program
from common.errors import UserError
from data import verse
from data.bpe import BPETokenizer
from data.corpus import load_corpus
from data.tokenizers import CharTokenizer, load, save
from tests import runs
from tests.runs import ROOT, command, start, write_text
from tools import export
from training.run import load_run, read_config


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    assert start("numpy", write_text(folder), folder / "run", max_steps=60, eval_interval=60, learning_rate=1e-2) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def nothing_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        yield


def sampled(run_dir: Path, *argv: object, capsys: pytest.CaptureFixture) -> str:
    """What sample.py prints, in this process."""
    capsys.readouterr()
    assert run_program(lambda: sample.main([str(run_dir), *map(str, argv)])) == 0
    return capsys.readouterr().out


def refused(run_dir: Path, *argv: object, capsys: pytest.CaptureFixture) -> str:
    """The one line with which sample.py stops."""
    return runs.refused(lambda: run_program(lambda: sample.main([str(run_dir), *map(str, argv)])), capsys)[1]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--prompt", "Alaric:", "--temperature", 1.3, "--seed", 7],
        ["--top-k", 3, "--num-samples", 2],
        ["--temperature", 0],
    ],
)
def test_one_seed_one_text_from_both_engines(run_dir: Path, options: list, capsys: pytest.CaptureFixture) -> None:
    length = ["--max-new-tokens", 100]  # far past the window of 16
    of_numpy = sampled(run_dir, *length, *options, capsys=capsys)
    assert of_numpy == sampled(run_dir, *length, *options, "--engine", "torch", capsys=capsys)
    assert of_numpy == sampled(run_dir, *length, *options, capsys=capsys)
    assert len(of_numpy) > 100


def test_length_seed_and_number(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    prompt = ["--prompt", "Alaric:"]
    text = sampled(run_dir, *prompt, "--max-new-tokens", 30, capsys=capsys)
    assert len(text) == len("Alaric:") + 30 + 1
    assert text.startswith("Alaric:")
    assert sampled(run_dir, *prompt, "--max-new-tokens", 0, capsys=capsys) == "Alaric:\n"
    assert text != sampled(run_dir, *prompt, "--max-new-tokens", 30, "--seed", 8, capsys=capsys)
    several = sampled(run_dir, *prompt, "--max-new-tokens", 30, "--num-samples", 3, capsys=capsys)
    parts = several.split("--- sample ")[1:]
    assert [part[:7] for part in parts] == ["1 of 3\n", "2 of 3\n", "3 of 3\n"]
    assert len({part[7:] for part in parts}) == 3
    assert parts[0][7:] == text, "the first of several is the one alone"


def test_the_prompt_may_come_through_a_pipe(run_dir: Path) -> None:
    """However slowly: a failure is a prompt that is lost, or half of one."""
    options = ["--max-new-tokens", "20", "--seed", "3"]
    given = command("sample.py", run_dir, "--prompt", "Alaric:", *options)
    assert (given.returncode, given.stderr) == (0, "")
    argv = [sys.executable, ROOT / "sample.py", run_dir, *options, "--prompt", "-"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        for part in ("Ala", "ric:"):
            time.sleep(1.5)
            process.stdin.write(part)
            process.stdin.flush()
        process.stdin.close()
        assert process.stdout.read() == given.stdout


@pytest.mark.parametrize("prompt", ["Alaric:\r\n", "\ufeffAlaric:\n", "\ufeffAlaric:\r\n"])
def test_a_prompt_from_windows_is_the_same_prompt(run_dir: Path, prompt: str, capsys: pytest.CaptureFixture) -> None:
    options = ["--max-new-tokens", 20]
    plain = sampled(run_dir, "--prompt", "Alaric:\n", *options, capsys=capsys)
    assert sampled(run_dir, "--prompt", prompt, *options, capsys=capsys) == plain
    piped = subprocess.run(
        [sys.executable, ROOT / "sample.py", run_dir, "--prompt", "-", *map(str, options)],
        input=prompt.encode(),
        capture_output=True,
        timeout=60,
    )
    assert piped.stdout.decode() == plain, piped.stderr


def test_standard_input_is_read_only_when_asked(run_dir: Path) -> None:
    """A failure: started by another program that left a pipe open, it waits for ever, or depends on who is quicker."""
    free = command("sample.py", run_dir, "--max-new-tokens", 20)
    assert (free.returncode, free.stderr) == (0, "")
    for said in ("", "Alaric:"):
        argv = [sys.executable, ROOT / "sample.py", run_dir, "--max-new-tokens", "20"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(argv, encoding="utf-8", **pipes) as process:
            process.stdin.write(said)
            process.stdin.flush()
            assert process.wait(timeout=60) == 0
            assert (process.stdout.read(), process.stderr.read()) == (free.stdout, "")


def test_a_closed_standard_input_is_no_prompt(
    run_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = sampled(run_dir, "--max-new-tokens", 20, capsys=capsys)
    monkeypatch.setattr(sys, "stdin", None)  # what Python makes of it
    assert sampled(run_dir, "--max-new-tokens", 20, capsys=capsys) == free
    assert "standard input is closed" in refused(run_dir, "--prompt", "-", capsys=capsys)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_large_models_are_sampled_in_the_dtype_of_their_weights(
    engine: str, run_dir: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure: GPT-2 takes twice the memory. NumPy reads the weights where they are, mapped from their file."""
    models = []
    for module, name in ((sample, "GPT"), (torchgpt, "GPT")):
        made = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, made=made, **k: models.append(made(*a, **k)) or models[-1])
    small = sampled(run_dir, "--max-new-tokens", 20, "--engine", engine, capsys=capsys)
    monkeypatch.setattr(sample, "LARGE", 1)
    assert sampled(run_dir, "--max-new-tokens", 20, "--engine", engine, capsys=capsys) == small
    if engine == "numpy":
        assert [model.params["wte.weight"].dtype for model in models] == [np.float64, np.float32]
        assert not models[1].params["h.0.attn.c_attn.weight"].flags.writeable
    else:
        assert [model.wte.weight.dtype for model in models] == [torch.float64, torch.float32]


def test_without_a_prompt_a_text_begins_after_a_line_end(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    free = sampled(run_dir, "--max-new-tokens", 20, capsys=capsys)
    assert sampled(run_dir, "--max-new-tokens", 20, "--prompt", "\n", capsys=capsys) == "\n" + free


def test_a_vocabulary_without_a_line_end(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("abcd" * 100)
    assert start("numpy", tmp_path / "text.txt", tmp_path / "run", max_steps=1, decay_steps=3) == 0
    assert len(sampled(tmp_path / "run", "--max-new-tokens", 5, capsys=capsys)) == 6


def test_vocabulary_entries_without_a_token_are_never_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = write_text(tmp_path)
    assert start("numpy", text, tmp_path / "run", vocab_size=5000, max_steps=1, decay_steps=3) == 0
    assert ", vocabulary 5000, of which the tokenizer char uses " in capsys.readouterr().out
    shown = sampled(tmp_path / "run", "--temperature", 5, "--max-new-tokens", 50, capsys=capsys)
    assert len(shown) == 51
    whole, cut = load_run(tmp_path / "run"), sample.load_for_sampling(tmp_path / "run")
    assert (whole[0].vocab_size, len(whole[1]["wte.weight"])) == (5000, 5000)
    assert cut[0].vocab_size == len(cut[1]["wte.weight"]) == cut[2].vocab_size < 5000


def test_a_run_that_was_never_best_samples_from_last(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text = write_text(tmp_path)
    assert start("numpy", text, tmp_path / "run", max_steps=1, decay_steps=3) == 0
    (tmp_path / "run" / "best.safetensors").rename(tmp_path / "elsewhere")
    assert sampled(tmp_path / "run", "--max-new-tokens", 5, capsys=capsys)
    (tmp_path / "run" / "last.safetensors").rename(tmp_path / "elsewhere too")
    assert "has no checkpoint yet" in refused(tmp_path / "run", capsys=capsys)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "Alaricß"], "'ß' (U+00DF) at position 6"),
        (["--temperature", -1], "temperature must be"),
        (["--temperature", "nan"], "temperature must be"),
        (["--top-k", 0], "top_k must be"),
        (["--max-new-tokens", -1], "max_new_tokens must be at least 0"),
        (["--num-samples", 0], "num_samples must be at least 1"),
        (["--seed", -1], "seed must be at least 0"),
        (["--engine", "jax"], "--engine"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_settings_that_make_no_sense(
    run_dir: Path, engine: str, options: list, said: str, capsys: pytest.CaptureFixture
) -> None:
    engine_flags = [] if "--engine" in options else ["--engine", engine]
    prompt = [] if "--prompt" in options else ["--prompt", "A"]
    assert said in refused(run_dir, *prompt, *options, *engine_flags, capsys=capsys)


def test_a_checkpoint_may_be_named_itself(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The tokenizer and config.json beside it are used."""
    length = ["--max-new-tokens", 30]
    assert sampled(run_dir / "best.safetensors", *length, capsys=capsys) == sampled(run_dir, *length, capsys=capsys)
    assert sampled(run_dir / "last.safetensors", *length, capsys=capsys)
    assert "no file" in refused(run_dir / "first.safetensors", capsys=capsys)
    (tmp_path / "alone.safetensors").write_bytes((run_dir / "best.safetensors").read_bytes())
    assert "is not a run: it has no config.json" in refused(tmp_path / "alone.safetensors", capsys=capsys)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_weights_that_are_finite_but_huge_are_one_line(
    engine: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "LARGE", 1)  # in float64 they would be fine
    config, weights, tokenizer = load_run(run_dir)
    huge = {name: np.full_like(weight, 3e38) for name, weight in weights.items()}
    export.write_run(tmp_path / "huge", config, huge, tokenizer)
    line = refused(tmp_path / "huge", "--engine", engine, capsys=capsys)
    assert f"{tmp_path / 'huge'} cannot write: logits must be finite, got finite weights too large" in line
    if engine == "numpy" and importlib.util.find_spec("onnxruntime"):
        assert run_program(lambda: export.main(["to-onnx", str(tmp_path / "huge"), str(tmp_path / "x.onnx")])) == 1
        line = runs.one_line(capsys.readouterr().err)
        assert f"{tmp_path / 'huge'} cannot be exported: logits must be finite" in line
        assert not (tmp_path / "x.onnx").exists()


def test_a_folder_that_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "is not a run: it has no config.json" in refused(tmp_path, capsys=capsys)
    assert "no file" in refused(tmp_path / "nowhere", capsys=capsys)


def test_a_model_of_hugging_faces_is_told_from_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    said = f"import it by python -m tools.export from-hf {tmp_path} RUN"
    assert said in refused(tmp_path, capsys=capsys)
    assert run_program(lambda: export.main(["info", str(tmp_path)])) == 1
    assert said in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab_size = read_config(run_dir).model.vocab_size
    assert load_run(run_dir)[0].vocab_size == vocab_size
    monkeypatch.setattr("training.run.load", lambda path: CharTokenizer("".join(map(chr, range(vocab_size + 1)))))
    for loads in (load_run, sample.load_for_sampling):
        with pytest.raises(UserError, match=f"has {vocab_size + 1} tokens, more than the model's {vocab_size}"):
            loads(run_dir)


def test_a_prompt_that_is_not_utf8(run_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", run_dir, "--prompt", "-"], input=b"\xff", capture_output=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: the prompt on standard input is not UTF-8")


def test_a_reader_that_has_seen_enough(run_dir: Path) -> None:
    argv = [sys.executable, ROOT / "sample.py", run_dir, "--max-new-tokens", "100000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        process.stdout.read(50)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Special tokens


END = "<|endoftext|>"


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A text of several documents, and a tokenizer with a token for their end."""
    folder = tmp_path_factory.mktemp("documents")
    (folder / "text.txt").write_text(END.join(verse.write(400, seed) for seed in range(10)))
    save(BPETokenizer.train(verse.write(4000, 1), 300, special_tokens=[END]), folder / "bpe.json")
    return folder / "text.txt", folder / "bpe.json"


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_in_a_text_are_read_if_asked_for_and_spoken_of_if_not(
    special: bool, documents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    text, bpe = documents
    few = {"max_steps": 1, "decay_steps": 3, "tokenizer": bpe} | ({"special_tokens": ""} if special else {})
    assert start("numpy", text, tmp_path / "run", **few) == 0
    printed = capsys.readouterr().out
    said = (
        f"{text} holds '{END}' 9 times, learned as ordinary text: --special-tokens would read it as the special token"
    )
    assert printed.count(said) == (not special)
    tokenizer = load(bpe)
    allowed = [END] if special else []
    counts = [
        len(tokenizer.encode(part, allowed_special=allowed))
        for part in (load_corpus(str(text)).train_text, load_corpus(str(text)).val_text)
    ]
    assert f"{counts[0]:,} tokens to learn from, {counts[1]:,} to validate on" in printed
    assert read_config(tmp_path / "run").training.special_tokens is special

    given = []
    with mock.patch("sample.token_stream", lambda *args: given.append(args[3].tolist()) or iter([])):
        for flags in ([], ["--special-tokens"]):
            sampled(tmp_path / "run", "--prompt", f"{END}A", *flags, capsys=capsys)
    as_text, as_token = (tokenizer.encode(f"{END}A", allowed_special=some).tolist() for some in ([], [END]))
    assert given == [as_token if special else as_text, as_token], "a run that learned the token reads it in prompts"

    change = {"no_special_tokens" if special else "special_tokens": ""}
    message = runs.refused(lambda: runs.resume("numpy", tmp_path / "run", **change), capsys)[1]
    assert "special_tokens of a run cannot be changed" in message


def test_special_tokens_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = write_text(tmp_path)
    flags = {"special_tokens": "", "max_steps": 1}
    message = runs.refused(lambda: start("numpy", text, tmp_path / "run", **flags), capsys)[1]
    assert "the tokenizer char has no special tokens: leave out --special-tokens" in message
    save(BPETokenizer((), ("<the end>",)), tmp_path / "bpe.json")
    flags["tokenizer"] = tmp_path / "bpe.json"
    message = runs.refused(lambda: start("numpy", text, tmp_path / "run", **flags), capsys)[1]
    assert "special token '<the end>' holds white space" in message

"""tools/export.py: the commands, what they refuse, and that a run which was imported is a run like any other."""

import dataclasses
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import numpygpt
import sample
import torchgpt
from common.cli import run_program
from data import verse
from data.bpe import BPETokenizer
from data.gpt2_bpe import END_OF_TEXT
from data.tokenizers import CharTokenizer, Tokenizer, save
from numpygpt import GPTConfig
from tests import runs
from tests.helpers import ROOT, Arrays, random_weights, train_config
from tools import export, sizes
from tools.hf import PICKLES, write_hf
from training.checkpoint import load_weights
from training.flops import forward_flops_per_token
from training.run import NO_CORPUS, RunConfig, load_run, read_config, write_config

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for anything anywhere else

TEXT = verse.write(3000, 3)
CHARACTERS = CharTokenizer.from_text(TEXT)
BPE = BPETokenizer.train(TEXT, 300, special_tokens=[END_OF_TEXT])
CONFIG = GPTConfig(CHARACTERS.vocab_size, 32, n_layer=2, n_head=2, n_embd=16, dropout=0.1)


def weights(config: GPTConfig, seed: int = 1) -> Arrays:
    return {name: param.astype(np.float32) for name, param in random_weights(config, seed).items()}


def run(*argv: object) -> int:
    """A command line of tools.export in this process -> the exit status."""
    return run_program(lambda: export.main([str(word) for word in argv]))


def refused(*argv: object, capsys: pytest.CaptureFixture) -> str:
    """The one line with which it stops."""
    out, line = runs.refused(lambda: run(*argv), capsys)
    assert out == ""
    return line


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sampled(folder: Path, capsys: pytest.CaptureFixture, prompt: str, count: int, engine: str = "numpy") -> str:
    """What sample.py writes greedily, prompt included."""
    capsys.readouterr()
    options = {"temperature": 0.0, "top_k": None, "seed": 1, "num_samples": 1}
    sample.write_samples(folder, prompt=prompt, max_new_tokens=count, engine=engine, **options)
    return capsys.readouterr().out.removesuffix("\n")


@pytest.fixture
def one_run(tmp_path: Path) -> Path:
    export.write_run(tmp_path / "run", CONFIG, weights(CONFIG), CHARACTERS)
    return tmp_path / "run"


@pytest.fixture
def folder(one_run: Path, tmp_path: Path) -> Path:
    """The same as Hugging Face keeps it, to be damaged."""
    assert run("to-hf", one_run, tmp_path / "hf") == 0
    return tmp_path / "hf"


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["characters", "bpe"])
def test_a_run_comes_back_from_hugging_face_every_bit(tokenizer: Tokenizer, bias: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size + 2, bias=bias)
    export.write_run(tmp_path / "run", config, weights(config), tokenizer)
    assert run("to-hf", tmp_path / "run", tmp_path / "hf") == 0
    assert run("from-hf", tmp_path / "hf", tmp_path / "back") == 0
    before, after = files(tmp_path / "run"), files(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before.keys() - {"config.json"}:
        assert before[name] == after[name], name
    assert load_run(tmp_path / "back")[0] == config


PEAK = """
import sys
from pathlib import Path

from tools import export, hf, hf_tokenizer, sizes

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

before = peak()
sys.exit(export.main(sys.argv[1:]) or print(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_a_model_passes_through_in_little_more_memory_than_its_weights(tmp_path: Path) -> None:
    """Its file, mapped, is most of it: no copy of the weights is made, and no moments. Measured: 1.1 and 1.2 times."""
    config = GPTConfig(30_000, 512, n_layer=2, n_head=4, n_embd=512)  # as in GPT-2, one tensor is much of the model
    params = numpygpt.init_params(config, 1, np.float32)
    size = sum(param.nbytes for param in params.values())  # 88 MB
    export.write_run(tmp_path / "run", config, params, CHARACTERS)
    for command in (["to-hf", "run", "hf"], ["from-hf", "hf", "back"]):
        program = [sys.executable, "-c", PEAK, *(tmp_path / word if word != command[0] else word for word in command)]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
        grown = int(done.stdout.split()[-1])
        assert size < grown < 1.3 * size, f"{command[0]}: {grown / size:.2f} times the weights"


def test_the_recipe_of_an_imported_model_keeps_its_dtype() -> None:
    """A failure: float64 weights would be trained in float32. The rate is constant; the tokenizer is the run's own."""
    for dtype, named in (("float32", "auto"), ("float64", "float64")):
        params = {name: param.astype(dtype) for name, param in random_weights(CONFIG, 1).items()}
        with TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            export.write_run(run_dir, CONFIG, params, CHARACTERS)
            settings = read_config(run_dir)
            assert load_run(run_dir)[1]["wte.weight"].dtype == dtype
        assert settings.training.dtype == named
        assert settings.training.tokenizer == str(run_dir / "tokenizer.json")
        assert settings.training.learning_rate == settings.training.min_lr
        assert settings.corpus_sha256 == NO_CORPUS


def test_what_was_changed_on_the_way_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors(folder, lambda arrays: arrays.update({name: array.astype(np.float16) for name, array in arrays.items()}))
    edit(folder / "config.json", resid_pdrop=0.2)
    capsys.readouterr()
    assert run("from-hf", folder, tmp_path / "back") == 0
    *said, last = capsys.readouterr().out.splitlines()
    assert said == [
        "there is one dropout for all places: 0.2 instead of resid_pdrop 0.2, embd_pdrop 0.1, attn_pdrop 0.1",
        "weights of float16 are kept as float32",
    ]
    assert last.startswith(f"{tmp_path / 'back'}: ")


def test_the_report_is_the_notes_and_the_sizes() -> None:
    with redirect_stdout(StringIO()) as output:
        export.report(Path("run"), GPTConfig(65, 256), ["a note", "another"])
    sizes = "run: 10,770,816 parameters, 6 layers, 6 heads, 384 channels, block 256, vocabulary 65"
    assert output.getvalue().splitlines() == ["a note", "another", sizes]


@pytest.mark.parametrize(
    ("unused", "said"),
    [(0, []), (1, ["the last row stands for nothing"]), (1200, ["the last 1,200 rows stand for nothing"])],
)
def test_an_import_says_how_many_rows_have_no_token(unused: int, said: list[str], tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=CHARACTERS.vocab_size + unused)
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", config, weights(config), CHARACTERS)
    with redirect_stdout(StringIO()) as output:
        export.from_hf(tmp_path / "hf", tmp_path / "run", None)
    *notes, _ = output.getvalue().splitlines()
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["characters", "bpe"])
def test_the_pipeline_of_transformers_writes_the_same_text(
    tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Through AutoModelForCausalLM, AutoTokenizer and pipeline("text-generation"), as far as the window goes. The
    model has ids that stand for nothing, with weights that would make them likely: neither writes them."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size + 40)
    params = weights(config)
    params["wte.weight"][tokenizer.vocab_size :] *= 3
    export.write_run(tmp_path / "run", config, params, tokenizer)
    assert run("to-hf", tmp_path / "run", tmp_path / "hf") == 0
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path / "hf"))
    prompt = TEXT[:12]
    count = config.block_size - len(tokenizer.encode(prompt))
    theirs = pipeline(prompt, max_new_tokens=count, do_sample=False)[0]["generated_text"]
    ours = sampled(tmp_path / "run", capsys, prompt, count)
    # Where the ids are no UTF-8 yet, ours waits for the rest of the character, which is a matter of printing.
    assert theirs.rstrip("\ufffd") == ours.rstrip("\ufffd")
    assert len(pipeline(prompt)[0]["generated_text"]) > len(prompt)  # and by default, too, it keeps to the window


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_an_imported_model_samples_as_it_did(
    engine: str, one_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("from-hf", folder, tmp_path / "new" / "run") == 0
    before = sampled(one_run, capsys, TEXT[:9], 50)
    assert sampled(tmp_path / "new" / "run", capsys, TEXT[:9], 50, engine) == before


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_an_imported_model_learns_from_any_text(
    engine: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A failure: what is imported cannot be fine-tuned, or the run forgets what it learned from."""
    text, fine_tuned = runs.write_text(tmp_path), tmp_path / "back"
    assert run("from-hf", folder, fine_tuned) == 0
    few = {"batch_size": 4, "grad_accum": 2, "eval_interval": 2, "learning_rate": 1e-2, "min_lr": 1e-3, "seed": 5}
    assert runs.resume(engine, fine_tuned, data=text, max_steps=4, **few) == 0
    losses = [line["loss"] for line in runs.measured(fine_tuned) if line["protocol"] == "full"]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    before, after = load_weights(tmp_path / "run" / "last.safetensors", CONFIG), load_run(fine_tuned)[1]
    assert all((before[name] != after[name]).any() for name in before)

    # From here on it is bound to its text like any other run.
    other = tmp_path / "other.txt"
    other.write_text(TEXT[:2000], encoding="utf-8")
    for change, line in (({"data": other}, "is not the corpus of"), ({"seed": 6}, "seed of a run cannot be changed")):
        capsys.readouterr()
        assert runs.resume(engine, fine_tuned, max_steps=6, **change) == 1
        assert line in capsys.readouterr().err
    assert runs.resume(engine, fine_tuned, max_steps=6) == 0


@pytest.mark.parametrize("change", [{"tokenizer": "bpe"}, {"n_layer": 3}])
def test_an_imported_model_keeps_its_shape_and_tokenizer(
    change: dict, one_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert runs.resume("numpy", one_run, data=runs.write_text(tmp_path), **change) == 1
    assert f"{next(iter(change))} of a run cannot be changed" in capsys.readouterr().err


def test_nanogpt_is_imported_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    params = weights(CONFIG)
    head = {"lm_head.weight": params["wte.weight"]}
    save_file({f"_orig_mod.transformer.{n}": a for n, a in params.items()} | head, tmp_path / "ckpt.safetensors")
    save(CHARACTERS, tmp_path / "tokenizer.json")
    argv = ["from-nanogpt", tmp_path / "ckpt.safetensors", tmp_path / "run", "--tokenizer", tmp_path / "tokenizer.json"]
    assert run(*argv, "--n-head", 2) == 0
    output = capsys.readouterr()
    assert f"{CONFIG.n_layer} layers, 2 heads" in output.out
    assert output.err.startswith("warning: nanoGPT's GELU is the erf form")
    config, imported, tokenizer = load_run(tmp_path / "run")
    assert (config, tokenizer) == (dataclasses.replace(CONFIG, dropout=0.0), CHARACTERS)
    for name, param in params.items():
        np.testing.assert_array_equal(imported[name], param)
    (tmp_path / "other").mkdir()
    assert "n_head" in refused(*argv[:2], tmp_path / "other" / "run", *argv[3:], "--n-head", 3, capsys=capsys)
    assert "n-head" in refused(*argv, capsys=capsys)


def test_the_measure_of_the_other_gelu_is_as_documented(tmp_path: Path) -> None:
    """What docs/ecosystem.md prints its table by: here for a small run, whose two forms differ, but not by much."""
    assert runs.start("numpy", runs.write_text(tmp_path), tmp_path / "run") == 0
    page = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    (program,) = (part.split("```")[0] for part in page.split("```python\n") if "numpygpt.gelu_forward = " in part)
    program = program.replace("runs/numpy-small", str(tmp_path / "run"))
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    measured = [line["loss"] for line in runs.measured(tmp_path / "run") if line["protocol"] == "full"]
    assert float(done.stdout.split("tanh ")[1].split(",")[0]) == pytest.approx(min(measured), abs=1e-5)
    assert 0 < float(done.stdout.split("at most ")[1].split()[0]) < 1e-2


def test_onnx(one_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx", reason="needs onnx: pip install -r requirements-dev.txt")
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -r requirements-dev.txt")
    assert run("to-onnx", one_run, tmp_path / "new" / "gpt.onnx") == 0
    output = capsys.readouterr().out
    assert "opset 20" in output
    assert "passed onnx.checker" in output
    assert float(output.split(" within ")[1].split()[0]) < 1e-5
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["gpt.onnx"]
    assert stat.S_IMODE((tmp_path / "new" / "gpt.onnx").stat().st_mode) == 0o666 & ~export.umask()

    from tools import onnx_graph

    monkeypatch.setattr(onnx_graph, "MAX_FILE_BYTES", 1000)
    assert run("to-onnx", one_run, tmp_path / "two" / "gpt.onnx") == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"gpt.onnx", "gpt.onnx.data"}
    assert "gpt.onnx.data: the weights, too large for one file" in capsys.readouterr().out
    (tmp_path / "two" / "gpt.onnx").unlink()
    monkeypatch.setattr(export, "load_run", None)  # it is refused before anything is computed
    assert "gpt.onnx.data exists already" in refused("to-onnx", one_run, tmp_path / "two" / "gpt.onnx", capsys=capsys)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"gpt.onnx.data"}


@pytest.mark.parametrize("wrong", [1e-3, np.nan])
def test_a_graph_that_computes_something_else_is_refused(
    wrong: float, one_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -r requirements-dev.txt")
    pytest.importorskip("onnx", reason="needs onnx: pip install -r requirements-dev.txt")
    from tools import onnx_graph

    write_onnx = onnx_graph.write_onnx

    def broken(file: Path, config: GPTConfig, params: Arrays) -> None:
        write_onnx(file, config, params | {"ln_f.bias": params["ln_f.bias"] + np.float32(wrong)})

    monkeypatch.setattr(onnx_graph, "write_onnx", broken)
    assert "of the largest away from NumPy's" in refused("to-onnx", one_run, tmp_path / "gpt.onnx", capsys=capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_nothing_is_overwritten(one_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever has the target's name, an empty folder and a broken link included."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = files(tmp_path)
    for target in ("empty", "file", "link", "run"):
        for command in (["from-hf", folder], ["to-hf", one_run], ["to-onnx", one_run]):
            assert "exists already" in refused(*command, tmp_path / target, capsys=capsys)
    assert files(tmp_path) == before


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize(
    ("command", "where"), [("from-hf", "write_config"), ("to-hf", "put_in_place"), ("to-onnx", "put_in_place")]
)
def test_nothing_stays_of_what_failed(
    command: str,
    where: str,
    failure: BaseException,
    one_run: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("onnx", reason="needs onnx: pip install -r requirements-dev.txt")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(export, where, fail)
    before = files(tmp_path)
    assert run(command, folder if command == "from-hf" else one_run, tmp_path / "target") in (1, 130)
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(("where", "time"), [("rename", 2), ("sync_folder", 1), ("sync_folder", 2)])
def test_no_half_of_an_onnx_model_stays(
    where: str, time: int, failure: BaseException, one_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in a second file, and a failure before, between or after the two get their names: a retry succeeds."""
    pytest.importorskip("onnx", reason="needs onnx: pip install -r requirements-dev.txt")
    from tools import onnx_graph

    monkeypatch.setattr(onnx_graph, "MAX_FILE_BYTES", 1000)
    module = os if where == "rename" else export
    real, calls = getattr(module, where), []

    def fail(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == time:
            raise failure
        real(*paths)

    with monkeypatch.context() as patched:
        patched.setattr(module, where, fail)
        assert run("to-onnx", one_run, tmp_path / "gpt.onnx") in (1, 130)
    assert len(calls) == time
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert run("to-onnx", one_run, tmp_path / "gpt.onnx") == 0


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"model_type": "llama"}, "model_type must be 'gpt2', got 'llama'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"activation_function": ["gelu_new"]}, "activation_function is ['gelu_new']"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_weights": 1}, "scale_attn_weights is 1"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"n_inner": 24}, "n_inner is 24"),
        ({"n_inner": None, "n_embd": None}, "n_embd must be an integer"),
        ({"n_inner": 64, "n_embd": "16"}, "n_inner is 64"),
        ({"quantization_config": {}}, "quantization_config is there"),
        ({"n_head": 3}, "n_embd must be a multiple of n_head"),
        ({"n_layer": "2"}, "n_layer must be an integer"),
        ({"n_positions": 1 << 40}, "block_size must be"),
        ({"resid_pdrop": 1.0}, "resid_pdrop must be a number in [0, 1), got 1.0"),
        ({"embd_pdrop": [2]}, "embd_pdrop must be a number in [0, 1), got [2]"),
        ({"attn_pdrop": True}, "attn_pdrop must be a number in [0, 1), got True"),
        ({"vocab_size": 3}, "transformer.wte.weight must have shape (3, 16)"),
        ({"n_layer": 3}, "tensor 'h.2.ln_1.weight' is missing"),
        ({"n_layer": 1}, "tensor 'h.1."),
        ({"bias": False}, "bias is false, but"),
        ({"bias": "no"}, "bias must be True or False"),
    ],
)
def test_what_this_architecture_is_not_is_refused_by_name(
    fields: dict, fault: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    edit(folder / "config.json", **fields)
    assert fault in refused("from-hf", folder, tmp_path / "new", capsys=capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


def tensors(folder: Path, change: Callable[[Arrays], object]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors")


WTE = "transformer.wte.weight"
DAMAGES = {
    "no folder": (shutil.rmtree, "no folder or file"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: Expecting property name"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights: expected model.safetensors"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "is cut short: 0 bytes"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 5000), "file not fully covered"),
    "weights are a text": (lambda f: (f / "model.safetensors").write_text("hello " * 9), "is cut short"),
    "weights are a folder": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "expected weights as safetensors",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "name one with --tokenizer"),
    "larger tokenizer": (
        lambda f: shutil.copy(f.parent / "larger.json", f / "tokenizer.json"),
        f"tokens, more than the model's {CONFIG.vocab_size}",
    ),
    "no tensors": (lambda f: save_file({}, f / "model.safetensors"), "model.safetensors holds no tensors"),
    "nothing but masks": (
        lambda f: save_file({"h.0.attn.bias": np.ones((1, 1), np.uint8)}, f / "model.safetensors"),
        "hf: tensor 'wte.weight' is missing",
    ),
    "a tensor is missing": (lambda f: tensors(f, lambda a: a.pop(WTE)), "tensor 'wte.weight' is missing"),
    "one too many": (lambda f: tensors(f, lambda a: a.update(x=a[WTE])), "tensor 'x' is not of this model"),
    "one twice": (lambda f: tensors(f, lambda a: a.update({"wte.weight": a[WTE]})), "are the same tensor"),
    "wrong shape": (
        lambda f: tensors(f, lambda a: a.update({WTE: a[WTE][:, 1:].copy()})),
        f"must have shape ({CONFIG.vocab_size}, 16), got ({CONFIG.vocab_size}, 15)",
    ),
    "wrong dtype": (lambda f: tensors(f, lambda a: a.update({WTE: a[WTE].astype(np.int8)})), "has dtype I8"),
    "not finite": (lambda f: tensors(f, lambda a: a[WTE].fill(np.nan)), "has NaN or infinite entries"),
    "untied head": (
        lambda f: tensors(f, lambda a: a.update({"lm_head.weight": a[WTE] + 1})),
        "lm_head.weight is not wte.weight",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_with_one_line(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tools.hf_tokenizer import to_hf

    (tmp_path / "larger.json").write_text(json.dumps(to_hf(BPE)))
    damage, fault = DAMAGES[name]
    damage(folder)
    assert fault in refused("from-hf", folder, tmp_path / "new", capsys=capsys)
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("suffix", PICKLES)
def test_pickles_are_never_opened(suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Neither in a folder nor named themselves; were it read, this one would fail as no pickle."""
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    for source in (folder, folder / f"pytorch_model{suffix}"):
        line = refused("from-hf", source, tmp_path / "new", capsys=capsys)
        assert "is a pickle, which can run code" in line
        assert "docs/ecosystem.md" in line
    argv = ["from-nanogpt", folder / f"pytorch_model{suffix}", tmp_path / "new", "--n-head", 2, "--tokenizer", "gpt2"]
    assert "is a pickle" in refused(*argv, capsys=capsys)


def shard(folder: Path) -> dict[str, str]:
    """Two shards with their index -> its weight_map."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{place % 2 + 1}.safetensors" for place, name in enumerate(arrays)}
    for file in set(places.values()):
        save_file({name: array for name, array in arrays.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"weight_map": None}, "weight_map must say"),
        ({"weight_map": {WTE: "../hf/model-1.safetensors"}}, "weight_map must say"),
        ({"weight_map": {WTE: "model-3.safetensors"}}, "no file"),
        ({"weight_map": {"elsewhere": "model-1.safetensors"}}, "'elsewhere' is missing"),
        ({"weight_map": {}}, "is missing"),
        ({"weight_map": {WTE: "model-1.bin"}}, "is a pickle"),
    ],
)
def test_shards(
    change: dict, fault: str, one_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shard(folder)
    assert run("from-hf", folder, tmp_path / "whole") == 0
    last = [load_file(run_dir / "last.safetensors") for run_dir in (one_run, tmp_path / "whole")]
    assert all(np.array_equal(array, last[1][name]) for name, array in last[0].items())
    edit(folder / "model.safetensors.index.json", **change)
    assert fault in refused("from-hf", folder, tmp_path / "new", capsys=capsys)


@given(data=st.data())
def test_no_file_brings_it_down(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bytes of any file changed, inserted or cut off: it is imported or refused, and nothing else."""
    tmp_path = tmp_path_factory.mktemp("fuzz")
    export.write_run(tmp_path / "run", CONFIG, weights(CONFIG), CHARACTERS)
    assert run("to-hf", tmp_path / "run", tmp_path / "hf") == 0
    path = tmp_path / "hf" / data.draw(st.sampled_from(["config.json", "model.safetensors", "tokenizer.json"]))
    content = bytearray(path.read_bytes())
    limit = min(len(content), 4000)  # the header of the weights, mostly
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, limit - 1))
        what = data.draw(st.sampled_from(["change", "insert", "cut"]))
        if what == "change":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "insert":
            content[at:at] = data.draw(st.sampled_from([b"0", b"-", b'"', b"null", b"1e999", b"[" * 5000, b"\xff"]))
        else:
            del content[at : at + data.draw(st.integers(1, 50))]
    path.write_bytes(content)
    code = run("from-hf", tmp_path / "hf", tmp_path / "new")
    assert code == (0 if (tmp_path / "new").exists() else 1)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        ([], "{from-hf, from-nanogpt, to-hf, to-onnx, info}"),
        (["to-pdf"], "to-pdf"),
        (["from-hf", "x"], "RUN"),
        (["info", "nowhere"], "nowhere"),
        (["to-hf", "nowhere", "x"], "nowhere"),
        (["to-onnx", "nowhere", "x"], "nowhere"),
        (["from-hf", "nowhere", "x"], "no folder or file 'nowhere'"),
        (["from-nanogpt", "nowhere", "x", "--n-head", 1, "--tokenizer", "gpt2"], "no file 'nowhere'"),
    ],
)
def test_command_lines_that_make_no_sense(
    argv: Sequence, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fault in refused(*argv, capsys=capsys)
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_cannot_be_exported(
    one_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (one_run / "last.safetensors").unlink()
    assert "has no checkpoint yet" in refused("to-hf", one_run, tmp_path / "hf", capsys=capsys)
    assert run("info", one_run) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def test_the_counts_are_those_of_the_model() -> None:
    for bias in (True, False):
        config = dataclasses.replace(CONFIG, bias=bias)
        counts = sizes.count_kinds(config)
        assert sum(exact for exact, _, _ in counts.values()) == numpygpt.GPT(config).num_params()


def test_the_operations_are_those_that_pytorch_counts() -> None:
    """Forward, and forward with backward. PyTorch multiplies the future, too, and throws it away: with T + 1 tokens
    attended to on average in place of (T + 1) / 2, less one where T is counted."""
    config = dataclasses.replace(CONFIG, dropout=0.0)
    model = torchgpt.GPT(config, attention="explicit")
    for T in (1, config.block_size):
        idx = torch.zeros((1, T), dtype=torch.int64)
        with FlopCounterMode(display=False) as forward:
            _, loss = model(idx, idx)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        future = config.n_layer * 4 * config.n_embd * (T - (T + 1) / 2)
        windows = dataclasses.replace(config, block_size=T)
        assert forward.get_total_flops() == T * (forward_flops_per_token(windows) + future)
        assert backward.get_total_flops() == 2 * forward.get_total_flops()


# Computed by hand for V 65, T 256, L 6, C 384. A layer has 4 C^2 + 4 C parameters in attention, 8 C^2 + 5 C in the MLP
# and 4 C in its norms, and the last norm has 2 C. Forward is 2 (V C + 12 L C^2) + 4 L C (T + 1) / 2 operations.
INFO = """: L 6, nh 6, C 384, T 256, V 65, with biases

parameters                           exact   share    estimate
token embedding, also the head      24,960    0.2%      24,960  V C
position embedding                  98,304    0.9%      98,304  T C
attention                        3,548,160   32.9%   3,538,944  4 L C^2
MLP                              7,089,408   65.8%   7,077,888  8 L C^2
norms                                9,984    0.1%           0
all                             10,770,816  100.0%  10,740,096  -0.29%

memory, {dtype}                        MB
weights                          {weights:>8}
to train: also gradients, m and v{training:>8}
keys and values of a full window {cache:>8}

MFLOP per token       exact  estimate
forward               22.47     23.90  2 N + 4 L C T
forward and backward  67.40     71.70  6 N + 12 L C T
"""
MEMORY = {  # 4 or 8 bytes each: N; 4 N; T times 2 L C
    "auto": {"dtype": "float32", "weights": "43.08", "training": "172.33", "cache": "4.72"},
    "float64": {"dtype": "float64", "weights": "86.17", "training": "344.67", "cache": "9.44"},
}


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_every_number_of_info(dtype: str) -> None:
    """Nothing but config.json is looked at."""
    settings = RunConfig("numpy", "full", NO_CORPUS, GPTConfig(65, 256), train_config(dtype=dtype), [])
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()) as output:
        write_config(Path(folder), settings)
        sizes.info(Path(folder))
    assert output.getvalue() == folder + INFO.format(**MEMORY[dtype])

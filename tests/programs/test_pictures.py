"""learn.pictures: all are drawn from any run, of what the engine itself computed; and docs/pictures.md shows all."""

import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numpygpt
from common.errors import UserError
from data.tokenizers import CharTokenizer
from learn import pictures, trace
from numpygpt import GPTConfig
from tests.helpers import ROOT
from tests.runs import resume, start, write_text
from tools.export import write_run
from training.metrics import read_metrics

PAGE = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
PROMPT = "What is the crown"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: two layers, a few steps on a short text."""
    folder = tmp_path_factory.mktemp("runs")
    assert start("numpy", write_text(folder), folder / "run", block_size=32) == 0
    return folder / "run"


def size(png: bytes) -> tuple[int, int]:
    """Width and height that a PNG file says it has."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_docs_pictures_are_all_there() -> None:
    shown = re.findall(r"^!\[([^]]+)\]\(pictures/(\w+)\.png\)$", PAGE, flags=re.MULTILINE)
    assert [name for _, name in shown] == list(pictures.PICTURES)
    assert sorted(path.stem for path in (ROOT / "docs" / "pictures").iterdir()) == sorted(pictures.PICTURES)
    for description, name in shown:
        content = (ROOT / "docs" / "pictures" / f"{name}.png").read_bytes()
        assert len(description) > 40, f"{name}: say what it shows, for whoever cannot see it"
        assert 800 <= size(content)[0] <= 1600
        assert len(content) < 200_000
        _, after = PAGE.split(f"({'pictures/' + name}.png)")
        assert len(after.split("![")[0].split("\n## ")[0].split()) > 25, f"{name}: no caption"


def test_every_picture_is_drawn(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert pictures.main([str(run), "--out", str(tmp_path / "new" / "folder")]) == 0
    written = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [path.stem for path in written] == list(pictures.PICTURES)
    assert all(min(size(path.read_bytes())) > 300 for path in written)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn, but not turned into PNG files, which takes most of the time."""
    monkeypatch.setattr(pictures, "png", lambda figure: b"")


def drawn(folder: Path, *argv: str) -> set[str]:
    """The names of the pictures of a run, drawn anew."""
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    assert pictures.main([str(folder), *argv]) == 0
    return {path.stem for path in (folder / "pictures").iterdir()}


@pytest.mark.usefixtures("quick")
def test_an_imported_run_shows_what_it_knows_and_no_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A failure: pictures of a training that never was. Fine-tuned, it has gradients; its beginning is not known."""
    text, imported = write_text(tmp_path), tmp_path / "run"
    tokenizer = CharTokenizer.from_text(text.read_text(encoding="utf-8"))
    config = GPTConfig(tokenizer.vocab_size, 16, n_layer=1, n_head=1, n_embd=8, dropout=0.0)
    write_run(imported, config, numpygpt.init_params(config, 1, np.float32), tokenizer)
    with pytest.raises(UserError, match="prompt must be given"):
        pictures.main([str(imported)])
    capsys.readouterr()
    assert drawn(imported, "--prompt", PROMPT) == set(pictures.PICTURES) - {
        "gradients",
        "first_steps",
        "grad_norm",
        "newton_schulz",
    }
    assert capsys.readouterr().err.splitlines() == [
        "without gradients.png: the run's beginning cannot be made again: its weights were imported",
        "without first_steps.png: the run's beginning cannot be made again: its weights were imported",
        "without grad_norm.png: metrics.jsonl has no gradients yet",
        "without newton_schulz.png: the run's beginning cannot be made again: its weights were imported",
    ]

    assert resume("numpy", imported, data=text, max_steps=12, batch_size=4, grad_accum=1, log_interval=1) == 0
    assert drawn(imported) == set(pictures.PICTURES) - {"gradients", "first_steps", "newton_schulz"}


@pytest.mark.usefixtures("quick")
def test_another_text_is_not_taken_for_the_run_s(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text, folder = write_text(tmp_path), tmp_path / "run"
    assert start("numpy", text, folder) == 0
    text.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    with pytest.raises(UserError, match="prompt must be given"):
        pictures.main([str(folder)])
    capsys.readouterr()
    assert drawn(folder, "--prompt", PROMPT[:16]) == set(pictures.PICTURES) - {
        "gradients",
        "first_steps",
        "newton_schulz",
    }
    assert f"{text} has changed since" in capsys.readouterr().err


def test_attention_is_what_the_engine_computed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = pictures.load_subject(run, PROMPT)
    seen = []
    softmax_forward = numpygpt.softmax_forward

    def watched(x: np.ndarray) -> np.ndarray:
        seen.append(softmax_forward(x))
        return seen[-1]

    monkeypatch.setattr(numpygpt, "softmax_forward", watched)
    logits, _ = numpygpt.GPT(subject.config, subject.weights).forward(subject.ids[None, :-1])
    assert len(seen) == subject.config.n_layer
    for i, probs in enumerate(seen):
        drawn = subject.trace.forward[f"h.{i}.attn.probs"]
        np.testing.assert_array_equal(drawn, probs)
        assert not drawn[..., ~np.tri(len(PROMPT) - 1, dtype=bool)].any()
        np.testing.assert_allclose(drawn.sum(axis=-1), 1, rtol=1e-12)
    np.testing.assert_array_equal(subject.trace.forward["logits"], logits)


def test_the_first_updates_are_those_of_the_run(run: Path) -> None:
    """A failure: first_steps.png shows another training than the run's own."""
    subject = pictures.load_subject(run, PROMPT)
    norms = pictures.first_norms(subject)
    assert norms.keys() == subject.weights.keys()
    drawn = np.linalg.norm(list(norms.values()), axis=0)  # of the whole gradient, for each update
    logged = [line["grad_norm"] for line in read_metrics(run / "metrics.jsonl") if line["protocol"] == "batch"]
    assert len(logged) == subject.training.max_steps
    np.testing.assert_allclose(drawn, logged, rtol=1e-5)


def test_a_prompt_from_windows_is_the_same_prompt(run: Path) -> None:
    plain, marked = (pictures.load_subject(run, mark + PROMPT).ids for mark in ("", "\ufeff"))
    np.testing.assert_array_equal(marked, plain)


def test_without_a_prompt_the_validation_text_is_drawn(run: Path) -> None:
    subject = pictures.load_subject(run, None)
    assert len(subject.ids) == subject.config.block_size + 1
    assert "".join(subject.labels(subject.ids)).strip("↵␣")


def test_one_layer_without_bias_and_without_clipping(run: Path, tmp_path: Path) -> None:
    folder, sizes = tmp_path / "odd", {"n_layer": 1, "n_head": 1, "block_size": 4, "no_bias": "", "grad_clip": 0}
    assert start("numpy", write_text(tmp_path), folder, **sizes) == 0
    assert pictures.main([str(folder)]) == 0
    assert len(list((folder / "pictures").iterdir())) == len(pictures.PICTURES)


@pytest.mark.parametrize(
    ("prompt", "message"), [("a", "3 to 33 tokens"), (100 * "a", "3 to 33 tokens"), ("añb", "'ñ'")]
)
def test_prompts_that_cannot_be_drawn(run: Path, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        pictures.main([str(run), "--prompt", prompt])


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        pictures.main([str(tmp_path)])


def test_a_run_can_be_traced(run: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert trace.main([PROMPT, "--run", str(run)]) == 0
    printed = capsys.readouterr().out
    layers = json.loads((run / "config.json").read_text())["model"]["n_layer"]
    assert f"h.{layers - 1}.mlp.out" in printed
    assert float(printed.split()[-1]) < 1e-12
    with pytest.raises(UserError, match="2 to 33 tokens"):
        trace.main([50 * "a", "--run", str(run)])


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("e", "vowels"),
        ("k", "consonants"),
        ("R", "capitals"),
        ("\n", "punctuation and space"),
        ("3", "others"),
        ("th", "others"),
    ],
)
def test_kinds_of_tokens(text: str, kind: str) -> None:
    assert pictures.kind_of(text) == kind
    assert kind in pictures.KINDS


def test_labels_are_visible_and_no_formulas() -> None:
    assert pictures.visible(" a\n$b$") == r"␣a↵\$b\$"


def test_import_needs_neither_torch_nor_matplotlib() -> None:
    check = "import sys, learn.pictures; assert not {'torch', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)

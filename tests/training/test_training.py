"""The parts of a training run: configuration, learning rate, batches, evaluation, metrics; and both engines in step."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from data.tokenizers import CharTokenizer, save
from numpygpt import GPTConfig
from tests import runs
from tests.runs import ENGINES, measured, refused, start, write_text
from train_numpy import NumpyEngine
from train_torch import TorchEngine
from training import loop
from training.batches import Batches, random_batch, split, step_rng
from training.config import PRESETS, Flags, ModelFlags, RunFlags, TrainConfig, learning_rate, muon_learning_rate
from training.evaluate import bits_per_char, consecutive_windows, estimate, evaluate
from training.metrics import MetricsWriter, draw_losses, metrics_until, read_metrics, write_metrics

MODEL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
TRAINING = dataclasses.replace(PRESETS["tiny"].training, dtype="float64", seed=3)


def make_engine(kind: str, model: GPTConfig = MODEL, training: TrainConfig = TRAINING) -> NumpyEngine | TorchEngine:
    return runs.make_engine(kind, model, training)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


def test_model_flags_are_gpt_config_but_for_the_vocabulary() -> None:
    assert {f.name for f in dataclasses.fields(ModelFlags)} == {f.name for f in dataclasses.fields(GPTConfig)}
    flags = PRESETS["small"].model
    assert flags.gpt_config(65).vocab_size == 65
    assert dataclasses.replace(flags, vocab_size=128).gpt_config(65).vocab_size == 128
    with pytest.raises(ValueError, match="vocab_size must be at least the tokenizer's 65, got 64"):
        dataclasses.replace(flags, vocab_size=64).gpt_config(65)


def test_presets_are_the_documented_models() -> None:
    sizes = {name: (p.model.n_layer, p.model.n_head, p.model.n_embd, p.model.block_size) for name, p in PRESETS.items()}
    assert sizes["small"] == (4, 4, 128, 64)
    assert sizes["full"] == (6, 6, 384, 256)
    assert sizes["gpt2"] == (12, 12, 768, 1024)
    assert PRESETS["gpt2"].model.gpt_config(65).vocab_size == 50257
    steps = {name: (p.training.max_steps, p.training.batch_size, p.model.dropout) for name, p in PRESETS.items()}
    assert steps["small"] == (2000, 12, 0.0)
    assert steps["full"] == (2000, 64, 0.2)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_steps", 0),
        ("max_steps", 2.5),
        ("max_steps", True),
        ("max_steps", 2**31),
        ("batch_size", 0),
        ("batch_size", 2**20),
        ("grad_accum", 17),  # micro-batches out of 16 sequences
        ("warmup_steps", -1),
        ("decay_steps", 19),  # less than the 20 steps of warm-up
        ("learning_rate", -1e-3),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("learning_rate", 10**400),
        ("learning_rate", "1e-3"),
        ("min_lr", 1.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("weight_decay", -0.1),
        ("grad_clip", math.inf),
        ("eval_interval", 0),
        ("estimate_batches", -1),
        ("log_interval", 0),
        ("seed", -1),
        ("dtype", "float16"),
        ("schedule", "step"),
        ("optimizer", "sgd"),
        ("muon_learning_rate", -1e-3),
        ("muon_weight_decay", math.nan),
        ("data", ""),
        ("tokenizer", None),
        ("bpe_vocab_size", 0),
    ],
)
def test_a_bad_field_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(PRESETS["tiny"].training, **{field: value})


@pytest.mark.parametrize("field", ["n_layer", "n_head", "n_embd", "block_size"])
def test_a_model_beyond_any_machine_is_refused(field: str) -> None:
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 1, "block_size": 1, "dropout": 0.0, "vocab_size": 1}
    if field == "n_head":
        sizes["n_embd"] = 2**40
    with pytest.raises(ValueError, match=f"{field} must be an integer of at least 1 and below (4096|1048576)"):
        ModelFlags(**sizes | {field: 2**40})


def test_resume_names_the_folder_already() -> None:
    with pytest.raises(ValueError, match="resume"):
        RunFlags("tiny", resume="a", run_dir="b")
    with pytest.raises(ValueError, match="resume"):
        RunFlags("tiny", resume="a", overwrite=True)


def test_every_flag_has_a_name_of_its_own() -> None:
    groups = [field.type for field in dataclasses.fields(Flags)]
    names = [field.name for group in groups for field in dataclasses.fields(group)]
    assert len(names) == len(set(names)), "flat flags of different groups would be one flag"


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate


def test_learning_rate_at_the_documented_steps() -> None:
    config = dataclasses.replace(TRAINING, max_steps=100, learning_rate=1.0, min_lr=0.1, warmup_steps=10)
    assert learning_rate(0, config) == 0.1
    assert learning_rate(9, config) == 1.0
    assert learning_rate(10, config) == 1.0
    assert learning_rate(55, config) == pytest.approx(0.55)
    assert learning_rate(99, config) > 0.1
    assert learning_rate(100, config) == learning_rate(10**6, config) == 0.1


def test_the_rate_of_muon_follows_that_of_adamw() -> None:
    config = dataclasses.replace(TRAINING, optimizer="muon", learning_rate=5e-3, muon_learning_rate=0.02)
    for lr in (5e-3, 1e-3, 0.0):
        assert muon_learning_rate(lr, config) == pytest.approx(4 * lr, rel=1e-15)
    with pytest.raises(ValueError, match="learning_rate must be above 0, as the rate of muon follows it"):
        dataclasses.replace(config, learning_rate=0.0, min_lr=0.0)


def test_learning_rate_of_odd_schedules() -> None:
    config = dataclasses.replace(TRAINING, max_steps=5, learning_rate=1.0, min_lr=0.1, warmup_steps=10)
    assert [learning_rate(step, config) for step in (0, 4)] == [0.1, 0.5]  # shorter than its warm-up
    config = dataclasses.replace(TRAINING, max_steps=100, learning_rate=1.0, min_lr=0.1, warmup_steps=0, decay_steps=50)
    assert learning_rate(0, config) == 1.0
    assert learning_rate(50, config) == learning_rate(99, config) == 0.1


@given(
    step=st.integers(0, 10**6),
    warmup_steps=st.integers(0, 10**4),
    max_steps=st.integers(1, 10**5),
    rates=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_learning_rate_stays_in_its_bounds(
    step: int, warmup_steps: int, max_steps: int, rates: tuple[float, float]
) -> None:
    low, high = sorted(rates)
    config = dataclasses.replace(
        TRAINING, max_steps=max_steps, warmup_steps=warmup_steps, learning_rate=high, min_lr=low
    )
    lr = learning_rate(step, config)
    assert 0 <= lr <= high * (1 + 1e-12)
    if step >= warmup_steps:
        assert lr >= low * (1 - 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


@given(
    num_tokens=st.integers(2, 300), block_size=st.integers(1, 40), batch_size=st.integers(1, 30), seed=st.integers(0, 9)
)
def test_an_epoch_reads_each_position_once(num_tokens: int, block_size: int, batch_size: int, seed: int) -> None:
    tokens = np.arange(num_tokens)  # a token says where it stands
    if num_tokens <= block_size:
        with pytest.raises(UserError, match=f"has {num_tokens} tokens.*block_size"):
            Batches(tokens, block_size, batch_size, seed)
        return
    batches = Batches(tokens, block_size, batch_size, seed)
    epochs = 3
    num_batches = math.ceil(epochs * batches.windows_per_epoch / batch_size)
    windows = np.concatenate([batches.at(step)[0] for step in range(num_batches)])
    for epoch in range(epochs):
        read = windows[epoch * batches.windows_per_epoch :][: batches.windows_per_epoch]
        places = np.sort(read.ravel())
        assert (np.diff(places) == 1).all(), "positions between the first and the last are read exactly once"
        left_out = num_tokens - 1 - len(places)
        assert left_out < 2 * block_size


def test_targets_are_the_next_tokens_and_batches_span_epochs() -> None:
    tokens = np.arange(50) * 7
    batches = Batches(tokens, block_size=8, batch_size=64, seed=0)  # 64 sequences out of 5 windows
    idx, targets = batches.at(0)
    assert idx.shape == targets.shape == (64, 8)
    assert (targets == idx + 7).all()


def test_batches_depend_on_seed_and_step_alone() -> None:
    tokens = np.arange(5000)
    batches, same, other = (Batches(tokens, 16, 4, seed) for seed in (1, 1, 2))
    for step in (300, 0, 77):  # in any order
        np.testing.assert_array_equal(batches.at(step)[0], same.at(step)[0])
        assert (batches.at(step)[0] != other.at(step)[0]).any()
    offsets = {int(batches.at(step)[0].min() % 16) for step in range(0, 3000, 80)}
    assert len(offsets) > 4, "each epoch begins at a place of its own"


def test_step_rng_streams_are_independent() -> None:
    addresses = [(seed, step, stream) for seed in (0, 1) for step in (0, 1) for stream in ("dropout", "sample")]
    draws = {address: step_rng(*address).random() for address in addresses}
    assert len(set(draws.values())) == len(addresses)
    assert all(step_rng(*address).random() == draw for address, draw in draws.items())


def test_random_batches_shrink_to_a_short_split() -> None:
    idx, targets = random_batch(np.arange(5), 16, 3, np.random.default_rng(0))
    assert idx.shape == (3, 4)
    assert (targets == idx + 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@given(num_tokens=st.integers(2, 200), block_size=st.integers(1, 40), batch_size=st.integers(1, 12))
def test_every_token_but_the_first_is_predicted_once(num_tokens: int, block_size: int, batch_size: int) -> None:
    tokens = np.arange(num_tokens)
    windows = list(consecutive_windows(tokens, block_size, batch_size))
    predicted = np.concatenate([targets.ravel() for _, targets in windows])
    np.testing.assert_array_equal(predicted, tokens[1:])
    assert all((targets == idx + 1).all() and idx.shape[1] <= block_size for idx, targets in windows)


@pytest.mark.parametrize("kind", ENGINES)
def test_evaluation_is_the_same_for_every_batch_size(kind: str) -> None:
    engine = make_engine(kind)
    tokens = np.random.default_rng(0).integers(MODEL.vocab_size, size=101)
    losses = [evaluate(engine.loss, tokens, MODEL.block_size, batch_size) for batch_size in (1, 2, 5, 12, 100, None)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-14)


def test_evaluation_weighs_by_tokens() -> None:
    def loss(idx: np.ndarray, targets: np.ndarray) -> float:
        return float(targets.mean())

    tokens = np.arange(12)  # windows of 8 and of 3
    assert evaluate(loss, tokens, 8) == pytest.approx(np.arange(1, 12).mean())
    assert estimate(loss, np.full(30, 4), 8, 2, num_batches=3, seed=0, step=0) == 4


def test_evaluation_asks_for_every_loss_before_it_looks_at_one() -> None:
    """To look at a number on a GPU is to wait for it."""
    events = []

    class OnDevice:
        def __float__(self) -> float:
            events.append("look")
            return 2.0

    def loss(*_: np.ndarray) -> OnDevice:
        events.append("ask")
        return OnDevice()

    assert evaluate(loss, np.zeros(30, int), 8, 1) == 2.0
    assert estimate(loss, np.zeros(30, int), 8, 2, num_batches=3, seed=0, step=0) == 2.0
    assert events == ["ask"] * 4 + ["look"] * 4 + ["ask"] * 3 + ["look"] * 3


def test_an_evaluation_that_is_not_finite_is_no_evaluation() -> None:
    for measure in (evaluate, lambda *rest: estimate(*rest, 1, 0, 0)):
        with pytest.raises(ValueError, match="not finite: the loss in evaluation is nan"):
            measure(lambda *_: math.nan, np.zeros(30, int), 8, 2)


def test_bits_per_char() -> None:
    assert bits_per_char(math.log(2), num_tokens=100, num_chars=100) == pytest.approx(1)
    assert bits_per_char(3 * math.log(2), num_tokens=100, num_chars=300) == pytest.approx(1)


# ---------------------------------------------------------------------------------------------------------------------
# The engines


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ENGINES)
def test_accumulation_equals_the_large_batch(kind: str, optimizer: str) -> None:
    training = dataclasses.replace(TRAINING, optimizer=optimizer)
    rng = np.random.default_rng(5)
    idx, targets = rng.integers(MODEL.vocab_size, size=(2, 7, 8))
    results = {}
    for parts in (1, 2, 3, 7):  # 7 sequences: 4 + 3, 3 + 2 + 2, ...
        engine = make_engine(kind, training=training)
        steps = [engine.train_step(step, split((idx, targets), parts), 1e-2) for step in range(3)]
        results[parts] = (np.array(steps, float), engine.save().weights)
    for parts in (2, 3, 7):
        np.testing.assert_allclose(results[parts][0], results[1][0], rtol=1e-12)
        for name, weight in results[1][1].items():
            np.testing.assert_allclose(results[parts][1][name], weight, rtol=1e-9, atol=1e-12, err_msg=name)


def test_accumulation_drops_what_the_large_batch_drops() -> None:
    model = dataclasses.replace(MODEL, dropout=0.3)
    rng = np.random.default_rng(5)
    idx, targets = rng.integers(MODEL.vocab_size, size=(2, 7, 8))
    losses = [make_engine("numpy", model).train_step(4, split((idx, targets), parts), 1e-2)[0] for parts in (1, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)


@pytest.mark.parametrize("kind", ENGINES)
def test_dropout_is_addressed_by_the_step_and_off_in_evaluation(kind: str) -> None:
    model = dataclasses.replace(MODEL, dropout=0.3)
    batch = np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8))
    losses = [make_engine(kind, model).train_step(step, [tuple(batch)], 0.0)[0] for step in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]
    assert make_engine(kind, model).loss(*batch) == make_engine(kind).loss(*batch)


def test_threads_share_muons_matrices_and_make_the_same_updates() -> None:
    """To the last bit, for any number of threads; 8 matrices here."""
    training = dataclasses.replace(TRAINING, optimizer="muon")
    batch = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))
    grads = make_engine("numpy", training=training).loss_and_grads(0, [batch])[1]
    results = {}
    for threads in (1, 2, 3, 20):
        engine = NumpyEngine(MODEL, training, threads)
        for _ in range(3):
            engine.update(grads, 1e-2)
        results[threads] = engine.save()
    assert len(results[1].m) == len(results[1].weights)
    for threads in (2, 3, 20):
        for part, whole in zip(vars(results[threads]).values(), vars(results[1]).values(), strict=True):
            assert part.keys() == whole.keys()
            assert all(np.array_equal(part[name], whole[name]) for name in whole), f"{threads} threads"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("broken", ["h.1.mlp.c_fc.weight", "wte.weight"])
def test_numbers_that_are_not_finite_stop_before_the_update(kind: str, broken: str, optimizer: str) -> None:
    engine = make_engine(kind, training=dataclasses.replace(TRAINING, optimizer=optimizer))
    batch = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))
    engine.train_step(0, [batch], 1e-3)
    saved = engine.save()
    weights = {name: weight.copy() for name, weight in saved.weights.items()}
    weights[broken].flat[3] = np.inf
    engine.load(dataclasses.replace(saved, weights=weights), 1)
    moments = {name: array.copy() for name, array in engine.save().m.items()}
    with pytest.raises(ValueError, match="finite"):
        engine.train_step(1, [batch], 1e-3)
    after = engine.save()
    assert all((after.weights[name] == weights[name]).all() for name in weights)
    assert all((after.m[name] == moments[name]).all() for name in moments)


@pytest.mark.parametrize("kind", ENGINES)
def test_clipping_off_and_on(kind: str) -> None:
    batch = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))
    norms, moments = [], []
    for clip in (0.0, 0.01):
        engine = make_engine(kind, training=dataclasses.replace(TRAINING, grad_clip=clip))
        norms.append(engine.train_step(0, [batch], 1e-3)[1])
        moments.append(engine.save().m)
    assert norms[0] == norms[1] > 0.01, "the norm is that before clipping"
    total = math.sqrt(sum((m**2).sum() for m in moments[1].values())) / (1 - TRAINING.beta1)
    assert total == pytest.approx(0.01, rel=1e-3)
    assert math.sqrt(sum((m**2).sum() for m in moments[0].values())) / (1 - TRAINING.beta1) == pytest.approx(norms[0])


def test_compile_that_fails_is_given_up(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_compile(model: torch.nn.Module, *, dynamic: bool) -> object:
        assert not dynamic, "a second length would become a variable, which the fused attention refuses"

        def call(*_: object) -> None:
            raise RuntimeError("no compiler\nand a long story")

        return call

    monkeypatch.setattr(torch, "compile", broken_compile)
    engine = runs.make_engine("torch", MODEL, TRAINING, compile=True)
    batch = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))
    losses = [engine.train_step(step, [batch], 1e-2)[0] for step in range(2)]
    assert losses[0] == make_engine("torch").train_step(0, [batch], 1e-2)[0]
    assert capsys.readouterr().err == "torch.compile failed, continuing without it: RuntimeError: no compiler\n"


def test_bfloat16_autocast_keeps_the_weights_float32() -> None:
    engine = make_engine("torch", training=dataclasses.replace(TRAINING, dtype="bfloat16"))
    batch = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))
    loss, _ = engine.train_step(0, [batch], 1e-2)
    exact = make_engine("torch").train_step(0, [batch], 1e-2)[0]
    assert 0 < abs(loss - exact) < 0.05
    assert {weight.dtype for weight in engine.save().weights.values()} == {np.dtype(np.float32)}


def test_bfloat16_is_for_training_and_not_for_evaluation() -> None:
    """The loss reported is the one that sample.py's weights have in either engine."""
    batch = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))
    losses = {
        dtype: float(make_engine("torch", training=dataclasses.replace(TRAINING, dtype=dtype)).loss(*batch))
        for dtype in ("bfloat16", "float32", "float64")
    }
    assert losses["bfloat16"] == losses["float32"]
    assert losses["float32"] == pytest.approx(losses["float64"], rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_200_steps_of_both_engines_are_one_curve(optimizer: str, tmp_path: Path) -> None:
    """The same batches, rates, clipping and evaluations from one seed: float64 losses equal to 1e-9 at every step."""
    text = write_text(tmp_path, 20_000)
    flags = {"dtype": "float64", "max_steps": 200, "decay_steps": 200, "learning_rate": 3e-3, "warmup_steps": 20}
    flags |= {"grad_accum": 2, "eval_interval": 100, "estimate_interval": 50, "optimizer": optimizer}
    for kind in ENGINES:
        assert start(kind, text, tmp_path / kind, **flags) == 0
    of_numpy, of_torch = (measured(tmp_path / kind) for kind in ENGINES)
    assert len(of_numpy) == 200 + 2 + 8
    for a, b in zip(of_numpy, of_torch, strict=True):
        assert abs(a["loss"] - b["loss"]) < 1e-9, f"{a} and {b}"
        assert [a.pop(word) for word in ("split", "protocol")] == [b.pop(word) for word in ("split", "protocol")]
        assert a == pytest.approx(b, rel=1e-7), "the step, and all columns beside the loss"
    assert of_numpy[-1]["loss"] < of_numpy[0]["loss"] - 0.8, "and it learns"


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_are_written_read_and_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with MetricsWriter(path) as metrics:
        for step in range(4):
            metrics.write(step, "train", "batch", 4.0 - step, lr=0.1)
            metrics.write(step + 1, "val", "full", 3.5 - step)
        metrics.sync()
    lines = read_metrics(path)
    assert lines[0] == {"step": 0, "split": "train", "protocol": "batch", "loss": 4.0, "lr": 0.1}
    with open(path, "ab") as file:
        file.write(b'{"step": 4, "spl')  # a power cut
    assert read_metrics(path) == lines
    write_metrics(path, metrics_until(read_metrics(path), 2))
    assert [(line["step"], line["protocol"]) for line in read_metrics(path)] == [
        (0, "batch"),
        (1, "full"),
        (1, "batch"),
        (2, "full"),
    ]


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"3", b"null", b'{"step": 1}', b"\xff", b"[" * 100_000, b'{"step": 1, "split": [], "loss": 1}']
)
def test_a_line_that_is_no_measurement_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"step": 0, "split": "val", "protocol": "full", "loss": 1.0}).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not a measurement"):
        read_metrics(path)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write(0, "val", "full", 1.0)
        whole = path.read_bytes()
        raw = metrics._file

        class FullDisk:
            name, fileno, truncate = str(path), raw.fileno, raw.truncate

            def write(self, line: bytes) -> int:
                return raw.write(line[:10])

            def close(self) -> None:
                raw.close()

        monkeypatch.setattr(metrics, "_file", FullDisk())
        with pytest.raises(OSError, match="No space left"):
            metrics.write(1, "val", "full", 1.0)
    assert path.read_bytes() == whole


def write_lines(path: Path, *metrics: dict) -> Path:
    path.write_text("".join(json.dumps(m) + "\n" for m in metrics))
    return path


@pytest.mark.parametrize("title", ["a title", "runs/$1_and_$2", "$", r"\$x$", "\udcff of other bytes", "{", "\n"])
def test_the_picture_is_drawn_from_whatever_was_measured(
    title: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Whatever the run is called: a $ is no formula."""
    for number, metrics in enumerate(([], [{"step": 0, "split": "train", "protocol": "batch", "loss": 4.0}])):
        path = tmp_path / f"{number}.png"
        draw_losses(path, write_lines(tmp_path / "metrics.jsonl", *metrics), title, {"bigram": 2.5, "entropy": 1.0})
        assert capsys.readouterr().err == ""
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "loss.png").mkdir()
    draw_losses(tmp_path / "loss.png", write_lines(tmp_path / "metrics.jsonl"), "a title", {})
    assert re.fullmatch(r"no loss\.png: IsADirectoryError: .*\n", capsys.readouterr().err)
    (tmp_path / "metrics.jsonl").write_text("garbage\n")
    draw_losses(tmp_path / "new.png", tmp_path / "metrics.jsonl", "a title", {})
    assert re.fullmatch(r"no new\.png: UserError: .*\n", capsys.readouterr().err)


def test_tokenizers_of_a_run_can_be_bpe(tmp_path: Path) -> None:
    text = write_text(tmp_path)
    assert start("numpy", text, tmp_path / "run", tokenizer="bpe", bpe_vocab_size=300, max_steps=2) == 0
    line = measured(tmp_path / "run")[-1]
    val_text = text.read_text()[3600:]
    assert CharTokenizer.from_text(val_text).vocab_size < 300
    assert line["protocol"] == "full"
    assert line["bits_per_char"] < line["loss"] / math.log(2), "a token stands for more than one character"


@pytest.mark.parametrize("kind", ENGINES)
def test_the_end_tells_the_time_of_training_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Without evaluations, and without the first step, which may have to compile."""
    now = 0.0

    def passing(work: Callable, seconds: Iterator[float]) -> Callable:
        def call(*args: object) -> object:
            nonlocal now
            now += next(seconds)
            return work(*args)

        return call

    engine = {"numpy": NumpyEngine, "torch": TorchEngine}[kind]
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(engine, "train_step", passing(engine.train_step, chain([7.0], repeat(0.5))))
    for name in ("evaluate", "estimate", "save_last", "save_tensors"):
        monkeypatch.setattr(loop, name, passing(getattr(loop, name), repeat(100.0)))
    start(kind, write_text(tmp_path), tmp_path / "run")  # 12 updates of 6 sequences of 16 tokens
    said = "12 steps: 5.5 s of training, 192 tokens/s; besides, 7.0 s for the first one"
    assert said in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("at", [70_000, 200_000])
def test_a_text_that_the_tokenizer_does_not_know_is_named_with_the_place(
    at: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In a later piece of either split, counted from the beginning of the text."""
    text, tokenizer = tmp_path / "text.txt", tmp_path / "tokenizer.json"
    save(CharTokenizer.from_text("ab "), tokenizer)
    words = "ab " * 70_000  # more than one piece, each of which ends at a blank
    text.write_text(words[:at] + "z" + words[at:])
    _, error = refused(lambda: start("numpy", text, tmp_path / "run", tokenizer=tokenizer), capsys)
    found = re.search(r"from its character ([\d,]+) on, character 'z' \(U\+007A\) at position (\d+) is not", error)
    assert int(found[1].replace(",", "")) + int(found[2]) == at
    assert error.startswith(f"error: {text} does not suit the tokenizer")

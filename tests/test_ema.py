"""The running average of the weights: what it is, that it is what is evaluated, and what is kept of it."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sample
import training.loop
from numpygpt import GPT, GPTConfig, Params
from tests.runs import ENGINES, measured, resume, start, write_text
from train_numpy import NumpyEngine
from train_torch import DeviceFlags, TorchEngine
from training.config import PRESETS, learning_rate
from training.evaluate import evaluate

EMA = 0.5  # which (1 + t) / (10 + t) reaches at t = 8: before that, the average is in its warm-up
MODEL = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
TRAINING = dataclasses.replace(PRESETS["tiny"].training, dtype="float64", seed=3, ema=EMA)
CPU = DeviceFlags("cpu", compile=False, graph=False, pad_vocab=False)
BATCH = tuple(np.random.default_rng(5).integers(MODEL.vocab_size, size=(2, 4, 8)))


def make_engine(kind: str, ema: float = EMA) -> NumpyEngine | TorchEngine:
    training = dataclasses.replace(TRAINING, ema=ema)
    return NumpyEngine(MODEL, training, threads=1) if kind == "numpy" else TorchEngine(MODEL, training, CPU)


def copy(params: Params) -> Params:
    return {name: array.copy() for name, array in params.items()}


@pytest.mark.parametrize("kind", ENGINES)
def test_the_average_is_the_recursion(kind: str) -> None:
    """average += (1 - d) (weight - average), d = min(ema, (1 + t) / (10 + t)) after t updates; first, the weights."""
    engine = make_engine(kind)
    expected = copy(engine.save()[0])
    for t in range(1, 15):
        engine.train_step(t - 1, [BATCH], 1e-2)
        weights, _, _, count, average = engine.save()
        assert count == t
        d = min(EMA, (1 + t) / (10 + t))
        for name, weight in weights.items():
            expected[name] = d * expected[name] + (1 - d) * weight
            np.testing.assert_allclose(average[name], expected[name], rtol=0, atol=1e-14, err_msg=f"{name}, update {t}")


@pytest.mark.parametrize("kind", ENGINES)
def test_evaluation_is_of_the_average(kind: str) -> None:
    """And training is not: it goes on as it would without one."""
    engine, without = make_engine(kind), make_engine(kind, ema=0.0)
    for step in range(5):
        assert engine.train_step(step, [BATCH], 1e-2) == without.train_step(step, [BATCH], 1e-2)
    weights, _, _, _, average = engine.save()
    of_weights, of_average = (GPT(MODEL, params, dtype=np.float64).forward(*BATCH)[1] for params in (weights, average))
    assert abs(of_weights - of_average) > 0.01
    assert float(engine.loss(*BATCH)) == pytest.approx(of_average, rel=1e-13)
    assert float(without.loss(*BATCH)) == pytest.approx(of_weights, rel=1e-13)
    assert without.save()[4] is None


def test_a_step_that_is_not_finite_leaves_the_average_alone() -> None:
    """On a GPU nobody waits for the numbers: weights and average must stay where they are of themselves."""
    engine = make_engine("torch")
    engine.lazy, engine.gpt.checked = True, False
    for step in range(3):
        engine.train_step(step, [BATCH], 1e-2)
    before = copy(engine.save()[4])
    engine.broken.fill_(2)  # as the step would have noted
    engine.train_step(3, [BATCH], 1e-2)
    after = engine.save()
    assert after[3] == 3
    assert all(np.array_equal(after[4][name], before[name]) for name in before)


# ---------------------------------------------------------------------------------------------------------------------
# Runs; that a resumed one is exact, and that either engine goes on with the other's, stands in test_resume.py


@pytest.fixture(autouse=True)
def no_pictures_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs, and are tested elsewhere."""
    monkeypatch.setattr(training.loop, "draw_losses", lambda *_: None)
    monkeypatch.setattr(sample, "show_sample", lambda *_: None)


@pytest.mark.parametrize("kind", ENGINES)
def test_best_holds_the_average_and_last_both(kind: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert (
        start(kind, write_text(tmp_path), run_dir, ema=0.9, dtype="float64", learning_rate=1e-3, eval_interval=6) == 0
    )
    best, last, moments = (
        load_file(run_dir / file)
        for file in ("best/model.safetensors", "last/model.safetensors", "last/optimizer.safetensors")
    )
    assert json.loads((run_dir / "last" / "state.json").read_text())["best_step"] == 12
    assert all(np.array_equal(best[name], moments[f"ema.{name}"]) for name in last)
    assert any((best[name] != last[name]).any() for name in last)
    config, weights, tokenizer = sample.load_for_sampling(run_dir)
    tokens = tokenizer.encode((tmp_path / "text.txt").read_text()[3600:])
    loss = evaluate(lambda *batch: GPT(config, weights, dtype=np.float64).forward(*batch)[1], tokens, config.block_size)
    assert loss == pytest.approx(measured(run_dir)[-1]["loss"], rel=1e-12), "what sample.py loads is what was measured"


@pytest.mark.parametrize("kind", ENGINES)
def test_an_average_may_begin_and_end_with_a_resumption(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop_at(last: int) -> None:
        def rate_and_event(step: int, config: object) -> float:
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return learning_rate(step, config)

        monkeypatch.setattr(training.loop, "learning_rate", rate_and_event)

    said = "the run kept no average of its weights until now"
    stop_at(3)
    assert start(kind, write_text(tmp_path), tmp_path / "run") == 128 + signal.SIGTERM
    assert said not in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "last" / "model.safetensors")
    stop_at(4)
    assert resume(kind, tmp_path / "run", ema=0.9) == 128 + signal.SIGTERM
    assert said in capsys.readouterr().out
    after = load_file(tmp_path / "run" / "last" / "model.safetensors")
    moments = load_file(tmp_path / "run" / "last" / "optimizer.safetensors")
    for name, weight in weights.items():
        expected = weight + (1 - 6 / 15) * (after[name] - weight)
        np.testing.assert_allclose(moments[f"ema.{name}"], expected, rtol=1e-5, atol=1e-7, err_msg=name)
    stop_at(-1)
    assert resume(kind, tmp_path / "run", ema=0.0) == 0
    assert said not in capsys.readouterr().out
    assert not any(name.startswith("ema.") for name in load_file(tmp_path / "run" / "last" / "optimizer.safetensors"))


def test_runs_begun_before_there_was_an_average_go_on(tmp_path: Path) -> None:
    assert start("numpy", write_text(tmp_path), tmp_path / "run", max_steps=2) == 0
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    assert config["training"].pop("ema") == 0
    path.write_text(json.dumps(config))
    assert resume("numpy", tmp_path / "run", max_steps=4) == 0

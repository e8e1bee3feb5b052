"""A run that is stopped and resumed is the run that was never stopped: the same bits, in either engine."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import sample
import train_numpy
import training.loop
from common.errors import UserError
from numpygpt import split_params
from tests.runs import (
    ENGINES,
    ROOT,
    SMALL,
    arguments,
    content,
    measured,
    refused,
    resume,
    skip_what_is_slow,
    start,
    state,
    write_text,
)
from training.checkpoint import Snapshot, State, load_weights
from training.config import learning_rate
from training.lock import locked
from training.run import read_config
from training.signals import Stopping

STEPS = SMALL["--max-steps"]
EVERYTHING_ON = {"dropout": 0.2, "grad_accum": 4}  # 6 sequences in 4 uneven parts


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(autouse=True)
def no_pictures_and_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_what_is_slow(monkeypatch)


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """at_step(k, event): let something happen while step k is made."""

    def arrange(when: int, event: Callable[[], None]) -> None:
        def learning_rate_and_event(step: int, config: object) -> float:
            if step == when:
                event()
            return learning_rate(step, config)

        monkeypatch.setattr(training.loop, "learning_rate", learning_rate_and_event)

    return arrange


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def crash() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("float64", "adamw"), ("float32", "muon")])
@pytest.mark.parametrize("engine", ENGINES)
def test_stopped_anywhere_and_resumed_is_never_stopped(
    engine: str, dtype: str, optimizer: str, text: Path, tmp_path: Path, at_step: Callable
) -> None:
    """Mid-warm-up (1, 2), at estimates (4, 8) and evaluations (5, 10), in between; and after every step in turn."""
    flags = EVERYTHING_ON | {"dtype": dtype, "optimizer": optimizer}
    assert start(engine, text, tmp_path / "whole", **flags) == 0
    whole = content(tmp_path / "whole")
    assert whole["tensors"].keys() == {"last.safetensors", "best.safetensors"}
    for stop_after in (1, 2, 4, 5, 7, 8, 10, 11):
        run_dir = tmp_path / str(stop_after)
        at_step(stop_after - 1, terminate)
        assert start(engine, text, run_dir, **flags) == 128 + signal.SIGTERM
        assert state(run_dir / "last.safetensors")["step"] == stop_after
        at_step(-1, terminate)
        assert resume(engine, run_dir) == 0
        assert content(run_dir) == whole, f"stopped after {stop_after} steps"

    at_step(0, terminate)
    start(engine, text, tmp_path / "slow", **flags)
    for step in range(1, STEPS):
        at_step(step, terminate)
        assert resume(engine, tmp_path / "slow") == 128 + signal.SIGTERM
    at_step(-1, terminate)
    assert resume(engine, tmp_path / "slow") == 0, "the last evaluation is made up for"
    assert content(tmp_path / "slow") == whole


@pytest.mark.parametrize("crash_at", [0, 3, 9])
def test_a_run_that_crashes_goes_back_to_its_checkpoint(
    crash_at: int, text: Path, tmp_path: Path, at_step: Callable
) -> None:
    """At step 0 and 3 there is none yet: it begins again. At step 9 the one of step 5 counts, and no line doubles."""
    assert start("numpy", text, tmp_path / "whole", **EVERYTHING_ON) == 0
    at_step(crash_at, crash)
    assert start("numpy", text, tmp_path / "run", **EVERYTHING_ON) == 128 + signal.SIGINT
    assert (tmp_path / "run" / "last.safetensors").exists() == (crash_at > 5)
    at_step(-1, crash)
    assert resume("numpy", tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_across_engines_and_back(optimizer: str, text: Path, tmp_path: Path, at_step: Callable) -> None:
    flags = {"dtype": "float64", "grad_accum": 4, "optimizer": optimizer}
    assert start("numpy", text, tmp_path / "whole", **flags) == 0
    for first, second in (ENGINES, ENGINES[::-1]):
        run_dir = tmp_path / first
        at_step(3, terminate)
        assert start(first, text, run_dir, **flags) == 128 + signal.SIGTERM
        at_step(7, terminate)
        assert resume(second, run_dir) == 128 + signal.SIGTERM
        at_step(-1, terminate)
        assert resume(first, run_dir) == 0
        for mine, whole in zip(measured(run_dir), measured(tmp_path / "whole"), strict=True):
            assert abs(mine.pop("loss") - whole.pop("loss")) < 1e-9
            assert [mine.pop(word) for word in ("split", "protocol")] == [
                whole.pop(word) for word in ("split", "protocol")
            ]
            assert mine == pytest.approx(whole, rel=1e-7)
        for file in ("last.safetensors", "best.safetensors"):
            expected = load_file(tmp_path / "whole" / file)
            for name, tensor in load_file(run_dir / file).items():
                np.testing.assert_allclose(tensor, expected[name], rtol=1e-6, atol=1e-11, err_msg=name)
        assert state(run_dir / "last.safetensors")["step"] == STEPS
        engines = [change["engine"] for change in read_config(run_dir).changes]
        assert engines == [[first, second], [second, first]]


def test_a_resumed_run_writes_the_same_sample(
    text: Path, tmp_path: Path, at_step: Callable, capsys: pytest.CaptureFixture
) -> None:
    options = {"prompt": "A", "max_new_tokens": 40, "temperature": 1.0, "top_k": None, "seed": 1, "num_samples": 1}
    texts = []
    for name, stop_after in (("whole", -1), ("stopped", 6)):
        at_step(stop_after, terminate)
        start("numpy", text, tmp_path / name)
        at_step(-1, terminate)
        resume("numpy", tmp_path / name)
        capsys.readouterr()
        sample.write_samples(tmp_path / name, engine="numpy", **options)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


# ---------------------------------------------------------------------------------------------------------------------
# What may change, and what may not


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        skip_what_is_slow(patch)
        assert start("numpy", write_text(folder), folder / "run") == 0
    return folder / "run"


def test_the_moments_in_a_checkpoint_are_those_of_its_optimizer(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Muon's matrices have one, everything else has two; whoever changes config.json by hand is told."""
    assert start("torch", text, tmp_path / "muon", optimizer="muon") == 0
    names = {name for name in load_file(tmp_path / "muon" / "last.safetensors") if name[:2] == "v."}
    without = {f"v.{name}" for name in split_params(load_file(tmp_path / "muon" / "best.safetensors"))[0]}
    assert names.isdisjoint(without)
    assert names | without == {name for name in load_file(finished / "last.safetensors") if name[:2] == "v."}

    shutil.copytree(finished, tmp_path / "adamw")
    for folder, other, fault in (("adamw", "muon", "not of this model"), ("muon", "adamw", "missing")):
        config = tmp_path / folder / "config.json"
        config.write_text(config.read_text().replace(f'"optimizer": "{folder}"', f'"optimizer": "{other}"'))
        line = refused(lambda folder=folder: resume("numpy", tmp_path / folder), capsys)[1]
        assert "v.h.0.attn.c_attn.weight" in line
        assert fault in line


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"n_embd": 32}, "n_embd"),
        ({"n_layer": 3}, "n_layer"),
        ({"n_head": 4}, "n_head"),
        ({"block_size": 8}, "block_size"),
        ({"vocab_size": 500}, "vocab_size"),
        ({"no_bias": ""}, "bias"),
        ({"tokenizer": "bpe"}, "tokenizer"),
        ({"bpe_vocab_size": 300}, "bpe_vocab_size"),
        ({"batch_size": 7}, "batch_size"),
        ({"seed": 2}, "seed"),
        ({"optimizer": "muon"}, "optimizer"),
        ({"dtype": "float64"}, "dtype"),
        ({"data": "verse"}, "verse is not the corpus of"),
        ({"max_steps": STEPS - 1}, f"max_steps must be at least the {STEPS} steps"),
        ({"overwrite": ""}, "overwrite"),
        ({"preset": "tiny"}, "--preset and --resume"),
    ],
)
def test_what_cannot_change_is_refused_by_name(
    flags: dict, named: str, finished: Path, capsys: pytest.CaptureFixture
) -> None:
    before = content(finished), (finished / "config.json").read_bytes()
    assert named in refused(lambda: resume("numpy", finished, **flags), capsys)[1]
    assert before == (content(finished), (finished / "config.json").read_bytes())


def test_what_may_change_is_allowed_and_recorded(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    allowed = {"max_steps": 15, "decay_steps": 15, "learning_rate": 1e-3, "grad_accum": 2, "dropout": 0.1}
    assert resume("numpy", run_dir, **allowed) == 0
    config = read_config(run_dir)
    (change,) = config.changes
    assert change.pop("step") == STEPS
    assert change == {
        "max_steps": [12, 15],
        "decay_steps": [12, 15],
        "learning_rate": [6e-3, 1e-3],
        "grad_accum": [1, 2],
        "dropout": [0.0, 0.1],
    }
    assert (config.training.max_steps, config.model.dropout) == (15, 0.1)
    assert [line["step"] for line in measured(run_dir) if line["protocol"] == "batch"] == list(range(15))
    assert resume("numpy", run_dir) == 0, "and it is the run's configuration from then on"
    assert len(read_config(run_dir).changes) == 1


def test_a_finished_run_can_be_resumed_and_does_nothing(finished: Path) -> None:
    before = content(finished)
    assert resume("numpy", finished) == 0
    assert content(finished) == before


def test_the_corpus_may_move_but_not_change(
    finished: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    moved = tmp_path / "moved.txt"
    shutil.copy(finished.parent / "text.txt", moved)
    assert resume("numpy", run_dir, data=moved) == 0
    moved.rename(tmp_path / "moved again.txt")
    said = refused(lambda: resume("numpy", run_dir), capsys)[1]
    assert f"no file '{moved}'" in said
    assert f"{run_dir} learned from it: if it has moved, say where with --data" in said
    (tmp_path / "moved again.txt").rename(moved)
    moved.write_text(moved.read_text() + " ")
    assert resume("numpy", run_dir) == 1
    assert f"{moved} is not the corpus of {run_dir}" in capsys.readouterr().err


def test_best_is_made_up_for_if_the_crash_came_before_it(text: Path, tmp_path: Path, at_step: Callable) -> None:
    assert start("numpy", text, tmp_path / "run", eval_interval=STEPS) == 0
    before = content(tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").unlink()
    assert resume("numpy", tmp_path / "run") == 0
    assert content(tmp_path / "run") == before


# ---------------------------------------------------------------------------------------------------------------------
# Stopping, locking, going wrong


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_says_how_to_go_on(number: int, text: Path, tmp_path: Path) -> None:
    flags = SMALL | {"--data": text, "--run-dir": tmp_path / "run", "--max-steps": 10**6, "--decay-steps": 10**6}
    flags |= {"--eval-interval": 10**6, "--estimate-interval": 10**6}
    argv = [sys.executable, ROOT / "train_numpy.py", *arguments(flags)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as trainer:
        while not ((lines := tmp_path / "run" / "metrics.jsonl").exists() and lines.stat().st_size > 1000):
            assert trainer.poll() is None
            time.sleep(0.01)
        trainer.send_signal(number)
        printed, errors = trainer.communicate(timeout=60)
    assert trainer.returncode == 128 + number
    assert errors.startswith("\nstopping after this step, and saving; Ctrl-C again stops at once (")
    assert errors.count("\n") == 2
    assert f"python train_numpy.py --resume {tmp_path / 'run'}" in printed
    step = state(tmp_path / "run" / "last.safetensors")["step"]
    assert [line["step"] for line in measured(tmp_path / "run")] == list(range(step))


def test_the_second_signal_leaves_at_once(text: Path, tmp_path: Path, at_step: Callable) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it did not leave")

    at_step(7, twice)
    assert start("numpy", text, tmp_path / "run") == 128 + signal.SIGINT
    at_step(-1, twice)
    assert resume("numpy", tmp_path / "run") == 0
    assert start("numpy", text, tmp_path / "whole") == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_stopping_puts_the_handlers_back() -> None:
    before = [signal.getsignal(number) for number in Stopping.SIGNALS]
    with Stopping() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.signal == signal.SIGTERM
        assert [signal.getsignal(number) for number in Stopping.SIGNALS] == before
    assert [signal.getsignal(number) for number in Stopping.SIGNALS] == before


def test_two_trainers_on_one_run(finished: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    with locked(finished):
        assert resume("numpy", finished) == 1
        error = capsys.readouterr().err
        assert f"{finished} is in use by another trainer (process '{os.getpid()}')" in error
        assert start("numpy", text, finished, overwrite="") == 1
        assert "in use" in capsys.readouterr().err
    assert resume("numpy", finished) == 0


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_that_are_not_finite_keep_the_last_good_checkpoint(
    engine: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A rate of 1e25 ruins the weights at step 7; step 8 notices, before it updates anything."""
    monkeypatch.setattr(
        training.loop, "learning_rate", lambda step, config: 1e25 if step == 7 else learning_rate(step, config)
    )
    assert start(engine, text, tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: stopped after 8 updates: ")
    assert "finite" in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'last.safetensors'}" in error
    assert state(tmp_path / "run" / "last.safetensors")["step"] == 5
    monkeypatch.undo()
    assert load_weights(tmp_path / "run" / "best.safetensors", read_config(tmp_path / "run").model)


def test_numbers_that_are_not_finite_are_never_saved(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save = train_numpy.NumpyEngine.save

    def ruined(engine: train_numpy.NumpyEngine) -> Snapshot:
        if engine.optimizer.t == 10:
            engine.gpt.params["h.0.ln_1.bias"][3] = np.nan
        return save(engine)

    monkeypatch.setattr(train_numpy.NumpyEngine, "save", ruined)
    assert start("numpy", text, tmp_path / "run") == 1
    assert "not finite: h.0.ln_1.bias; the last good checkpoint is" in capsys.readouterr().err
    assert state(tmp_path / "run" / "last.safetensors")["step"] == 5


def test_state_is_checked() -> None:
    good = State(step=3, grad_norm=0.5, best_step=2, best_loss=1.5, seconds=0.1)
    wrong = [("step", -1), ("step", 1.0), ("step", True), ("best_step", 4), ("best_step", None), ("best_loss", -1.0)]
    for field, value in [*wrong, ("best_loss", float("nan")), ("seconds", "1"), ("grad_norm", [])]:
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(good, **{field: value})


def test_a_folder_that_is_no_run_gets_no_lock(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert resume("numpy", tmp_path) == 1
    assert "is not a run" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError):
        read_config(tmp_path)


def test_a_run_of_bfloat16_goes_on_in_numpy(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Its weights are float32."""
    run_dir = tmp_path / "run"
    start("torch", text, run_dir, dtype="bfloat16")
    assert resume("numpy", run_dir, max_steps=14) == 0
    assert "continues in float32 here\n" in capsys.readouterr().err
    config = read_config(run_dir)
    assert config.training.dtype == "float32"
    assert config.changes[0]["dtype"] == ["bfloat16", "float32"]
    assert [line["step"] for line in measured(run_dir) if line["protocol"] == "batch"] == list(range(14))

"""The training loop from outside: what is measured, when it is saved, what a signal or a moved folder does to it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import train_numpy
from common.errors import UserError
from data.tokenizers import load
from numpygpt import GPT
from sample import load_for_sampling
from tests import runs
from tests.runs import ROOT, content, measured, refused, resume, skip_what_is_slow, start, state, write_text
from training import loop
from training.batches import random_batch
from training.checkpoint import load_checkpoint, save_last, save_tensors
from training.config import learning_rate
from training.evaluate import evaluate
from training.lock import Lock, locked
from training.metrics import MetricsWriter, read_metrics
from training.run import load_run, read_config


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_what_is_slow(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that the tests copy, or only read."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        skip_what_is_slow(patch)
        assert start("numpy", text, folder) == 0
    return folder


@contextmanager
def scratch() -> Iterator[tuple[pytest.MonkeyPatch, Path, Path]]:
    """For tests that catch mutants, which take no fixtures: what replaces things, a text, and a folder for a run."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        skip_what_is_slow(patch)
        yield patch, write_text(Path(folder)), Path(folder) / "run"


def everything(folder: Path) -> dict[str, bytes | str]:
    """All names under a folder, with what is in the files; links as where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def copy(run_dir: Path, target: Path) -> Path:
    target.mkdir()
    for path in run_dir.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def at_step(monkeypatch: pytest.MonkeyPatch, when: int, event: Callable[[], object]) -> None:
    """Let something happen while step `when` is made."""

    def learning_rate_and_event(step: int, config: object) -> float:
        if step == when:
            event()
        return learning_rate(step, config)

    monkeypatch.setattr(loop, "learning_rate", learning_rate_and_event)


# ---------------------------------------------------------------------------------------------------------------------
# What is measured


def test_random_windows_reach_both_ends() -> None:
    """A failure: the last tokens of a split are never in an estimate."""
    tokens, rng = np.arange(9), np.random.default_rng(0)
    idx, targets = random_batch(tokens, 4, 500, rng)
    assert set(idx[:, 0]) == {0, 1, 2, 3, 4}
    assert targets.max() == 8


def test_each_estimate_has_random_windows_of_its_own() -> None:
    """A failure: a run is watched through the same few windows, and their luck looks like progress."""
    addresses = []

    def estimate(*args: object) -> float:
        addresses.append(args[-2:])
        return 2.0

    with scratch() as (patch, text, run_dir):
        patch.setattr(loop, "estimate", estimate)
        assert start("numpy", text, run_dir, seed=5) == 0
    assert addresses == [(5, step) for step in (4, 4, 8, 8, 12, 12)]


def test_of_two_equal_losses_the_earlier_stays_best() -> None:
    """More steps for the same loss are no gain; and best.safetensors is not written for nothing."""
    with scratch() as (patch, text, run_dir):
        patch.setattr(loop, "evaluate", lambda *_: 2.0)
        assert start("numpy", text, run_dir) == 0
        assert state(run_dir / "last.safetensors")["best_step"] == 5
        assert state(run_dir / "best.safetensors")["step"] == 5


def test_the_seconds_of_a_run_continue_after_a_resume() -> None:
    with scratch() as (_, text, run_dir):
        assert start("numpy", text, run_dir) == 0
        before = state(run_dir / "last.safetensors")["seconds"]
        assert before > 0
        assert resume("numpy", run_dir, max_steps=14) == 0
        assert state(run_dir / "last.safetensors")["seconds"] > before
        seconds = [line["seconds"] for line in read_metrics(run_dir / "metrics.jsonl")]
        assert seconds == sorted(seconds)


def test_metrics_are_on_the_disk_before_the_checkpoint_that_knows_them() -> None:
    """A failure: after a power cut, measurements are missing that nobody makes again."""
    events = []
    with scratch() as (patch, text, run_dir):
        for owner, name in ((MetricsWriter, "write"), (MetricsWriter, "sync"), (loop, "save_last")):
            real = getattr(owner, name)
            patch.setattr(
                owner, name, lambda *args, real=real, name=name, **rest: events.append(name) or real(*args, **rest)
            )
        assert start("numpy", text, run_dir) == 0
    saves = [number for number, name in enumerate(events) if name == "save_last"]
    assert len(saves) == 3
    assert all(events[number - 1] == "sync" for number in saves)


class FakeTime:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


def test_the_wait_before_the_next_save_follows_from_the_last_one() -> None:
    """Saving costs under 2% of the time, however long one takes."""
    time = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", time)
        clock = loop.Clock(0.0)
        for took in (0.0, 0.1, 3.0):
            with clock.saving():
                time.now += took
            time.now += max(10, 50 * took) - 1e-6
            assert not clock.save_due()
            time.now += 2e-6
            assert clock.save_due()


def test_the_clock_leaves_out_evaluations_and_saves() -> None:
    time = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "time", time)
        clock = loop.Clock(100.0)
        for _ in range(2):
            time.now += 0.5
            clock.step_done()
            with clock.pause():
                time.now += 10
        assert clock.steps == [0.5, 0.5]
        assert clock.steps_per_second() == 2
        time.now += 0.25
        clock.step_done()
        assert clock.steps_per_second() == 4
        assert clock.seconds() == 100 + 2 * 10.5 + 0.25


def test_an_evaluation_may_be_of_the_first_tokens_alone(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    assert start("numpy", text, run_dir, eval_tokens=50, dtype="float64") == 0
    printed = capsys.readouterr().out
    assert "400 to validate on, of which the first 50" in printed
    assert "on the first 50 tokens of the split" in printed
    line = measured(run_dir)[-1]
    assert (line["protocol"], line["eval_tokens"]) == ("full", 50)
    config, weights, _ = load_run(run_dir / "last.safetensors")
    tokens = load(run_dir / "tokenizer.json").encode(text.read_text()[3600:])[:50]
    model = GPT(config, weights)
    expected = evaluate(lambda *batch: model.forward(*batch)[1], tokens, config.block_size)
    assert line["loss"] == pytest.approx(expected, rel=1e-12)
    assert line["bits_per_char"] == pytest.approx(expected / np.log(2), rel=1e-12)
    _, error = refused(lambda: resume("numpy", run_dir, eval_tokens=60), capsys)
    assert "eval_tokens of a run cannot be changed" in error
    assert start("numpy", text, tmp_path / "whole", eval_tokens=10**6, max_steps=1, decay_steps=3) == 0
    assert "eval_tokens" not in measured(tmp_path / "whole")[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Signals


@pytest.mark.parametrize("batch", [0, 2])
def test_a_signal_interrupts_an_evaluation_which_is_made_up_for(
    batch: int, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """And the resumed run is the one that was never stopped, even if the first try to make up for it is stopped too."""
    flags = {"estimate_batches": 0, "max_steps": 5, "decay_steps": 5}
    assert start("numpy", text, tmp_path / "whole", **flags) == 0
    monkeypatch.setattr("training.evaluate.TOKENS_AT_ONCE", 16)  # 25 batches
    loss, asked = train_numpy.NumpyEngine.loss, 0

    def interrupted(engine: train_numpy.NumpyEngine, *rest: np.ndarray) -> float:
        nonlocal asked
        if asked == batch:
            os.kill(os.getpid(), signal.SIGINT)
        asked += 1
        return loss(engine, *rest)

    capfd.readouterr()
    monkeypatch.setattr(train_numpy.NumpyEngine, "loss", interrupted)
    assert start("numpy", text, tmp_path / "run", **flags) == 130
    assert asked == batch + 1, "not a batch more"
    assert "\nstopping after this step, and saving; Ctrl-C again stops at once (nothing was" in capfd.readouterr().err
    saved = state(tmp_path / "run" / "last.safetensors")
    assert (saved["step"], saved["best_step"]) == (5, None)
    asked = 0
    assert resume("numpy", tmp_path / "run") == 130
    assert not (tmp_path / "run" / "best.safetensors").exists()
    monkeypatch.setattr(train_numpy.NumpyEngine, "loss", loss)
    monkeypatch.setattr("training.evaluate.TOKENS_AT_ONCE", 2048)
    assert resume("numpy", tmp_path / "run") == 0
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("program", ["train_numpy.py", "train_torch.py"])
def test_an_interrupt_while_loading_prints_nothing(program: str, tmp_path: Path) -> None:
    """In the first second, NumPy and PyTorch are being imported."""
    marker = tmp_path / "loading"
    for package in ("numpy", "torch"):
        (tmp_path / f"{package}.py").write_text(f"import time\nopen({str(marker)!r}, 'w').close()\ntime.sleep(300)\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    argv = [sys.executable, ROOT / program]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not marker.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_a_run_may_be_trained_outside_the_main_thread(text: Path, tmp_path: Path) -> None:
    """Where no signal arrives, nothing is done about signals."""
    statuses = []
    worker = threading.Thread(target=lambda: statuses.append(start("numpy", text, tmp_path / "run", max_steps=2)))
    worker.start()
    worker.join()
    assert statuses == [0]


# ---------------------------------------------------------------------------------------------------------------------
# Beside a trainer at work, and without its folder


def test_a_run_can_be_read_at_any_moment_of_its_saves(finished: Path, tmp_path: Path) -> None:
    """Many reads against many saves: a reader sees one checkpoint or the other, whole."""
    run_dir = copy(finished, tmp_path / "run")
    config = read_config(run_dir).model
    made = load_checkpoint(run_dir / "last.safetensors", config, np.float32)
    weights = {name: array.copy() for name, array in made.snapshot.weights.items()}
    allowed = {weights["ln_f.weight"].tobytes()}
    done = threading.Event()

    def save_on() -> None:
        for number in range(100):
            weights["ln_f.weight"] = np.full_like(weights["ln_f.weight"], number)
            allowed.add(weights["ln_f.weight"].tobytes())
            save_last(run_dir / "last.safetensors", made.snapshot, made.state, config)
            save_tensors(run_dir / "best.safetensors", weights, made.state, config)
        done.set()

    trainer = threading.Thread(target=save_on)
    trainer.start()
    seen = set()
    while not done.is_set():
        for run in (run_dir, run_dir / "last.safetensors", run_dir / "best.safetensors"):
            found = load_for_sampling(run)[1]["ln_f.weight"].tobytes()
            assert found in allowed
            seen.add(found)
    trainer.join()
    assert len(seen) > 5


@pytest.mark.parametrize("what", ["moved", "deleted", "replaced"])
def test_a_trainer_without_its_folder_stops_and_harms_no_other_run(
    what: str,
    finished: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    run_dir = tmp_path / "run"

    def lose() -> None:
        run_dir.rename(tmp_path / "elsewhere")
        if what == "replaced":
            copy(finished, run_dir)

    at_step(monkeypatch, 7, lose)
    _, error = refused(lambda: start("numpy", text, run_dir), capsys)
    assert f"{run_dir} was moved, deleted or replaced meanwhile" in error
    if what == "replaced":
        assert everything(run_dir) == everything(finished)
    else:
        assert not run_dir.exists(), "it was not made again"


def test_only_the_holder_of_a_lock_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two start in one new folder: the one that made the folder may be the one that loses."""
    folder, holders = tmp_path / "run", []
    mkdir = Path.mkdir

    def and_another_is_quicker(path: Path, *args: object, **options: object) -> None:
        mkdir(path, *args, **options)
        holders.append(Lock(path))

    monkeypatch.setattr(Path, "mkdir", and_another_is_quicker)
    with pytest.raises(UserError, match="in use"), locked(folder):
        pass
    assert holders[0].is_held()
    holders[0].release()
    assert list(folder.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# A resume that is refused changes nothing; nothing is written through a link


REFUSED = {
    "a wrong flag": (lambda run_dir: None, {"n_layer": 3}),
    "too few steps": (lambda run_dir: None, {"max_steps": 3}),
    "another corpus": (lambda run_dir: None, {"data": "verse"}),
    "a damaged tokenizer": (lambda run_dir: (run_dir / "tokenizer.json").write_text("{}"), {}),
    "a damaged checkpoint": (lambda run_dir: (run_dir / "last.safetensors").write_bytes(b"x" * 99), {}),
    "damaged metrics": (lambda run_dir: (run_dir / "metrics.jsonl").write_text("x\n"), {}),
    "no lock yet": (lambda run_dir: (run_dir / "lock").unlink(), {"n_layer": 3}),
    "a file that was not finished": (lambda run_dir: (run_dir / ".config.json.0123abcd.new").touch(), {"n_layer": 3}),
    "a link as lock": (lambda run_dir: link(run_dir / "lock", run_dir.parent / "precious"), {}),
    "a second name of a file as lock": (lambda run_dir: hard_link(run_dir / "lock", run_dir.parent / "digits"), {}),
    "another file as lock": (lambda run_dir: (run_dir / "lock").write_text("my precious"), {}),
    "a pipe as lock": (lambda run_dir: pipe(run_dir / "lock"), {}),
    "a folder as lock": (lambda run_dir: folder(run_dir / "lock"), {}),
    "a pipe as configuration": (lambda run_dir: pipe(run_dir / "config.json"), {}),
    "a pipe as checkpoint": (lambda run_dir: pipe(run_dir / "last.safetensors"), {}),
}


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def hard_link(path: Path, target: Path) -> None:
    path.unlink()
    path.hardlink_to(target)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have a name")
@pytest.mark.parametrize("fault", REFUSED)
def test_a_refused_resume_changes_nothing(
    fault: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_dir = copy(finished, tmp_path / "run")
    (tmp_path / "precious").write_text("my precious")
    (tmp_path / "digits").write_text("12345")
    damage, flags = REFUSED[fault]
    damage(run_dir)
    before = everything(tmp_path), sorted(path.name for path in run_dir.iterdir())
    refused(lambda: resume("numpy", run_dir, **flags), capsys)
    assert before == (everything(tmp_path), sorted(path.name for path in run_dir.iterdir()))


def test_links_in_a_run_are_replaced_and_not_followed(finished: Path, tmp_path: Path) -> None:
    run_dir = copy(finished, tmp_path / "run")
    for name in ("config.json", "metrics.jsonl", "last.safetensors", "best.safetensors"):
        (run_dir / name).rename(tmp_path / name)
        (run_dir / name).symlink_to(tmp_path / name)
    (run_dir / "loss.png").symlink_to(tmp_path / "config.json")
    before = {name: content for name, content in everything(tmp_path).items() if "/" not in name}
    assert resume("numpy", run_dir, max_steps=15) == 0
    after = everything(tmp_path)
    assert all(after[name] == old for name, old in before.items())
    assert state(run_dir / "last.safetensors")["step"] == 15


def test_metrics_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("my precious")
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is a symbolic link, which is not followed"):
        MetricsWriter(tmp_path / "metrics.jsonl")
    assert (tmp_path / "precious").read_text() == "my precious"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes that have a name")
def test_what_was_not_finished_is_deleted_whatever_it_is(finished: Path, tmp_path: Path) -> None:
    run_dir = copy(finished, tmp_path / "run")
    names = [f".last.safetensors.0123abc{number}.new" for number in range(4)]
    os.mkfifo(run_dir / names[0])
    (run_dir / names[1]).symlink_to(tmp_path / "run" / "config.json")
    (run_dir / names[2]).write_bytes(b"half")
    (run_dir / names[3]).mkdir()  # nobody's work of ours: it stays
    (run_dir / ".mine.new").touch()
    assert resume("numpy", run_dir, max_steps=13) == 0
    left = {path.name for path in run_dir.iterdir() if path.name.startswith(".")}
    assert left == {names[3], ".mine.new"}


# ---------------------------------------------------------------------------------------------------------------------
# Configurations


@pytest.mark.parametrize("engine", runs.ENGINES)
def test_numbers_of_another_type_are_brought_to_theirs(
    engine: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """beta1 as an integer would reach PyTorch, and fail there."""
    run_dir = copy(finished, tmp_path / "run")
    text = (run_dir / "config.json").read_text()
    changed = re.sub(r'("(beta1|grad_clip|weight_decay)"): [\d.]+', r"\1: 0", text)
    changed = changed.replace('"dropout": 0.0', '"dropout": 0')
    assert changed.count(": 0,") >= 4
    (run_dir / "config.json").write_text(changed)
    assert resume(engine, run_dir, max_steps=13) == 0, capsys.readouterr().err
    assert type(read_config(run_dir).training.beta1) is float


def test_a_model_that_no_machine_trains_is_refused_at_once(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for flags, said in (
        ({"n_layer": 10**6}, "n_layer must be"),
        ({"n_layer": 4000, "n_embd": 2**18}, "no machine trains"),
        ({"vocab_size": 2**45}, "no machine trains"),
    ):
        assert start("numpy", text, tmp_path / "run", **flags) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""The training loop, one for both engines: learning rate, batch, step, log, evaluate, save; and again.

An engine is a model with its optimizer: train_numpy.py and train_torch.py each define one. Everything that decides
which numbers come out, apart from the arithmetic itself, is decided here.
"""

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self, SupportsFloat

import numpy as np
from tqdm import tqdm

from common.errors import UserError, printable
from training.batches import Batch, gather, split
from training.checkpoint import Snapshot, State, save_last, save_tensors
from training.config import estimate_due, eval_due, learning_rate
from training.evaluate import bits_per_char, estimate, evaluate
from training.metrics import MetricsWriter, draw_losses
from training.run import BEST, LAST, METRICS, PICTURE, Run
from training.signals import Stopping

SAVE_SECONDS = 10  # of training are lost in a crash; more, if saving takes long:
SAVE_RATIO = 50  # times what the last save took must pass before the next, so that saving costs under 2%


class Engine:
    """A model with its optimizer. What an engine does not say is that of one process, and NumPy's."""

    is_main = True  # among several processes that train one model together, the one that measures, reports and saves
    eval_batch_size: int | None = None  # sequences that `loss` is best given at once; None: `evaluate` chooses

    def gather(self, tokens: np.ndarray, starts: np.ndarray, T: int) -> Batch:
        """idx, targets (B, T) from tokens (n,) at starts (B,), in the engine's own kind of array."""
        return gather(tokens, starts, T)

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[SupportsFloat, SupportsFloat]:
        """Learn from one batch -> its mean loss in nats, and the gradient's global norm before clipping.

        micro_batches: the batch in parts; the update is that of the whole. Dropout is addressed by the step. If the
        loss or a gradient is NaN or infinite, no weight is touched any more: either this raises ValueError at once, or,
        where reading a number means waiting for a device, `check` does later.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError if a step so far was not finite and nobody said so."""

    def sync_stop(self, signal: int | None) -> int | None:
        """The signal that asks this process to stop, or another one that trains with it."""
        return signal

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> SupportsFloat:
        """idx, targets (B, T) -> mean loss in nats, without dropout, in the precision of the weights."""
        raise NotImplementedError

    def num_params(self) -> int:
        raise NotImplementedError

    def save(self) -> Snapshot:
        """Weights and moments as they are now. The arrays may be the engine's own: they are read before it goes on."""
        raise NotImplementedError

    def load(self, snapshot: Snapshot, step: int) -> None:
        """Continue from what `save` returned after `step` updates, in either engine. The arrays are copied."""
        raise NotImplementedError


def train(engine: Engine, run: Run) -> int | None:
    """Train until max_steps are made, or until a signal asks to stop -> that signal, or None.

    A signal lets the step finish, and saves. Raises UserError if the numbers stop being finite; what was saved before,
    stays.
    """
    config, batches = run.training, run.batches
    if run.checkpoint is not None:
        engine.load(run.checkpoint.snapshot, run.checkpoint.state.step)
    if engine.is_main:
        print_header(engine, run)

    notice = (lambda: stop_notice(run)) if engine.is_main else None
    with Stopping(notice) as stopping, Recorder(engine, run, stopping) as record, translate_errors(record):
        stop = record.missed_evaluation() if run.missed_evaluation else None
        while record.state.step < config.max_steps and not stop:
            step = record.state.step
            lr = learning_rate(step, config)
            batch = engine.gather(batches.tokens, batches.starts(step), batches.block_size)
            loss, grad_norm = engine.train_step(step, split(batch, config.grad_accum), lr)
            record.log_update(loss, grad_norm, lr)

            if estimate_due(step + 1, config):
                record.log_estimates()
            if evaluating := eval_due(step + 1, config):
                record.evaluate_and_log()

            stop = engine.sync_stop(stopping.signal)
            if evaluating or stop or record.clock.save_due():
                record.save()

    if engine.is_main:
        print_summary(run, record)
    return None if record.is_finished() else stop


class Clock:
    """What took how long: training, without evaluations and saving; and when to save next."""

    def __init__(self, seconds: float) -> None:
        """seconds: that the run took before it was resumed"""
        now = time.perf_counter()
        self.began = now - seconds
        self.step_began = self.last_log = now
        self.save_at = now + SAVE_SECONDS
        self.steps: list[float] = []  # seconds of each update
        self.steps_since_log = 0

    def step_done(self) -> None:
        now = time.perf_counter()
        self.steps.append(now - self.step_began)
        self.steps_since_log += 1
        self.step_began = now

    def steps_per_second(self) -> float:
        """Since this was last asked for, or since the pause that came after that."""
        now = time.perf_counter()
        speed = self.steps_since_log / (now - self.last_log)
        self.steps_since_log, self.last_log = 0, now
        return speed

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not training."""
        began = time.perf_counter()
        yield
        took = time.perf_counter() - began
        self.step_began += took
        self.last_log += took

    @contextmanager
    def saving(self) -> Iterator[None]:
        began = time.perf_counter()
        with self.pause():
            yield
        now = time.perf_counter()
        self.save_at = now + max(SAVE_SECONDS, SAVE_RATIO * (now - began))

    def save_due(self) -> bool:
        return time.perf_counter() > self.save_at

    def seconds(self) -> float:
        """That the run has taken so far, stops not counted."""
        return time.perf_counter() - self.began


class EvaluationStoppedError(Exception):
    """A signal came in the middle of an evaluation."""


class Recorder:
    """What a run measures and keeps: state, metrics, progress bar, checkpoints.

    Of several processes only the main one writes, prints and evaluates; the others count the steps.
    """

    def __init__(self, engine: Engine, run: Run, stopping: Stopping) -> None:
        self.engine, self.run, self.stopping = engine, run, stopping
        self.state = run.checkpoint.state if run.checkpoint else State()
        self.clock = Clock(self.state.seconds)
        self.lr = 0.0  # of the last update
        self.grad_norm: SupportsFloat = self.state.grad_norm or 0.0  # of its gradient
        self.evaluated = not run.missed_evaluation  # unless a signal has interrupted the last one that was due

    def __enter__(self) -> Self:
        self.hidden = None if self.engine.is_main else True  # None: wherever there is no terminal
        steps = self.run.training.max_steps
        self.bar = tqdm(total=steps, initial=self.state.step, unit="step", disable=self.hidden, dynamic_ncols=True)
        self.metrics = MetricsWriter(self.run.folder / METRICS) if self.engine.is_main else None
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.bar.close()
        if self.metrics is not None:
            self.metrics.close()

    def log_update(self, loss: SupportsFloat, grad_norm: SupportsFloat, lr: float) -> None:
        """Count an update; write a line about its batch, if one is due."""
        step, config = self.state.step, self.run.training
        log = step % config.log_interval == 0
        if log or estimate_due(step + 1, config) or eval_due(step + 1, config):
            self.engine.check()  # a device works on as long as nobody reads its numbers
            loss, grad_norm = float(loss), float(grad_norm)
        self.lr, self.grad_norm = lr, grad_norm
        self.clock.step_done()
        self.bar.update()
        if log and self.metrics is not None:
            speed = self.clock.steps_per_second() * config.batch_size * self.run.model.block_size
            self.write("train", "batch", float(loss), tokens_per_s=speed)
            self.bar.set_postfix_str(f"loss {float(loss):.3f}, {speed:,.0f} tokens/s", refresh=False)
        self.state = replace(self.state, step=step + 1)

    def log_estimates(self) -> None:
        """Estimate the loss on both splits, quickly."""
        if not self.engine.is_main:
            return
        run, config, report = self.run, self.run.training, []
        with self.clock.pause():
            for name, tokens in (("train", run.batches.tokens), ("val", run.val_tokens)):
                sizes = (run.model.block_size, config.batch_size, config.estimate_batches)
                loss = estimate(self.engine.loss, tokens, *sizes, config.seed, self.state.step)
                self.write(name, "estimate", loss)
                report.append(f"{name} {loss:.4f}")
            self.say(f"step {self.state.step:>6}: {', '.join(report)} (estimates)")

    def evaluate_and_log(self) -> None:
        """Measure the loss on the validation split, and see whether it is the best so far. A signal interrupts it."""
        if not self.engine.is_main:
            return
        run, self.evaluated = self.run, False
        with self.clock.pause():
            try:
                loss = evaluate(
                    self.engine.loss, run.eval_tokens, run.model.block_size, self.engine.eval_batch_size, self.watch
                )
            except EvaluationStoppedError:
                return
            bits = bits_per_char(loss, len(run.eval_tokens) - 1, run.eval_chars)
            capped = {} if len(run.eval_tokens) == len(run.val_tokens) else {"eval_tokens": len(run.eval_tokens)}
            self.write("val", "full", loss, bits_per_char=bits, **capped)
            self.say(f"step {self.state.step:>6}: val {loss:.4f} on {extent(run)}, {bits:.4f} bits per character")
        self.evaluated = True
        if self.state.best_loss is None or loss < self.state.best_loss:  # of two equal ones the earlier stays
            self.state = replace(self.state, best_step=self.state.step, best_loss=loss)

    def watch(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation, with a progress bar. Raises EvaluationStoppedError once a signal has come."""
        for batch in tqdm(batches, desc="evaluating", unit="batch", disable=self.hidden, leave=False, delay=1):
            if self.stopping.signal is not None:
                raise EvaluationStoppedError
            yield batch

    def missed_evaluation(self) -> int | None:
        """Make up for the evaluation that a signal interrupted -> the signal that interrupts this one, if one does."""
        self.lr = learning_rate(self.state.step - 1, self.run.training)
        self.evaluate_and_log()
        stop = self.engine.sync_stop(self.stopping.signal)
        self.save()
        return stop

    def save(self) -> None:
        """Write last.safetensors, then best.safetensors if this is it: a resumed run makes up for a missing best."""
        self.engine.check()
        if self.metrics is None or self.run.lock is None:
            return
        self.run.lock.check()
        with self.clock.saving():
            self.metrics.sync()  # the lines up to a checkpoint are on the disk before it is
            snapshot = self.engine.save()
            state = replace(self.state, grad_norm=float(self.grad_norm), seconds=self.clock.seconds())
            save_last(self.run.folder / LAST, snapshot, state, self.run.model)
            if state.best_step == state.step:
                save_tensors(self.run.folder / BEST, snapshot.weights, state, self.run.model)

    def is_finished(self) -> bool:
        """Are all steps made, and evaluated?"""
        return self.evaluated and self.state.step >= self.run.training.max_steps

    def write(self, split: str, protocol: str, loss: float, **others: float) -> None:
        """One line of metrics.jsonl."""
        tokens = self.state.step * self.run.training.batch_size * self.run.model.block_size
        update = {"lr": self.lr, "grad_norm": float(self.grad_norm)}
        assert self.metrics is not None
        times = {"tokens": tokens, "seconds": self.clock.seconds()}
        self.metrics.write(self.state.step, split, protocol, loss, **update, **times, **others)

    def say(self, line: str) -> None:
        """Print a line above the progress bar."""
        with self.bar.external_write_mode():
            print(line, flush=True)


@contextmanager
def translate_errors(record: Recorder) -> Iterator[None]:
    """Turn what ends a training run into a UserError that says what is saved."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:  # what the engines raise when a number is not finite
        raise UserError(f"stopped after {record.state.step} updates: {error}; {what_is_saved(record.run)}") from error
    except OSError as error:  # the disk is full, or gone
        fault = error.strerror or error
        message = f"could not write after {record.state.step} updates: {fault}; {what_is_saved(record.run)}"
        raise UserError(message) from error


def what_is_saved(run: Run) -> str:
    """Where to resume from, for messages."""
    last = run.folder / LAST
    return f"the last good checkpoint is {last}" if last.exists() else "nothing was saved yet"


def stop_notice(run: Run) -> str:
    return f"stopping after this step, and saving; Ctrl-C again stops at once ({what_is_saved(run)})"


def extent(run: Run) -> str:
    """What an evaluation is of."""
    whole = len(run.eval_tokens) == len(run.val_tokens)
    return "the whole split" if whole else f"the first {len(run.eval_tokens):,} tokens of the split"


def print_header(engine: Engine, run: Run) -> None:
    """What is about to happen."""
    model, config, used = run.model, run.training, run.tokenizer.vocab_size
    step = run.checkpoint.state.step if run.checkpoint else 0
    tokenizer = printable(config.tokenizer)
    print(
        f"{run.engine} engine, {config.dtype}, {engine.num_params():,} parameters: {model.n_layer} layers, "
        f"{model.n_head} heads, {model.n_embd} channels, block {model.block_size}, vocabulary {model.vocab_size}"
        + (f", of which the tokenizer {tokenizer} uses {used}" if used < model.vocab_size else "")
    )
    capped = f", of which the first {len(run.eval_tokens):,}" if len(run.eval_tokens) < len(run.val_tokens) else ""
    print(
        f"{printable(str(config.data))}: {len(run.batches.tokens):,} tokens to learn from, {len(run.val_tokens):,} to "
        f"validate on{capped}"
    )
    print("to beat: " + ", ".join(f"{name} {loss:.4f}" for name, loss in run.baselines.items()) + " nats per token")
    print(f"{'resuming' if step else 'keeping the run'} in {run.folder}, step {step} of {config.max_steps}")


def print_summary(run: Run, record: Recorder) -> None:
    """loss.png, and what came out."""
    state, steps = record.state, record.clock.steps
    title = f"{run.folder.name}: {run.engine}, {run.training.data}"
    if run.lock is not None:
        run.lock.check()
    draw_losses(run.folder / PICTURE, run.folder / METRICS, title, run.baselines)
    if state.best_loss is not None:
        of = extent(run).removeprefix("the ")
        bits = bits_per_char(state.best_loss, len(run.eval_tokens) - 1, run.eval_chars)
        print(
            f"best validation loss, {of}: {state.best_loss:.4f} nats per token, {bits:.4f} bits per "
            f"character, at step {state.best_step} of {state.step}"
        )
    if len(steps) > 1:
        first, others = steps[0], math.fsum(steps[1:])  # the first one compiles, records, allocates
        speed = (len(steps) - 1) * run.training.batch_size * run.model.block_size / others
        print(
            f"{len(steps):,} steps: {others:.1f} s of training, {speed:,.0f} tokens/s; "
            f"besides, {first:.1f} s for the first one"
        )
    if not record.is_finished():
        print(f"stopped at step {state.step} and saved; resume with:")
        print(f"    python train_{run.engine}.py --resume {shlex.quote(str(run.folder))}")

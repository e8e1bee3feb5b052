"""The training loop, one for both engines: learning rate, step, log, evaluate, save; and again.

An engine is a model with its optimizer: train_numpy.py and train_torch.py each define one. Everything that decides
which numbers come out, apart from the arithmetic itself, is decided here.
"""

import dataclasses
import math
import shlex
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol, SupportsFloat

import numpy as np

from common.errors import UserError
from numpygpt import Params
from training.batches import Batch, split
from training.checkpoint import Checkpoint, State, locate, save_checkpoints
from training.config import learning_rate
from training.evaluate import bits_per_char, estimate, evaluate
from training.metrics import MetricsWriter, draw_losses, read_metrics
from training.run import METRICS, PICTURE, Run
from training.stopping import Stopping

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["Engine", "train"]

SAVE_SECONDS = 10  # of training are lost in a crash; more, if saving takes long:
SAVE_RATIO = 50  # times what the last save took must pass before the next, so that saving costs under 2%


class Engine(Protocol):
    """What the loop asks of a model and its optimizer."""

    leader: bool  # among several processes that train one model together, the one that measures, reports and saves
    eval_batch_size: int | None  # sequences that `loss` likes to have at once; None: what `evaluate` thinks fit

    def windows(self, tokens: np.ndarray, starts: np.ndarray, T: int) -> Batch:
        """idx, targets (B, T) from tokens (n,) at starts (B,), wherever the engine likes to have them."""
        ...

    def train_step(self, step: int, micro_batches: Sequence[Batch], lr: float) -> tuple[SupportsFloat, SupportsFloat]:
        """Learn from one batch -> its mean loss in nats, and the gradient's global norm before clipping.

        micro_batches: the batch in parts; the update is that of the whole. Dropout is addressed by the step. If the
        loss or a gradient is NaN or infinite, no weight is touched any more: either this raises ValueError at once, or,
        where looking at a number means to wait for a device, `check` does later.
        """
        ...

    def check(self) -> None:
        """Raises ValueError if a step so far was not finite."""
        ...

    def agree(self, stop: int | None) -> int | None:
        """The signal that asks this process to stop, or another one that trains with it."""
        ...

    def loss(self, idx: np.ndarray, targets: np.ndarray) -> SupportsFloat:
        """idx, targets (B, T) -> mean loss in nats, without dropout, in the precision of the weights."""
        ...

    def num_params(self) -> int: ...

    def save(self) -> tuple[Params, Params, Params, int]:
        """Weights, AdamW's moments m and v, and its count of steps t."""
        ...

    def load(self, weights: Params, m: Params, v: Params, t: int) -> None:
        """What `save` returned, in either engine."""
        ...


def train(engine: Engine, run: Run) -> int | None:
    """Train until max_steps are made, or until a signal asks to stop -> that signal, or None.

    A signal lets the step finish, and saves. Raises UserError if the numbers stop being finite; what was saved before,
    stays.
    """
    from tqdm import tqdm  # here: it takes longer to load than --help may take

    config, tokens_per_step = run.training, run.training.batch_size * run.model.block_size
    state = State(step=0, t=0, best_step=None, best_loss=None, seconds=0.0, engine=run.engine)
    if run.checkpoint is not None:
        state = dataclasses.replace(run.checkpoint.state, engine=run.engine)
        engine.load(run.checkpoint.weights, run.checkpoint.m, run.checkpoint.v, state.t)
    run.batches.read = engine.windows
    if engine.leader:
        introduce(engine, run, state)

    quiet = None if engine.leader else True  # None: wherever there is no terminal
    with (
        MetricsWriter(run.folder / METRICS) if engine.leader else nullcontext() as metrics,
        tqdm(total=config.max_steps, initial=state.step, unit="step", disable=quiet, dynamic_ncols=True) as bar,
        Stopping() as stopping,
    ):
        stop, began = None, time.perf_counter() - state.seconds
        spans = []  # seconds of each update, without evaluations and saving
        timed_step, timed_at = state.step, time.perf_counter()
        save_at = time.perf_counter() + SAVE_SECONDS
        try:
            for step in range(state.step, config.max_steps):
                started = time.perf_counter()
                lr = learning_rate(step, config)
                micro_batches = split(run.batches.at(step), config.grad_accum)
                loss, grad_norm = engine.train_step(step, micro_batches, lr)
                state = dataclasses.replace(state, step=step + 1)
                stop = engine.agree(stopping.signal)

                log = step % config.log_interval == 0
                look = config.estimate_batches > 0 and state.step % config.estimate_interval == 0
                due = state.step % config.eval_interval == 0 or state.step == config.max_steps
                if log or look or due or stop:
                    engine.check()  # a device works on as long as nobody looks at its numbers
                    loss, grad_norm = float(loss), float(grad_norm)
                now = time.perf_counter()
                spans.append(now - started)
                state = dataclasses.replace(state, seconds=now - began)
                bar.update()
                if not engine.leader:
                    if stop:
                        break
                    continue

                if log:
                    speed = (step + 1 - timed_step) * tokens_per_step / (now - timed_at)
                    timed_step, timed_at = step + 1, now
                    times = {"tokens": step * tokens_per_step, "seconds": now - began, "tokens_per_s": speed}
                    metrics.write(step, "train", "batch", loss, lr=lr, grad_norm=grad_norm, **times)
                    bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
                update = {"lr": lr, "grad_norm": grad_norm}
                if look:
                    watch(engine, run, state, update, metrics, bar)
                if due:
                    state = measure(engine, run, state, update, metrics, bar)
                if due or stop or now > save_at:
                    save_began = time.perf_counter()
                    engine.check()
                    save(engine, run, state, metrics)
                    now = time.perf_counter()
                    save_at = now + max(SAVE_SECONDS, SAVE_RATIO * (now - save_began))
                    timed_step, timed_at = state.step, now  # the speed is that of training
                if stop:
                    break
        except UserError:
            raise
        except ValueError as error:  # what the engines raise when a number is not finite
            raise UserError(f"stopped after {state.step} updates: {error}; {what_is_saved(run)}") from error
        except OSError as error:  # the disk is full, or gone
            fault = error.strerror or error
            raise UserError(f"could not write after {state.step} updates: {fault}; {what_is_saved(run)}") from error

    if engine.leader:
        conclude(run, state, spans)
    return stop if state.step < config.max_steps else None


def watch(
    engine: Engine, run: Run, state: State, update: dict[str, float], metrics: MetricsWriter, bar: "tqdm"
) -> None:
    """Estimate the loss on both splits, quickly. update: the rate and the gradient's norm of the last one."""
    config = run.training
    report = []
    for name, tokens in (("train", run.batches.tokens), ("val", run.val_tokens)):
        sizes = (run.model.block_size, config.batch_size, config.estimate_batches)
        loss = estimate(engine.loss, tokens, *sizes, config.seed, state.step)
        metrics.write(state.step, name, "estimate", loss, **update, **so_far(run, state))
        report.append(f"{name} {loss:.4f}")
    say(bar, f"step {state.step:>6}: {', '.join(report)} (estimates)")


def measure(
    engine: Engine, run: Run, state: State, update: dict[str, float], metrics: MetricsWriter, bar: "tqdm"
) -> State:
    """Measure the loss on the whole validation split -> the state, with the best so far. update: as for `watch`."""
    loss = evaluate(engine.loss, run.val_tokens, run.model.block_size, engine.eval_batch_size)
    bits = bits_per_char(loss, len(run.val_tokens) - 1, run.val_chars)
    metrics.write(state.step, "val", "full", loss, bits_per_char=bits, **update, **so_far(run, state))
    say(bar, f"step {state.step:>6}: val {loss:.4f} on the whole split, {bits:.4f} bits per character")
    if state.best_loss is None or loss < state.best_loss:
        state = dataclasses.replace(state, best_step=state.step, best_loss=loss)
    return state


def so_far(run: Run, state: State) -> dict[str, float]:
    """What every evaluation says about the way up to it."""
    return {"tokens": state.step * run.training.batch_size * run.model.block_size, "seconds": state.seconds}


def say(bar: "tqdm", line: str) -> None:
    """Print a line above the progress bar."""
    with bar.external_write_mode():
        print(line, flush=True)


def save(engine: Engine, run: Run, state: State, metrics: MetricsWriter) -> None:
    """last/, and best/ if this is it. In this order: a run that is resumed makes up for a best/ that is missing."""
    metrics.sync()  # the lines up to a checkpoint are on the disk before it is
    weights, m, v, t = engine.save()
    checkpoint = Checkpoint(weights, m, v, dataclasses.replace(state, t=t))
    names = ["last", "best"] if state.best_step == state.step else ["last"]
    save_checkpoints(run.folder, names, checkpoint, run.model)


def introduce(engine: Engine, run: Run, state: State) -> None:
    """What is about to happen."""
    model, config, used = run.model, run.training, run.tokenizer.vocab_size
    print(
        f"{run.engine} engine, {config.dtype}, {engine.num_params():,} parameters: {model.n_layer} layers, "
        f"{model.n_head} heads, {model.n_embd} channels, block {model.block_size}, vocabulary {model.vocab_size}"
        + (f", of which the tokenizer {config.tokenizer} uses {used}" if used < model.vocab_size else "")
    )
    print(f"{config.data}: {len(run.batches.tokens):,} tokens to learn from, {len(run.val_tokens):,} to validate on")
    print("to beat: " + ", ".join(f"{name} {loss:.4f}" for name, loss in run.yardsticks.items()) + " nats per token")
    print(f"{'going on' if state.step else 'keeping the run'} in {run.folder}, step {state.step} of {config.max_steps}")


def conclude(run: Run, state: State, spans: Sequence[float]) -> None:
    """loss.png, and what came out. spans: the seconds of each update that was made."""
    title = f"{run.folder.name}: {run.engine}, {run.training.data}"
    draw_losses(run.folder / PICTURE, read_metrics(run.folder / METRICS), title, run.yardsticks)
    if state.best_loss is not None:
        bits = bits_per_char(state.best_loss, len(run.val_tokens) - 1, run.val_chars)
        print(
            f"best validation loss, whole split: {state.best_loss:.4f} nats per token, {bits:.4f} bits per character, "
            f"at step {state.best_step} of {state.step}"
        )
    if len(spans) > 1:
        first, others = spans[0], math.fsum(spans[1:])  # the first one compiles, records, allocates
        speed = (len(spans) - 1) * run.training.batch_size * run.model.block_size / others
        print(
            f"{len(spans):,} steps: {others:.1f} s of training, {speed:,.0f} tokens/s; "
            f"besides, {first:.1f} s for the first one"
        )
    if state.step < run.training.max_steps:
        print(f"stopped at step {state.step} and saved; go on with:")
        print(f"    python train_{run.engine}.py --resume {shlex.quote(str(run.folder))}")


def what_is_saved(run: Run) -> str:
    """For whoever has to go back."""
    last = locate(run.folder, "last")
    return "nothing was saved yet" if last is None else f"the last good checkpoint is {last}"

"""How fast does train_torch.py train on a GPU, how soon does it reach nanoGPT's loss, and how far below it does it get?

    python -m bench.gpu                          the tables of docs/benchmarks.md, on one CUDA GPU
    python -m bench.gpu --presets full           one preset only
    python -m bench.gpu --seeds 0                without the whole training runs
    python -m bench.gpu --device cpu --presets tiny --seeds 0    the same program where there is no GPU: a smoke test

A step is one update of the preset's batch. "plain loop, compiled" is what most people write: batches gathered on the
host and copied from pinned memory, autocast, torch.compile of the model, fused AdamW, the loss read back every ten
steps; "plain loop, eager" is the same without torch.compile. The others are train_torch.py's own engine with its flags.
Each contender takes turns with the compiled plain loop, in one process, round after round; a ratio is the median over
the rounds of the ratio within each. A contender that fails, or has to do without what its name says, has no numbers.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import torch

from common.cli import parse, run_program
from common.errors import UserError
from data.corpus import Corpus, load_corpus
from data.tokenizers import CharTokenizer
from numpygpt import GPTConfig
from torchgpt import GPT, decay_groups
from train_torch import TorchEngine
from training.batches import Batches
from training.config import PRESETS, TrainConfig, learning_rate
from training.evaluate import evaluate
from training.flops import training_flops_per_token
from training.torch_device import DeviceFlags, first_line

# Dense bfloat16 matrix rate in FLOP/s, without sparsity, from the vendor's data sheets.
PEAKS = {
    "NVIDIA H200": 989e12,  # H200 Tensor Core GPU datasheet, SXM
    "NVIDIA H100 80GB HBM3": 989e12,  # H100 Tensor Core GPU datasheet, SXM
    "NVIDIA A100-SXM4-80GB": 312e12,  # A100 Tensor Core GPU datasheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,  # L4 Tensor Core GPU datasheet
}
NANOGPT_LOSS = 1.4697  # what nanoGPT reports for the full model, as a random-batch estimate
HEADER = """
| | ms/step | tokens/s | times the compiled plain loop's (quartiles) | memory, MB | MFU | first 3 steps, s |
|---|---|---|---|---|---|---|"""
RECIPE_HEADER = f"""
| seed | s of training to {NANOGPT_LOSS} | at step | s in all | first step, s | best loss | at step |
|---|---|---|---|---|---|---|"""
Maker = Callable[[], Callable[[int], None]]  # -> a function that makes n updates

MICRO_BATCH = {"gpt2": 8}  # sequences at once, where the preset's batch is far larger than a step here needs to be


@dataclass(frozen=True)
class Options:
    """Measure training on a GPU."""

    presets: tuple[Literal["tiny", "small", "full", "gpt2"], ...] = ("full", "gpt2")  # which to measure
    device: Literal["cuda", "cpu"] = "cuda"  # cpu only to see that the program runs
    rounds: int = 5  # turns that each contender takes with the compiled plain loop
    steps: int = 20  # updates of either in a turn
    seeds: int = 3  # how often to train the full model by its recipe too, each time from another seed

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        for name, least in {"rounds": 1, "steps": 1, "seeds": 0}.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each a function that makes n updates


def engine_updates(
    model: GPTConfig, training: TrainConfig, flags: DeviceFlags, tokens: np.ndarray
) -> Callable[[int], None]:
    """train_torch.py's engine. Raises UserError if it had to do without any of its flags."""
    engine = TorchEngine(model, training, flags)
    batches = Batches(tokens, model.block_size, training.batch_size, 1)
    done = 0

    def update(n: int) -> None:
        nonlocal done
        for step in range(done, done + n):
            batch = engine.gather(tokens, batches.starts(step), model.block_size)
            loss, _ = engine.train_step(step, [batch], learning_rate(step, training))
            if step % 10 == 0:
                loss.item()
        loss.item()  # wait for all of it
        done += n
        check_flags(engine, flags)

    return update


def check_flags(engine: TorchEngine, flags: DeviceFlags) -> None:
    """Raises UserError if the engine had to do without torch.compile: then its speed is another's."""
    if engine.flags != flags:
        raise UserError("it continued without torch.compile")


def plain_updates(
    model: GPTConfig, training: TrainConfig, device: str, tokens: np.ndarray, *, compiled: bool
) -> Callable[[int], None]:
    """The plain loop. As in nanoGPT, a large vocabulary is padded."""
    gpt = GPT(model, pad_vocab_to=64 if model.vocab_size > 1000 else 1, checked=False).to(device).train()
    forward = torch.compile(gpt, dynamic=False) if compiled else gpt
    optimizer = torch.optim.AdamW(decay_groups(gpt.parameters(), 0.1), betas=(0.9, 0.99), fused=True)
    batches, done = Batches(tokens, model.block_size, training.batch_size, 1), 0

    def send(ids: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(ids))
        return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor

    def update(n: int) -> None:
        nonlocal done
        for step in range(done, done + n):
            idx, targets = map(send, batches.at(step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            with torch.autocast(device, dtype=torch.bfloat16):
                _, loss = forward(idx, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                loss.item()
        loss.item()  # wait for all of it
        if device == "cuda":
            torch.cuda.synchronize()
        done += n

    return update


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def prepare(preset: str, corpus: Corpus) -> tuple[GPTConfig, TrainConfig, np.ndarray]:
    """Model, recipe and tokens; for gpt2 random tokens, since speed does not depend on which they are."""
    training = replace(PRESETS[preset].training, grad_accum=1)
    if preset == "gpt2":
        training = replace(training, batch_size=MICRO_BATCH[preset])
        return PRESETS[preset].model.gpt_config(50257), training, np.random.default_rng(0).integers(50257, size=10**6)
    tokenizer = CharTokenizer.from_text(corpus.text)
    return PRESETS[preset].model.gpt_config(tokenizer.vocab_size), training, tokenizer.encode(corpus.train_text)


def contenders(
    preset: str, model: GPTConfig, training: TrainConfig, device: Literal["cuda", "cpu"], tokens: np.ndarray
) -> dict[str, Maker]:
    """What makes each, by name."""
    cuda = device == "cuda"
    eager = DeviceFlags(device, pad_vocab=cuda)
    modes = {"eager": eager, "compiled": replace(eager, compile=True)}
    if cuda:
        modes["captured"] = replace(eager, compile=True, graph=True)
    makers: dict[str, Maker] = {
        f"plain loop, {mode}, bfloat16": partial(
            plain_updates, model, training, device, tokens, compiled=mode == "compiled"
        )
        for mode in ("compiled", "eager")
    }
    for mode, flags in modes.items():
        for dtype in ("float32", "bfloat16"):
            makers[f"{mode}, {dtype}"] = partial(engine_updates, model, replace(training, dtype=dtype), flags, tokens)
    return makers


def measure(preset: str, options: Options, corpus: Corpus) -> None:
    """Print the rows of all contenders of a preset, below HEADER."""
    torch._dynamo.reset()  # another model's shapes would make this one's variable
    model, training, tokens = prepare(preset, corpus)
    cuda = options.device == "cuda"
    peak = PEAKS.get(torch.cuda.get_device_name()) if cuda else None
    tokens_per_step = training.batch_size * model.block_size
    plain = None
    for name, make in contenders(preset, model, training, options.device, tokens).items():  # the plain loop first
        update = None
        gc.collect()  # a recorded engine is a cycle: its memory would count as the next one's
        try:
            before, start = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            update = make()
            update(3)  # compiles, records, allocates
            first = time.perf_counter() - start
            memory = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}" if cuda else "not measured"
            plain = plain or update
            turns = [(timed(plain, options.steps), timed(update, options.steps)) for _ in range(options.rounds)]
        except (RuntimeError, UserError) as error:
            if plain is None:
                raise UserError(f"{name}, with which the others are compared, failed: {first_line(error)}") from error
            print(f"| {preset}: {name} | failed: {first_line(error)} | | | | | |", flush=True)
            continue
        typical = statistics.median(seconds for _, seconds in turns)
        low, middle, high = np.percentile([base / seconds for base, seconds in turns], (25, 50, 75))
        gain = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        mfu = (
            f"{training_flops_per_token(model) * tokens_per_step / typical / peak:.0%}"
            if peak and "bfloat16" in name
            else ""
        )
        print(
            f"| {preset}: {name} | {typical * 1e3:.2f} | {tokens_per_step / typical:,.0f} | {gain} | {memory} | {mfu} "
            f"| {first:.0f} |",
            flush=True,
        )


def timed(update: Callable[[int], None], steps: int) -> float:
    """Seconds a step."""
    start = time.perf_counter()
    update(steps)
    return (time.perf_counter() - start) / steps


@dataclass
class Outcome:
    """What came of one training run. Seconds are of training alone, without evaluations and without the first step."""

    seconds: float  # all of it
    first: float  # the first step, which compiles and records
    best_loss: float  # over the steps at which train_torch.py evaluates
    best_step: int
    reached: tuple[float, int] | None  # the seconds and the step at which NANOGPT_LOSS was, if ever


def train_recipe(options: Options, corpus: Corpus) -> None:
    """Train the full model by its recipe from several seeds, and print a table of what came of each, and the mean."""
    recipe = prepare("full", corpus)[1]
    print(RECIPE_HEADER, flush=True)
    best_losses = []
    for seed in range(recipe.seed, recipe.seed + options.seeds):
        run = train_once(seed, options, corpus)
        reached = "not reached | " if run.reached is None else "{:.1f} | {:,}".format(*run.reached)
        cells = f"{run.seconds:.1f} | {run.first:.0f} | {run.best_loss:.4f} | {run.best_step:,}"
        print(f"| {seed} | {reached} | {cells} |", flush=True)
        best_losses.append(run.best_loss)
    print(
        f"| mean (range) | | | | | {statistics.mean(best_losses):.4f} "
        f"({min(best_losses):.4f} to {max(best_losses):.4f}) | |"
    )


def train_once(seed: int, options: Options, corpus: Corpus, look_every: int = 50) -> Outcome:
    """One training run by the recipe of the full model, evaluated on the whole validation split.

    Raises UserError if the engine had to do without what a GPU has, ValueError if the loss is no longer finite.
    """
    torch._dynamo.reset()
    gc.collect()
    model, training, tokens = prepare("full", corpus)
    training = replace(training, dtype="bfloat16", seed=seed)
    val_tokens = CharTokenizer.from_text(corpus.text).encode(corpus.val_text)
    cuda = options.device == "cuda"
    flags = DeviceFlags(options.device, compile=cuda, pad_vocab=cuda)
    start = time.perf_counter()
    engine = TorchEngine(model, training, flags)
    batches = Batches(tokens, model.block_size, training.batch_size, seed)

    def update(step: int) -> torch.Tensor:
        batch = engine.gather(tokens, batches.starts(step), model.block_size)
        return engine.train_step(step, [batch], learning_rate(step, training))[0]

    update(0).item()  # wait for all of it
    check_flags(engine, flags)
    run = Outcome(0.0, time.perf_counter() - start, math.inf, 0, None)
    intervals = (look_every, training.eval_interval, training.max_steps)
    looks = sorted({step for every in intervals for step in range(every, training.max_steps + 1, every)} | {1})
    for last, step in pairwise(looks):
        began = time.perf_counter()
        for done in range(last, step):
            batch_loss = update(done)
        batch_loss.item()
        run.seconds += time.perf_counter() - began
        engine.check()
        loss = evaluate(engine.loss, val_tokens, model.block_size, engine.eval_batch_size)
        if run.reached is None and loss <= NANOGPT_LOSS:
            run.reached = run.seconds, step
        if loss < run.best_loss and (step % training.eval_interval == 0 or step == training.max_steps):
            run.best_loss, run.best_step = loss, step
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m bench.gpu", argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA GPU here, so nothing to measure; --device cpu shows that the program runs")
    corpus = load_corpus("shakespeare_char")
    torch.set_float32_matmul_precision("high")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}")
    print(HEADER, flush=True)
    for preset in options.presets:
        measure(preset, options, corpus)
    if options.seeds > 0:
        train_recipe(options, corpus)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

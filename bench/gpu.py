"""How fast does train_torch.py train on a GPU, and how soon does it reach nanoGPT's loss?

    python bench/gpu.py                          the tables of docs/benchmarks.md, on one CUDA GPU
    python bench/gpu.py --presets full           one preset only
    python bench/gpu.py --no-to-loss             without the whole training run
    python bench/gpu.py --device cpu --presets tiny --no-to-loss    the same program where there is no GPU: a smoke test

A step is one update of the preset's batch. All contenders run in one process, in turn, round after round; a ratio is
the median over the rounds of the ratio within each. "plain loop" is what most people write: batches gathered on the
host and copied from pinned memory, autocast, torch.compile of the model, fused AdamW, the loss read back every ten
steps. The others are train_torch.py's own engine with its flags.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.corpus import load_corpus
from data.tokenizers import CharTokenizer
from numpygpt import GPTConfig
from torchgpt import GPT
from train_torch import DeviceFlags, TorchEngine, flops_per_token
from training.batches import Batches
from training.command import parse, run_program
from training.config import PRESETS, TrainConfig, learning_rate
from training.evaluate import evaluate

# Dense bfloat16 matrix rate in FLOP/s, without sparsity, from the vendor's data sheets.
PEAKS = {
    "NVIDIA H200": 989e12,  # H200 Tensor Core GPU datasheet, SXM
    "NVIDIA H100 80GB HBM3": 989e12,  # H100 Tensor Core GPU datasheet, SXM
    "NVIDIA A100-SXM4-80GB": 312e12,  # A100 Tensor Core GPU datasheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,  # L4 Tensor Core GPU datasheet
}
NANOGPT_LOSS = 1.4697  # what nanoGPT reports for the full model, as a random-batch estimate
MICRO_BATCH = {"gpt2": 8}  # sequences at once, where the preset's batch is far larger than a step here needs to be


@dataclass(frozen=True)
class Options:
    """Measure training on a GPU."""

    presets: tuple[Literal["tiny", "small", "full", "gpt2"], ...] = ("full", "gpt2")  # which to measure
    device: Literal["cuda", "cpu"] = "cuda"  # cpu only to see that the program runs
    rounds: int = 5  # rounds, each of which runs every contender once
    steps: int = 20  # updates of each contender in a round
    to_loss: bool = True  # also train the full model until its whole-split validation loss is nanoGPT's


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each a function that makes n updates


def engine_updates(
    model: GPTConfig, training: TrainConfig, flags: DeviceFlags, tokens: np.ndarray
) -> Callable[[int], None]:
    engine = TorchEngine(model, training, flags)
    batches = Batches(tokens, model.block_size, training.batch_size, 1)
    batches.read = engine.windows
    done = 0

    def update(n: int) -> None:
        nonlocal done
        for step in range(done, done + n):
            loss, _ = engine.train_step(step, [batches.at(step)], learning_rate(step, training))
        loss.item()  # wait for all of it
        done += n

    return update


def plain_updates(model: GPTConfig, training: TrainConfig, device: str, tokens: np.ndarray) -> Callable[[int], None]:
    gpt = torch.compile(GPT(model).to(device).train())
    decayed = [p for p in gpt.parameters() if p.ndim >= 2]
    groups = [{"params": decayed}, {"params": [p for p in gpt.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    batches, done = Batches(tokens, model.block_size, training.batch_size, 1), 0

    def send(ids: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(np.ascontiguousarray(ids))
        return ids.pin_memory().to(device, non_blocking=True) if device == "cuda" else ids

    def update(n: int) -> None:
        nonlocal done
        for step in range(done, done + n):
            idx, targets = map(send, batches.at(step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, training)
            with torch.autocast(device, dtype=torch.bfloat16):
                _, loss = gpt(idx, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), training.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if step % 10 == 0:
                loss.item()
        if device == "cuda":
            torch.cuda.synchronize()
        done += n

    return update


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def prepare(preset: str) -> tuple[GPTConfig, TrainConfig, np.ndarray]:
    """Model, recipe and tokens; for gpt2 random tokens, since speed does not depend on which they are."""
    training = replace(PRESETS[preset].training, grad_accum=1)
    if preset == "gpt2":
        training = replace(training, batch_size=MICRO_BATCH[preset])
        return PRESETS[preset].model.gpt_config(50257), training, np.random.default_rng(0).integers(50257, size=10**6)
    corpus = load_corpus()
    tokenizer = CharTokenizer.from_text(corpus.text)
    return PRESETS[preset].model.gpt_config(tokenizer.vocab_size), training, tokenizer.encode(corpus.train_text)


def measure(preset: str, options: Options) -> None:
    """Print a table: tokens/s, ms/step, memory and MFU of every contender."""
    model, training, tokens = prepare(preset)
    device, cuda = options.device, options.device == "cuda"
    eager = DeviceFlags(device, compile=False, graph=False, pad_vocab=cuda)
    float32, bfloat16 = replace(training, dtype="float32"), replace(training, dtype="bfloat16")
    makers = {
        "plain loop, bfloat16": lambda: plain_updates(model, training, device, tokens),
        "eager, float32": lambda: engine_updates(model, float32, eager, tokens),
        "eager, bfloat16": lambda: engine_updates(model, bfloat16, eager, tokens),
        "compiled, float32": lambda: engine_updates(model, float32, replace(eager, compile=True), tokens),
        "compiled, bfloat16": lambda: engine_updates(model, bfloat16, replace(eager, compile=True), tokens),
    }
    if cuda:
        captured = replace(eager, compile=True, graph=True)
        makers["captured, float32"] = lambda: engine_updates(model, float32, captured, tokens)
        makers["captured, bfloat16"] = lambda: engine_updates(model, bfloat16, captured, tokens)

    updates, memory, first = {}, {}, {}
    for name, make in makers.items():
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated() if cuda else 0, time.perf_counter()
        updates[name] = make()
        updates[name](3)  # compiles, records, allocates
        first[name] = time.perf_counter() - start
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20 if cuda else float("nan")
    times: dict[str, list[float]] = {name: [] for name in updates}
    for _ in range(options.rounds):
        for name, update in updates.items():
            start = time.perf_counter()
            update(options.steps)
            times[name].append((time.perf_counter() - start) / options.steps)

    peak = PEAKS.get(torch.cuda.get_device_name()) if cuda else None
    tokens_per_step = training.batch_size * model.block_size
    print(f"\n### {preset}: {tokens_per_step:,} tokens a step\n")
    print("| | ms/step | tokens/s | times the plain loop's (quartiles) | memory, MB | MFU | first 3 steps, s |")
    print("|---|---|---|---|---|---|---|")
    base = np.array(times["plain loop, bfloat16"])
    for name, values in times.items():
        typical = statistics.median(values)
        low, middle, high = np.percentile(base / np.array(values), (25, 50, 75))
        gain = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        mfu = f"{flops_per_token(model) * tokens_per_step / typical / peak:.0%}" if peak else "peak unknown"
        print(
            f"| {name} | {typical * 1e3:.2f} | {tokens_per_step / typical:,.0f} | {gain} "
            f"| {memory[name]:.0f} | {mfu} | {first[name]:.0f} |"
        )


def seconds_to_loss(options: Options, every: int = 50) -> None:
    """Train the full model by its recipe until its whole-split loss is NANOGPT_LOSS; evaluations are not timed."""
    model, training, tokens = prepare("full")
    corpus = load_corpus()
    val_tokens = CharTokenizer.from_text(corpus.text).encode(corpus.val_text)
    cuda = options.device == "cuda"
    training = replace(training, dtype="bfloat16")
    start = time.perf_counter()
    engine = TorchEngine(model, training, DeviceFlags(options.device, compile=cuda, graph=cuda, pad_vocab=cuda))
    batches = Batches(tokens, model.block_size, training.batch_size, training.seed)
    batches.read = engine.windows
    spent, warm = 0.0, None
    for step in range(training.max_steps):
        began = time.perf_counter()
        loss, _ = engine.train_step(step, [batches.at(step)], learning_rate(step, training))
        if warm is None:
            loss.item()
            warm = time.perf_counter() - start
            continue
        if (step + 1) % every == 0:
            loss.item()
        spent += time.perf_counter() - began
        if (step + 1) % every == 0 and (
            loss := evaluate(engine.loss, val_tokens, model.block_size, 128)
        ) <= NANOGPT_LOSS:
            print(f"\n{loss:.4f} on the whole validation split after {step + 1} steps and {spent:.1f} s of training,")
            print(f"besides {warm:.0f} s to compile, record and make the first step.")
            return
    print(f"\n{NANOGPT_LOSS} was not reached in {training.max_steps} steps: {loss:.4f}")


def main() -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "bench/gpu.py", None)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: no CUDA GPU here: nothing to measure", file=sys.stderr)
        return 1
    torch.set_float32_matmul_precision("high")
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}")
    for preset in options.presets:
        measure(preset, options)
    if options.to_loss:
        seconds_to_loss(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

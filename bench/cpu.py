"""How fast is plain NumPy? Measures training steps and generation of both engines on this machine's CPU.

    python -m bench.cpu                     training steps of small and full, and generation: docs/benchmarks.md
    python -m bench.cpu --preset small      one of them only
    python -m bench.cpu --preset gpt2       GPT-2 124M writing, beside torchgpt and transformers: docs/ecosystem.md
    python -m bench.cpu --profile           where the NumPy step's time goes, operation by operation

A step is forward, backward, clipping and AdamW in float32, on random tokens. All contenders run in one process with
the same number of threads, in turn, round after round; a ratio is the median over the rounds of the ratio within each,
so that what disturbs the machine disturbs all of them. The floor is the step's matrix products alone, as NumPy's BLAS
computes them: no program on this BLAS can be faster.

A turn is a few steps in a row, as in training. The first is not counted: it pays for what the contender before left in
the caches, and for its threads that still spin for more work. Of the others, the mean counts.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Literal

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
from tqdm import tqdm

import numpygpt
from bench.timing import alternate, blas_threads, high_water, ratio, seconds
from common.cli import parse, run_program
from common.cores import usable_cores
from training.parallel import loss_and_grads_in_parts, tune_process

# Vocabulary and sizes of the presets, without dropout: torch's eager attention leaves its fast path when it drops.
PRESETS = {
    "small": (numpygpt.GPTConfig(65, 64, n_layer=4, n_head=4, n_embd=128, dropout=0.0), 12),
    "full": (numpygpt.GPTConfig(65, 256, n_layer=6, n_head=6, n_embd=384, dropout=0.0), 8),
}
STEPS = {"small": 5, "full": 1}  # that count, in a turn
LR, MAX_NORM = 1e-3, 1.0


@dataclass(frozen=True)
class Options:
    """Measure both engines on this CPU."""

    preset: Literal["small", "full", "gpt2"] | None = None
    """what to measure; by default training with small and full, and generation with full"""
    rounds: int = 15
    """rounds, each of which runs every contender once"""
    threads: int = field(default_factory=usable_cores)
    """threads for every contender"""
    compile: bool = True
    """also measure training with torch.compile, which first compiles for up to a minute a preset"""
    profile: bool = False
    """measure nothing but the NumPy step of small or full, operation by operation"""

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        for name in ("rounds", "threads"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.profile and self.preset == "gpt2":
            raise ValueError("profile is of a training step, and preset gpt2 only writes: choose small or full")


def random_batch(config: numpygpt.GPTConfig, B: int) -> tuple[np.ndarray, np.ndarray]:
    """idx, targets (B, block_size)."""
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, config.vocab_size, (2, B, config.block_size)))


# ---------------------------------------------------------------------------------------------------------------------
# The contenders: each a function that returns a function that runs one step


def numpy_step(config: numpygpt.GPTConfig, B: int, threads: int) -> Callable[[], None]:
    idx, targets = random_batch(config, B)
    tune_process(threads)
    model = numpygpt.GPT(config)
    optimizer = numpygpt.AdamW(model.params)

    def step() -> None:
        _, grads = loss_and_grads_in_parts(model, idx, targets, threads=threads)
        numpygpt.clip_grad_norm(grads, MAX_NORM)
        optimizer.step(grads, LR)

    return step


def torch_step(config: numpygpt.GPTConfig, B: int, threads: int, compiled: bool = False) -> Callable[[], None]:
    import torch

    import torchgpt

    torch.set_num_threads(threads)
    idx, targets = map(torch.from_numpy, random_batch(config, B))
    model = torchgpt.GPT(config)
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(torchgpt.decay_groups(params, 0.1), lr=LR, betas=(0.9, 0.99), fused=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        _, loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def products(config: numpygpt.GPTConfig, B: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of both factors of every matrix product in one step of B sequences, forward and backward."""
    T, C, nh = config.block_size, config.n_embd, config.n_head
    rows, hs = B * T, C // nh
    layers = [(C, 3 * C), (C, C), (C, 4 * C), (4 * C, C)] * config.n_layer + [(C, config.vocab_size)]
    for n_in, n_out in layers:
        yield (rows, n_in), (n_in, n_out)  # out
        yield (rows, n_out), (n_out, n_in)  # dx
        yield (n_out, rows), (rows, n_in)  # dweight
    for queries, keys in config.n_layer * list(numpygpt.causal_tiles(T, T)):
        q, k = queries.stop - queries.start, keys.stop
        for _ in "att", "ddropped":
            yield (B, nh, q, hs), (B, nh, hs, k)
        for _ in "heads", "dq":
            yield (B, nh, q, k), (B, nh, k, hs)
        for _ in "dk", "dv":
            yield (B, nh, k, q), (B, nh, q, hs)


def flops(config: numpygpt.GPTConfig, B: int) -> int:
    """Floating-point operations of a step's matrix products."""
    return sum(2 * int(np.prod(a)) * b[-1] for a, b in products(config, B))


def floor_step(config: numpygpt.GPTConfig, B: int, threads: int) -> Callable[[], None]:
    """The matrix products alone, cut among the threads like the model's, on arrays that exist already."""
    rng = np.random.default_rng(0)

    def prepare(size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        arrays: dict[tuple, np.ndarray] = {}

        def array(role: str, shape: tuple[int, ...]) -> np.ndarray:
            return arrays.setdefault((role, shape), rng.standard_normal(shape, dtype=np.float32))

        return [(array("a", a), array("b", b), array("out", (*a[:-1], b[-1]))) for a, b in products(config, size)]

    parts = [prepare(B * (i + 1) // threads - B * i // threads) for i in range(threads)]

    def run(part: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        for a, b, out in part:
            np.matmul(a, b, out=out)

    def step() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(run, parts))

    return step


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def peak_memory(engine: str, config: numpygpt.GPTConfig, B: int, threads: int, steps: int = 5) -> float:
    """MB that `steps` steps add to the process at their peak: weights, gradients, moments, activations."""
    if engine == "torch":
        import torchgpt  # noqa: F401  what importing takes is not the step's
    before = high_water()
    step = (numpy_step if engine == "numpy" else torch_step)(config, B, threads)
    with blas_threads(1):
        for _ in range(steps):
            step()
    return high_water() - before


def measure_steps(preset: str, options: Options) -> None:
    config, B = PRESETS[preset]
    tokens, threads = B * config.block_size, options.threads
    contenders = {
        "NumPy": numpy_step(config, B, threads),
        "torchgpt, eager": torch_step(config, B, threads),
        "BLAS floor": floor_step(config, B, threads),
    }
    if options.compile:
        contenders["torchgpt, compiled"] = torch_step(config, B, threads, compiled=True)
    with blas_threads(1):  # the contenders on NumPy bring their own threads
        times = alternate(contenders, options.rounds, STEPS[preset], uncounted=1)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each
        memory = {
            name: pool.apply(peak_memory, (engine, config, B, threads))
            for name, engine in (("NumPy", "numpy"), ("torchgpt, eager", "torch"))
        }

    print(f"\n### {preset}: {config.n_layer} layers, {config.n_embd} channels, T {config.block_size}, B {B}\n")
    print("| | ms/step | tokens/s | NumPy's speed relative to it: median (quartiles) | peak memory, MB |")
    print("|---|---|---|---|---|")
    for name, values in times.items():
        typical = statistics.median(values)
        used = f"{memory[name]:.0f}" if name in memory else ""
        print(f"| {name} | {typical * 1e3:.1f} | {tokens / typical:,.0f} | {ratio(values, times['NumPy'])} | {used} |")
    rate = flops(config, B) / statistics.median(times["BLAS floor"]) / 1e9
    print(f"\nThe step's matrix products: {flops(config, B) / 1e9:.1f} GFLOP, at {rate:.0f} GFLOP/s in the floor.")


def measure_generation(options: Options) -> None:
    """Tokens/s of the full model, batch 1: within the window with and without key/value cache, and past it."""
    import torch

    import torchgpt

    torch.set_num_threads(options.threads)
    tune_process(threads=1)
    config = PRESETS["full"][0]
    T = config.block_size
    by_numpy, by_torch = numpygpt.GPT(config), torchgpt.GPT(config).eval()
    start, full = np.zeros((1, 1), np.int64), np.zeros((1, T), np.int64)
    # Without a cache, each token of a text that grows from 1 to T - 1 costs a whole forward pass; every 16th is run.
    sample = range(1, T, 16)

    def rng() -> np.random.Generator:
        return np.random.default_rng(0)

    @torch.no_grad()
    def torch_uncached() -> None:
        for length in sample:
            by_torch(torch.from_numpy(full[:, :length]))

    contenders: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "within the window": (
            lambda: by_numpy.generate(start, T - 1, rng=rng()),
            lambda: by_torch.generate(torch.from_numpy(start), T - 1, rng=rng()),
            T - 1,
        ),
        "within the window, no cache": (
            lambda: [by_numpy.forward(full[:, :length]) for length in sample],
            torch_uncached,
            len(sample),
        ),
        "past the window": (
            lambda: by_numpy.generate(full, 8, rng=rng()),
            lambda: by_torch.generate(torch.from_numpy(full), 8, rng=rng()),
            8,
        ),
    }
    flat = {(name, 0): ours for name, (ours, _, _) in contenders.items()}
    flat |= {(name, 1): theirs for name, (_, theirs, _) in contenders.items()}
    with blas_threads(options.threads):
        times = alternate(flat, options.rounds)

    print("\n### generation: the full model, batch 1\n")
    print("| | NumPy, tokens/s | torchgpt, tokens/s | NumPy's speed relative to it: median (quartiles) |")
    print("|---|---|---|---|")
    for name, (_, _, tokens) in contenders.items():
        ours, theirs = times[name, 0], times[name, 1]
        speeds = f"{tokens / statistics.median(ours):,.0f} | {tokens / statistics.median(theirs):,.0f}"
        print(f"| {name} | {speeds} | {ratio(theirs, ours)} |")
    cached, uncached = contenders["within the window"][2], len(sample)
    for i, engine in enumerate(("NumPy", "torchgpt")):
        per_token = times["within the window", i] / cached, times["within the window, no cache", i] / uncached
        print(f"\nThe cache makes {engine} {ratio(per_token[1], per_token[0])} times as fast within the window.")


def profile(preset: str, threads: int, steps: int = 30) -> None:
    """Print the milliseconds of one thread's part of a step by operation: its own time, the minimum over the steps.

    And beside their sum what a step of the whole batch takes, whose parts wait for each other and for Python's lock.
    """
    config, B = PRESETS[preset]
    whole = numpy_step(config, B, threads)
    B = max(1, B // threads)
    idx, targets = random_batch(config, B)
    spent: dict[str, float] = {}
    children: list[float] = [0.0]

    def timed(name: str, function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            children.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            total = time.perf_counter() - start
            spent[name] = spent.get(name, 0.0) + total - children.pop()
            children[-1] += total
            return result

        return wrapper

    names = [name for name in vars(numpygpt) if name.endswith(("_forward", "_backward"))]
    originals = {name: getattr(numpygpt, name) for name in [*names, "clip_grad_norm"]}
    model = numpygpt.GPT(config)
    optimizer = numpygpt.AdamW(model.params)
    best: dict[str, float] = defaultdict(lambda: float("inf"))
    try:
        for name, function in originals.items():
            setattr(numpygpt, name, timed(name, function))
        with blas_threads(1):
            for _ in tqdm(range(steps), desc=preset, leave=False, disable=None):
                spent.clear()
                _, grads = timed("everything else", model.loss_and_grads)(idx, targets)
                numpygpt.clip_grad_norm(grads, MAX_NORM)
                timed("AdamW.step", optimizer.step)(grads, LR)
                for name, value in spent.items():
                    best[name] = min(best[name], value)
            floor = min(seconds(floor_step(config, B, 1)) for _ in range(steps))
    finally:
        for name, function in originals.items():
            setattr(numpygpt, name, function)
    with blas_threads(1):
        together = min(seconds(whole) for _ in range(steps))

    total = sum(best.values())
    print(f"\n### {preset}: one thread's part of a step, B {B}\n\n| operation | ms | share |\n|---|---|---|")
    for name, value in sorted(best.items(), key=lambda item: -item[1]):
        print(f"| {name} | {value * 1e3:.2f} | {value / total:.1%} |")
    print(f"| all of it | {total * 1e3:.2f} | 100% |")
    print(f"| the matrix products alone | {floor * 1e3:.2f} | {floor / total:.1%} |")
    print(f"| the whole step, {threads} such parts side by side | {together * 1e3:.2f} | {together / total:.1%} |")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m bench.cpu", argv)
    if not options.profile:
        high_water()  # where it cannot be told, better now than when all else is measured
    print(f"NumPy {np.__version__}, {options.threads} threads, {options.rounds} rounds")
    if options.preset == "gpt2":
        from bench.gpt2 import measure_gpt2  # here: it needs transformers, and this module's functions

        measure_gpt2(options.rounds, options.threads)
        return 0
    for preset in PRESETS if options.preset is None else [options.preset]:
        if options.profile:
            profile(preset, options.threads)
        else:
            measure_steps(preset, options)
    if not options.profile and options.preset != "small":
        measure_generation(options)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

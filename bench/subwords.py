"""Characters or subwords? Trains the same model with several tokenizers: the tables and the plot of docs/tokenizers.md.

    python -m bench.subwords                       characters, and byte-pair encodings of 512, 1,024 and 4,096 tokens
    python -m bench.subwords --engine torch        the same with PyTorch, on the CPU too
    python -m bench.subwords --preset tiny --max-chars 20000 --vocab-sizes 512 --run-dir /tmp/look --out /tmp/look.png

The last one is a quick look, in a minute. Its runs have a folder of their own.

What is equal: the layers, the recipe, and the characters of training text that are learned from, so that longer tokens
mean fewer steps. What follows from the tokenizer: the vocabulary, so the number of embedding parameters, and how many
characters a window of block_size tokens spans. Losses per token cannot be compared across tokenizers. What counts is
bits per character on the whole validation split.

The runs are kept under --run-dir, and each is an ordinary run: sample.py reads it. One that is there already is not
trained again; one that was interrupted is resumed.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np

from bench.timing import alternate, blas_threads, ratio
from common.cli import parse, run_program
from common.cores import usable_cores
from common.errors import UserError
from common.files import write_figure
from data.corpus import Corpus, load_corpus
from data.tokenizers import get_tokenizer
from numpygpt import GPTConfig, param_shapes
from sample import first_ids, load_for_sampling, token_stream
from train_numpy import MEMORY, NumpyEngine
from training.batches import Batches, step_rng
from training.config import PRESETS, Flags, RunFlags, TrainConfig, learning_rate
from training.loop import Engine, train
from training.metrics import read_metrics
from training.run import METRICS, Run, open_run, read_config

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVALUATIONS = 6  # on the whole validation split, of each run: the points of the plot
STEPS = 5  # training steps of each contender in a round
SAMPLE_CHARS = 300  # of each contender in a round, and of the samples in the page
TEMPERATURE, SEED = 0.8, 1337  # sample.py's defaults
ENGINES = {"numpy": "NumPy", "torch": "PyTorch"}
COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:purple", "tab:orange", "tab:brown", "tab:grey")


@dataclass(frozen=True)
class Options:
    """Compare tokenizers in bits per character."""

    engine: Literal["numpy", "torch"] = "numpy"  # what trains and generates, on the CPU
    preset: Literal["tiny", "small", "full"] = "small"  # where layers, recipe and the number of characters come from
    vocab_sizes: tuple[int, ...] = (512, 1024, 4096)  # of the byte-pair encodings; characters are always there
    data: str = "shakespeare_char"  # shakespeare_char, verse or a UTF-8 text file
    max_chars: int | None = None  # characters to learn from; None: as many as the preset reads, one to a token
    run_dir: Path = Path("runs/tokenizers")  # the folder of the runs
    out: Path = Path("docs/tokenizers.png")  # the plot
    rounds: int = 9  # of measuring speed, each of which runs every contender once

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        for name in ("max_chars", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 1 <= len(set(self.vocab_sizes)) == len(self.vocab_sizes) < len(COLOURS):
            raise ValueError(f"vocab_sizes must be 1 to {len(COLOURS) - 1} different numbers, got {self.vocab_sizes}")


@dataclass(frozen=True)
class Result:
    """One trained contender."""

    name: str
    run: Run
    tokens_per_char: float  # of the training split
    val_tokens_per_char: float
    curve: list[tuple[int, float]]  # characters learned from, bits per character on the whole validation split
    nats_per_token: float  # at the end, on the whole validation split

    @property
    def bits(self) -> float:
        return self.curve[-1][1]

    @property
    def bigram_bits(self) -> float:
        """The bigram's bits per character: a nat per token is as many of them as for the model."""
        return self.run.baselines["bigram"] * self.bits / self.nats_per_token

    @property
    def chars_per_step(self) -> float:
        return tokens_per_step(self.run.training, self.run.model.block_size) / self.tokens_per_char

    @property
    def embedding_params(self) -> int:
        """Of tokens and positions."""
        shapes = param_shapes(self.run.model)
        return sum(math.prod(shapes[name]) for name in ("wte.weight", "wpe.weight"))

    @property
    def other_params(self) -> int:
        return sum(map(math.prod, param_shapes(self.run.model).values())) - self.embedding_params


def tokens_per_step(training: TrainConfig, block_size: int) -> int:
    return training.batch_size * block_size


# ---------------------------------------------------------------------------------------------------------------------
# Training


def contender_flags(options: Options, corpus: Corpus, vocab_size: int | None) -> Flags:
    """The preset with one tokenizer, BPE or None for characters, in as many steps as its characters take.

    The decay ends with the run, but the warm-up keeps its number of steps, however few there are: what it waits for,
    AdamW's averages and the first order among the weights, takes steps and not characters. With a warm-up of a
    twentieth of its steps, as characters have, BPE-1024 ends up worse than a bigram in the small preset. With the whole
    of it the peak rate hardly matters: half of it changes no encoding by more than 0.015 bits per character.

    Raises UserError if the text cannot give such a vocabulary.
    """
    preset = PRESETS[options.preset]
    per_step = tokens_per_step(preset.training, preset.model.block_size)
    chars = options.max_chars or preset.training.max_steps * per_step
    kind, tokens_per_char = "char", 1.0
    if vocab_size is not None:
        kind = "bpe"
        tokenizer = get_tokenizer(kind, corpus.train_text, vocab_size)
        tokens_per_char = len(tokenizer.encode(corpus.train_text)) / len(corpus.train_text)
    steps = max(1, round(chars * tokens_per_char / per_step))
    training = replace(
        preset.training,
        max_steps=steps,
        eval_interval=math.ceil(steps / EVALUATIONS),
        data=corpus.name,
        tokenizer=kind,
        bpe_vocab_size=vocab_size or preset.training.bpe_vocab_size,
        dtype="float32",
    )
    folder = options.run_dir / f"{options.engine}-{kind}{vocab_size or ''}"
    there = (folder / "config.json").exists()
    if there and (found := read_config(folder)).training != training:
        names = [name for name in vars(training) if getattr(training, name) != getattr(found.training, name)]
        raise UserError(f"{folder} holds a run with another {' and '.join(names)}: choose another --run-dir")
    run = RunFlags(options.preset, resume=str(folder)) if there else RunFlags(options.preset, run_dir=str(folder))
    return Flags(preset.model, training, run)


def make_engine(name: str, model: GPTConfig, training: TrainConfig) -> Engine:
    """An engine with fresh weights."""
    if name == "numpy":
        return NumpyEngine(model, training, usable_cores())
    from train_torch import TorchEngine  # the NumPy engine must run without PyTorch
    from training.torch_device import DeviceFlags

    return TorchEngine(model, training, DeviceFlags("cpu"))


def train_contender(name: str, options: Options, corpus: Corpus, vocab_size: int | None) -> Result | int:
    """The run of one contender, trained now or before; or the signal that stopped it. Raises UserError."""
    flags = contender_flags(options, corpus, vocab_size)
    print(f"\n--- {name}")
    with open_run(flags, options.engine, MEMORY) as run:
        stopped_by = train(make_engine(options.engine, run.model, run.training), run)
    if stopped_by is not None:
        return stopped_by
    full = [m for m in read_metrics(run.folder / METRICS) if m["protocol"] == "full"]
    tokens_per_char = len(run.batches.tokens) / len(corpus.train_text)
    curve = [(round(m["tokens"] / tokens_per_char), m["bits_per_char"]) for m in full]
    val_tokens_per_char = len(run.val_tokens) / len(corpus.val_text)
    return Result(name, run, tokens_per_char, val_tokens_per_char, curve, full[-1]["loss"])


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def training_round(engine_name: str, result: Result) -> Callable[[], None]:
    """A function that makes STEPS updates of a fresh model of the same kind."""
    run = result.run
    engine = make_engine(engine_name, run.model, run.training)
    batches = Batches(run.batches.tokens, run.model.block_size, run.training.batch_size, run.training.seed)
    done = 0

    def update() -> None:
        nonlocal done
        for step in range(done, done + STEPS):
            batch = engine.gather(batches.tokens, batches.starts(step), run.model.block_size)
            engine.train_step(step, [batch], learning_rate(step, run.training))
        done += STEPS

    return update


def write_sample(engine: Literal["numpy", "torch"], folder: Path) -> str:
    """SAMPLE_CHARS characters, or just over, as sample.py writes them."""
    config, weights, tokenizer = load_for_sampling(folder)
    rng = step_rng(SEED, 0, "sample")
    ids = token_stream(engine, config, weights, first_ids(tokenizer), rng, TEMPERATURE, None)
    return "".join(until(SAMPLE_CHARS, tokenizer.stream(islice(ids, SAMPLE_CHARS))))


def until(num_chars: int, pieces: Iterator[str]) -> Iterator[str]:
    """Pieces of text until they have num_chars characters."""
    for piece in pieces:
        yield piece
        num_chars -= len(piece)
        if num_chars <= 0:
            return


@dataclass(frozen=True)
class Speed:
    """How fast one contender is, and how many times as fast as characters are."""

    chars_per_s: float  # median over the rounds
    factor: float  # median of the ratio within each round
    gain: str  # the same with its quartiles


def measure_training(engine: str, results: Sequence[Result], rounds: int) -> list[Speed]:
    times = alternate({result.name: training_round(engine, result) for result in results}, rounds)
    return speeds([times[r.name] / (STEPS * r.chars_per_step) for r in results])


def measure_generation(
    engine: Literal["numpy", "torch"], results: Sequence[Result], rounds: int
) -> tuple[list[Speed], list[str]]:
    """Speeds, and the samples that were written."""
    samples: dict[str, str] = {}

    def writer(result: Result) -> Callable[[], None]:
        def write() -> None:
            samples[result.name] = write_sample(engine, result.run.folder)

        return write

    times = alternate({result.name: writer(result) for result in results}, rounds)
    texts = [samples[result.name] for result in results]
    return speeds([times[r.name] / len(text) for r, text in zip(results, texts, strict=True)]), texts


def speeds(seconds_per_char: Sequence[np.ndarray]) -> list[Speed]:
    """From the seconds per character of each contender in each round. They are compared with the first contender."""
    chars = seconds_per_char[0]
    return [
        Speed(1 / statistics.median(own), statistics.median(chars / own), ratio(chars, own)) for own in seconds_per_char
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The tables and the plot


def tables(results: Sequence[Result], training: Sequence[Speed], generation: Sequence[Speed]) -> Iterator[str]:
    """The three tables of docs/tokenizers.md, in Markdown: what goes in, what comes out, and how fast."""
    first = results[0]
    names = [r.name for r in results]
    yield table(
        {
            "": names,
            "vocabulary": [f"{r.run.model.vocab_size:,}" for r in results],
            "parameters in embeddings": [f"{r.embedding_params:,}" for r in results],
            "parameters elsewhere": [f"{r.other_params:,}" for r in results],
            "tokens per character, training split": [f"{r.tokens_per_char:.3f}" for r in results],
            "tokens per character, validation split": [f"{r.val_tokens_per_char:.3f}" for r in results],
            "window, in characters": [f"{r.run.model.block_size / r.val_tokens_per_char:.0f}" for r in results],
            "steps": [f"{r.run.training.max_steps:,}" for r in results],
        }
    )
    yield table(
        {
            "": names,
            "nats per token": [f"{r.nats_per_token:.4f}" for r in results],
            "bits per character": [f"**{r.bits:.4f}**" for r in results],
            "relative to characters": [f"{r.bits / first.bits - 1:+.1%}" for r in results],
            "the bigram's bits per character": [f"{r.bigram_bits:.4f}" for r in results],
        }
    )
    faster = "times as fast as with characters: median (quartiles)"
    yield table(
        {
            "": names,
            "training, characters/s": [f"{speed.chars_per_s:,.0f}" for speed in training],
            faster: [speed.gain for speed in training],
            "generation, characters/s": [f"{speed.chars_per_s:,.0f}" for speed in generation],
            f"{faster} ": [speed.gain for speed in generation],
        }
    )


def table(columns: dict[str, list[str]]) -> str:
    """A table in Markdown from its columns, by their titles."""
    rows = [[title.strip() for title in columns], ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(results: Sequence[Result], training: Sequence[Speed], title: str) -> "Figure":
    """The plot: bits per character over characters learned from, and over the seconds that these take."""
    from matplotlib.figure import Figure  # slow to load: --help must not wait for it

    figure = Figure(figsize=(9, 4.5), dpi=130, layout="constrained")
    by_chars, by_seconds = figure.subplots(1, 2, sharey=True)
    for result, speed, colour in zip(results, training, COLOURS, strict=False):
        chars, bits = zip(*result.curve, strict=True)
        by_chars.plot([n / 1e6 for n in chars], bits, "o-", color=colour, markersize=4, label=result.name)
        by_seconds.plot([n / speed.chars_per_s for n in chars], bits, "o-", color=colour, markersize=4)
    by_chars.set_ylabel("bits per character, whole validation split")
    by_chars.set_xlabel("millions of characters learned from")
    by_seconds.set_xlabel("seconds of training, at the measured speed")
    by_chars.legend()
    for axes in (by_chars, by_seconds):
        axes.grid(alpha=0.2)
    figure.suptitle(title)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m bench.subwords", argv)
    corpus = load_corpus(options.data)
    results = []
    with blas_threads(1):  # the engines bring their own threads
        for vocab_size in (None, *options.vocab_sizes):
            name = "characters" if vocab_size is None else f"BPE-{vocab_size}"
            result = train_contender(name, options, corpus, vocab_size)
            if isinstance(result, int):
                return 128 + result
            results.append(result)
        print("\n--- speed")
        training = measure_training(options.engine, results, options.rounds)
        generation, samples = measure_generation(options.engine, results, options.rounds)
    title = f"The same model, the same text, other tokens ({ENGINES[options.engine]}, {corpus.name})"
    write_figure(options.out, draw(results, training, title))
    for markdown in tables(results, training, generation):
        print(f"\n{markdown}")
    for result, text in zip(results, samples, strict=True):
        print(f"\n### {result.name}\n\n```text\n{text.strip()}\n```")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

"""What can be chosen about a run, with the presets; each field's comment is what --help says about it.

ModelFlags   the model's sizes: GPTConfig, except that the vocabulary may be left to the tokenizer
TrainConfig  everything else that decides which numbers come out
RunFlags     what does not: where the run is kept, how many threads work on it

The two that decide what comes out are kept with the run, in config.json: RunConfig.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from common.errors import UserError, shorten
from numpygpt import GPTConfig

MAX_SIZE = 1 << 20  # of a model in any direction, and of a batch: no machine has room for more
MAX_LAYERS = 1 << 12
MAX_PARAMS = 1 << 40
PresetName = Literal["tiny", "small", "full", "gpt2"]
DTYPES = ("auto", "float32", "bfloat16", "float64")


@dataclass(frozen=True)
class ModelFlags:
    """The model. The letters are those of numpygpt.py."""

    n_layer: int  # L, transformer blocks
    n_head: int  # nh, attention heads in each block; divides n_embd
    n_embd: int  # C, channels
    block_size: int  # the longest T that the model sees, in tokens; also the length of each training sequence
    dropout: float  # probability with which an activation is dropped in training, in [0, 1)
    bias: bool = True  # biases in linear layers and LayerNorms
    vocab_size: int | None = None  # V; None: as many as the tokenizer has tokens. More is allowed, less is not

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            check_integer(self, name, at_least=1, below=MAX_LAYERS if name == "n_layer" else MAX_SIZE)
        object.__setattr__(self, "dropout", as_number(self, "dropout", below=1))
        config = self.gpt_config(1)
        params = config.n_embd * (12 * config.n_layer * config.n_embd + config.vocab_size + config.block_size)
        if params >= MAX_PARAMS:
            raise ValueError(
                f"n_layer, n_embd, block_size and vocab_size make a model of over {params:.0e} parameters, which no "
                "machine trains: choose smaller ones"
            )

    def gpt_config(self, tokenizer_vocab_size: int) -> GPTConfig:
        """The GPTConfig for a tokenizer. Raises UserError if the tokenizer has more tokens than vocab_size."""
        fields = dataclasses.asdict(self)
        if self.vocab_size is None:
            fields["vocab_size"] = tokenizer_vocab_size
        config = GPTConfig(**fields)
        if config.vocab_size < tokenizer_vocab_size:
            raise UserError(
                f"vocab_size must be at least the tokenizer's {tokenizer_vocab_size}, got {config.vocab_size}"
            )
        return config


@dataclass(frozen=True)
class TrainConfig:
    """Data, optimisation and measurement: everything else that decides which numbers come out."""

    max_steps: int  # how many updates to make
    batch_size: int  # sequences that one update learns from, all micro-batches together
    learning_rate: float  # peak rate, reached at the end of the warm-up
    min_lr: float  # the rate that the decay ends at
    warmup_steps: int  # steps in which the rate rises linearly from 0 to the peak
    eval_interval: int  # steps between evaluations on the whole validation split, which decide what best.safetensors is
    data: str | None = None  # shakespeare_char, verse or a UTF-8 text file; None: shakespeare_char, else verse
    tokenizer: str = "char"  # char, bpe, gpt2, a tokenizer.json, or merges as in GPT-2's vocab.bpe
    bpe_vocab_size: int = 1024  # how many tokens the tokenizer "bpe" learns from the training split
    special_tokens: bool = False  # where the text holds a special token, as <|endoftext|>, read it as that token
    schedule: Literal["cosine", "linear"] | None = None  # how the rate falls; None: cosine for adamw, linear for muon
    decay_steps: int | None = None  # the step at which the rate arrives at min_lr; None: max_steps
    grad_accum: int = 1  # micro-batches an update is computed in: less memory, same result
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices inside blocks, and AdamW for all others
    muon_learning_rate: float = 0.02  # Muon's peak rate; it rises and falls in proportion to learning_rate, AdamW's
    muon_weight_decay: float = 0.1  # Muon's decoupled decay
    weight_decay: float = 0.1  # AdamW's decoupled decay of matrices; biases and gains have none
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.99  # AdamW's memory of the gradient's square
    grad_clip: float = 1.0  # largest global norm of the gradient; 0: off
    eval_tokens: int | None = None  # evaluate on the first so many tokens of the validation split; None: all of it
    estimate_interval: int = 250  # steps between quick estimates of the loss on both splits
    estimate_batches: int = 5  # random batches of each split in such an estimate; 0: no estimates
    log_interval: int = 10  # steps between lines of metrics.jsonl about the training batch
    seed: int = 1337  # of the initial weights, the order of the batches, dropout and estimates
    # bfloat16 is for train_torch.py alone, where the weights stay float32; auto: bfloat16 on a GPU, else float32
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        check_integer(self, "batch_size", at_least=1, below=MAX_SIZE)
        for name in ("max_steps", "grad_accum", "eval_interval", "estimate_interval", "log_interval", "bpe_vocab_size"):
            check_integer(self, name, at_least=1)
        for name in ("warmup_steps", "estimate_batches", "seed"):
            check_integer(self, name, at_least=0)
        if self.decay_steps is not None:
            check_integer(self, "decay_steps", at_least=1)
            if self.decay_steps < self.warmup_steps:
                raise ValueError(
                    f"decay_steps must be at least warmup_steps {self.warmup_steps}, got {self.decay_steps}"
                )
        if self.eval_tokens is not None:
            check_integer(self, "eval_tokens", at_least=2)
        for name in (
            "learning_rate",
            "min_lr",
            "muon_learning_rate",
            "muon_weight_decay",
            "weight_decay",
            "grad_clip",
        ):
            object.__setattr__(self, name, as_number(self, name))
        for name in ("beta1", "beta2"):
            object.__setattr__(self, name, as_number(self, name, below=1))
        if self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr must be at most learning_rate {self.learning_rate}, got {self.min_lr}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"optimizer must be adamw or muon, got {shorten(self.optimizer)}")
        if self.schedule not in ("cosine", "linear", None):
            raise ValueError(f"schedule must be cosine or linear, got {shorten(self.schedule)}")
        if self.optimizer == "muon" and self.learning_rate == 0:
            raise ValueError("learning_rate must be above 0, as the rate of muon follows it in proportion")
        if self.grad_accum > self.batch_size:
            raise ValueError(f"grad_accum must be at most batch_size {self.batch_size}, got {self.grad_accum}")
        for name in ("data", "tokenizer"):
            value = getattr(self, name)
            if (not isinstance(value, str) or not value) and (name, value) != ("data", None):
                raise ValueError(f"{name} must be a name or a file, got {shorten(value)}")
        if type(self.special_tokens) is not bool:
            raise ValueError(f"special_tokens must be true or false, got {shorten(self.special_tokens)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {shorten(self.dtype)}")


@dataclass(frozen=True)
class RunFlags:
    """Where the run is kept, and how it is computed."""

    # where the other defaults come from: tiny (seconds), small (minutes on a CPU), full (a GPU), gpt2 (a large GPU)
    preset: PresetName
    run_dir: str | None = None  # folder to keep the run in; None: runs/<engine>-<preset>
    overwrite: bool = False  # replace the run that is in the folder
    resume: str | None = None  # resume the run in this folder; its configuration replaces the preset
    threads: int | None = None  # CPU threads; None: as many as the cores that this process may use

    def __post_init__(self) -> None:
        """Raises ValueError that names the field."""
        if self.preset not in tuple(PRESETS):
            raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {shorten(self.preset)}")
        if self.threads is not None:
            check_integer(self, "threads", at_least=1)
        if "" in (self.run_dir, self.resume):
            raise ValueError("run_dir and resume must name a folder, got an empty name")
        if self.resume is not None and (self.overwrite or self.run_dir is not None):
            raise ValueError("resume already names the run's folder: leave out run_dir and overwrite")


@dataclass(frozen=True)
class Flags:
    """A whole command line: what was asked for, with a preset's defaults for everything else."""

    model: ModelFlags
    training: TrainConfig
    run: RunFlags


NO_CORPUS = ""  # the corpus_sha256 of a run whose weights were imported, and that has learned from nothing yet


@dataclass(frozen=True)
class RunConfig:
    """What config.json holds. Raises ValueError that names the field."""

    engine: str  # numpy or torch, whichever trained last
    preset: PresetName
    corpus_sha256: str  # or NO_CORPUS
    model: GPTConfig
    training: TrainConfig
    changes: list[dict]  # one for each resumption that changed something: {"step": 200, "max_steps": [200, 400]}

    def __post_init__(self) -> None:
        RunFlags(preset=self.preset)  # which checks it
        if self.engine not in ("numpy", "torch"):
            raise ValueError(f"engine must be numpy or torch, got {shorten(self.engine)}")
        if type(self.corpus_sha256) is not str:
            raise ValueError(f"corpus_sha256 must be a string, got {shorten(self.corpus_sha256)}")
        if type(self.changes) is not list or not all(type(change) is dict for change in self.changes):
            raise ValueError(f"changes must be a list of objects, got {shorten(self.changes)}")


def check_integer(config: object, name: str, at_least: int, below: int = 2**31) -> None:
    """Raises ValueError unless the field is an integer in [at_least, below)."""
    value = getattr(config, name)
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value < below:
        raise ValueError(f"{name} must be an integer of at least {at_least} and below {below}, got {shorten(value)}")


def as_number(config: object, name: str, below: float = 1e30) -> float:
    """The field as a float, whatever kind of number it is. Raises ValueError unless it is one in [0, below)."""
    value = getattr(config, name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < below:
        raise ValueError(f"{name} must be a number in [0, {below}), got {shorten(value)}")
    return float(value)


@dataclass(frozen=True)
class Preset:
    """A model, and a recipe to train it."""

    model: ModelFlags
    training: TrainConfig


PRESETS = {
    "tiny": Preset(
        ModelFlags(n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.0),
        TrainConfig(
            max_steps=200,
            batch_size=16,
            learning_rate=6e-3,
            min_lr=6e-4,
            warmup_steps=20,
            eval_interval=100,
            estimate_interval=50,
        ),
    ),
    "small": Preset(
        ModelFlags(n_layer=4, n_head=4, n_embd=128, block_size=64, dropout=0.0),
        TrainConfig(
            max_steps=2000,
            batch_size=12,
            learning_rate=5e-3,
            min_lr=1e-5,
            warmup_steps=100,
            weight_decay=0.3,
            beta2=0.995,
            eval_interval=1000,
        ),
    ),
    "full": Preset(  # nanoGPT's; of its 5,000 steps the best was seen at the 1,750th, so here the rate ends soon after
        ModelFlags(n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2),
        TrainConfig(
            max_steps=2000,
            batch_size=64,
            learning_rate=1e-3,
            min_lr=1e-5,
            warmup_steps=100,
            eval_interval=250,
        ),
    ),
    "gpt2": Preset(  # GPT-2 small; the recipe is nanoGPT's, with half a million tokens to an update
        ModelFlags(n_layer=12, n_head=12, n_embd=768, block_size=1024, dropout=0.0, vocab_size=50257),
        TrainConfig(
            max_steps=600_000,
            batch_size=480,
            grad_accum=60,
            learning_rate=6e-4,
            min_lr=6e-5,
            warmup_steps=2000,
            eval_interval=1000,
            beta2=0.95,
        ),
    ),
}


def eval_due(step: int, config: TrainConfig) -> bool:
    """Whether the validation split is evaluated after `step` updates: at intervals, and at the end."""
    return step > 0 and (step % config.eval_interval == 0 or step == config.max_steps)


def estimate_due(step: int, config: TrainConfig) -> bool:
    """Whether the loss is estimated after `step` updates."""
    return step > 0 and config.estimate_batches > 0 and step % config.estimate_interval == 0


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of the update that follows `step` updates: linear warm-up, then a cosine or a line down to min_lr.

        step 0                            learning_rate / warmup_steps
        step warmup_steps - 1             learning_rate: the top of the warm-up
        step warmup_steps                 learning_rate again: the decay begins
        halfway to decay_steps            (learning_rate + min_lr) / 2
        step decay_steps and after        min_lr

    A run shorter than its warm-up ends within it.
    """
    decay_steps = config.max_steps if config.decay_steps is None else config.decay_steps
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if step >= decay_steps:
        return config.min_lr
    progress = (step - config.warmup_steps) / (decay_steps - config.warmup_steps)
    schedule = config.schedule or ("linear" if config.optimizer == "muon" else "cosine")
    left = 1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def muon_learning_rate(lr: float, config: TrainConfig) -> float:
    """Muon's rate where AdamW's is lr: they have the same schedule, each with its own peak."""
    return lr * (config.muon_learning_rate / config.learning_rate)

"""The run folder: begin a run, or resume one.

config.json          what was chosen: both configs, the corpus' SHA-256, the engine; and what was changed later on
tokenizer.json       text to ids and back
metrics.jsonl        every measurement, see training.metrics
loss.png             its picture
last.safetensors     the newest checkpoint, see training.checkpoint
best.safetensors     the weights with the lowest validation loss
lock                 held by the trainer at work, see training.lock
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from bigram import bigram_loss
from common.errors import UserError, shorten
from common.files import build, read_json, write_atomically
from data.corpus import Corpus, load_corpus
from data.text import cut
from data.tokenizers import CharTokenizer, Tokenizer, get_tokenizer, load, save
from numpygpt import GPTConfig, Params, is_for_muon, param_shapes
from training.batches import Batches, encode, special_tokens
from training.checkpoint import TOKENIZER, Checkpoint, State, load_checkpoint, load_weights, save_tensors
from training.config import NO_CORPUS, Flags, ModelFlags, RunConfig, TrainConfig, eval_due
from training.lock import LOCK, Lock, locked
from training.memory import MemoryUse, check_memory
from training.metrics import metrics_until, read_metrics, write_metrics

CONFIG, METRICS, PICTURE = "config.json", "metrics.jsonl", "loss.png"
LAST, BEST = "last.safetensors", "best.safetensors"
FILES = {CONFIG, METRICS, PICTURE, LAST, BEST}  # what makes a folder a run
LEFTOVER = re.compile(r"\.(config\.json|tokenizer\.json|metrics\.jsonl|loss\.png|(last|best)\.safetensors)\.\w{8}\.new")
# What a resumed run cannot change, besides the model: with another eval_tokens no two losses could be compared.
FIXED = ("seed", "batch_size", "optimizer", "tokenizer", "bpe_vocab_size", "special_tokens", "eval_tokens")


@dataclass(frozen=True)
class Run:
    """A run that is open, and everything about it that the training loop needs."""

    folder: Path
    engine: str
    model: GPTConfig
    training: TrainConfig
    tokenizer: Tokenizer
    batches: Batches  # of the training split
    val_tokens: np.ndarray  # (n,) integers, n >= 2
    eval_tokens: np.ndarray  # those of them that an evaluation predicts: all, or the first --eval-tokens
    eval_chars: int  # how many characters eval_tokens[1:] stand for
    baselines: dict[str, float]  # losses to compare with, in nats per token: the bigram's; verse's entropy
    checkpoint: Checkpoint | None = None  # to resume from, or None to begin
    missed_evaluation: bool = False  # the evaluation due at the checkpoint was interrupted
    lock: Lock | None = None  # the folder's, in the process that writes there


@contextmanager
def open_run(flags: Flags, engine: str, memory: MemoryUse | None) -> Iterator[Run]:
    """Begin the run that the flags describe, or resume the one they name; nobody else can while it is open.

    memory: what the engine takes the machine's memory for; None: its memory is elsewhere, on a GPU

    Raises UserError if the folder holds a run already, or is in use; if data, tokenizer, model and memory do not fit
    each other; for a resumed run, if its files are damaged, or a flag would change what cannot be changed. Then nothing
    in the folder has changed.
    """
    if flags.run.resume is not None:
        folder = Path(flags.run.resume)
        read_config(folder)  # before a lock is put there
        with locked(folder) as lock:
            yield resume_run(folder, flags, engine, memory, lock)
    else:
        folder = Path(flags.run.run_dir or f"runs/{engine}-{flags.run.preset}")
        check_free(folder, flags.run.overwrite)
        with locked(folder) as lock:
            check_free(folder, flags.run.overwrite)  # once more, now that it cannot change
            yield begin_run(folder, flags, engine, memory, lock)


def begin_run(folder: Path, flags: Flags, engine: str, memory: MemoryUse | None, lock: Lock) -> Run:
    """Make sure that everything fits, and only then write it down. config.json comes last: with it the run exists."""
    corpus = load_corpus(flags.training.data)
    training = dataclasses.replace(flags.training, data=corpus.name)
    # All characters count, or validation might not be writable; but merges are learned from the training split alone.
    pieces = cut(corpus.utf8, anywhere=True) if training.tokenizer == "char" else corpus.train_pieces()
    tokenizer = get_tokenizer(training.tokenizer, pieces, training.bpe_vocab_size)
    model = flags.model.gpt_config(tokenizer.vocab_size)
    run = assemble(folder, engine, model, training, tokenizer, corpus, memory)

    lock.sign()
    for name in (CONFIG, *sorted(FILES - {CONFIG})):  # of a run that is to be overwritten, config.json first
        (folder / name).unlink(missing_ok=True)
    delete_leftovers(folder)
    save(tokenizer, folder / TOKENIZER)
    write_config(folder, RunConfig(engine, flags.run.preset, corpus.sha256, model, training, []))
    return dataclasses.replace(run, lock=lock)


def resume_run(folder: Path, flags: Flags, engine: str, memory: MemoryUse | None, lock: Lock) -> Run:
    """Check what the flags change, load the newest checkpoint, and forget what was measured after it.

    A run with imported weights begins here: it takes whatever corpus, seed and batch size the flags say.
    """
    config, tokenizer = read_config(folder), load(folder / TOKENIZER)
    begins = config.corpus_sha256 == NO_CORPUS
    try:
        corpus = load_corpus(flags.training.data)
    except UserError as error:
        if begins or flags.training.data != config.training.data:
            raise
        raise UserError(f"{error}; {folder} learned from it: if it has moved, say where with --data") from error
    training = dataclasses.replace(flags.training, data=corpus.name) if begins else flags.training
    model = flags.model.gpt_config(tokenizer.vocab_size)
    changes = find_changes(folder, config, engine, model, training)
    if not begins and corpus.sha256 != config.corpus_sha256:
        raise UserError(
            f"{corpus.name} is not the corpus of {folder}: its SHA-256 is {corpus.sha256}, not "
            f"{shorten(config.corpus_sha256)}"
        )
    run = assemble(folder, engine, model, training, tokenizer, corpus, memory)
    checkpoint = load_last(folder, model, training)
    state = checkpoint.state if checkpoint else State()
    metrics = metrics_until(read_metrics(folder / METRICS), state.step)
    evaluated = any(line["step"] == state.step and line["protocol"] == "full" for line in metrics)

    lock.sign()
    delete_leftovers(folder)
    if checkpoint is not None and state.best_step == state.step:  # saved after the last: a crash may have come between
        save_tensors(folder / BEST, checkpoint.snapshot.weights, state, model)
    write_metrics(folder / METRICS, metrics)
    if changes:
        history = [*config.changes, {"step": state.step} | changes]
        write_config(folder, RunConfig(engine, config.preset, corpus.sha256, model, training, history))
    missed = eval_due(state.step, training) and not evaluated
    return dataclasses.replace(run, checkpoint=checkpoint, missed_evaluation=missed, lock=lock)


def find_changes(
    folder: Path, config: RunConfig, engine: str, model: GPTConfig, training: TrainConfig
) -> dict[str, list]:
    """{name: [before, after]} of what the flags change about a run. Raises UserError for what cannot be changed."""
    before = {"engine": config.engine} | asdict(config.model) | asdict(config.training)
    after = {"engine": engine} | asdict(model) | asdict(training)
    changes = {name: [before[name], after[name]] for name in before if before[name] != after[name]}
    begins = config.corpus_sha256 == NO_CORPUS
    for name, (old, new) in changes.items():
        precision = name == "dtype" and "float64" in (old, new)  # bfloat16 and float32 keep the same weights
        fixed = name in FIXED and not (begins and name in ("seed", "batch_size", "optimizer", "eval_tokens"))
        if precision or fixed or (name in asdict(model) and name != "dropout"):
            raise UserError(f"{name} of a run cannot be changed: {folder} has {shorten(old)}, not {shorten(new)}")
    return changes


def load_last(folder: Path, model: GPTConfig, training: TrainConfig) -> Checkpoint | None:
    """The checkpoint to resume from, or None if none was saved yet. Raises UserError."""
    if not os.path.lexists(folder / LAST):
        if os.path.lexists(folder / BEST):
            raise UserError(f"{folder} has {BEST}, but the checkpoint to resume from, {LAST}, is missing")
        return None
    muon = training.optimizer == "muon"
    without_v = [name for name, shape in param_shapes(model).items() if muon and is_for_muon(name, len(shape))]
    dtype = np.float64 if training.dtype == "float64" else np.float32
    checkpoint = load_checkpoint(folder / LAST, model, dtype, without_v)
    if checkpoint.state.step > training.max_steps:
        raise UserError(f"max_steps must be at least the {checkpoint.state.step} steps that {folder} has made")
    return checkpoint


def assemble(
    folder: Path,
    engine: str,
    model: GPTConfig,
    training: TrainConfig,
    tokenizer: Tokenizer,
    corpus: Corpus,
    memory: MemoryUse | None,
) -> Run:
    """Encode both splits, take the baselines, see that the model fits into memory. Raises UserError. Writes nothing."""
    if memory is not None:
        check_memory(model, training, memory)
    anywhere = isinstance(tokenizer, CharTokenizer)
    splits = {0: corpus.train_pieces(anywhere=anywhere), corpus.num_train_chars: corpus.val_pieces(anywhere=anywhere)}
    special = special_tokens(tokenizer, training, corpus)
    try:
        train_tokens, val_tokens = (
            encode(tokenizer, pieces, folder, start, special) for start, pieces in splits.items()
        )
    except UserError as error:
        raise UserError(f"{corpus.name} does not suit the tokenizer: {error}") from error
    if len(val_tokens) < 2:
        raise UserError(
            f"{corpus.name} is too short: its validation split, the last tenth, has {len(val_tokens)} tokens, and 2 "
            "are needed to predict one from the other"
        )
    batches = Batches(train_tokens, model.block_size, training.batch_size, training.seed)
    eval_tokens = val_tokens[: training.eval_tokens]
    whole = len(eval_tokens) == len(val_tokens)
    num_chars = corpus.num_chars - corpus.num_train_chars if whole else len(tokenizer.decode(eval_tokens))
    eval_chars = num_chars - len(tokenizer.decode(eval_tokens[:1]))
    if eval_chars < 1:
        raise UserError(
            f"{corpus.name} is too short: its validation split, the last tenth, is a single character, and 2 are "
            "needed to predict one from the other"
        )
    baselines = {"bigram": bigram_loss(train_tokens, eval_tokens, tokenizer.vocab_size)}
    if corpus.entropy_per_char is not None:
        baselines["entropy"] = corpus.entropy_per_char * eval_chars / (len(eval_tokens) - 1)
    return Run(folder, engine, model, training, tokenizer, batches, val_tokens, eval_tokens, eval_chars, baselines)


def load_run(run: Path) -> tuple[GPTConfig, Params, Tokenizer]:
    """Model, weights and tokenizer of a run's best checkpoint, or of its last if none was best yet; or of the one whose
    .safetensors file is given. A trainer may be at work on it. Raises UserError."""
    folder = folder_of(run)
    config = read_config(folder).model
    tokenizer = load(folder / TOKENIZER)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, more than the model's {config.vocab_size}"
        )
    candidates = [run] if folder != run else [path for name in (BEST, LAST) if os.path.lexists(path := folder / name)]
    if not candidates:
        raise UserError(f"{folder} has no checkpoint yet: it is saved at the first evaluation")
    return config, load_weights(candidates[0], config), tokenizer


def folder_of(run: Path) -> Path:
    """The folder of a run that is named by it, or by one of its .safetensors files."""
    return run.parent if run.suffix == ".safetensors" and not run.is_dir() else run


def read_config(folder: Path) -> RunConfig:
    """The config.json of a run. Raises UserError that names the file and the fault."""
    path = folder / CONFIG
    if folder.is_dir() and not os.path.lexists(path):
        raise UserError(f"{folder} is not a run: it has no {CONFIG}")
    if is_old(folder):
        raise UserError(f"{folder} was made by version 0.1.0, whose checkpoints cannot be read any more: train again")
    content = read_json(path, "the configuration of a run")
    if "model_type" in content:
        raise UserError(
            f"{folder} is Hugging Face's, and not a run: import it by python -m tools.export from-hf {folder} RUN"
        )
    model = build(GPTConfig, content.get("model"), path)
    build(ModelFlags, asdict(model), path)  # which knows what sizes are out of reach
    training = build(TrainConfig, content.get("training"), path)
    return build(RunConfig, content | {"model": model, "training": training}, path)


def is_old(folder: Path) -> bool:
    """Is this a run of version 0.1.0, whose checkpoints were the folders last and best?"""
    return any((folder / name / "state.json").exists() for name in ("last", "best"))


def write_config(folder: Path, config: RunConfig) -> None:
    """Put the config.json of a run in place. Raises OSError."""
    write_atomically(folder / CONFIG, json.dumps(asdict(config), indent=2).encode())


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError if a new run in this folder would overwrite anything without being told to."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: expected a folder for the run")
    if is_old(folder):
        raise UserError(f"{folder} holds a run of version 0.1.0: delete it, or choose another --run-dir")
    names = set(os.listdir(folder))
    others = {name for name in names - FILES - {TOKENIZER, LOCK} if not LEFTOVER.fullmatch(name)}
    if CONFIG not in names and others:
        raise UserError(f"{folder} is not a run, and not empty: choose another --run-dir")
    if names & FILES and not overwrite:
        raise UserError(
            f"{folder} holds a run: resume it by --resume {folder}, replace it by --overwrite, or choose another "
            "--run-dir"
        )


def delete_leftovers(folder: Path) -> None:
    """Delete what a dead process has begun to write and not finished, see common.files.replace_atomically."""
    for path in folder.iterdir():
        if LEFTOVER.fullmatch(path.name) and (path.is_symlink() or not path.is_dir()):
            path.unlink()

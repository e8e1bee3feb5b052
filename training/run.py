"""The run folder: begin a run, or go on with one.

config.json      what was chosen: both configs, the corpus' SHA-256, the engine; and what was changed later on
tokenizer.json   text to ids and back
metrics.jsonl    every measurement, see training.metrics
loss.png         its picture
last/, best/     the newest checkpoint, and the one with the lowest loss, see training.checkpoint
lock             held by the trainer at work; a dead process holds nothing
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import UserError, shorten
from common.files import read_json, write_atomically
from data.text import cut
from data.tokenizers import CharTokenizer, Tokenizer, get_tokenizer, load, save
from numpygpt import GPTConfig, Params
from training.batches import Batches
from training.checkpoint import (
    TOKENIZER,
    Checkpoint,
    build,
    load_checkpoint,
    load_weights,
    locate,
    recover,
    remove,
    save_checkpoint,
)
from training.config import Flags, ModelFlags, RunFlags, TrainConfig
from training.metrics import trim_metrics

if TYPE_CHECKING:
    from data.corpus import Corpus

__all__ = ["METRICS", "PICTURE", "Run", "RunConfig", "load_run", "open_run", "read_config"]

CONFIG, METRICS, PICTURE, LOCK = "config.json", "metrics.jsonl", "loss.png", "lock"
CHECKPOINTS = ("last", "best")
FIXED = (
    "seed",
    "batch_size",
    "tokenizer",
    "bpe_vocab_size",
    "special_tokens",
)  # what a resumed run cannot change, besides the model
NO_CORPUS = ""  # the corpus_sha256 of a run whose weights were imported, and that has learned from nothing yet

Check = Callable[[GPTConfig, TrainConfig], None]  # raises what there is to say against a run


@dataclass(frozen=True)
class RunConfig:
    """What config.json holds. Raises ValueError that names the field."""

    engine: str  # numpy or torch, whichever trained last
    preset: str
    corpus_sha256: str  # or NO_CORPUS
    model: GPTConfig
    training: TrainConfig
    changes: list[dict]  # one for each resumption that changed something: {"step": 200, "max_steps": [200, 400]}

    def __post_init__(self) -> None:
        RunFlags(preset=self.preset)
        if self.engine not in ("numpy", "torch"):
            raise ValueError(f"engine must be numpy or torch, got {shorten(self.engine)}")
        if type(self.corpus_sha256) is not str:
            raise ValueError(f"corpus_sha256 must be a string, got {shorten(self.corpus_sha256)}")
        if type(self.changes) is not list or not all(type(change) is dict for change in self.changes):
            raise ValueError(f"changes must be a list of objects, got {shorten(self.changes)}")


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
    val_chars: int  # how many characters val_tokens[1:] stand for
    yardsticks: dict[str, float]  # losses to compare with, in nats per token: the bigram's; verse's entropy
    checkpoint: Checkpoint | None  # where to go on, or None to begin


@contextmanager
def open_run(flags: Flags, engine: str, check: Check) -> Iterator[Run]:
    """Begin the run that the flags describe, or go on with the one they name; nobody else can while it is open.

    check: called before anything in the folder changes; what it raises is passed on

    Raises UserError if the folder holds a run already, or is in use; if data, tokenizer and model do not fit each
    other; for a resumed run, if its files are damaged, or a flag would change what cannot be changed.
    """
    if flags.run.resume is not None:
        folder = Path(flags.run.resume)
        config = read_config(folder)
        with locked(folder):
            yield resume_run(folder, config, flags, engine, check)
    else:
        folder = Path(flags.run.run_dir or f"runs/{engine}-{flags.run.preset}")
        check_free(folder, flags.run.overwrite)  # before anything is put there
        with new_folder(folder), locked(folder):
            check_free(folder, flags.run.overwrite)  # and now that it cannot change
            yield begin_run(folder, flags, engine, check)


def begin_run(folder: Path, flags: Flags, engine: str, check: Check) -> Run:
    """Make sure that everything fits, and only then write it down. config.json comes last: with it the run exists."""
    from data.corpus import load_corpus  # here: it takes longer to load than --help may take

    corpus = load_corpus(flags.training.data)
    training = dataclasses.replace(flags.training, data=corpus.name)
    # All characters count, or validation might not be writable; but merges are learned from the training split alone.
    pieces = cut(corpus.utf8, anywhere=True) if training.tokenizer == "char" else corpus.train_pieces()
    tokenizer = get_tokenizer(training.tokenizer, pieces, training.bpe_vocab_size)
    model = flags.model.gpt_config(tokenizer.vocab_size)
    check(model, training)
    run = assemble(folder, engine, model, training, tokenizer, corpus, None)

    for name in (CONFIG, METRICS, PICTURE):  # of a run that is to be overwritten
        (folder / name).unlink(missing_ok=True)
    for name in CHECKPOINTS:
        recover(folder, name)
        remove(folder / name)
    save(tokenizer, folder / TOKENIZER)
    write_config(folder, RunConfig(engine, flags.run.preset, corpus.sha256, model, training, []))
    return run


def resume_run(folder: Path, config: RunConfig, flags: Flags, engine: str, check: Check) -> Run:
    """Check what the flags change, load the newest checkpoint, and forget what was measured after it.

    A run with imported weights begins here: it takes whatever corpus, seed and batch size the flags say.
    """
    from data.corpus import load_corpus

    tokenizer = load(folder / TOKENIZER)
    begins = config.corpus_sha256 == NO_CORPUS
    try:
        corpus = load_corpus(flags.training.data)
    except UserError as error:
        if begins or flags.training.data != config.training.data:
            raise
        raise UserError(f"{error}; {folder} learned from it: if it has moved, say where with --data") from error
    training = dataclasses.replace(flags.training, data=corpus.name) if begins else flags.training
    model = flags.model.gpt_config(tokenizer.vocab_size)
    changes = changed({"engine": config.engine}, {"engine": engine})
    changes |= changed(asdict(config.model), asdict(model)) | changed(asdict(config.training), asdict(training))
    for name, (before, after) in changes.items():
        precision = name == "dtype" and "float64" in (before, after)  # bfloat16 and float32 keep the same weights
        fixed = name in FIXED and not (begins and name in ("seed", "batch_size", "special_tokens"))
        if precision or fixed or (name in asdict(model) and name != "dropout"):
            raise UserError(f"{name} of a run cannot be changed: {folder} has {before}, not {after}")
    if not begins and corpus.sha256 != config.corpus_sha256:
        raise UserError(
            f"{corpus.name} is not the corpus of {folder}: its SHA-256 is {corpus.sha256}, not {config.corpus_sha256}"
        )
    check(model, training)

    for name in CHECKPOINTS:
        recover(folder, name)
    checkpoint, step = None, 0
    if (last := locate(folder, "last")) is not None:
        checkpoint = load_checkpoint(last, model, np.float64 if training.dtype == "float64" else np.float32)
        step = checkpoint.state.step
        if step > training.max_steps:
            raise UserError(f"max_steps must be at least the {step} steps that {folder} has made")
        if checkpoint.state.best_step == step:  # best/ is saved after last/: a crash may have come between
            save_checkpoint(folder, "best", checkpoint, model)
    elif locate(folder, "best") is not None:
        raise UserError(f"{folder} has best/, but the checkpoint to go on from, last/, is missing")
    run = assemble(folder, engine, model, training, tokenizer, corpus, checkpoint)
    trim_metrics(folder / METRICS, step)
    if changes:
        changes = [*config.changes, {"step": step} | changes]
        write_config(folder, RunConfig(engine, config.preset, corpus.sha256, model, training, changes))
    return run


def assemble(
    folder: Path,
    engine: str,
    model: GPTConfig,
    training: TrainConfig,
    tokenizer: Tokenizer,
    corpus: "Corpus",
    checkpoint: Checkpoint | None,
) -> Run:
    """Encode both splits and take the measures that need no model. Raises UserError if either split is too short."""
    from bigram import bigram_loss

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
    val_chars = corpus.num_chars - corpus.num_train_chars - len(tokenizer.decode(val_tokens[:1]))
    if val_chars < 1:
        raise UserError(
            f"{corpus.name} is too short: its validation split, the last tenth, is a single character, and 2 are "
            "needed to predict one from the other"
        )
    yardsticks = {"bigram": bigram_loss(train_tokens, val_tokens, tokenizer.vocab_size)}
    if corpus.entropy_per_char is not None:
        yardsticks["entropy"] = corpus.entropy_per_char * val_chars / (len(val_tokens) - 1)
    return Run(folder, engine, model, training, tokenizer, batches, val_tokens, val_chars, yardsticks, checkpoint)


def special_tokens(tokenizer: Tokenizer, training: TrainConfig, corpus: "Corpus") -> tuple[str, ...]:
    """The special tokens that are to be read in the text. If there are any, and they are not: say so. Raises UserError.

    Texts are cut at white space before they are encoded, so a special token that holds some could be cut in two.
    """
    if training.special_tokens:
        if not tokenizer.special_tokens:
            raise UserError(f"the tokenizer {training.tokenizer} has no special tokens: leave out --special-tokens")
        for token in tokenizer.special_tokens:
            if len(token.split()) > 1 or token != token.strip():
                raise UserError(f"special token {shorten(token)} holds white space: it cannot be read in a text")
        return tokenizer.special_tokens
    for token in tokenizer.special_tokens:
        if times := corpus.utf8.count(token.encode()):
            print(
                f"{corpus.name} holds {shorten(token)} {times:,} time{'s' * (times > 1)}, learned as ordinary text: "
                "--special-tokens would read it as the special token"
            )
    return ()


def encode(
    tokenizer: Tokenizer, pieces: Iterable[str], folder: Path, start: int, special: Collection[str]
) -> np.ndarray:
    """The token ids of a text, (n,) unsigned integers, mapped from a file: a large corpus takes disk and not memory.

    Pages of the file that were read count as memory all the same, so an id has no more bytes than it needs.

    The file has no name: it is in the folder as long as the array is, and a crash leaves nothing of it.
    start: where in its corpus the text begins
    special: the special tokens to read in it

    Raises UserError that says from where on something cannot be encoded.
    """
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    with tempfile.TemporaryFile(dir=folder) as file:
        for piece in pieces:
            try:
                file.write(tokenizer.encode(piece, allowed_special=special).astype(dtype).tobytes())
            except UserError as error:
                raise UserError(f"from its character {start:,} on, {error}") from error
            start += len(piece)
        file.flush()
        return np.memmap(file, dtype, mode="r") if file.tell() else np.empty(0, dtype)


def load_run(folder: Path) -> tuple[GPTConfig, Params, Tokenizer]:
    """The model, weights and tokenizer of a run's best checkpoint, or of its last. Raises UserError."""
    config = read_config(folder).model
    tokenizer = load(folder / TOKENIZER)
    checkpoint = locate(folder, "best") or locate(folder, "last")
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: it is saved at the first evaluation")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, more than the model's {config.vocab_size}"
        )
    return config, load_weights(checkpoint, config), tokenizer


def read_config(folder: Path) -> RunConfig:
    """The config.json of a run. Raises UserError that names the file and the fault."""
    path = folder / CONFIG
    if folder.is_dir() and not path.exists():
        raise UserError(f"{folder} is not a run: it has no {CONFIG}")
    content = read_json(path, "the configuration of a run")
    if "model_type" in content:
        raise UserError(
            f"{folder} is Hugging Face's, and not a run: import it by python -m tools.export from-hf {folder} RUN"
        )
    model = build(GPTConfig, content.get("model"), path)
    build(ModelFlags, asdict(model), path)  # which knows what sizes are out of reach
    training = content.get("training")
    if type(training) is dict:
        training = {"ema": 0.0, "special_tokens": False} | training  # runs begun before there were these have none
    training = build(TrainConfig, training, path)
    return build(RunConfig, content | {"model": model, "training": training}, path)


def write_config(folder: Path, config: RunConfig) -> None:
    write_atomically(folder / CONFIG, json.dumps(asdict(config), indent=2).encode())


def changed(before: dict, after: dict) -> dict[str, list]:
    """{name: [before, after]} of what differs between two dicts with the same names."""
    return {name: [before[name], after[name]] for name in before if before[name] != after[name]}


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError if a new run in this folder would overwrite anything that nobody gave up."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: expected a folder for the run")
    names = set(os.listdir(folder))
    run_names = {CONFIG, METRICS, PICTURE, *(name + end for name in CHECKPOINTS for end in ("", ".new", ".old"))}
    others = {name for name in names - run_names - {TOKENIZER, LOCK} if not name.endswith(".new")}
    if CONFIG not in names and others:
        raise UserError(f"{folder} is not a run, and not empty: choose another --run-dir")
    if names & run_names and not overwrite:
        raise UserError(
            f"{folder} holds a run: go on with it by --resume {folder}, replace it by --overwrite, or choose another "
            "--run-dir"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make the folder if it is not there; and if nothing but the lock ever comes into it, delete what was made."""
    try:
        folder.mkdir(parents=True)
        made = True
    except FileExistsError:
        made = False
    try:
        yield
    finally:  # the lock is closed by now: Windows deletes no open file
        if made and folder.is_dir() and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock. The system lets go of it when the process ends, however it ends. Raises UserError."""
    with open(folder / LOCK, "a+") as file:
        if not try_lock(file.fileno()):
            file.seek(0)
            raise UserError(f"{folder} is in use by another trainer (process {shorten(file.read(20))})")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        for leftover in folder.glob(".*.new"):  # of a write_atomically that a dead process did not finish
            leftover.unlink()
        yield


def try_lock(handle: int) -> bool:
    """Lock an open file for this process alone, or return False if another one has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

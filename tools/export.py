"""Models in and out: Hugging Face's GPT-2 and nanoGPT's into a run, a run to Hugging Face and to ONNX; and its sizes.

    python -m tools.export from-hf gpt2/ runs/gpt2              # a folder with config.json and model.safetensors
    python -m tools.export from-nanogpt ckpt.safetensors runs/nanogpt --n-head 6 --tokenizer gpt2
    python -m tools.export to-hf runs/numpy-small hf/           # for AutoModelForCausalLM and AutoTokenizer
    python -m tools.export to-onnx runs/numpy-small gpt.onnx
    python -m tools.export info runs/gpt2

What is imported is a run like any other: sample.py and the trainers take it. Nothing that exists is overwritten, and
what is written appears under its name only when all of it is there. docs/ecosystem.md tells more.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

from common.cli import parse, run_program
from common.errors import UserError
from common.files import sync_folder
from data.tokenizers import Tokenizer, save
from numpygpt import GPTConfig, Params
from tools.sizes import info, num_params
from training.checkpoint import TOKENIZER, State, save_tensors
from training.config import NO_CORPUS, RunConfig, TrainConfig
from training.run import LAST, load_run, write_config

RunFolder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


@dataclass(frozen=True)
class FromHF:
    """Import a GPT-2 model of Hugging Face's as a new run."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR|FILE")]
    """its folder, or its weights with config.json beside them"""
    run: RunFolder
    """the run folder to make"""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="gpt2|FILE")] = None
    """gpt2, a tokenizer.json, or merges as in GPT-2's vocab.bpe; by default what is in the folder"""


@dataclass(frozen=True)
class FromNanogpt:
    """Import a nanoGPT model, saved as safetensors, as a new run."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """its state dict"""
    run: RunFolder
    """the run folder to make"""
    n_head: int
    """attention heads: the one size that the tensors do not tell"""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="gpt2|FILE")]
    """gpt2, a tokenizer.json, or merges as in GPT-2's vocab.bpe"""


@dataclass(frozen=True)
class ToHF:
    """Export a run's best checkpoint as a folder for Hugging Face's transformers."""

    run: RunFolder
    """the run, or one of its .safetensors files"""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """the folder to make"""


@dataclass(frozen=True)
class ToOnnx:
    """Export a run's best checkpoint as an ONNX file, token ids in, logits out."""

    run: RunFolder
    """the run, or one of its .safetensors files"""
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """the file to make"""


@dataclass(frozen=True)
class Info:
    """Count a model's parameters, memory and operations."""

    run: RunFolder
    """the run"""


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def write_run(folder: Path, config: GPTConfig, params: Params, tokenizer: Tokenizer) -> None:
    """A new run that has made no step: the weights, and an optimizer that has seen nothing. Raises UserError, OSError.

    There is no best.safetensors: nothing has been measured. The recipe is one for fine-tuning, a rate low and constant;
    the trainers' --resume takes it, with whatever text is to be learned from.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's {config.vocab_size}")
    recipe = TrainConfig(
        max_steps=100,
        batch_size=16,
        learning_rate=3e-5,
        min_lr=3e-5,
        warmup_steps=0,
        eval_interval=10,
        tokenizer=str(folder / TOKENIZER),
        grad_accum=16,
        dtype="float64" if params["wte.weight"].dtype == np.float64 else "auto",
    )
    with scratch(folder) as new:
        save(tokenizer, new / TOKENIZER)
        save_tensors(new / LAST, params, State(), config)
        write_config(new, RunConfig("numpy", "gpt2", NO_CORPUS, config, recipe, []))
        put_in_place(new, folder)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target`, to write in; what is still in it at the end is deleted. Raises UserError, OSError."""
    refuse_existing(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        os.chmod(new, 0o777 & ~umask())  # mkdtemp makes it private
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def put_in_place(new: Path, target: Path) -> None:
    """Give a file or a folder, now whole, its name. Raises UserError, OSError."""
    if new.is_dir():
        sync_folder(new)
    refuse_existing(target)  # os.rename would replace a file, or an empty folder
    os.rename(new, target)
    sync_folder(target.parent)


def umask() -> int:
    """The permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def refuse_existing(target: Path) -> None:
    """Raises UserError if there is anything of that name."""
    if os.path.lexists(target):
        raise UserError(f"{target} exists already, and nothing is overwritten: choose another name, or delete it")


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def from_hf(source: Path, run: Path, tokenizer: str | None) -> None:
    """Make a run of a GPT-2 folder or weights file, with the named tokenizer or the folder's, and say what came in.

    Raises UserError if the run exists, or if source or tokenizer cannot be read or are not of this architecture;
    OSError as any write does. Then there is no run.
    """
    from tools.hf import read_hf
    from tools.hf_tokenizer import read_tokenizer

    refuse_existing(run)
    model, tokens = read_hf(source), read_tokenizer(source, tokenizer)
    write_run(run, model.config, model.params, tokens)
    report(run, model.config, [*model.notes, *unused_rows(model.config, tokens)])


def from_nanogpt(source: Path, run: Path, n_head: int, tokenizer: str) -> None:
    """Make a run of a nanoGPT state dict, say what came in, and warn of its GELU. Raises what from_hf does."""
    from tools.hf import read_nanogpt
    from tools.hf_tokenizer import read_tokenizer

    refuse_existing(run)
    model, tokens = read_nanogpt(source, n_head), read_tokenizer(source, tokenizer)
    write_run(run, model.config, model.params, tokens)
    report(run, model.config, [*model.notes, *unused_rows(model.config, tokens)])
    print(
        "warning: nanoGPT's GELU is the erf form, this one's is GPT-2's tanh form: logits differ slightly, see "
        "docs/ecosystem.md",
        file=sys.stderr,
    )


def unused_rows(config: GPTConfig, tokenizer: Tokenizer) -> list[str]:
    """What to say about rows of the model that no token has: padding, or a token that was lost on the way."""
    unused = config.vocab_size - tokenizer.vocab_size
    if unused <= 0:
        return []
    rows = f"the last {unused:,} rows stand" if unused > 1 else "the last row stands"
    return [
        f"the model has {config.vocab_size:,} rows for tokens, and its tokenizer has {tokenizer.vocab_size:,} tokens: "
        f"{rows} for nothing, and can never be sampled"
    ]


def report(run: Path, config: GPTConfig, notes: Sequence[str]) -> None:
    """What came in, and what was changed on the way."""
    for note in notes:
        print(note)
    print(
        f"{run}: {num_params(config):,} parameters, {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} channels, block {config.block_size}, vocabulary {config.vocab_size}"
    )


def to_hf(run: Path, folder: Path) -> None:
    """Write a run's best checkpoint as a folder for Hugging Face.

    Raises UserError if the folder exists, if the run cannot be read, or if its tokenizer cannot be said in Hugging
    Face's format; OSError as any write does. Then there is no folder.
    """
    from tools.hf import write_hf

    refuse_existing(folder)
    config, params, tokenizer = load_run(run)
    with scratch(folder) as new:
        write_hf(new, config, params, tokenizer)
        put_in_place(new, folder)
    print(f"{folder}: load it with AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained")


def to_onnx(run: Path, file: Path) -> None:
    """Write a run's best checkpoint as an ONNX file, checked by onnx and, where there is one, by onnxruntime.

    Raises UserError if the run cannot be read, if onnx is not installed, if the file or its <file>.data exists, and if
    the graph's logits are not NumPy's; OSError as any write does. Then nothing is left behind.
    """
    from tools.onnx_graph import OPSET, TOLERANCE, compare, write_onnx

    beside = file.with_name(f"{file.name}.data")  # where weights too large for the file go
    refuse_existing(file)
    refuse_existing(beside)
    config, params, _ = load_run(run)
    with scratch(file) as new:
        write_onnx(new / file.name, config, params)
        try:
            apart, allowed = compare(new / file.name, config, params), TOLERANCE[params["wte.weight"].dtype.name]
        except ValueError as error:  # finite weights so large that the logits are not
            raise UserError(f"{run} cannot be exported: {error}") from error
        if apart is not None and not apart <= allowed:
            raise UserError(
                f"onnxruntime's logits are {apart:.1e} of the largest away from NumPy's, and {allowed:.0e} is allowed: "
                f"{file} was not written"
            )
        files = [path for path in (beside, file) if (new / path.name).exists()]  # the one that names the other last
        try:
            for path in files:
                put_in_place(new / path.name, path)
        except BaseException:  # also Ctrl-C: half a model would only be in the way
            for path in files:
                if not (new / path.name).exists():  # it has moved
                    path.unlink(missing_ok=True)
            raise
    print(f"{file}: ONNX, opset {OPSET}, idx (B, T) int64 -> logits (B, T, V); passed onnx.checker")
    if beside in files:
        print(f"{beside}: the weights, too large for one file; keep the two together")
    if apart is None:
        print("not compared with NumPy's logits: onnxruntime is not installed")
    else:
        print(f"onnxruntime: logits within {apart:.1e} of NumPy's, relative to the largest")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    command: Any = FromHF | FromNanogpt | ToHF | ToOnnx | Info  # mypy has no type for a union that is a value
    match parse(command, "python -m tools.export", argv, description=__doc__.split("\n")[0]):
        case FromHF(source, run, tokenizer):
            from_hf(source, run, tokenizer)
        case FromNanogpt(source, run, n_head, tokenizer):
            from_nanogpt(source, run, n_head, tokenizer)
        case ToHF(run, folder):
            to_hf(run, folder)
        case ToOnnx(run, file):
            to_onnx(run, file)
        case Info(run):
            info(run)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

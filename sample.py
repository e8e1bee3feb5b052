"""Text from a trained GPT, with either engine.

    python sample.py runs/numpy-small
    python sample.py runs/numpy-small/last.safetensors
    python sample.py runs/numpy-small --prompt "ROMEO:" --max-new-tokens 500 --temperature 0.8 --top-k 40 --seed 7
    printf "ROMEO:" | python sample.py runs/numpy-small --prompt -

The run's best checkpoint writes, or its last one if none was best yet. One seed gives one text, whichever engine
computes it: both compute in float64, where the two agree too closely for any draw to fall between them. Only models
of GPT-2's size and more are sampled in the dtype of their weights: those may take the memory, and float64 twice of it.
"""

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

from common.cli import parse, run_program
from common.errors import UserError
from data.text import check_text, normalize_text
from data.tokenizers import Tokenizer
from numpygpt import GPT, GPTConfig, Params, check_sampling
from training.batches import step_rng
from training.parallel import tune_process
from training.run import folder_of, load_run, read_config

if TYPE_CHECKING:
    from torch import Tensor

Engine = Literal["numpy", "torch"]

LARGE = 50_000_000  # parameters, from which on a model is sampled in the dtype of its weights


def load_for_sampling(folder: Path) -> tuple[GPTConfig, Params, Tokenizer]:
    """load_run, but a vocabulary with more entries than the tokenizer has tokens is cut to them. Raises UserError.

    The others stand for nothing, and without them they cannot be drawn.
    """
    config, weights, tokenizer = load_run(folder)
    weights["wte.weight"] = weights["wte.weight"][: tokenizer.vocab_size]
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size), weights, tokenizer


def token_stream(
    engine: Engine,
    config: GPTConfig,
    weights: Params,
    prompt: np.ndarray,
    rng: np.random.Generator,
    temperature: float,
    top_k: int | None,
) -> Iterator[int]:
    """Token ids after prompt (T,), without end, from either engine. Raises ValueError on impossible settings."""
    large = sum(weight.size for weight in weights.values()) >= LARGE
    dtype = weights["wte.weight"].dtype if large else np.dtype(np.float64)
    stream: Iterator[np.ndarray] | Iterator[Tensor]
    if engine == "numpy":
        tune_process(threads=1)
        gpt = GPT(config, weights, dtype=dtype.type)
        stream = gpt.stream(prompt[None], temperature=temperature, top_k=top_k, rng=rng)
    else:
        import torch  # here: the NumPy engine must run without it

        import torchgpt

        twin = torchgpt.GPT(config, dtype=getattr(torch, dtype.name))
        twin.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
        idx = torch.from_numpy(prompt[None].astype(np.int64))
        stream = twin.stream(idx, temperature=temperature, top_k=top_k, rng=rng)
    return (int(tokens[0]) for tokens in stream)


def write_samples(
    folder: Path,
    *,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    num_samples: int,
    engine: Engine,
    special_tokens: bool = False,
) -> None:
    """Print the prompt and what follows it, as it is generated, num_samples times. Raises UserError.

    Without a prompt the text begins as after a line end, or if the vocabulary has none, with its first token.
    """
    for name, value, least in (
        ("max_new_tokens", max_new_tokens, 0),
        ("num_samples", num_samples, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    try:
        check_sampling(temperature, top_k)
    except ValueError as error:
        raise UserError(str(error)) from error
    config, weights, tokenizer = load_for_sampling(folder)
    special_tokens = special_tokens or read_config(folder_of(folder)).training.special_tokens
    special = tokenizer.special_tokens if special_tokens else ()
    ids = tokenizer.encode(prompt, allowed_special=special) if prompt else first_ids(tokenizer)
    for number in range(num_samples):
        if num_samples > 1:
            print(f"--- sample {number + 1} of {num_samples}")
        print(prompt or "", end="", flush=True)
        rng = step_rng(seed, number, "sample")
        try:
            new_ids = token_stream(engine, config, weights, ids, rng, temperature, top_k)
            for piece in tokenizer.stream(islice(new_ids, max_new_tokens)):
                print(piece, end="", flush=True)
        except UserError:
            raise
        except ValueError as error:  # finite weights so large that the logits are not
            raise UserError(f"{folder} cannot write: {error}") from error
        print()


def first_ids(tokenizer: Tokenizer) -> np.ndarray:
    """(1,) int32: what a text without a prompt follows."""
    try:
        return tokenizer.encode("\n")
    except UserError:
        return np.zeros(1, np.int32)


def show_sample(folder: Path, engine: Engine) -> None:
    """What a trainer ends with: a short text from what it has just saved, and how to get more."""
    print("\na sample of the best checkpoint:\n")
    write_samples(
        folder, prompt=None, max_new_tokens=300, temperature=0.8, top_k=None, seed=1337, num_samples=1, engine=engine
    )
    print(f"\nmore of it:\n    python sample.py {shlex.quote(str(folder))} --engine {engine} --max-new-tokens 1000")


def read_prompt() -> str:
    """All of standard input, however long it takes. Raises UserError if it is closed, or not UTF-8."""
    if sys.stdin is None:
        raise UserError("no prompt: standard input is closed")
    return check_text(sys.stdin.buffer.read(), "the prompt on standard input").decode()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def arguments(
        run: Annotated[Path, tyro.conf.Positional],
        prompt: str | None = None,
        max_new_tokens: int = 500,
        temperature: float = 0.8,
        top_k: int | None = None,
        seed: int = 1337,
        num_samples: int = 1,
        engine: Engine = "numpy",
        special_tokens: bool = False,
    ) -> dict:
        """Text from a trained GPT, with either engine.

        Args:
            run: the folder that a trainer kept its run in, or one of the .safetensors files there.
            prompt: the text to continue; - reads all of standard input, which nothing else does.
            max_new_tokens: how many tokens to add.
            temperature: divides the logits; below 1 is more cautious, 0 always takes the likeliest token.
            top_k: draw from the k likeliest tokens only.
            seed: of the draws; one seed, one text, whichever engine.
            num_samples: how many texts to write, each with draws of its own.
            engine: what computes the model; the text is the same.
            special_tokens: read special tokens in the prompt, as <|endoftext|>, as these tokens; always on if the run
                was trained so.
        """
        return {
            "folder": run,
            "prompt": prompt,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "seed": seed,
            "num_samples": num_samples,
            "engine": engine,
            "special_tokens": special_tokens,
        }

    options = parse(arguments, "sample.py", argv)
    if options["prompt"] == "-":
        options["prompt"] = read_prompt()
    elif options["prompt"] is not None:
        options["prompt"] = normalize_text(options["prompt"])
    write_samples(**options)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

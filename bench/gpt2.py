"""GPT-2 124M on this machine's CPU: numpygpt, torchgpt and Hugging Face's transformers, in turn, in one process.

Run by `python -m bench.cpu --preset gpt2`. The weights are random, which costs what trained ones cost; each contender
reads them from its own files, float32, and continues one text greedily with its key/value cache. Memory is measured in
a process each, from before the weights are loaded to after some tokens are written.
"""

import math
import statistics
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import numpygpt
from bench.timing import alternate, blas_threads, high_water, ratio
from data.tokenizers import CharTokenizer
from tools.export import write_run
from tools.hf import write_hf
from training.run import load_run

CONFIG = numpygpt.GPTConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0)
PROMPT, NEW = 256, 32  # tokens
ENGINES = ("NumPy", "torchgpt", "transformers")
Generate = Callable[[np.ndarray, int], np.ndarray]  # idx (1, T), how many more -> (1, T + more)


def write_models(folder: Path, config: numpygpt.GPTConfig) -> None:
    """The same random weights as a run of ours, and as Hugging Face keeps them."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in numpygpt.param_shapes(config).items():
        draw = rng.standard_normal(shape, np.float32)
        draw *= 0.02
        params[name] = draw + np.float32(len(shape) == 1 and name.endswith("weight"))  # gains are about 1
    tokenizer = CharTokenizer("\n")  # no text is written or read
    write_run(folder / "run", config, params, tokenizer)
    (folder / "hf").mkdir()
    write_hf(folder / "hf", config, params, tokenizer)


def load(engine: str, folder: Path, threads: int) -> Generate:
    """The model of one engine, from its files, ready to continue a text."""
    if engine == "NumPy":
        config, weights, _ = load_run(folder / "run")
        model = numpygpt.GPT(config, weights)
        return lambda idx, more: model.generate(idx, more, temperature=0)

    import torch

    torch.set_num_threads(threads)
    if engine == "torchgpt":
        import torchgpt

        config, weights, _ = load_run(folder / "run")
        gpt = torchgpt.GPT(config).eval()
        gpt.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})
        return lambda idx, more: gpt.generate(torch.from_numpy(idx), more, temperature=0).numpy()

    from transformers import AutoModelForCausalLM, GenerationConfig

    gpt2 = AutoModelForCausalLM.from_pretrained(folder / "hf").eval()
    gpt2.generation_config = GenerationConfig(do_sample=False, use_cache=True)
    return lambda idx, more: gpt2.generate(
        torch.from_numpy(idx), attention_mask=torch.ones(idx.shape), max_new_tokens=more, min_new_tokens=more
    ).numpy()


def peak_memory(engine: str, folder: Path, threads: int) -> float:
    """MB that loading the model and writing some tokens add to a process that has imported what it needs."""
    if engine != "NumPy":
        import torchgpt  # noqa: F401
    if engine == "transformers":
        from transformers import GPT2LMHeadModel  # noqa: F401
    before = high_water()
    with blas_threads(threads):
        load(engine, folder, threads)(np.zeros((1, 16), np.int64), 16)
    return high_water() - before


def measure_gpt2(rounds: int, threads: int, config: numpygpt.GPTConfig = CONFIG) -> None:
    """Print a table: tokens/s of a prompt and of generation, and memory, all of them beside NumPy's."""
    import torch  # noqa: F401  what is missing is better said now than when two gigabytes are written
    import transformers  # noqa: F401

    idx = np.random.default_rng(1).integers(config.vocab_size, size=(1, PROMPT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder, config)
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each
            memory = {engine: pool.apply(peak_memory, (engine, folder, threads)) for engine in ENGINES}
            pool.close()
            pool.join()
        models = {engine: load(engine, folder, threads) for engine in ENGINES}
        with blas_threads(threads):
            contenders = {}
            for engine, generate in models.items():
                contenders[engine, "prompt"] = lambda generate=generate: generate(idx, 1)
                contenders[engine, "generation"] = lambda generate=generate: generate(idx[:, :1], NEW)
            times = alternate(contenders, rounds)

    num_params = sum(map(math.prod, numpygpt.param_shapes(config).values()))
    weights = num_params * 4 / 1e6
    size = f"{num_params / 1e6:.0f}M parameters, {weights:.0f} MB of weights"
    print(f"\n### GPT-2, {size}: float32, batch 1, {rounds} rounds\n")
    print(
        f"| | prompt of {PROMPT}, tokens/s | NumPy's speed relative to it: median (quartiles) | {NEW} new tokens, "
        "tokens/s | NumPy's speed relative to it: median (quartiles) | peak memory, MB | times the weights |"
    )
    print("|---|---|---|---|---|---|---|")
    for engine in ENGINES:
        cells = [engine]
        for phase, tokens in (("prompt", PROMPT), ("generation", NEW)):
            mine, numpys = times[engine, phase], times["NumPy", phase]
            cells += [f"{tokens / statistics.median(mine):,.1f}", ratio(mine, numpys)]
        print(f"| {' | '.join(cells)} | {memory[engine]:.0f} | {memory[engine] / weights:.2f} |")

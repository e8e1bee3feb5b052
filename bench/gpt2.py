"""GPT-2 124M on this machine's CPU: numpygpt, torchgpt and Hugging Face's transformers, in turn, in one process.

Run by `python bench/cpu.py --preset gpt2`. The weights are random, which costs what trained ones cost; each contender
reads them from its own files, float32, and continues one text greedily with its key/value cache. Memory is measured in
a process each, from before the weights are loaded to after some tokens are written.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import numpygpt
from bench.cpu import alternate, blas_threads, ratio
from data.tokenizers import CharTokenizer
from tools.export import load_run, write_run
from tools.hf import write_hf

# `python bench/cpu.py` puts its own folder first, where transformers would take bench/tokenizers.py for the library.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

CONFIG = numpygpt.GPTConfig(50257, 1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0)
PROMPT, NEW = 256, 32  # tokens
ENGINES = ("NumPy", "torchgpt", "transformers")
Generate = Callable[[np.ndarray, int], np.ndarray]  # idx (1, T), how many more -> (1, T + more)


def write_models(folder: Path) -> None:
    """The same random weights as a run of ours, and as Hugging Face keeps them."""
    rng = np.random.default_rng(0)
    params = {}
    for name, shape in numpygpt.param_shapes(CONFIG).items():
        draw = rng.standard_normal(shape, np.float32)
        draw *= 0.02
        params[name] = draw + np.float32(len(shape) == 1 and name.endswith("weight"))  # gains are about 1
    tokenizer = CharTokenizer("\n")  # nobody writes or reads a text
    write_run(folder / "run", CONFIG, params, tokenizer)
    (folder / "hf").mkdir()
    write_hf(folder / "hf", CONFIG, params, tokenizer)


def load(engine: str, folder: Path, threads: int) -> Generate:
    """The model of one engine, from its files, ready to continue a text."""
    if engine == "NumPy":
        model = numpygpt.GPT(CONFIG, load_run(folder / "run")[1])
        return lambda idx, more: model.generate(idx, more, temperature=0)

    import torch

    torch.set_num_threads(threads)
    if engine == "torchgpt":
        import torchgpt

        gpt = torchgpt.GPT(CONFIG).eval()
        gpt.load_state_dict({name: torch.tensor(weight) for name, weight in load_run(folder / "run")[1].items()})
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

    def high_water() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6

    before = high_water()
    with blas_threads(threads):
        load(engine, folder, threads)(np.zeros((1, 16), np.int64), 16)
    return high_water() - before


def measure_gpt2(rounds: int, threads: int) -> None:
    """Print a table: tokens/s of a prompt and of generation, and memory, all of them beside NumPy's."""
    idx = np.random.default_rng(1).integers(CONFIG.vocab_size, size=(1, PROMPT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # a process each: the mark never falls
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

    weights = sum(np.prod(shape) for shape in numpygpt.param_shapes(CONFIG).values()) * 4 / 1e6
    print(f"\n### GPT-2, 124M parameters, {weights:.0f} MB of weights: float32, batch 1, {rounds} rounds\n")
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

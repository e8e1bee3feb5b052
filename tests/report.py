"""Measure how far the engines are apart, and write it down: docs/parity.md and docs/parity.png.

    python -m tests.report
    python -m tests.report --only-mutants       only the list of mutants; nothing is measured

Runs the suite's own parity tests over many random models, and reports the largest error that each tensor had in any of
them. What the tests allow stands beside it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
from hypothesis import settings

from common.cli import parse, run_program

DOCS = Path(__file__).resolve().parent.parent / "docs"

WAYS = ("direction", "entry")  # of finite differences
MUTANTS_HEADING = "## Mutants\n"


@dataclass(frozen=True)
class Options:
    """Measure how far the engines are apart, and write docs/parity.md."""

    examples: int = 200  # random models for each comparison
    only_mutants: bool = False  # measure nothing: write the list of mutants and keep the rest of the page


KINDS = [
    "logits",
    "loss",
    "wte.weight",
    "wpe.weight",
    *(
        f"h.*.{layer}.{kind}"
        for layer in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    ),
    "ln_f.weight",
    "ln_f.bias",
]


def tests_that_measure() -> list[tuple[Callable, list[tuple]]]:
    """The tests whose errors are reported, each with the arguments of its calls."""
    from tests.model import test_dropout, test_layers, test_model, test_trajectory

    text = "verse" if test_trajectory.needs_shakespeare.args[0] else "shakespeare_char"
    return [
        (test_layers.test_layer_parity_float64, [(layer,) for layer in test_layers.LAYERS]),
        (test_layers.test_layer_parity_float32, [(layer,) for layer in test_layers.LAYERS]),
        (test_layers.test_layer_finite_differences, [(layer,) for layer in test_layers.LAYERS]),
        (test_model.test_parity_float64, [("sdpa",), ("explicit",)]),
        (test_model.test_parity_float64_with_large_weights, [("sdpa",)]),
        (test_model.test_parity_with_hugging_face, [()]),
        (test_model.test_parity_float32, [()]),
        (test_model.test_finite_differences_of_the_whole_model, [(True,), (False,)]),
        (test_dropout.test_dropout_parity, [()]),
        (test_trajectory.test_trajectory_parity_float64, [("adamw", text)]),
        (test_trajectory.test_trajectory_parity_with_dropout, [(text,)]),
    ]


def measure(examples: int) -> dict[str, dict[str, float]]:
    """What was compared -> tensor -> the largest error over so many examples."""
    from tests import conftest

    settings.register_profile("report", max_examples=examples, **conftest.COMMON)
    settings.load_profile("report")  # before the tests are imported: they take their settings then
    from tests.helpers import MEASURED

    for test, calls in tests_that_measure():
        print(test.__name__, flush=True)
        for arguments in calls:
            test(*arguments)
    return MEASURED


def measure_training(steps: int) -> dict[str, np.ndarray]:
    """dtype -> the relative difference of the two engines' losses at each step of one run."""
    from tests.helpers import ENGINES, train_config
    from tests.model import test_trajectory as trajectory

    tokens, V = trajectory.tokens_of("verse" if trajectory.needs_shakespeare.args[0] else "shakespeare_char")
    config = trajectory.GPTConfig(V, dropout=0.0, **trajectory.MODEL)
    differences = {}
    for dtype in ("float64", "float32"):
        training = train_config(**trajectory.RECIPE, dtype=dtype)
        ours, theirs = (trajectory.losses_of(engine, config, training, tokens, steps) for engine in ENGINES)
        differences[dtype] = np.abs(ours - theirs) / theirs
    return differences


# ---------------------------------------------------------------------------------------------------------------------
# The page


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in [header, *rows]]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(header) - 1), *lines[1:]])


def number(errors: dict[str, float], kind: str) -> str:
    return f"{errors[kind]:.1e}" if kind in errors else ""


def largest(measured: dict, *whats: str) -> float:
    return max(max(measured[what].values()) for what in whats)


def code(text: str) -> str:
    """Source text in a cell of a table."""
    return "`" + text.strip().replace("\n", " ⏎ ").replace("|", "\\|") + "`" if text.strip() else "nothing"


def page(measured: dict[str, dict[str, float]], examples: int) -> str:
    import torch
    import transformers

    from tests.model import test_layers, test_model

    references = {
        "PyTorch, float64": measured["NumPy and PyTorch, float64"],
        "Hugging Face, float64": measured["NumPy and Hugging Face, float64"],
        "with dropout, float64": measured["the model with dropout, float64"],
        "finite differences, float64": {
            kind: max(measured[f"the model, finite differences in one {way}"][kind] for way in WAYS)
            for kind in measured["the model, finite differences in one entry"]
        },
        "NumPy, float32": measured["float32: NumPy"],
        "PyTorch, float32": measured["float32: PyTorch"],
    }
    whole = table(
        ["tensor", *references],
        [[f"`{kind}`", *(number(errors, kind) for errors in references.values())] for kind in KINDS],
    )
    layers = table(
        ["layer", "PyTorch, float64", "finite differences, float64", "NumPy, float32", "PyTorch, float32"],
        [
            [
                layer,
                f"{largest(measured, f'{layer}, float64'):.1e}",
                f"{largest(measured, *(f'{layer}, finite differences in one {way}' for way in WAYS)):.1e}",
                f"{largest(measured, f'{layer}, float32: NumPy'):.1e}",
                f"{largest(measured, f'{layer}, float32: PyTorch'):.1e}",
            ]
            for layer in test_layers.LAYERS
        ],
    )
    weights = measured["200 steps, float64: weights"]
    key_bias = "h.*.attn.c_attn.bias"
    training = table(
        ["200 steps in float64", "largest error"],
        [
            ["loss, at any step", f"{measured['200 steps, float64']['loss']:.1e}"],
            ["gradient norm, at any step", f"{measured['200 steps, float64']['norm']:.1e}"],
            ["weights at the end", f"{max(v for k, v in weights.items() if k != key_bias):.1e}"],
            [f"`{key_bias}` at the end", f"{weights[key_bias]:.1e}"],
            ["m at the end", f"{largest(measured, '200 steps, float64: m'):.1e}"],
            ["v at the end", f"{largest(measured, '200 steps, float64: v'):.1e}"],
        ],
    )
    float32 = [measured["float32: NumPy"][kind] / measured["float32: PyTorch"][kind] for kind in KINDS]
    numpy_version, torch_version = np.__version__, torch.__version__.partition("+")[0]
    versions = f"NumPy {numpy_version}, PyTorch {torch_version} and transformers {transformers.__version__}"
    text = f"""# How far the two engines are apart

Written by `python -m tests.report`: {examples} random models a column, with {versions}; the whole model's finite
differences are those of two models. An error is the
largest |actual - expected| / (|expected| + s) over all entries of a tensor and over all examples, where s is the
tensor's typical size, the root of its mean square. The smallest distance between two numbers near 1 is 2.2e-16 in
float64 and 1.2e-7 in float32.

![errors of every tensor, and of the loss over 200 steps of training](parity.png)

## The whole model

Gradients, and logits and loss, of NumPy's model against an independent one. The last two columns compare each engine's
float32 with float64. NumPy's rounding is of the same order as PyTorch's: from {min(float32):.1f} to
{max(float32):.1f} times, tensor by tensor. With dropout, PyTorch drops what NumPy dropped; Hugging Face's model is
compared without.

{whole}

In float64 the tests allow {test_model.LOGITS:.0e} for logits and loss and {test_model.GRADIENTS:.0e} for gradients.
With weights so large that attention is all but one-hot and logits reach hundreds, errors grow from layer to layer:
to {largest(measured, "NumPy and PyTorch, float64, large weights"):.1e}, of {test_model.LARGE_GRADIENTS:.0e} allowed.

## Layer by layer

The largest error of any tensor of a layer: its output, and the gradient of its input and of each parameter, for a
random gradient of the output. The tests allow {test_layers.FLOAT64:.0e}; for finite differences, whose own rounding
is most of what is seen, {test_layers.FINITE_DIFFERENCES:.0e}.

{layers}

## Training

Both engines from one seed, with warm-up, cosine, clipping, decay and accumulation.

{training}

The bias of the keys has a gradient of exactly 0, as softmax does not see it. AdamW divides by the gradient's size, so
what is learned there is the rounding of either engine; it changes nothing.

"""
    return wrapped(text) + mutants()


def wrapped(text: str) -> str:
    """The page with its paragraphs, but not its headings, tables and pictures, in lines of at most 120 characters."""
    parts = [part if part.startswith(("#", "|", "!")) else fill(part, 120) for part in text.strip().split("\n\n")]
    return "\n\n".join(parts) + "\n\n"


def mutants() -> str:
    """The page's last section."""
    from tests.mutants.table import MUTANTS

    rows = table(
        ["what is wrong", "in", "replaced", "by", "killed by"],
        [[m.name, f"`{m.file}`", code(m.replaced), code(m.by), f"`{m.killed_by}`"] for m in MUTANTS],
    ).replace(" ---: |", " --- |")
    return f"""{MUTANTS_HEADING}
`pytest -k mutant` puts each of these {len(MUTANTS)} small bugs into the source. The test that is named must then fail.

{rows}
"""


def draw(measured: dict[str, dict[str, float]], differences: dict[str, np.ndarray], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tests.model import test_model

    figure = Figure(figsize=(12, 5.5), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for label, what, marker, colour in (
        ("NumPy and PyTorch, float64", "NumPy and PyTorch, float64", "o", "tab:blue"),
        ("NumPy and Hugging Face, float64", "NumPy and Hugging Face, float64", "s", "tab:green"),
        ("NumPy float32, from float64", "float32: NumPy", "o", "tab:orange"),
        ("PyTorch float32, from float64", "float32: PyTorch", "x", "tab:red"),
    ):
        errors = [measured[what].get(kind, np.nan) for kind in KINDS]
        left.plot(errors, range(len(KINDS)), marker, color=colour, label=label, markersize=5)
    left.axvline(test_model.GRADIENTS, color="black", linewidth=1, label="what the tests allow in float64")
    for dtype in (np.float64, np.float32):
        left.axvline(np.finfo(dtype).eps, color="grey", linestyle=":", linewidth=1)
    left.set(xscale="log", xlim=(1e-17, 1e-3), yticks=range(len(KINDS)), yticklabels=KINDS)
    left.set(title="logits, loss and every gradient", xlabel="largest relative error (dotted: one unit of rounding)")
    left.invert_yaxis()
    for dtype, colour in (("float64", "tab:blue"), ("float32", "tab:orange")):
        errors = differences[dtype]
        right.plot(np.where(errors > 0, errors, np.nan), ".", color=colour, markersize=4, label=dtype)
        right.axhline(np.finfo(dtype).eps, color="grey", linestyle=":", linewidth=1)
    right.set(yscale="log", ylim=(1e-17, 1e-3), xlabel="step", ylabel="relative difference")
    right.set(title="loss of NumPy and PyTorch in training")
    for axes in (left, right):
        axes.grid(alpha=0.2)
        axes.legend(loc="center", bbox_to_anchor=(0.56, 0.5), fontsize=7)
    path.parent.mkdir(exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)


def main() -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m tests.report", None)
    path = DOCS / "parity.md"
    if options.only_mutants:
        measured_part = path.read_text(encoding="utf-8").partition(MUTANTS_HEADING)[0]
        path.write_text(measured_part + mutants(), encoding="utf-8")
        print("written: the mutants of docs/parity.md")
        return 0
    measured, differences = measure(options.examples), measure_training(200)
    text = page(measured, options.examples)
    draw(measured, differences, DOCS / "parity.png")
    path.write_text(text, encoding="utf-8")
    print(text.partition(MUTANTS_HEADING)[0])
    print("written: docs/parity.md, docs/parity.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

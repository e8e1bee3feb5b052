"""Pictures of a trained run, from its folder: what the model has learned, seen from inside.

    python -m learn.pictures runs/numpy-small
    python -m learn.pictures runs/numpy-small --out docs/pictures --prompt "ROMEO: O, speak again, bright angel!"

    attention.png         the attention weights of every head on the prompt, and three heads enlarged
    mask.png              what the causal mask does to the scores of one head, and what is never computed
    gelu.png              GELU, its derivative, and which values reach it in the model
    gradients.png         the size of the gradient in every tensor, for one batch, before training and after
    first_steps.png       the size of the gradient in every tensor over the first updates of training, made once more
    grad_norm.png         the norm of the whole gradient over the steps of training
    newton_schulz.png     what each of Muon's five steps makes of the singular values of one gradient
    probabilities.png     what the model expects next, along the prompt, and how surprised it is
    sampling.png          what temperature and top-k do to the distribution after the prompt
    embedding.png         the rows of wte.weight, projected to two dimensions

docs/pictures.md says what to see in each. Nothing is computed a second way: the weights of attention are what
numpygpt.softmax_forward returned while the model ran, GELU's derivative is numpygpt.gelu_backward, and the frequencies
of sampling are counts of numpygpt.sample.
"""

import io
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, SupportsInt, cast

from common.startup import prepare_imports

if __name__ == "__main__":
    prepare_imports()

import numpy as np
import tyro

import numpygpt
from common.cli import parse, run_program
from common.errors import UserError
from common.files import write_atomically
from data.corpus import Corpus, load_corpus
from data.text import normalize_text
from data.tokenizers import Tokenizer
from learn.trace import Trace, trace_numpy
from numpygpt import GPT, GPTConfig, Params, clip_grad_norm
from sample import load_for_sampling
from train_numpy import NumpyEngine
from training.batches import Batches
from training.config import TrainConfig, learning_rate
from training.metrics import read_metrics
from training.run import METRICS, NO_CORPUS, RunConfig, read_config

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MAX_LABELLED = 600  # tokens that embedding.png writes out; of a larger vocabulary these are the first
MAX_PROMPT = 40  # tokens that probabilities.png has room for
MAX_MAP = 20  # tokens of the prompt in attention.png; those before see no others, so their weights are the same
MAX_BATCH = 12  # sequences in a batch of gradients.png and first_steps.png
FIRST_STEPS, MIN_STEPS = 200, 20  # updates in first_steps.png: of a small model, and of a large one
MAX_WORK = 2e11  # parameters times tokens, over all those updates: about ten seconds
DRAWS = 100_000  # of numpygpt.sample, for each setting in sampling.png
VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Options:
    """Draw what a trained model has learned."""

    run: tyro.conf.Positional[Path]  # the folder of the run
    out: Path | None = None  # where the pictures go; None: into the run's folder, under pictures/
    prompt: str | None = None  # the text that the model is shown; None: the beginning of the validation split


@dataclass(frozen=True)
class Subject:
    """What is drawn: a model with its run, and the prompt."""

    config: GPTConfig
    weights: Params  # float64
    tokenizer: Tokenizer
    training: TrainConfig
    metrics: list[dict]
    train_tokens: np.ndarray  # (n,), none of them if the run has no text of its own
    ids: np.ndarray  # (T + 1,) of the prompt
    trace: Trace  # of the model on ids[:-1], with the targets ids[1:]
    left_out: dict[str, str]  # {picture: why it cannot be drawn}

    def labels(self, ids: Iterable[SupportsInt]) -> list[str]:
        """What the tokens stand for, with white space made visible."""
        return [visible(self.tokenizer.decode([int(token)])) for token in ids]


def visible(text: str) -> str:
    """The text with signs in place of white space, and $ kept from opening a formula."""
    return "".join(VISIBLE.get(char, char) for char in text).replace("$", r"\$")


def load_subject(run: Path, prompt: str | None) -> Subject:
    """Everything the pictures need from a run. Raises UserError."""
    config, weights, tokenizer = load_for_sampling(run)
    weights = {name: value.astype(np.float64) for name, value in weights.items()}
    settings = read_config(run)
    corpus = own_corpus(settings)
    longest = min(config.block_size, MAX_PROMPT)
    special = tokenizer.special_tokens if settings.training.special_tokens else ()
    if prompt is not None:
        ids = tokenizer.encode(normalize_text(prompt), allowed_special=special).astype(np.int64)
    elif corpus is not None:
        beginning = tokenizer.encode(corpus.val_text[: 4 * longest], allowed_special=special)
        ids = beginning.astype(np.int64)[: longest + 1]
    else:
        raise UserError(f"prompt must be given: the text that {run} learned from is not here")
    if not 3 <= len(ids) <= longest + 1:
        raise UserError(f"prompt must have 3 to {longest + 1} tokens to be drawn, got {len(ids)}")
    trace = trace_numpy(config, weights, ids[None, :-1], ids[None, 1:])
    train_tokens = tokenizer.encode("" if corpus is None else corpus.train_text, allowed_special=special)
    metrics = read_metrics(run / METRICS)

    left_out = {}
    if corpus is None or was_imported(settings):
        why = "its weights were imported" if was_imported(settings) else f"{settings.training.data} has changed since"
        left_out = dict.fromkeys(
            ("gradients", "first_steps", "newton_schulz"), f"the run's beginning cannot be made again: {why}"
        )
    if not any("grad_norm" in line for line in metrics):
        left_out["grad_norm"] = f"{METRICS} has no gradients yet"
    return Subject(config, weights, tokenizer, settings.training, metrics, train_tokens, ids, trace, left_out)


def own_corpus(settings: RunConfig) -> Corpus | None:
    """The text that a run learned from; None if it has learned from none, or is another now. Raises UserError."""
    if settings.corpus_sha256 == NO_CORPUS:
        return None
    corpus = load_corpus(settings.training.data)
    return corpus if corpus.sha256 == settings.corpus_sha256 else None


def was_imported(settings: RunConfig) -> bool:
    """Whether the run's first weights came from elsewhere: only such a run was once without a corpus."""
    texts = [change.get("data") for change in settings.changes]  # [before, after]
    return settings.corpus_sha256 == NO_CORPUS or any(type(pair) is list and pair[:1] == [None] for pair in texts)


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure, width x height inches, that needs no display."""
    from matplotlib.figure import Figure  # here: it takes longer to load than --help may take

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def png(figure: "Figure") -> bytes:
    """The figure as the content of a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# The pictures


def draw_attention(subject: Subject) -> "Figure":
    """A map for every head: row t shows how token t divides its attention among the tokens up to itself. Above, the
    heads of `remarkable_heads`, enlarged."""
    L, nh = subject.config.n_layer, subject.config.n_head
    labels = subject.labels(subject.ids[:-1][:MAX_MAP])
    maps = {  # (layer, head): (T, T)
        (i, head): probs[:MAX_MAP, :MAX_MAP]
        for i in range(L)
        for head, probs in enumerate(subject.trace.forward[f"h.{i}.attn.probs"][0])
    }
    figure = new_figure(11, 4.6 + 6 * L / nh)
    above, below = cast(np.ndarray, figure.subfigures(2, 1, height_ratios=[4.6, 6 * L / nh]))
    chosen = remarkable_heads(maps, labels)
    for axes, ((i, head), remark) in zip(above.subplots(1, len(chosen), squeeze=False)[0], chosen.items(), strict=True):
        image = draw_map(axes, maps[i, head], labels, rows=True, columns=True)
        axes.set_title(f"layer {i}, head {head}:\n{remark}", fontsize=11)
        axes.set_xlabel("the token it looks at (key)")
        axes.set_ylabel("the token that looks (query)")
    above.colorbar(image, ax=above.axes, label="weight", pad=0.01)
    for axes, ((i, head), probs) in zip(below.subplots(L, nh, squeeze=False).flat, maps.items(), strict=True):
        draw_map(axes, probs, labels, rows=False, columns=False)
        axes.set_title(f"layer {i}, head {head}", fontsize=9, pad=3)
    below.suptitle(f"all {L * nh} heads", fontsize=11)
    return figure


def remarkable_heads(maps: dict[tuple[int, int], np.ndarray], labels: list[str]) -> dict[tuple[int, int], str]:
    """Up to three heads of the maps {(layer, head): (T, T)}, each with what makes it remarkable."""
    T = len(labels)
    before = {key: np.diagonal(probs, -1).mean() for key, probs in maps.items()}
    # Of each key, its mean weight for all queries two or more tokens later; keys with fewer than three of these are out
    looked_at = {
        key: np.array([probs[s + 2 :, s].mean() if T - s - 2 >= 3 else 0 for s in range(T)])
        for key, probs in maps.items()
    }
    entropy = {key: -(probs * np.log(np.maximum(probs, 1e-300))).sum(axis=-1).mean() for key, probs in maps.items()}
    chosen: dict[tuple[int, int], str] = {}
    for score in (before, {key: keys.max() for key, keys in looked_at.items()}, entropy):
        rest = {key: value for key, value in score.items() if key not in chosen}
        if not rest:
            break
        best = max(rest, key=rest.__getitem__)
        if score is before:
            chosen[best] = f"{before[best]:.0%} of its attention goes\nto the character before"
        elif score is entropy:
            chosen[best] = "it looks at many at once:\nnearly an average of the past"
        else:
            s = int(looked_at[best].argmax())
            chosen[best] = f"{looked_at[best][s]:.0%} of its attention, later on,\ngoes back to “{labels[s]}”"
    return chosen


def draw_map(axes: "Axes", values: np.ndarray, labels: list[str], *, rows: bool, columns: bool) -> "AxesImage":
    """One (T, T) map of weights in [0, 1], the future in grey, with the tokens at the sides that are asked for.

    Colours follow the square root of the weight, or small weights could not be told from 0.
    """
    from matplotlib.colors import PowerNorm

    T = len(labels)
    axes.set_facecolor("0.92")
    seen = np.ma.masked_where(~np.tri(T, dtype=bool), values)
    image = axes.imshow(seen, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    size = min(9.0, 150 / T)
    axes.set_xticks(range(T), labels if columns else [], fontsize=size, family="monospace")
    axes.set_yticks(range(T), labels if rows else [], fontsize=size, family="monospace")
    axes.tick_params(length=0, pad=2)
    return image


def draw_mask(subject: Subject) -> "Figure":
    """Left and middle: one head's scores with the mask, and what the softmax makes of them. Right: causal_tiles."""
    n = min(8, len(subject.ids) - 1)
    labels = subject.labels(subject.ids[:n])
    att, probs = (subject.trace.forward[f"h.0.attn.{name}"][0, 0, :n, :n] for name in ("att", "probs"))
    figure = new_figure(12, 4.4)
    left, middle, right = figure.subplots(1, 3)

    seen = np.ma.masked_invalid(att)
    left.set_facecolor("0.92")
    largest = abs(seen).max()
    left.imshow(seen, cmap="PuOr", vmin=-largest, vmax=largest)  # orange is negative, purple positive
    left.set_title("att: scores of layer 0, head 0, masked")
    draw_map(middle, probs, labels, rows=True, columns=True)
    middle.set_title("probs = softmax(att): each row sums to 1")
    for axes, values in ((left, att), (middle, probs)):
        axes.set_xlabel("key")
        axes.set_ylabel("query")
        axes.set_xticks(range(n), labels, fontsize=10, family="monospace")
        axes.set_yticks(range(n), labels, fontsize=10, family="monospace")
        axes.tick_params(length=0)
        for t, s in np.ndindex(n, n):
            value = values[t, s]
            seen_text = f"{value:.2f}" if axes is middle else f"{round(float(value), 1) + 0.0:.1f}"  # 0.0, not -0.0
            text = seen_text if s <= t else "0" if axes is middle else "-∞"
            dark = s <= t and abs(value) > (0.35 if axes is middle else 0.6 * largest)
            axes.text(s, t, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")

    T = 4 * numpygpt.ATTENTION_TILE
    kind = np.zeros((T, T))  # 0 never computed, 1 computed and masked, 2 used
    for queries, keys in numpygpt.causal_tiles(T, T):
        kind[queries, keys] = 1
    kind[np.tri(T, dtype=bool)] += 1
    right.imshow(kind, cmap="Blues", vmin=0, vmax=3, interpolation="nearest")
    right.set_xticks(np.arange(0, T + 1, T // 4))
    right.set_yticks(np.arange(0, T + 1, T // 4))
    right.set_title(f"T = {T}: {np.count_nonzero(kind) / T**2:.1%} of the scores are computed")
    right.set_xlabel("key")
    right.set_ylabel("query")
    for (x, y), text in {(0.3, 0.3): "used", (0.75, 0.25): "never computed"}.items():
        right.text(x * T, (1 - y) * T if text == "used" else y * T, text, ha="center", va="center", fontsize=11)
    right.annotate(
        "masked", (0.96 * T, 0.9 * T), (0.86 * T, 0.68 * T), fontsize=11, ha="center", arrowprops={"arrowstyle": "->"}
    )
    return figure


def draw_gelu(subject: Subject) -> "Figure":
    """GELU and its derivative, and a histogram of what c_fc gives it in all layers, for the prompt."""
    x = np.linspace(-4, 4, 801)
    out, saved = numpygpt.gelu_forward(x)
    slope = numpygpt.gelu_backward(np.ones_like(x), saved)
    hidden = np.stack([subject.trace.forward[f"h.{i}.mlp.hidden (c_fc)"] for i in range(subject.config.n_layer)])
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    counts = axes.twinx()
    shown = hidden[np.abs(hidden) <= 4]
    counts.hist(shown, bins=80, range=(-4, 4), color="0.88")
    counts.set_ylim(0, 2.5 * np.histogram(shown, 80, (-4, 4))[0].max())
    counts.set_yticks([])
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    axes.plot(x, out, color="tab:blue", linewidth=2, label="GELU")
    axes.plot(x, slope, color="tab:red", linewidth=2, label="its derivative")
    axes.fill_between(
        [], [], color="0.88", label=f"what reaches it in this model: {np.mean(hidden < 0):.0%} is negative"
    )
    lowest = out.argmin()
    axes.annotate(
        f"minimum {out[lowest]:.2f}", (x[lowest], out[lowest]), (-3.2, -0.75), arrowprops={"arrowstyle": "->"}
    )
    axes.set_title("GELU dips below 0 before it rises, so its derivative is negative there")
    axes.set_xlabel("x")
    axes.set_ylim(-1, 3)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def draw_gradients(subject: Subject) -> "Figure":
    """The gradient's typical entry in every tensor for the first training batch: fresh weights left, trained right.

    The root of the mean square, and not the norm: a norm grows with the number of entries, and the tensors have from
    128 to 65,536 of them in the small preset.
    """
    from matplotlib import colormaps

    config, training = subject.config, subject.training
    batch_size = min(training.batch_size, MAX_BATCH)
    batch = Batches(subject.train_tokens, config.block_size, batch_size, training.seed).at(0)
    fresh = numpygpt.init_params(config, training.seed, np.float64)

    kinds = list(by_kind(fresh))
    figure = new_figure(10, 1 + 0.5 * len(kinds))
    columns = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, weights, title in zip(
        columns, (fresh, subject.weights), ("before training", "after training"), strict=True
    ):
        loss, grads = GPT(config, weights).loss_and_grads(*batch)
        for place, names in enumerate(by_kind(grads).values()):
            height = 0.8 / len(names)
            for i, name in enumerate(names):
                shade = 0.95 if len(names) == 1 else 0.35 + 0.6 * i / (len(names) - 1)
                color = colormaps["Blues"](shade) if name.startswith("h.") else "0.6"
                size = np.linalg.norm(grads[name]) / math.sqrt(grads[name].size)
                axes.barh(place - 0.4 + height * (i + 0.5), size, height, color=color)
        axes.set_title(f"{title}: loss {loss:.3f}")
        axes.set_xscale("log")
        axes.set_xlabel("typical entry of the gradient (root mean square)")
        axes.grid(axis="x", alpha=0.3)
    columns[0].set_yticks(range(len(kinds)), kinds, family="monospace", fontsize=9)
    columns[0].set_ylim(len(kinds) - 0.4, -0.6)
    layers = (
        f"; blue: a bar for each layer, from 0 (light) to {config.n_layer - 1} (dark)" if config.n_layer > 1 else ""
    )
    figure.suptitle(f"How large is the gradient in each tensor?\ngrey: outside the blocks{layers}", fontsize=11)
    return figure


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """{"mlp.c_fc.weight": its names in all layers}; a parameter outside the blocks is a kind of its own."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.split(".", 2)[-1] if name.startswith("h.") else name, []).append(name)
    return kinds


def first_norms(subject: Subject) -> dict[str, list[float]]:
    """The run's first updates once more, with its seed and recipe, in float32 -> {tensor: its gradient's norms}.

    A batch larger than MAX_BATCH is cut to that. The norms are those before clipping.
    """
    config, training = subject.config, subject.training
    batch_size = min(training.batch_size, MAX_BATCH)
    batches = Batches(subject.train_tokens, config.block_size, batch_size, training.seed)
    engine = NumpyEngine(config, replace(training, dtype="float32"), threads=1)
    affordable = int(MAX_WORK / (engine.num_params() * batch_size * config.block_size))
    norms: dict[str, list[float]] = {name: [] for name in engine.gpt.params}
    for step in range(min(training.max_steps, max(MIN_STEPS, min(FIRST_STEPS, affordable)))):
        _, grads = engine.loss_and_grads(step, [batches.at(step)])
        for name, grad in grads.items():
            norms[name].append(float(np.linalg.norm(grad)))
        clip_grad_norm(grads, engine.grad_clip)
        engine.update(grads, learning_rate(step, training))
    return norms


def draw_first_steps(subject: Subject) -> "Figure":
    """A map of the gradient's typical entry: a row for every tensor, layers side by side, a column for every update."""
    from matplotlib.colors import LogNorm

    norms, kinds = first_norms(subject), by_kind(subject.weights)
    rows = [name for names in kinds.values() for name in names]
    values = np.array([np.array(norms[name]) / math.sqrt(subject.weights[name].size) for name in rows])
    figure = new_figure(10, 1.6 + 0.11 * len(rows) + 0.1 * len(kinds))
    axes = figure.subplots()
    low, high = np.percentile(values[values > 0], [1, 99.9])
    image = axes.imshow(
        np.maximum(values, 1e-30), cmap="viridis", norm=LogNorm(low, high), aspect="auto", interpolation="nearest"
    )
    edges = np.cumsum([0, *map(len, kinds.values())]) - 0.5
    axes.set_yticks((edges[:-1] + edges[1:]) / 2, list(kinds), family="monospace", fontsize=9)
    axes.tick_params(axis="y", length=0)
    for edge in edges[1:-1]:
        axes.axhline(edge, color="white", linewidth=1.5)
    figure.colorbar(image, ax=axes, label="typical entry of the gradient", pad=0.01)
    axes.set_xlabel("update")
    layers = f"in each band a row for every layer, from 0 (top) to {subject.config.n_layer - 1}"
    title = f"How the gradients change over the first {values.shape[1]} updates"
    axes.set_title(f"{title}\n{layers}" if subject.config.n_layer > 1 else title, fontsize=11)
    return figure


def draw_grad_norm(subject: Subject) -> "Figure":
    """The norm of the whole gradient at each logged step, before clipping, and where it is clipped."""
    from matplotlib.ticker import LogLocator, NullFormatter

    norms = [(line["step"], line["grad_norm"]) for line in subject.metrics if line["protocol"] == "batch"]
    figure = new_figure(8, 4)
    axes = figure.subplots()
    axes.semilogy(*zip(*norms, strict=True), color="tab:blue", linewidth=0.9, label="before clipping")
    if subject.training.grad_clip:
        limit = subject.training.grad_clip
        axes.axhline(limit, color="tab:red", linestyle="--", linewidth=1, label=f"clipped to {limit:g}")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    axes.set_ylabel("norm of the gradient")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def draw_newton_schulz(subject: Subject) -> "Figure":
    """Muon's five steps. Left: what they make of any singular value. Right: of those of one matrix's gradient."""
    from matplotlib import colormaps

    config, training = subject.config, subject.training
    batch_size = min(training.batch_size, MAX_BATCH)
    batch = Batches(subject.train_tokens, config.block_size, batch_size, training.seed).at(0)
    name = "h.0.mlp.c_fc.weight"
    grad = GPT(config, subject.weights).loss_and_grads(*batch)[1][name]
    s = np.geomspace(1e-4, 1, 500)
    pairs = np.zeros((len(s), 2, 2))  # of norm 1, so that s stays s when orthogonalize divides by the norm
    pairs[:, 0, 0], pairs[:, 1, 1] = s, np.sqrt(1 - s**2)
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2, sharey=True)
    for steps in range(6):
        color, label = colormaps["viridis"](steps / 5.5), str(steps)
        left.loglog(s, numpygpt.orthogonalize(pairs, steps)[:, 0, 0], color=color, label=label)
        singular_values = np.linalg.svd(numpygpt.orthogonalize(grad, steps), compute_uv=False)
        right.plot(np.arange(1, len(singular_values) + 1), singular_values, ".-", color=color, label=label)
    left.set_ylim(1e-4, 2)
    left.set_xlabel("a singular value, divided by the norm of the matrix")
    left.set_ylabel("what it becomes")
    right.set_xlabel("the singular values, from the largest to the smallest")
    left.set_title("any matrix", fontsize=11)
    right.set_title(f"the gradient of {name}", fontsize=11)
    right.legend(title="steps", fontsize=9)
    for axes in (left, right):
        axes.axhline(1, color="0.5", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    return figure


def draw_probabilities(subject: Subject) -> "Figure":
    """For each token of the prompt the likeliest next ones, and the surprise at the one that came."""
    from matplotlib.patches import Rectangle

    logits, targets = subject.trace.forward["logits"][0], subject.ids[1:]
    probs = numpygpt.softmax_forward(logits)  # (T, V)
    T, ranks = len(targets), min(5, probs.shape[1])
    best = np.argsort(-probs, axis=-1, kind="stable")[:, :ranks]
    figure = new_figure(12, 4.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 3])

    surprise = -np.log(probs[np.arange(T), targets])
    bars = above.bar(range(T), surprise, color="tab:red", alpha=0.7)
    above.bar_label(bars, subject.labels(targets), padding=2, family="monospace", fontsize=10)
    guessing = np.log(probs.shape[1])
    above.axhline(guessing, color="0.5", linestyle="--", linewidth=1)
    above.set_ylim(0, 1.15 * max(guessing, surprise.max()))
    above.set_ylabel("surprise (nats)")
    above.set_title(
        f"How surprised is the model by what comes next (written on each bar)? On average {surprise.mean():.2f} nats; "
        f"guessing (dashed) is log {probs.shape[1]} = {guessing:.2f}",
        fontsize=11,
    )

    image = below.imshow(np.take_along_axis(probs, best, -1).T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for t, rank in np.ndindex(T, ranks):
        token = best[t, rank]
        shade = "white" if probs[t, token] > 0.6 else "black"
        below.text(t, rank, *subject.labels([token]), color=shade, ha="center", va="center", family="monospace")
        if token == targets[t]:
            below.add_patch(
                Rectangle((t - 0.47, rank - 0.47), 0.94, 0.94, fill=False, edgecolor="tab:red", linewidth=2)
            )
    below.set_yticks(range(ranks), [f"{rank + 1}." for rank in range(ranks)])
    below.set_ylabel("expected next")
    below.set_xticks(range(T), subject.labels(subject.ids[:-1]), family="monospace", fontsize=11)
    below.set_xlabel("the text so far, up to this token; above it, what is expected next; framed in red, what came")
    figure.colorbar(image, ax=below, label="probability", pad=0.01)
    return figure


def draw_sampling(subject: Subject) -> "Figure":
    """Frequencies of the next token in many draws of numpygpt.sample, with four settings, where it is least certain."""
    from matplotlib.ticker import PercentFormatter

    logits = subject.trace.forward["logits"][0]
    probs = numpygpt.softmax_forward(logits)
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(axis=-1)
    t = int(entropy.argmax())
    shown = np.argsort(-probs[t], kind="stable")[:16]
    settings: dict[str, tuple[float, int | None]] = {
        "temperature 1: as learned": (1.0, None),
        "temperature 0.5: more cautious": (0.5, None),
        "temperature 2: more daring": (2.0, None),
        "temperature 1, top-k 5": (1.0, 5),
    }
    figure = new_figure(10, 5.5)
    for axes, (title, (temperature, top_k)) in zip(
        figure.subplots(2, 2, sharex=True, sharey=True).flat, settings.items(), strict=True
    ):
        rng = np.random.default_rng(subject.training.seed)
        draws = numpygpt.sample(np.tile(logits[t], (DRAWS, 1)), temperature, top_k, rng)
        shares = np.bincount(draws, minlength=logits.shape[1]) / DRAWS
        others = 1 - shares[shown].sum()
        axes.bar(range(len(shown)), shares[shown], color="tab:blue")
        axes.bar(len(shown) + 0.5, others, color="0.6")
        axes.set_title(title, fontsize=11)
        axes.grid(axis="y", alpha=0.3)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xticks([*range(len(shown)), len(shown) + 0.5], [*subject.labels(shown), "rest"], family="monospace")
    context = "".join(subject.labels(subject.ids[: t + 1]))
    figure.suptitle(f"What comes after “{context}”?", family="monospace", fontsize=11)
    figure.supylabel(f"share of {DRAWS:,} draws", fontsize=11)
    figure.supxlabel("next token, the likeliest first", fontsize=11)
    return figure


def draw_embedding(subject: Subject) -> "Figure":
    """Every row of wte.weight in the plane in which the rows are spread out most."""
    wte = subject.weights["wte.weight"]
    centred = wte - wte.mean(axis=0)
    _, sizes, axes_of_spread = np.linalg.svd(centred, full_matrices=False)
    points = (centred @ axes_of_spread[:2].T)[:MAX_LABELLED]
    share = sizes**2 / (sizes**2).sum()
    width, height = 8, 6.5
    spread = np.ptp(points, axis=0) + 1e-12
    places = spread_labels(points / spread * (width, height), distance=0.19) / (width, height) * spread
    figure = new_figure(width, height)
    axes = figure.subplots()
    axes.plot(*np.stack([points, places], axis=1).transpose(2, 1, 0), color="0.75", linewidth=0.7)
    for token, place in enumerate(places):
        color = KINDS[kind_of(subject.tokenizer.decode([token]))]
        axes.text(*place, *subject.labels([token]), color=color, ha="center", va="center", size=12, family="monospace")
    for kind, shade in KINDS.items():
        axes.plot([], [], "o", color=shade, label=kind)
    axes.legend(fontsize=9)
    axes.set_title("Token embeddings: what stands near what?", fontsize=11)
    axes.set_xlabel(f"first direction: {share[0]:.0%} of the spread")
    axes.set_ylabel(f"second direction: {share[1]:.0%}")
    axes.margins(0.06)
    axes.grid(alpha=0.2)
    return figure


def spread_labels(points: np.ndarray, distance: float, rounds: int = 200) -> np.ndarray:
    """Places (n, 2) for labels near their points (n, 2), no two closer than distance if there is room."""
    places = points + 1e-6 * np.random.default_rng(0).standard_normal(points.shape)  # equal points part too
    for _ in range(rounds):
        apart = places[:, None] - places[None]  # (n, n, 2)
        length = np.linalg.norm(apart, axis=-1) + np.where(np.eye(len(places)), np.inf, 0)
        push = np.maximum(distance - length, 0)
        if not push.any():
            break
        places = places + 0.5 * ((push / length)[..., None] * apart).sum(axis=1)
    return places


KINDS = {
    "vowels": "tab:red",
    "consonants": "tab:blue",
    "capitals": "tab:green",
    "punctuation and space": "tab:purple",
    "others": "0.4",
}


def kind_of(text: str) -> str:
    """Which of KINDS a token belongs to."""
    if len(text) != 1:
        return "others"
    if text in "aeiouy":
        return "vowels"
    if text.islower():
        return "consonants"
    if text.isupper():
        return "capitals"
    return "others" if text.isalnum() else "punctuation and space"


PICTURES: dict[str, Callable[[Subject], "Figure"]] = {
    "attention": draw_attention,
    "mask": draw_mask,
    "gelu": draw_gelu,
    "gradients": draw_gradients,
    "first_steps": draw_first_steps,
    "grad_norm": draw_grad_norm,
    "newton_schulz": draw_newton_schulz,
    "probabilities": draw_probabilities,
    "sampling": draw_sampling,
    "embedding": draw_embedding,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parse(Options, "python -m learn.pictures", argv)
    out = options.run / "pictures" if options.out is None else options.out
    subject = load_subject(options.run, options.prompt)
    for name, draw in PICTURES.items():
        if name in subject.left_out:
            print(f"without {name}.png: {subject.left_out[name]}", file=sys.stderr)
            continue
        path = out / f"{name}.png"
        write_atomically(path, png(draw(subject)))
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))

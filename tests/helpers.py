"""What the tests share: twins of the two engines, and the measure of how far apart two tensors are."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, example, given, settings

import numpygpt
import torchgpt
from training.config import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ("numpy", "torch")
ATTENTIONS = ("sdpa", "explicit")  # of torchgpt
ALL_ENGINES = ("numpy", *ATTENTIONS)
EPS32 = float(np.finfo(np.float32).eps)

Arrays = dict[str, np.ndarray]

MEASURED: dict[str, dict[str, float]] = {}  # what was compared -> tensor -> the largest error seen in this process


def property_test(share: float = 1.0, always: Sequence[dict] = (), **strategies: object) -> Callable:
    """Hypothesis's `given`, with a twin `test.quick` of few examples and no shrinking, for test_mutants.

    share: of the profile's examples
    always: examples that are tried first, every time
    """

    def decorate(test: Callable) -> Callable:
        wrapped = settings(max_examples=math.ceil(share * settings.default.max_examples))(given(**strategies)(test))
        quick = settings(
            max_examples=15,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
            report_multiple_bugs=False,
        )(given(**strategies)(test))
        for keywords in reversed(always):
            wrapped, quick = example(**keywords)(wrapped), example(**keywords)(quick)
        wrapped.quick = quick
        return wrapped

    return decorate


# ---------------------------------------------------------------------------------------------------------------------
# The measure


def rms(x: np.ndarray) -> float:
    """The root of the mean square: the size of a tensor's typical entry."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def relative_error(actual: np.ndarray, expected: np.ndarray, scale: float | None = None) -> tuple[float, tuple]:
    """The largest |actual - expected| / (|expected| + scale) over all entries, and where it is; NaN counts as inf.

    scale: the size below which an entry is rounding: by default the tensor's own RMS. So each entry has a relative
    tolerance, and each tensor its own absolute one.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    error = np.abs(actual - expected)
    size = np.abs(expected) + (rms(expected) if scale is None else scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(error == 0, 0.0, error / size)
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    where = np.unravel_index(ratio.argmax(), ratio.shape)
    return float(ratio[where]), tuple(int(i) for i in where)


def keep(what: str, name: str, error: float) -> None:
    """Note an error in MEASURED, the layers of a model together, if it is the largest so far."""
    kind, worst = re.sub(r"^h\.\d+\.", "h.*.", name), MEASURED.setdefault(what, {})
    worst[kind] = max(worst.get(kind, 0.0), error)


def assert_close(
    what: str,
    name: str,
    actual: np.ndarray,
    expected: np.ndarray,
    gate: float,
    *,
    scale: float | None = None,
    meaning: str,
) -> None:
    """Fail unless actual is within gate of expected, entry by entry; see relative_error. Keeps the worst in MEASURED.

    what: the kind of comparison; name: the tensor; meaning: what it means if they differ
    """
    error, where = relative_error(actual, expected, scale)
    keep(what, name, error)
    if not error <= gate:
        got, wanted = np.asarray(actual)[where], np.asarray(expected)[where]
        raise AssertionError(
            f"{what}, {name}: {error:.2e} of its size off at {where}, {got!r} for {wanted!r}; the gate is {gate:.0e}. "
            f"{meaning}"
        )


def assert_as_exact_as_torch(
    what: str,
    name: str,
    actual: np.ndarray,
    torch32: np.ndarray,
    truth: np.ndarray,
    gate: float,
    *,
    scale: float | None = None,
    meaning: str,
) -> None:
    """Fail unless the float32 tensor `actual` is as near to the float64 truth as rounding allows.

    Rounding is measured: PyTorch computes the same tensor in float32, and errs by so much; where it errs by nothing, by
    luck, one unit in the last place of the tensor's size is allowed it all the same. gate: how many times that.
    """
    assert actual.dtype == np.float32, f"{what}, {name}: dtype {actual.dtype}, expected float32"
    scale = rms(truth) if scale is None else scale
    unit = np.abs(torch32.astype(np.float64) - truth).max() + EPS32 * scale
    error = float(np.abs(actual.astype(np.float64) - truth).max())
    ratio = error / unit if unit > 0 else math.inf if error > 0 else 0.0
    keep(f"{what}: NumPy over PyTorch", name, ratio)
    for engine, array in (("NumPy", actual), ("PyTorch", torch32)):
        keep(f"{what}: {engine}", name, relative_error(array, truth, scale)[0])
    if not ratio <= gate:
        raise AssertionError(
            f"{what}, {name}: {error:.2e} off, {ratio:.1f} times what PyTorch's rounding is; the gate is {gate}. "
            f"{meaning}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Twins


def random_weights(config: numpygpt.GPTConfig, seed: int, gain: float = 1.0) -> Arrays:
    """Weights with which every part of the model matters; fresh ones, with biases of 0 and gains of 1, hide bugs.

    gain scales all matrices: at 1, activations and logits are about 1.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for name, shape in numpygpt.param_shapes(config).items():
        draw = rng.standard_normal(shape)
        if name in ("wte.weight", "wpe.weight"):
            params[name] = 0.5 * gain * draw
        elif len(shape) == 2:
            params[name] = gain / math.sqrt(shape[1]) * draw
        elif name.endswith(".bias"):
            params[name] = 0.3 * draw
        else:
            params[name] = 1 + 0.3 * draw
    return params


def to_torch(arrays: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


def torch_twin(config: numpygpt.GPTConfig, params: Arrays, **options: object) -> "torchgpt.GPT":
    """torchgpt.GPT with these weights and their dtype, in evaluation mode. Attention is explicit if nothing is said."""
    dtype = torch.from_numpy(params["wte.weight"][:1].copy()).dtype
    model = torchgpt.GPT(config, dtype=dtype, **{"attention": "explicit", **options})
    model.load_state_dict(to_torch(params))
    return model.eval()


def make(engine: str, config: numpygpt.GPTConfig, params: Arrays) -> "numpygpt.GPT | torchgpt.GPT":
    """One of ALL_ENGINES, or of ENGINES, with these weights; PyTorch's in evaluation mode."""
    if engine == "numpy":
        return numpygpt.GPT(config, params)
    return torch_twin(config, params, attention="sdpa" if engine == "torch" else engine)


def ids_tensor(ids: np.ndarray) -> torch.Tensor:
    """Ids for torchgpt, in the layout that they have; PyTorch looks up int32 and int64 only."""
    return torch.from_numpy(ids.astype(np.int64) if ids.dtype == np.uint8 else ids.copy(order="K"))


def forward(model: object, idx: np.ndarray, targets: np.ndarray | None = None) -> tuple[np.ndarray, float | None]:
    """Logits and loss as arrays, of either engine; PyTorch's in the mode that the model is in."""
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            logits, loss = model(ids_tensor(idx), None if targets is None else ids_tensor(targets))
        return logits.numpy(), None if loss is None else loss.numpy()[()]
    return model.forward(idx, targets)


def loss_and_grads(model: object, idx: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
    """Loss and gradients as arrays, of either engine; PyTorch's in the mode that the model is in."""
    if isinstance(model, torch.nn.Module):
        model.zero_grad(set_to_none=True)
        _, loss = model(ids_tensor(idx), ids_tensor(targets))
        loss.backward()
        return loss.detach().numpy()[()], {name: param.grad.numpy().copy() for name, param in model.named_parameters()}
    return model.loss_and_grads(idx, targets)


def generate(model: object, idx: np.ndarray, max_new_tokens: int, **options: object) -> np.ndarray:
    """Generated tokens as an array, of either engine."""
    if isinstance(model, torch.nn.Module):
        return model.generate(ids_tensor(idx), max_new_tokens, **options).numpy()
    return model.generate(idx, max_new_tokens, **options)


@contextmanager
def tiles_of(queries: int) -> Iterator[None]:
    """Attention in tiles of so few queries that even short sequences cross their edges."""
    with mock.patch.object(numpygpt, "ATTENTION_TILE", queries):
        yield


def uncancelled_scales(model: numpygpt.GPT, idx: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """For each parameter, the size that its gradient's rounding is relative to.

    The gradient starts from dlogits = softmax - onehot. Where the model is sure and right, nothing is left of that but
    its rounding, and a gradient near 0 is all noise; so the size is that of a gradient that starts from the two terms
    without their cancellation, softmax + onehot, each times a random number.
    """
    idx, targets, count = numpygpt.check_batch(model.config, np.asarray(idx), np.asarray(targets))
    logits, saved = numpygpt.gpt_forward(idx, model.params, model.config)
    terms = numpygpt.softmax_forward(logits)
    rows, columns = np.nonzero(targets >= 0)
    terms[rows, columns, targets[rows, columns]] += 1
    terms[targets < 0] = 0
    terms *= np.random.default_rng(0).standard_normal(terms.shape)
    return {name: rms(grad) for name, grad in numpygpt.gpt_backward(terms / count, saved).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Training


def train_config(**fields: object) -> TrainConfig:
    """A recipe of 100 steps, in float64, with these fields instead of its own."""
    usual = {"max_steps": 100, "batch_size": 4, "learning_rate": 1.0, "min_lr": 0.1, "warmup_steps": 10}
    return TrainConfig(**{**usual, "eval_interval": 10, "dtype": "float64", **fields})


# ---------------------------------------------------------------------------------------------------------------------
# Finite differences

# f'(0) from f at -4h ... 4h, exact for polynomials of degree 8 (Fornberg 1988, table 1)
STENCIL = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}


def central_difference(f: Callable[[float], float], h: float) -> float:
    """The derivative of f at 0: eight values of f instead of two take the error from h^2 to h^8."""
    return sum(weight * (f(k * h) - f(-k * h)) for k, weight in STENCIL.items()) / h


def assert_finite_differences(
    what: str,
    value: Callable[[Arrays], float],
    tensors: Arrays,
    grads: Arrays,
    rng: np.random.Generator,
    gate: float,
    *,
    magnitude: float,
    h: Mapping[str, float] | None = None,
    meaning: str,
) -> None:
    """Fail unless grads are the derivatives of value(tensors) along a random direction of every tensor, and in one
    random entry of it.

    magnitude: of the terms of value, whose rounding divided by h is the witness's own error
    h: the steps of some tensors, by default 1e-3
    """
    for name, tensor in tensors.items():
        step = (h or {}).get(name, 1e-3)
        entry = np.zeros(tensor.shape)
        entry[tuple(rng.integers(n) for n in tensor.shape)] = 1
        for kind, direction in (("direction", rng.standard_normal(tensor.shape)), ("entry", entry)):
            measured = central_difference(lambda s, d=direction: value({**tensors, name: tensor + s * d}), step)  # noqa: B023
            size = max(rms(grads[name]) * float(np.linalg.norm(direction)), 1e-3 * magnitude / step)
            assert_close(
                f"{what} in one {kind}",
                name,
                np.vdot(grads[name], direction),
                np.array(measured),
                gate,
                scale=size,
                meaning=meaning,
            )

"""Muon: what orthogonalize does to singular values, the update from its formula, and both engines as one function."""

import math

import numpy as np
import pytest
import torch

import numpygpt
import torchgpt
from numpygpt import GPTConfig, Muon, orthogonalize, split_params
from tests.helpers import Arrays, assert_close, to_torch

MEANING = "numpygpt.Muon and what it is compared with make different updates."
CONFIG = GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
SHAPES = {"square": (12, 12), "tall": (36, 12), "wide": (12, 48), "one row": (1, 9), "one column": (9, 1)}


def polynomial(s: np.ndarray) -> np.ndarray:
    """What one Newton-Schulz step makes of a singular value, with the published coefficients."""
    return 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5


def five_steps(s: np.ndarray) -> np.ndarray:
    for _ in range(5):
        s = polynomial(s)
    return s


def band() -> tuple[float, float]:
    """What five steps leave of any singular value in [0.0016, 1], from the two places where the polynomial is flat.

    It rises from 0 to its largest value below 1 and falls to its smallest just above 1. Its smallest, largest and what
    becomes of the largest all lie between these two values: so nothing that is once between them ever leaves.
    """
    flat = np.sqrt(np.sort(np.roots([5 * 2.0315, 3 * -4.7750, 3.4445])).real)
    highest, lowest = polynomial(flat)
    assert lowest < polynomial(np.linspace(lowest, highest, 1001)).min() + 1e-6
    assert polynomial(np.linspace(lowest, highest, 1001)).max() < highest
    return float(lowest), float(highest)


def with_singular_values(s: np.ndarray, shape: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, ...]:
    """A random matrix with these singular values: U, V.T and U diag(s) V.T."""
    rng = np.random.default_rng(seed)
    k = len(s)
    U = np.linalg.qr(rng.standard_normal((shape[0], k)))[0]
    Vt = np.linalg.qr(rng.standard_normal((shape[1], k)))[0].T
    return U, Vt, (U * s) @ Vt


# ---------------------------------------------------------------------------------------------------------------------
# orthogonalize


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_orthogonalize_maps_each_singular_value_by_the_polynomial(shape: tuple[int, int]) -> None:
    """Same singular vectors, and of the singular values, over their norm, the polynomial five times: nothing else."""
    s = np.geomspace(1, 1e-4, min(shape))
    U, Vt, g = with_singular_values(s, shape)
    expected = (U * five_steps(s / np.linalg.norm(s))) @ Vt
    # measured: 8e-14; a^5 = 485 enlarges the rounding of the small singular values
    assert_close("orthogonalize", str(shape), orthogonalize(g), expected, 1e-12, meaning=MEANING)


def test_orthogonalize_makes_as_many_steps_as_told() -> None:
    U, Vt, g = with_singular_values(np.array([3.0, 2.0, 1.0]), (4, 5))
    s = np.array([3.0, 2.0, 1.0]) / math.sqrt(14)
    assert_close("orthogonalize", "0 steps", orthogonalize(g, 0), (U * s) @ Vt, 1e-13, meaning=MEANING)
    assert_close("orthogonalize", "1 step", orthogonalize(g, 1), (U * polynomial(s)) @ Vt, 1e-13, meaning=MEANING)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("scale", [1, "tiny", "huge", "denormal"])
@pytest.mark.parametrize("kind", ["random", "rank-deficient", "tall", "wide"])
def test_orthogonalize_brings_singular_values_into_the_band(kind: str, scale: object, dtype: type) -> None:
    """Between the polynomial's lowest and highest value, whatever the shape and the size of the entries."""
    shape = {"tall": (64, 16), "wide": (16, 64)}.get(kind, (24, 24))
    rank = 5 if kind == "rank-deficient" else min(shape)
    _, _, g = with_singular_values(np.geomspace(1, 0.01, rank), shape)
    info = np.finfo(dtype)
    # "denormal" entries have lost digits, but not their place in the band: hence not too small
    factor = {1: 1, "tiny": 1e8 * info.tiny, "huge": info.max, "denormal": info.tiny}[scale]
    g = (g / np.abs(g).max()).astype(dtype) * dtype(factor)
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        out = orthogonalize(g)
    assert out.dtype == dtype
    assert out.shape == shape
    s = np.linalg.svd(out.astype(np.float64), compute_uv=False)
    lowest, highest = band()
    margin = 1e-4 if dtype == np.float32 else 1e-9
    assert s[:rank].min() > lowest - margin
    assert s[:rank].max() < highest + margin
    assert (s[rank:] < 485 * 10 * info.eps).all(), "what was 0 stays 0, but for rounding times a^5"


def test_orthogonalize_leaves_zeros_and_does_not_write_to_its_argument() -> None:
    for dtype in (np.float32, np.float64):
        g = np.zeros((3, 5), dtype)
        g.flags.writeable = False
        np.testing.assert_array_equal(orthogonalize(g), np.zeros((3, 5), dtype))
    stack = np.stack([np.zeros((3, 5)), np.ones((3, 5))])
    stack.flags.writeable = False
    out = orthogonalize(stack)
    assert (out[0] == 0).all()
    assert np.linalg.norm(out[1]) > 0.6


def test_orthogonalize_of_a_stack_is_that_of_each() -> None:
    """Also where the sizes of the matrices differ by many orders."""
    rng = np.random.default_rng(0)
    stack = rng.standard_normal((2, 3, 8, 6)) * np.array([1e-200, 1, 1e200])[:, None, None]
    out = orthogonalize(stack)
    for i in np.ndindex(2, 3):
        assert_close("orthogonalize of a stack", str(i), out[i], orthogonalize(stack[i]), 1e-13, meaning=MEANING)


def test_orthogonalize_of_a_tall_matrix_is_that_of_its_transpose() -> None:
    """To the last bit: the product of the smaller size is taken for both, 16 x 16 and not 64 x 64."""
    g = np.random.default_rng(0).standard_normal((3, 64, 16))
    np.testing.assert_array_equal(orthogonalize(g), orthogonalize(np.ascontiguousarray(g.mT)).mT)


def test_orthogonalize_float32_against_float64() -> None:
    g = np.random.default_rng(0).standard_normal((4, 32, 48))
    out = orthogonalize(g.astype(np.float32))
    assert out.dtype == np.float32
    # measured: 3e-6
    assert_close("orthogonalize", "float32", out, orthogonalize(g), 3e-5, meaning="float32 loses more than rounding.")


@pytest.mark.parametrize("shape", [(3, 12, 12), (36, 12), (2, 12, 48)], ids=str)
def test_orthogonalize_is_the_same_in_pytorch(shape: tuple[int, ...]) -> None:
    g = np.random.default_rng(0).standard_normal(shape)
    twin = torchgpt.orthogonalize(torch.from_numpy(g)).numpy()
    assert_close("orthogonalize in PyTorch", str(shape), twin, orthogonalize(g), 1e-13, meaning=MEANING)
    twin32 = torchgpt.orthogonalize(torch.from_numpy(g).float())
    assert twin32.dtype == torch.float32
    assert_close("orthogonalize in PyTorch", "float32", twin32.numpy(), orthogonalize(g), 3e-5, meaning=MEANING)
    zeros = torchgpt.orthogonalize(torch.zeros(2, 3))
    assert (zeros == 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# The update


def test_muon_trains_the_matrices_inside_blocks() -> None:
    """Four in each block: neither the embeddings and the tied head, nor biases and gains."""
    for params in (numpygpt.GPT(CONFIG).params, dict(torchgpt.GPT(CONFIG).named_parameters())):
        matrices, others = split_params(params)
        linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        assert list(matrices) == [f"h.{i}.{name}.weight" for i in range(2) for name in linear]
        assert {"wte.weight", "wpe.weight", "ln_f.weight", "h.0.ln_1.weight", "h.0.mlp.c_fc.bias"} <= others.keys()
        assert matrices.keys().isdisjoint(others)
        assert matrices.keys() | others.keys() == params.keys()
        assert all(params[name] is param for name, param in (matrices | others).items())


def some_matrices(seed: int = 0) -> Arrays:
    """Two shapes twice, in an order in which they alternate, and one more."""
    rng = np.random.default_rng(seed)
    shapes = {"a": (12, 4), "b": (4, 12), "c": (12, 4), "d": (4, 12), "e": (5, 5)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def test_muon() -> None:
    """Ten steps from the definition, with the singular value decomposition in place of products."""
    params, expected = some_matrices(), some_matrices()
    optimizer = Muon(params, momentum=0.9, weight_decay=0.2)
    history = []
    for t in range(10):
        grads, lr = some_matrices(100 + t), 0.1 / (1 + t)
        before = {name: grad.copy() for name, grad in grads.items()}
        history.append(before)
        optimizer.step(grads, lr)
        for name, param in expected.items():
            m = sum(0.1 * 0.9 ** (t - s) * history[s][name] for s in range(t + 1))
            ahead = 0.9 * m + 0.1 * history[t][name]
            U, s, Vt = np.linalg.svd(ahead, full_matrices=False)
            update = (U * five_steps(s / np.linalg.norm(s))) @ Vt
            scale = math.sqrt(3) if param.shape == (12, 4) else 1
            expected[name] = param - lr * 0.2 * param - lr * scale * update
            assert_close("Muon", f"m.{name}", optimizer.m[name], m, 1e-13, meaning=MEANING)
            assert_close("Muon", name, params[name], expected[name], 1e-13, meaning=MEANING)
            np.testing.assert_array_equal(grads[name], before[name])


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_muon_orthogonalises_q_k_and_v_apart(engine: str) -> None:
    """c_attn moves as three matrices of their own would, and c_proj beside it as itself."""
    rng = np.random.default_rng(0)
    start, grad = rng.standard_normal((2, 4, 6, 6))
    together, apart = (
        (
            {"c_attn.weight": array[:3].reshape(18, 6).copy(), "c_proj.weight": array[3].copy()}
            for array in (start, grad)
        ),
        ({name: matrix.copy() for name, matrix in zip("qkvo", array, strict=True)} for array in (start, grad)),
    )
    moved = []
    for params, grads in (together, apart):
        if engine == "numpy":
            Muon(params).step(grads, 0.1)
            moved.append(np.concatenate(list(params.values())))
        else:
            tensors = to_torch(params)
            for name, gradient in to_torch(grads).items():
                tensors[name].grad = gradient
            torchgpt.Muon(tensors, 0.1).step()
            moved.append(torch.cat(list(tensors.values())).numpy())
    np.testing.assert_array_equal(*moved)


def test_muon_does_not_see_the_scale_of_the_gradients() -> None:
    """Clipping, or a loss in other units, changes nothing, as long as it is the same in all steps."""
    plain, scaled = some_matrices(), some_matrices()
    optimizers = Muon(plain), Muon(scaled)
    for t in range(5):
        grads = some_matrices(100 + t)
        optimizers[0].step(grads, 0.02)
        optimizers[1].step({name: 1e-9 * grad for name, grad in grads.items()}, 0.02)
    for name, param in plain.items():
        assert_close("Muon, gradients times 1e-9", name, scaled[name], param, 1e-13, meaning=MEANING)


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_muon_moves_nothing_without_a_gradient_but_by_decay(engine: str) -> None:
    for weight_decay in (0.0, 0.5):
        params = some_matrices()
        if engine == "numpy":
            moved = some_matrices()
            Muon(moved, weight_decay=weight_decay).step({name: np.zeros_like(p) for name, p in params.items()}, 0.1)
        else:
            tensors = to_torch(params)
            for tensor in tensors.values():
                tensor.grad = torch.zeros_like(tensor)
            torchgpt.Muon(tensors, 0.1, weight_decay=weight_decay).step()
            moved = {name: tensor.numpy() for name, tensor in tensors.items()}
        for name, param in params.items():
            np.testing.assert_array_equal(moved[name], param - 0.1 * (weight_decay * param))


def test_muon_refuses() -> None:
    params = some_matrices()
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        Muon(params, momentum=1)
    with pytest.raises(ValueError, match="weight_decay must be at least 0, got -1"):
        Muon(params, weight_decay=-1)
    with pytest.raises(ValueError, match=r"Muon learns matrices, got bias of shape \(3,\)"):
        Muon({**params, "bias": np.zeros(3)})
    with pytest.raises(ValueError, match=r"Muon learns matrices, got bias of shape \(3,\)"):
        torchgpt.Muon({"bias": torch.zeros(3)}, 0.1)
    frozen = some_matrices()
    frozen["b"].flags.writeable = False
    with pytest.raises(ValueError, match="b must be writable"):
        Muon(frozen)

    optimizer, before = Muon(params), some_matrices()
    grads = some_matrices(1)
    with pytest.raises(ValueError, match="lr must be a finite number of at least 0, got nan"):
        optimizer.step(grads, math.nan)
    with pytest.raises(ValueError, match="missing or unknown: e"):
        optimizer.step({name: grad for name, grad in grads.items() if name != "e"}, 0.1)
    with pytest.raises(ValueError, match="the gradient of e must have shape"):
        optimizer.step({**grads, "e": np.zeros((5, 4))}, 0.1)
    for name, param in params.items():
        np.testing.assert_array_equal(param, before[name])
        np.testing.assert_array_equal(optimizer.m[name], 0 * param)


# ---------------------------------------------------------------------------------------------------------------------
# Beside PyTorch


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_muon_beside_pytorchs_own(dtype: torch.dtype | None) -> None:
    """torch.optim.Muon orthogonalises in bfloat16, of 8 bits: each update may be off by that, and no more."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with PyTorch 2.9")
    ours = to_torch({name: param.astype(np.float32) for name, param in some_matrices().items()})
    theirs = {name: tensor.clone() for name, tensor in ours.items()}
    optimizers = (
        torchgpt.Muon(ours, 0.02, momentum=0.95, weight_decay=0.1, dtype=dtype),
        torch.optim.Muon(theirs.values(), 0.02, momentum=0.95, weight_decay=0.1),
    )
    for t in range(10):
        before = {name: (ours[name].clone(), theirs[name].clone()) for name in ours}
        for name, grad in to_torch(some_matrices(100 + t)).items():
            ours[name].grad, theirs[name].grad = grad.float(), grad.float()
        for optimizer in optimizers:
            optimizer.step()
        for name, (our, their) in before.items():
            error = torch.linalg.matrix_norm((ours[name] - our) - (theirs[name] - their))
            size = torch.linalg.matrix_norm(theirs[name] - their)
            # measured: 0.047 from float32, 0.077 from bfloat16, and without the look-ahead 0.82
            assert error < 0.12 * size, f"step {t}, {name}: {float(error / size):.3f} of the update off"


def test_muon_is_the_same_in_both_engines_for_200_steps() -> None:
    """From one seed, in float64: weights and momentum, those that AdamW trains beside it as well."""
    gpt = numpygpt.GPT(CONFIG, seed=3, dtype=np.float64)
    twin = torchgpt.GPT(CONFIG, seed=3, dtype=torch.float64, attention="explicit").train()
    matrices, others = split_params(gpt.params)
    named = dict(twin.named_parameters())
    twin_matrices, twin_others = split_params(named)
    muon, adamw = Muon(matrices), numpygpt.AdamW(others)
    twin_muon = torchgpt.Muon(twin_matrices, 0.0)
    groups = [
        {"params": [param for param in twin_others.values() if param.ndim >= 2], "weight_decay": 0.1},
        {"params": [param for param in twin_others.values() if param.ndim < 2], "weight_decay": 0.0},
    ]
    twin_adamw = torch.optim.AdamW(groups, betas=adamw.betas)

    rng = np.random.default_rng(0)
    losses = []
    for step in range(200):
        idx = (np.cumsum(rng.integers(1, 4, size=(4, 9)), axis=1) + rng.integers(11, size=(4, 1))) % 11
        idx, targets, rate = idx[:, :-1], idx[:, 1:], 1 - step / 200
        loss, grads = gpt.loss_and_grads(idx, targets)
        losses.append(float(loss))
        muon.step({name: grads[name] for name in matrices}, 0.02 * rate)
        adamw.step({name: grads[name] for name in others}, 5e-3 * rate)
        twin.zero_grad()
        twin(torch.from_numpy(idx.copy()), torch.from_numpy(targets.copy()))[1].backward()
        for group in twin_muon.param_groups:
            group["lr"] = 0.02 * rate
        for group in twin_adamw.param_groups:
            group["lr"] = 5e-3 * rate
        twin_muon.step()
        twin_adamw.step()

    assert np.mean(losses[-20:]) < 1.3, "the steps learn: a uniform guess is log(11) = 2.4, the source has log(3) = 1.1"
    for name, param in gpt.params.items():
        assert_close("200 steps of Muon", name, named[name].detach().numpy(), param, 1e-9, meaning=MEANING)
    for name, param in twin_matrices.items():
        momentum = twin_muon.state[param]["momentum_buffer"].numpy()
        assert_close("200 steps of Muon", f"m.{name}", momentum, muon.m[name], 1e-9, meaning=MEANING)

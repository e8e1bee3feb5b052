"""Start here: every gradient of a tiny GPT, proved twice in a few seconds.

    pytest tests/test_gradients.py

First PyTorch's autograd computes them too. Then, without trusting PyTorch: move one weight a little, and see whether
the loss moves by gradient times step. All in float64, where rounding is about 1e-16.
"""

import numpy as np
import pytest
import torch

import numpygpt
import torchgpt

CONFIG = numpygpt.GPTConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=12, dropout=0.0)

rng = np.random.default_rng(0)
idx = rng.integers(11, size=(3, 8))  # 3 sequences of 8 tokens
targets = rng.integers(11, size=(3, 8))
# Fresh biases are 0 and fresh gains are 1, which would hide mistakes: a little noise on everything.
params = numpygpt.init_params(CONFIG, dtype=np.float64)
params = {name: param + 0.1 * rng.standard_normal(param.shape) for name, param in params.items()}

ours = numpygpt.GPT(CONFIG, params, dtype=np.float64)
loss, grads = ours.loss_and_grads(idx, targets)


@pytest.fixture(scope="module")
def autograd() -> tuple[float, dict[str, np.ndarray]]:
    """The loss and the gradients of the same model in PyTorch."""
    model = torchgpt.GPT(CONFIG, dtype=torch.float64)
    model.load_state_dict({name: torch.from_numpy(param) for name, param in params.items()})
    _, torch_loss = model(torch.from_numpy(idx), torch.from_numpy(targets))
    torch_loss.backward()
    return torch_loss.item(), {name: param.grad.numpy() for name, param in model.named_parameters()}


def test_the_loss_is_pytorchs(autograd: tuple) -> None:
    """A failure: the forward passes differ. Measured: 0."""
    torch_loss, _ = autograd
    assert abs(loss - torch_loss) < 1e-13 * abs(torch_loss)


@pytest.mark.parametrize("name", params)
def test_every_entry_of_every_gradient_is_pytorchs(name: str, autograd: tuple) -> None:
    """A failure: the backward pass of the function that has this parameter, or of one above it. Measured: 6e-15."""
    _, torch_grads = autograd
    scale = np.sqrt(np.mean(torch_grads[name] ** 2))  # the size of a typical entry of this tensor
    assert np.abs(grads[name] - torch_grads[name]).max() < 1e-12 * scale


@pytest.mark.parametrize("name", params)
def test_the_loss_moves_by_gradient_times_step(name: str) -> None:
    """A failure: this gradient is not the slope of the loss.

    (loss(w + h) - loss(w - h)) / 2h is the slope, except for terms of size h^2 and rounding of size 1e-16 / h.
    Measured: 3e-9 of the gradient at most.
    """
    entry = np.unravel_index(np.abs(grads[name]).argmax(), grads[name].shape)  # where it matters most
    h, slope = 1e-5, 0.0
    for sign in (+1, -1):
        nudged = {other: param.copy() for other, param in params.items()}
        nudged[name][entry] += sign * h
        _, nudged_loss = numpygpt.GPT(CONFIG, nudged, dtype=np.float64).forward(idx, targets)
        slope += sign * nudged_loss / (2 * h)
    assert abs(slope - grads[name][entry]) < 1e-7 * abs(grads[name][entry])

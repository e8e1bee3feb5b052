"""What neither engine may swallow: each bad input is a ValueError that says what came and what was expected, and both
engines say it in the same words.
"""

import functools
import itertools
import json
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch

import numpygpt
import torchgpt
from numpygpt import AdamW, GPTConfig
from tests.helpers import ENGINES, forward, generate, loss_and_grads, make, random_weights

CONFIG = GPTConfig(vocab_size=7, block_size=4, n_layer=2, n_head=2, n_embd=6, dropout=0.0)
GOOD = np.array([[1, 2, 3], [4, 5, 6]])
B_AND_T = r"must have shape \(B, T\) with B and T at least 1, got shape "


def put(ids: np.ndarray, value: object) -> np.ndarray:
    ids = ids.copy()
    ids[1, 2] = value
    return ids


# What goes in -> what the message says.
BAD_IDS = {
    "negative": (put(GOOD, -1), r"idx must be in \[0, 7\), got -1$"),
    "too large": (put(GOOD, 7), r"idx must be in \[0, 7\), got 7$"),
    "far too large": (put(GOOD, 2**62), rf"idx must be in \[0, 7\), got {2**62}$"),
    "float": (GOOD.astype(np.float64), r"idx must hold integers, got dtype float64$"),
    "boolean": (GOOD > 2, r"idx must hold integers, got dtype bool$"),
    "one dimension": (GOOD[0], rf"idx {B_AND_T}\(3,\)$"),
    "three dimensions": (GOOD[None], rf"idx {B_AND_T}\(1, 2, 3\)$"),
    "no sequences": (GOOD[:0], rf"idx {B_AND_T}\(0, 3\)$"),
    "no tokens": (GOOD[:, :0], rf"idx {B_AND_T}\(2, 0\)$"),
}
TOO_LONG = np.zeros((2, 5), np.int64), r"T must be at most block_size 4, got idx of shape \(2, 5\)$"
BAD_TARGETS = {
    "below -1": (put(GOOD, -2), r"targets must be in \[0, 7\) \(or -1, to be ignored\), got -2$"),
    "too large": (put(GOOD, 7), r"targets must be in \[0, 7\) \(or -1, to be ignored\), got 7$"),
    "-100": (put(GOOD, -100), r"targets must be in \[0, 7\) \(or -1, to be ignored\), got -100$"),
    "float": (GOOD.astype(np.float64), r"targets must hold integers, got dtype float64$"),
    "one dimension": (GOOD[0], rf"targets {B_AND_T}\(3,\)$"),
    "shorter": (GOOD[:, :2], r"targets must have the shape of idx, \(2, 3\), got \(2, 2\)$"),
    "transposed": (GOOD.T, r"targets must have the shape of idx, \(2, 3\), got \(3, 2\)$"),
    "all ignored": (np.full((2, 3), -1), r"targets must hold at least one id that is not -1, got 6 times -1$"),
}
BAD_SAMPLING = {
    "negative temperature": ({"temperature": -0.5}, r"temperature must be a finite number of at least 0, got -0\.5$"),
    "temperature NaN": ({"temperature": math.nan}, r"temperature must be a finite number of at least 0, got nan$"),
    "infinite temperature": ({"temperature": math.inf}, r"temperature must be a finite number of at least 0, got inf$"),
    "top_k 0": ({"top_k": 0}, r"top_k must be None or an integer of at least 1, got 0$"),
    "negative top_k": ({"top_k": -3}, r"top_k must be None or an integer of at least 1, got -3$"),
    "fractional top_k": ({"top_k": 1.5}, r"top_k must be None or an integer of at least 1, got 1\.5$"),
    "boolean top_k": ({"top_k": True}, r"top_k must be None or an integer of at least 1, got True$"),
}


def message_of(call: Callable[[], object]) -> str:
    """The message of the ValueError that the call must raise."""
    with pytest.raises(ValueError, match=r".") as caught:
        call()
    assert type(caught.value) is ValueError, f"a {type(caught.value).__name__}, not a plain ValueError"
    return str(caught.value)


def call(engine: str, idx: np.ndarray, targets: np.ndarray | None = None, method: str = "forward") -> object:
    model = make(engine, CONFIG, random_weights(CONFIG, 0))
    if engine == "torch":
        return model(torch.tensor(idx), None if targets is None else torch.tensor(targets))
    return getattr(model, method)(idx, targets)


def assert_both_say(pattern: str, message: Callable[[str], str]) -> None:
    """Both engines, and in the same words."""
    said = {engine: message(engine) for engine in ENGINES}
    for engine, words in said.items():
        assert re.search(pattern, words), f"{engine} says {words!r}"
    assert len(set(said.values())) == 1, f"two messages for one mistake: {said}"


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids(case: str) -> None:
    """A failure: NumPy takes -1 for the last token, or PyTorch aborts the process."""
    ids, pattern = BAD_IDS[case]
    assert_both_say(pattern, lambda engine: message_of(lambda: call(engine, ids)))
    if ids.shape == GOOD.shape:
        assert re.search(pattern, message_of(lambda: call("numpy", ids, GOOD, "loss_and_grads")))
    model = {engine: make(engine, CONFIG, random_weights(CONFIG, 0)) for engine in ENGINES}
    assert_both_say(pattern, lambda engine: message_of(lambda: generate(model[engine], ids, 2)))


def test_a_sequence_longer_than_the_window() -> None:
    """A failure: positions that no weight exists for. Generation crops instead: see test_sampling."""
    ids, pattern = TOO_LONG
    assert_both_say(pattern, lambda engine: message_of(lambda: call(engine, ids)))
    assert re.search(pattern, message_of(lambda: call("numpy", ids, ids, "loss_and_grads")))


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_bad_targets(case: str) -> None:
    """A failure: a target is taken for another token, or the mean is over nothing."""
    targets, pattern = BAD_TARGETS[case]
    assert_both_say(pattern, lambda engine: message_of(lambda: call(engine, GOOD, targets)))
    assert re.search(pattern, message_of(lambda: call("numpy", GOOD, targets, "loss_and_grads")))


@pytest.mark.parametrize("case", BAD_SAMPLING)
def test_bad_sampling(case: str) -> None:
    """A failure: a crash or, worse, a text, from a setting that means nothing. The error comes at once, not with the
    first token."""
    options, pattern = BAD_SAMPLING[case]
    models = {engine: make(engine, CONFIG, random_weights(CONFIG, 0)) for engine in ENGINES}
    assert_both_say(pattern, lambda engine: message_of(lambda: generate(models[engine], GOOD, 1, **options)))
    assert_both_say(pattern, lambda engine: message_of(lambda: generate(models[engine], GOOD, 0, **options)))
    prompts = {"numpy": GOOD, "torch": torch.from_numpy(GOOD)}
    assert_both_say(pattern, lambda engine: message_of(lambda: models[engine].stream(prompts[engine], **options)))


@pytest.mark.parametrize("number", [-1, 1.0, True, None])
def test_bad_numbers_of_new_tokens(number: object) -> None:
    """A failure: range() says it, in its own words, or -1 tokens are made."""
    models = {engine: make(engine, CONFIG, random_weights(CONFIG, 0)) for engine in ENGINES}
    pattern = rf"max_new_tokens must be an integer of at least 0, got {number}$"
    assert_both_say(pattern, lambda engine: message_of(lambda: generate(models[engine], GOOD, number)))


@pytest.mark.parametrize("name", ["wte.weight", "h.1.mlp.c_proj.bias", "ln_f.weight"])
def test_weights_that_are_not_finite(name: str) -> None:
    """A failure: a run that has diverged goes on, and writes NaN into its checkpoint."""
    ids = np.full((2, 3), 6)
    pattern = rf"logits must be finite, got {re.escape(name)} with NaN or infinite entries$"

    actions = [
        lambda model: forward(model, ids),
        lambda model: forward(model, ids, ids),
        lambda model: loss_and_grads(model, ids, ids),
        lambda model: generate(model, ids, 1),
    ]
    for value, action in itertools.product((math.nan, math.inf), actions):
        params = random_weights(CONFIG, 0)
        models = {engine: make(engine, CONFIG, params) for engine in ENGINES}
        models["numpy"].params[name].flat[-1] = value
        with torch.no_grad():
            models["torch"].state_dict()[name].view(-1)[-1] = value
        with np.errstate(all="ignore"):
            said = {engine: message_of(functools.partial(action, model)) for engine, model in models.items()}
        assert_both_say(pattern, said.get)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_finite_weights_whose_logits_are_not(dtype: str) -> None:
    """A failure: the message blames weights that are fine; those of float64 as soon as float32 could not hold them."""
    params = {name: param.astype(dtype) for name, param in random_weights(CONFIG, 0).items()}
    params["ln_f.weight"][:] = np.finfo(dtype).max
    models = {engine: make(engine, CONFIG, params) for engine in ENGINES}
    pattern = "logits must be finite, got finite weights too large for their dtype$"
    with np.errstate(all="ignore"):
        assert_both_say(pattern, lambda engine: message_of(lambda: generate(models[engine], GOOD, 1)))


@pytest.mark.parametrize("name", ["wte.weight", "wpe.weight", "h.0.attn.c_proj.bias", "h.1.mlp.c_proj.bias"])
def test_channels_whose_variance_overflows(name: str) -> None:
    """A failure: LayerNorm divides by infinity, all its outputs are 0, and the loss is log V as if nothing were."""
    params = {name: param.astype(np.float32) for name, param in random_weights(CONFIG, 0).items()}
    params[name].flat[::3] = 1e25
    models = {engine: make(engine, CONFIG, params) for engine in ENGINES}
    pattern = "logits must be finite, got finite weights too large for their dtype$"
    with np.errstate(all="ignore"):
        for action in (lambda model: forward(model, GOOD, GOOD), lambda model: generate(model, GOOD, 1)):
            assert_both_say(pattern, lambda engine, do=action: message_of(lambda: do(models[engine])))


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "uint16", "uint32", "uint64"])
def test_ids_may_be_any_integers(dtype: str) -> None:
    """A failure: PyTorch's embedding takes two of these dtypes only, and says so in its own words."""
    models = {engine: make(engine, CONFIG, random_weights(CONFIG, 0)) for engine in ENGINES}
    ids = GOOD.astype(dtype)
    for model in models.values():
        (logits, loss), (same, equal) = forward(model, GOOD, GOOD), forward(model, ids, ids)
        assert np.array_equal(logits, same)
        assert loss == equal
        assert np.array_equal(generate(model, GOOD, 3, temperature=0), generate(model, ids, 3, temperature=0))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_new_tokens_are_int64_whatever_the_prompt(dtype: str) -> None:
    """A failure: a new token does not fit the dtype of the prompt: 284 becomes 28, and is fed back as such."""
    config = GPTConfig(**{**vars(CONFIG), "vocab_size": 300})
    params = random_weights(config, 0)
    params["wte.weight"][:256] *= 0.1  # so that tokens beyond 255 are likely
    texts = []
    for engine in ENGINES:
        model, prompt = make(engine, config, params), GOOD.astype(dtype)
        prompt = prompt if engine == "numpy" else torch.from_numpy(prompt)
        texts += [np.asarray(model.generate(prompt, 8, rng=np.random.default_rng(0)))]
        assert np.asarray(next(model.stream(prompt))).dtype == np.int64
        assert texts[-1].dtype == np.int64
    assert np.array_equal(*texts)
    assert (texts[0] > 255).any()


def test_ids_of_a_dtype_that_numpy_does_not_know() -> None:
    model = torchgpt.GPT(CONFIG)
    ids = torch.zeros((1, 2), dtype=torch.bfloat16)
    assert message_of(lambda: model(ids)) == "idx must hold integers, got dtype bfloat16"
    assert message_of(lambda: model.generate(ids, 1)) == "idx must hold integers, got dtype bfloat16"
    assert message_of(lambda: model(ids.long(), ids)) == "targets must hold integers, got dtype bfloat16"


# ---------------------------------------------------------------------------------------------------------------------
# The configuration, the parameters, the optimizer

BAD_FIELDS = [
    *(
        (name, value)
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")
        for value in (0, -1, 1.0, True)
    ),
    ("n_embd", 7),
    *(("dropout", value) for value in (1.0, -0.1, math.nan, "0.1", True, False, None)),
    *(("bias", value) for value in (1, "yes", None)),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS)
def test_bad_configs(name: str, value: object) -> None:
    """A failure: the error comes later, from somewhere else, and names no field."""
    message = message_of(lambda: GPTConfig(**{**vars(CONFIG), name: value}))
    assert message.startswith(f"{name} must be "), message
    assert repr(value) in message, f"{message!r} does not say what came"


def test_numbers_of_numpy_in_a_config_become_those_of_python() -> None:
    """A failure: a config made of what np.max or a DataFrame gave cannot be saved as JSON."""
    fields = {name: np.int64(value) for name, value in vars(CONFIG).items() if name not in ("dropout", "bias")}
    config = GPTConfig(**fields, dropout=np.float32(0.5), bias=np.bool_(False))
    assert {type(value) for value in vars(config).values()} == {int, float, bool}
    assert json.loads(json.dumps(vars(config))) == {**vars(CONFIG), "dropout": 0.5, "bias": False}
    assert type(GPTConfig(**{**vars(CONFIG), "dropout": 0}).dropout) is float


def without(params: dict, name: str) -> dict:
    return {other: param for other, param in params.items() if other != name}


BAD_PARAMS = {
    "missing": (lambda p: without(p, "ln_f.bias"), "ln_f.bias is missing from params$"),
    "unknown": (lambda p: {**p, "lm_head.weight": p["wte.weight"]}, "lm_head.weight is no parameter of this config"),
    "transposed": (
        lambda p: {**p, "h.0.mlp.c_fc.weight": p["h.0.mlp.c_fc.weight"].T},
        r"h\.0\.mlp\.c_fc\.weight must have shape \(24, 6\), got \(6, 24\)$",
    ),
    "half": (
        lambda p: {**p, "ln_f.bias": p["ln_f.bias"].astype(np.float16)},
        "ln_f.bias must be float32 or float64, got float16$",
    ),
    "integers": (lambda p: {**p, "ln_f.bias": np.ones(6, int)}, "ln_f.bias must be float32 or float64, got int64$"),
    "NaN": (lambda p: {**p, "ln_f.bias": np.full(6, np.nan)}, "ln_f.bias must be finite, got NaN or infinite entries$"),
    "a single NaN": (
        lambda p: {**p, "ln_f.bias": np.where(np.arange(6) == 3, np.nan, p["ln_f.bias"])},
        "ln_f.bias must be finite, got NaN or infinite entries$",
    ),
    "infinite": (
        lambda p: {**p, "ln_f.bias": np.full(6, np.inf)},
        "ln_f.bias must be finite, got NaN or infinite entries$",
    ),
}


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params(case: str) -> None:
    """A failure: weights of another model, or broken ones, are taken."""
    change, pattern = BAD_PARAMS[case]
    message = message_of(lambda: numpygpt.GPT(CONFIG, change(random_weights(CONFIG, 0))))
    assert re.search(pattern, message), message


def test_bad_arguments_of_the_models() -> None:
    """A failure: a mistake in a call is found late, or never."""
    assert_both_say(
        "dtype must be float32 or float64, got",
        lambda engine: message_of(
            (lambda: numpygpt.GPT(CONFIG, dtype=np.float16))
            if engine == "numpy"
            else (lambda: torchgpt.GPT(CONFIG, dtype=torch.float16))
        ).replace("torch.", ""),
    )
    assert "attention must be 'sdpa' or 'explicit', got 'flash'" in message_of(
        lambda: torchgpt.GPT(CONFIG, attention="flash")
    )
    model = numpygpt.GPT(CONFIG)
    assert message_of(lambda: model.loss_and_grads(GOOD, None)) == "targets must be an array of token ids, got None"
    message = message_of(lambda: model.forward(GOOD, rng=[np.random.default_rng(0)]))
    assert message == "rng must be one generator, or one for each of the 2 sequences, got 1"
    for count in (0, 5, -1, 6.0, True):
        message = message_of(lambda count=count: model.loss_and_grads(GOOD, GOOD, count=count))
        assert message == f"count must be an integer of at least 6, got {count}"
    nothing = np.full((2, 3), -1)
    loss, grads = model.loss_and_grads(GOOD, nothing, count=6)  # a part of a batch may have no targets
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


BAD_OPTIMIZERS = {
    "betas": [(1.0, 0.99), (0.9, 1.0), (-0.1, 0.99), (0.9, math.nan), (0.9,), (0.9, 0.99, 0.999)],
    "eps": [0.0, -1e-8, math.nan],
    "weight_decay": [-0.1, math.nan],
}


@pytest.mark.parametrize("name", BAD_OPTIMIZERS)
def test_bad_optimizers(name: str) -> None:
    """A failure: updates that divide by zero, or run away."""
    for value in BAD_OPTIMIZERS[name]:
        message = message_of(lambda value=value: AdamW({"a": np.zeros(2)}, **{name: value}))
        assert message.startswith(f"{name} must be "), message
        assert repr(value) in message, message


@pytest.mark.parametrize("lr", [-1e-3, math.nan, math.inf])
def test_bad_learning_rates(lr: float) -> None:
    """A failure: weights that climb the loss, or become NaN, at once and without a word."""
    params = {"a": np.ones(2)}
    optimizer = AdamW(params)
    message = message_of(lambda: optimizer.step({"a": np.ones(2)}, lr))
    assert message == f"lr must be a finite number of at least 0, got {lr}"
    assert optimizer.t == 0
    assert (params["a"] == 1).all()
    assert not optimizer.m["a"].any()


def test_gradients_of_other_parameters() -> None:
    """A failure: a parameter that got no gradient is silently left as it is."""
    optimizer = AdamW({"a": np.zeros(2), "b": np.zeros(2)})
    for grads in ({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}, {}):
        message = message_of(lambda grads=grads: optimizer.step(grads, 0.1))
        assert message.startswith("grads must have the names of params; missing or unknown: ")
    assert optimizer.t == 0, "a step that failed was counted"


def test_gradients_of_other_shapes() -> None:
    """A failure: NumPy stretches a gradient to the shape of its parameter, or stops halfway through the update."""
    optimizer = AdamW({"a": np.zeros((2, 2)), "b": np.zeros(2)})
    message = message_of(lambda: optimizer.step({"a": np.ones((2, 2)), "b": np.ones(1)}, 0.1))
    assert message == "the gradient of b must have shape (2,), got (1,)"
    assert optimizer.t == 0, "a step that failed was counted"
    assert not optimizer.m["a"].any(), "a step that failed has begun"


def test_weights_that_cannot_be_learned() -> None:
    """A failure: the first step moves m and v, and only then finds that the weights are read-only."""
    weight = np.zeros(2)
    weight.flags.writeable = False
    message = message_of(lambda: AdamW({"a": weight}))
    assert message == "a must be writable to be learned, got a read-only array: copy it first"


@pytest.mark.parametrize("gpt", [numpygpt.GPT, torchgpt.GPT])
@pytest.mark.parametrize("seed", [-1, 1.5, True, "1"])
def test_bad_seeds(gpt: type, seed: object) -> None:
    """A failure: an error from within NumPy that does not say which argument is meant."""
    assert message_of(lambda: gpt(CONFIG, seed=seed)) == f"seed must be an integer of at least 0, got {seed!r}"


@pytest.mark.parametrize("columns", [0, -64, 1.5])
def test_bad_padding(columns: object) -> None:
    """A failure: a division by zero, far from the argument that is meant."""
    message = message_of(lambda: torchgpt.GPT(CONFIG, pad_vocab_to=columns))
    assert message == f"pad_vocab_to must be an integer of at least 1, got {columns}"


@pytest.mark.parametrize("dtype", [np.float16, np.int64, "bfloat16", None])
def test_bad_dtypes_of_weights(dtype: object) -> None:
    """A failure: an error from within NumPy, or a model of a dtype that nothing here is tested with."""
    message = message_of(lambda: numpygpt.GPT(CONFIG, dtype=dtype))
    assert message.startswith("dtype must be float32 or float64, got "), message


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_bad_clipping(max_norm: float) -> None:
    """A failure: all gradients become 0, or change their sign."""
    grads = {"a": np.ones(2)}
    assert message_of(lambda: numpygpt.clip_grad_norm(grads, max_norm)) == f"max_norm must be positive, got {max_norm}"
    assert (grads["a"] == 1).all()

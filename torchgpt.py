"""The GPT of numpygpt.py in PyTorch: the same names in the same order, and autograd instead of the backward passes.

Read it beside numpygpt.py, which explains each part; comments here say what PyTorch does differently. state_dict() has
exactly the names, shapes and layout of numpygpt's params, so weights move either way with load_state_dict and no
transposition. The letters B, T, C, V, L, nh and hs are those of numpygpt.py.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from numpygpt import (
    NEWTON_SCHULZ,
    GPTConfig,
    check_batch,
    check_count,
    check_finite,
    check_ids,
    check_sampling,
    init_params,
    is_integer,
)

KVCache = tuple[Tensor, Tensor]  # the keys and the values of one layer


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """PyTorch's function of this name written out, with the numbered steps of numpygpt.py. Shapes are as there."""
    hs, queries, keys = q.shape[-1], q.shape[-2], k.shape[-2]
    scores = q @ k.transpose(-1, -2)  # 1.
    att = scores / math.sqrt(hs)  # 2.
    future = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(1 + keys - queries)
    att = att.masked_fill(future, -math.inf)  # 3.
    probs = att.softmax(dim=-1)  # 4.
    weights = F.dropout(probs, dropout)  # 5.
    return weights @ v  # 6.


class Attention(nn.Module):
    """Causal multi-head self-attention: x (B, T, C) -> (B, T, C).

    attention "sdpa" is PyTorch's fused kernel (FlashAttention where the hardware has it), which never stores the
    (T, T) matrix; "explicit" is the function above, for reading and for comparing dropout masks.
    dropout: a rate for this call, whatever mode the module is in; so are those of MLP and Block
    """

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.attention = config.n_head, attention
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x: Tensor, dropout: float = 0.0, kv_cache: KVCache | None = None, start: int = 0) -> Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if kv_cache is not None:
            k_cache, v_cache = kv_cache
            end = start + T
            k_cache[:, :, start:end], v_cache[:, :, start:end] = k, v
            k, v = k_cache[:, :, :end], v_cache[:, :, :end]

        if self.attention == "explicit":
            heads = scaled_dot_product_attention(q, k, v, dropout)
        else:
            # The kernel's causal mask is for as many queries as keys. In generation there may be fewer, but then it is
            # a single one (see _stream): the last, which sees all keys. bool(), because torch.compile may make T a
            # symbol, and the kernel refuses a symbolic answer.
            heads = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=bool(T > 1))

        y = heads.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), dropout)


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between them, four times as wide inside: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C, bias=config.bias)
        self.c_proj = nn.Linear(4 * C, C, bias=config.bias)

    def forward(self, x: Tensor, dropout: float = 0.0) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(hidden), dropout)


class Block(nn.Module):
    """One transformer block, (B, T, C) -> (B, T, C): each branch reads the residual stream x and adds to it."""

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, attention)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, dropout: float = 0.0, kv_cache: KVCache | None = None, start: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), dropout, kv_cache, start)
        x = x + self.mlp(self.ln_2(x), dropout)
        return x


class GPT(nn.Module):
    """The whole model. Its initial weights are bit for bit those of numpygpt.GPT for the same seed and dtype.

    config: the sizes
    seed, dtype: of the initial weights, float32 or float64
    attention: "sdpa" or "explicit", see Attention
    pad_vocab_to: the head computes as many columns as the next multiple of this, and leaves those beyond V out of the
        logits: same function, same parameters, but a width that a GPU's tensor cores like (64, say)
    recompute: in training keep only each block's input, and compute the block once more in the backward pass: less
        memory for about a third more time
    checked: forward checks ids, targets and logits, and each time the CPU must wait for the GPU; with False the caller
        must make sure that the batch is valid and the loss finite

    Raises ValueError that names the argument.
    """

    def __init__(
        self,
        config: GPTConfig,
        *,
        seed: int = 1337,
        dtype: torch.dtype = torch.float32,
        attention: str = "sdpa",
        pad_vocab_to: int = 1,
        recompute: bool = False,
        checked: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        if attention not in ("sdpa", "explicit"):
            raise ValueError(f"attention must be 'sdpa' or 'explicit', got {attention!r}")
        if not is_integer(pad_vocab_to) or pad_vocab_to < 1:
            raise ValueError(f"pad_vocab_to must be an integer of at least 1, got {pad_vocab_to!r}")
        self.config, self.recompute, self.checked = config, recompute, checked
        self.vocab_padding = -config.vocab_size % pad_vocab_to
        with torch.device("meta"):  # names and shapes only: the weights follow at once
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
            self.h = nn.ModuleList(Block(config, attention) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        weights = init_params(config, seed, np.float32 if dtype == torch.float32 else np.float64)
        self.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()}, assign=True)

    def num_params(self) -> int:
        """How many numbers are learned. The head adds none: it is wte.weight."""
        return sum(param.numel() for param in self.parameters())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) integers, targets (B, T) integers or None -> logits (B, T, V), mean loss in nats or None.

        Dropout is on in training mode. Raises ValueError on bad ids, targets or weights, as numpygpt does; not inside
        torch.compile, which cannot look at numbers, and not if the model was made with checked=False.
        """
        checked = self.checked and not torch.compiler.is_compiling()
        if checked:
            check_batch(self.config, as_array("idx", idx), None if targets is None else as_array("targets", targets))
        logits = self._logits(idx, self.config.dropout if self.training else 0.0)
        if checked:
            self._check_finite(logits)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=-1)

    def _logits(
        self, idx: Tensor, dropout: float = 0.0, kv_cache: list[KVCache] | None = None, start: int = 0
    ) -> Tensor:
        """numpygpt's gpt_forward: idx (B, T) -> logits (B, T, V), or (B, 1, V) with a kv_cache."""
        x = self.wte(idx.long()) + self.wpe.weight[start : start + idx.shape[1]]
        x = F.dropout(x, dropout)
        for i, block in enumerate(self.h):
            if self.recompute and self.training and kv_cache is None:
                # Without dropout there is no random state to restore, which a CUDA graph could not record.
                x = checkpoint(block, x, dropout, use_reentrant=False, preserve_rng_state=dropout > 0)
            else:
                x = block(x, dropout, None if kv_cache is None else kv_cache[i], start)
        if kv_cache is not None:
            x = x[:, -1:]  # generation needs only the last token's logits
        head = self.wte.weight  # the tied head: wte once more
        if self.vocab_padding:
            head = F.pad(head, (0, 0, 0, self.vocab_padding))
        return F.linear(self.ln_f(x), head)[..., : self.config.vocab_size]

    def _check_finite(self, logits: Tensor) -> None:
        """Raises ValueError if a logit is NaN or infinite. If all are finite, the CPU waits for the device only once.

        In float64, which holds every finite number of the other dtypes, bfloat16 included.
        """
        if not torch.isfinite(logits).all():
            params = {name: param.detach().double().cpu().numpy() for name, param in self.named_parameters()}
            check_finite(logits.detach().double().cpu().numpy(), params)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Tensor:
        """Continue each row of idx (B, T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens) int64.

        The other arguments, and the errors raised, are those of `stream`.
        """
        check_count("max_new_tokens", max_new_tokens)
        stream = self.stream(idx, temperature=temperature, top_k=top_k, rng=rng)
        return torch.cat([idx.long(), *(next(stream)[:, None] for _ in range(max_new_tokens))], dim=1)

    def stream(
        self,
        idx: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue each row of idx (B, T), T >= 1, without end: yields the next tokens (B,) int64, one step at a time.

        Arguments and errors are those of numpygpt's GPT.stream, and so, from the same weights and rng, are the tokens.
        They are on idx's device. Never with dropout, whatever the model's mode.
        """
        check_ids("idx", as_array("idx", idx), 0, self.config.vocab_size)
        check_sampling(temperature, top_k)
        return self._stream(idx.long(), temperature, top_k, np.random.default_rng() if rng is None else rng)

    def _stream(self, idx: Tensor, temperature: float, top_k: int | None, rng: np.random.Generator) -> Iterator[Tensor]:
        """The loop behind `stream`, with the key/value cache that numpygpt explains."""
        config, new_empty = self.config, self.wte.weight.new_empty
        shape = (len(idx), config.n_head, config.block_size, config.n_embd // config.n_head)
        kv_cache = [(new_empty(shape), new_empty(shape)) for _ in range(config.n_layer)]
        window, start = idx[:, -config.block_size :], 0
        while True:
            with torch.no_grad():
                logits = self._logits(window[:, start:], 0.0, kv_cache, start)
            self._check_finite(logits)
            tokens = sample(logits[:, -1], temperature, top_k, rng).to(idx.device)
            yield tokens
            start = window.shape[1]
            window = torch.cat([window, tokens[:, None]], dim=1)
            if window.shape[1] > config.block_size:  # the window is full
                window, start = window[:, 1:], 0


def as_array(name: str, ids: Tensor) -> np.ndarray:
    """The ids for numpygpt's checks. Raises ValueError for floats here, since NumPy has no bfloat16."""
    if ids.is_floating_point():
        raise ValueError(f"{name} must hold integers, got dtype {str(ids.dtype).removeprefix('torch.')}")
    return ids.cpu().numpy()


def sample(logits: Tensor, temperature: float, top_k: int | None, rng: np.random.Generator) -> Tensor:
    """Draw one token for each row by inverting the cumulative distribution: logits (B, V) -> (B,) int64, on the CPU."""
    logits = logits.detach().cpu().double()
    if temperature == 0:
        return logits.argmax(dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    cdf = ((logits - logits.amax(dim=-1, keepdim=True)) / temperature).exp().cumsum(dim=-1)
    total = cdf[:, -1:]
    threshold = torch.from_numpy(rng.random(len(logits)))[:, None] * total
    threshold = torch.minimum(threshold, total.nextafter(torch.zeros(())))
    return torch.searchsorted(cdf, threshold, right=True)[:, 0]


def decay_groups(params: Iterable[Tensor], weight_decay: float) -> list[dict]:
    """The parameters in two groups for torch.optim.AdamW: as in numpygpt's AdamW, only matrices decay."""
    params = list(params)
    return [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Bring all singular values of a matrix near 1: g (..., m, n) -> (..., m, n). The very steps of numpygpt's."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT.contiguous() if tall else g
    tiny = torch.finfo(g.dtype).tiny
    x = x / (x.abs().amax(dim=(-2, -1), keepdim=True) + tiny)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + tiny)
    identity = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        gram = x @ x.mT
        x = (a * identity + b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """numpygpt's Muon as a PyTorch optimizer: the same arithmetic, in the dtype of the parameters.

    PyTorch's own torch.optim.Muon always orthogonalises in bfloat16, one matrix at a time, and q, k and v as one.

    params: the matrices to learn by their names (see split_params)
    dtype: to orthogonalise in; None: that of the parameters. bfloat16 is faster on a GPU and puts an update a few
        hundredths off: less than what five steps leave between a singular value and 1
    """

    def __init__(
        self,
        params: dict[str, Tensor],
        lr: float | Tensor,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params.values(), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.params, self.dtype = params, dtype
        for name, param in params.items():
            if param.ndim != 2:
                raise ValueError(f"Muon learns matrices, got {name} of shape {tuple(param.shape)}: leave it to AdamW")
        self.found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure that returns a loss
        """One update of all parameters from their .grad. Matrices of one shape are orthogonalised together.

        Where found_inf is 1, nothing changes, as in PyTorch's fused optimizers: so a GPU can skip an update by itself.
        """
        (group,) = self.param_groups
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for name, param in self.params.items():
            state = self.state[param]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(param)
            m = momentum * state["momentum_buffer"] + (1 - momentum) * param.grad
            ahead = momentum * m + (1 - momentum) * param.grad
            self.set(state["momentum_buffer"], m)
            maps = 3 if name.endswith("c_attn.weight") else 1
            for pair in zip(param.chunk(maps), ahead.chunk(maps), strict=True):
                by_shape.setdefault(pair[0].shape, []).append(pair)
        for (rows, columns), pairs in by_shape.items():
            scale = math.sqrt(max(1, rows / columns))
            stack = torch.stack([ahead for _, ahead in pairs])
            updates = orthogonalize(stack.to(self.dtype or stack.dtype)).to(stack.dtype)
            for (param, _), update in zip(pairs, updates, strict=True):
                self.set(param, param - lr * (scale * update + weight_decay * param))

    def set(self, tensor: Tensor, value: Tensor) -> None:
        """Give tensor this value, unless found_inf is 1."""
        tensor.copy_(value if self.found_inf is None else torch.where(self.found_inf > 0, tensor, value))

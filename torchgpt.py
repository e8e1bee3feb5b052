"""The GPT of numpygpt.py in PyTorch: the same names in the same order, and autograd in place of the backward passes.

Read it beside numpygpt.py, which explains each part; here stands what PyTorch does differently. state_dict() has just
the names, shapes and layout of numpygpt's params, so weights move either way with load_state_dict and no transposition.
The letters B, T, C, V, L, nh and hs are those of numpygpt.py.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from numpygpt import (
    GPTConfig,
    check_batch,
    check_count,
    check_finite,
    check_ids,
    check_sampling,
    init_params,
    is_integer,
)

Past = tuple[Tensor, Tensor, int]  # (keys, values, start), as at numpygpt's attention_forward


class Attention(nn.Module):
    """Causal multi-head self-attention: x (B, T, C) -> (B, T, C).

    attention "sdpa" is PyTorch's fused kernel (FlashAttention where the hardware has it), which never stores the
    (T, T) matrix; "explicit" writes out what it computes, for reading and for comparing dropout masks.
    """

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.dropout, self.attention = config.n_head, config.dropout, attention
        self.c_attn = nn.Linear(C, 3 * C, bias=config.bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        B, T, C = x.shape
        hs = C // self.n_head
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, hs).permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        if past is not None:
            keys, values, start = past
            keys[:, :, start : start + T], values[:, :, start : start + T] = k, v
            k, v = keys[:, :, : start + T], values[:, :, : start + T]

        p = self.dropout if self.training else 0.0
        if self.attention == "explicit":
            att = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(hs))
            past_or_self = torch.ones(att.shape[-2:], dtype=torch.bool, device=x.device).tril(att.shape[-1] - T)
            att = att.masked_fill(~past_or_self, -math.inf)
            heads = F.dropout(att.softmax(dim=-1), p) @ v
        else:
            # Several queries have no past (see _stream), so the mask is square; a single one, the last, sees all.
            # bool(), because torch.compile may make T a symbol, and the kernel refuses a symbolic answer.
            heads = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=bool(T > 1))

        y = heads.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), p)


class MLP(nn.Module):
    """Two linear layers with a tanh GELU between them, four times as wide inside: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.dropout = config.dropout
        self.c_fc = nn.Linear(C, 4 * C, bias=config.bias)
        self.c_proj = nn.Linear(4 * C, C, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


class Block(nn.Module):
    """One transformer block, (B, T, C) -> (B, T, C): each branch reads the residual stream x and adds to it."""

    def __init__(self, config: GPTConfig, attention: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, attention)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), past)
        x = x + self.mlp(self.ln_2(x))
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
        vouches for the batch and watches the loss

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
        """How many numbers are learnt. The head adds none: it is wte.weight."""
        return sum(param.numel() for param in self.parameters())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T) integers, targets (B, T) integers or None -> logits (B, T, V), mean loss in nats or None.

        Dropout is on in training mode. Raises ValueError on bad ids, targets or weights, as numpygpt does; not inside
        torch.compile, which cannot look at numbers, and not if the model was made with checked=False.
        """
        checked = self.checked and not torch.compiler.is_compiling()
        if checked:
            check_batch(self.config, as_array("idx", idx), None if targets is None else as_array("targets", targets))
        logits = self._logits(idx)
        if checked:
            self._check_finite(logits)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=-1)

    def _logits(self, idx: Tensor, pasts: list[Past] | None = None) -> Tensor:
        """idx (B, T) -> logits (B, T, V), or (B, 1, V) with pasts."""
        start = 0 if pasts is None else pasts[0][2]
        x = self.wte(idx.long()) + self.wpe.weight[start : start + idx.shape[1]]
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.h):
            if self.recompute and self.training:
                # Without dropout there is no generator to set back, which a CUDA graph could not record.
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=self.config.dropout > 0)
            else:
                x = block(x, None if pasts is None else pasts[i])
        if pasts is not None:
            x = x[:, -1:]  # whoever continues a text needs the logits after its last token only
        head = self.wte.weight  # the tied head: wte once more
        if self.vocab_padding:
            head = F.pad(head, (0, 0, 0, self.vocab_padding))
        return F.linear(self.ln_f(x), head)[..., : self.config.vocab_size]

    def _check_finite(self, logits: Tensor) -> None:
        """Raises ValueError if a logit is NaN or infinite. If all are finite, the device is asked once."""
        if not torch.isfinite(logits).all():
            params = {name: param.detach().float().cpu().numpy() for name, param in self.named_parameters()}
            check_finite(logits.detach().float().cpu().numpy(), params)

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Tensor:
        """Continue each row of idx (B, T), T >= 1, by max_new_tokens tokens -> (B, T + max_new_tokens).

        The other arguments, and the errors raised, are those of `stream`.
        """
        check_count("max_new_tokens", max_new_tokens)
        stream = self.stream(idx, temperature=temperature, top_k=top_k, rng=rng)
        return torch.cat([idx, *(next(stream)[:, None] for _ in range(max_new_tokens))], dim=1)

    def stream(
        self,
        idx: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        rng: np.random.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Continue each row of idx (B, T), T >= 1, without end: yields the next tokens (B,), one step at a time.

        Arguments and errors are those of numpygpt's GPT.stream, and so, from the same weights and rng, are the tokens;
        these have idx's dtype and device. Never with dropout, whatever the model's mode.
        """
        check_ids("idx", as_array("idx", idx), 0, self.config.vocab_size)
        check_sampling(temperature, top_k)
        return self._stream(idx, temperature, top_k, np.random.default_rng() if rng is None else rng)

    def _stream(self, idx: Tensor, temperature: float, top_k: int | None, rng: np.random.Generator) -> Iterator[Tensor]:
        """The loop behind `stream`, with the key/value cache that numpygpt explains."""
        config, B = self.config, len(idx)
        kept_shape = (config.n_layer, 2, B, config.n_head, config.block_size, config.n_embd // config.n_head)
        kept, start = self.wte.weight.new_empty(kept_shape), 0
        window = idx[:, -config.block_size :]
        while True:
            with torch.no_grad(), without_dropout(self):
                logits = self._logits(window[:, start:], [(keys, values, start) for keys, values in kept])
            self._check_finite(logits)
            tokens = sample(logits[:, -1], temperature, top_k, rng).to(idx)
            yield tokens
            start = window.shape[1]
            window = torch.cat([window, tokens[:, None]], dim=1)
            if window.shape[1] > config.block_size:
                window, start = window[:, 1:], 0


def as_array(name: str, ids: Tensor) -> np.ndarray:
    """The ids for numpygpt's checks. Raises ValueError for floats here: NumPy has no bfloat16 to be told of."""
    if ids.is_floating_point():
        raise ValueError(f"{name} must hold integers, got dtype {str(ids.dtype).removeprefix('torch.')}")
    return ids.cpu().numpy()


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards the mode that the model was in before."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def sample(logits: Tensor, temperature: float, top_k: int | None, rng: np.random.Generator) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution: logits (B, V) -> (B,) int64, on the CPU."""
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


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The model's parameters in two groups for torch.optim: as in numpygpt's AdamW, only matrices decay."""
    params = list(model.parameters())
    return [
        {"params": [param for param in params if param.ndim >= 2], "weight_decay": weight_decay},
        {"params": [param for param in params if param.ndim < 2], "weight_decay": 0.0},
    ]

"""How many floating-point operations a model takes: counted, and by the usual estimate."""

import math

from numpygpt import GPTConfig, param_shapes


def forward_flops_per_token(config: GPTConfig) -> float:
    """Floating-point operations of the forward pass' matrix products, a token, on average over a full window.

    A product with a matrix of n entries is n multiplications and n additions. The lookups are none. A token at place t
    attends to t + 1 tokens, with C multiplications and additions each for the scores, and as many for the values. The
    backward pass has twice as many.
    """
    shapes = param_shapes(config).items()
    matrices = sum(math.prod(shape) for name, shape in shapes if len(shape) == 2 and name != "wpe.weight")
    attended = (config.block_size + 1) / 2
    return 2 * matrices + config.n_layer * 4 * config.n_embd * attended


def training_flops_per_token(config: GPTConfig) -> int:
    """The usual estimate for learning from one token, forward and backward: 6 for each weight, and attention's.

    Chowdhery et al. 2022 (PaLM), appendix B: it takes all parameters for entries of matrices, and has every token
    attend to the whole window. Position embeddings multiply nothing and are left out.
    """
    weights = sum(math.prod(shape) for name, shape in param_shapes(config).items() if name != "wpe.weight")
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size

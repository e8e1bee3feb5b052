"""The table of mutants: file -> the test that fails -> what is wrong, what is replaced, by what.

`python -m tests.report` prints it as a page.
"""

from learn.mistakes import MISTAKES
from tests.mutants import Mutant

# numpygpt.py's functions that are exercises have their mutants in learn/mistakes.py. Here is the test that fails for
# all those of a function, or else for the one mutant that is named.
KILLERS_OF_MISTAKES = {
    "softmax_backward": "test_layers.py::test_layer_parity_float64[softmax]",
    "cross_entropy_backward": "test_layers.py::test_layer_parity_float64[cross_entropy]",
    "linear_backward": "test_layers.py::test_layer_parity_float64[linear]",
    "layernorm_backward": "test_layers.py::test_layer_parity_float64[layernorm]",
    "gelu_backward": "test_layers.py::test_layer_finite_differences[gelu]",
    "embedding_backward": "test_layers.py::test_layer_parity_float64[embedding]",
    "dropout_forward": "test_dropout.py::test_masks_have_the_right_rate_and_scale",
    "evaluation scaled by 1 - p": "test_semantics.py::test_evaluation_does_not_depend_on_dropout[numpy]",
    "one mask in all places": "test_dropout.py::test_every_place_and_every_sequence_has_a_mask_of_its_own",
    "dropout_backward": "test_layers.py::test_layer_parity_float64[dropout]",
    "scaled_dot_product_attention_backward": "test_dropout.py::test_dropout_parity",
    "block_backward": "test_layers.py::test_layer_parity_float64[block]",
    "gpt_backward": "test_dropout.py::test_dropout_parity",
    "clip_grad_norm": "test_trajectory.py::test_clip_parity",
    "a norm that is not finite makes all gradients NaN": (
        "test_trajectory.py::test_clipping_leaves_a_norm_that_is_not_finite_alone[nan]"
    ),
    "AdamW.step": "test_trajectory.py::test_adamw_parity",
    "biases and gains decay": "test_semantics.py::test_exactly_the_matrices_decay",
    "gains decay, because their name ends in weight": "test_semantics.py::test_exactly_the_matrices_decay",
    "no decay": "test_semantics.py::test_exactly_the_matrices_decay",
    "sample": "test_sampling.py::test_the_sampler_inverts_the_distribution[numpy]",
    "top-k keeps one too many": "test_sampling.py::test_top_k_keeps_ties_and_nothing_else[numpy]",
    "top-k drops what ties with the k-th": "test_sampling.py::test_top_k_keeps_ties_and_nothing_else[numpy]",
    "one random number for all rows": "test_sampling.py::test_sampler_parity",
    "u = 0 draws what has no probability": (
        "test_sampling.py::test_no_token_without_probability_is_drawn_at_the_ends[numpy]"
    ),
    "the sampler works in float32": "test_sampling.py::test_the_sampler_works_in_float64[numpy]",
    "GPT._stream": "test_sampling.py::test_the_cache_changes_nothing[numpy]",
}

TABLE = {
    "numpygpt.py": {
        "test_bad_input.py::test_channels_whose_variance_overflows[wpe.weight]": [
            ("a variance that overflows makes zeros", "    variance[np.isinf(variance)] = np.nan", "    variance += 0"),
        ],
        "test_model.py::test_initial_weights_are_as_specified": [
            ("residual projections start as large as the others", "0.02 / math.sqrt(2 * config.n_layer)", "0.02"),
            ("one residual branch counted in a layer, not two", "sqrt(2 * config.n_layer)", "sqrt(config.n_layer)"),
            ("gains start at 0", "np.ones(shape, dtype)", "np.zeros(shape, dtype)"),
            (
                "uniform weights of the same deviation",
                "std * rng.standard_normal(shape)",
                "std * rng.uniform(-(3**0.5), 3**0.5, shape)",
            ),
        ],
        "test_model.py::test_each_tensor_has_random_numbers_of_its_own": [
            (
                "every tensor drawn from the seed anew",
                "std * rng.standard_normal(shape)",
                "std * np.random.default_rng(seed).standard_normal(shape)",
            ),
        ],
        "test_model.py::test_the_weights_of_one_seed_are_the_same_in_both_dtypes": [
            (
                "float32 weights drawn in float32",
                "(std * rng.standard_normal(shape))",
                "(std * rng.standard_normal(shape, dtype=dtype))",
            ),
        ],
        "test_layers.py::test_layer_parity_float64[embedding]": [
            ("positions counted from the end of the table", "wpe[:T], (idx", "wpe[-T:], (idx"),
        ],
        "test_layers.py::test_layer_parity_float64[layernorm]": [
            (
                "sample variance: divided by C - 1",
                "mean_last_axis(centered * centered)",
                "sum_last_axis(centered * centered) / max(x.shape[-1] - 1, 1)",
            ),
            ("eps added to the standard deviation", "1 / np.sqrt(variance + eps)", "1 / (np.sqrt(variance) + eps)"),
            ("eps 1e-6", "eps: float = 1e-5", "eps: float = 1e-6"),
        ],
        "test_layers.py::test_layer_parity_float64[gelu]": [
            (
                "GELU by the error function",
                "tanh = np.tanh(GELU_SCALE * (x + GELU_CUBIC * x * x * x))",
                "tanh = np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))",
            ),
            ("two digits of GELU's constant exchanged", "0.044715\n", "0.044175\n"),
            ("sqrt(2 / pi) rounded to four digits", "GELU_SCALE = math.sqrt(2 / math.pi)", "GELU_SCALE = 0.7979"),
        ],
        "test_dropout.py::test_every_place_and_every_sequence_has_a_mask_of_its_own": [
            (
                "one mask for all sequences",
                "for seed in rng.integers(2**63, size=B)",
                "for seed in [rng.integers(2**63)] * B",
            ),
        ],
        "test_dropout.py::test_a_mask_is_drawn_anew_for_every_step": [
            ("the same mask at every step", "in rng.integers(2**63, size=B)", "in range(B)"),
        ],
        "test_semantics.py::test_evaluation_does_not_depend_on_dropout[numpy]": [
            (
                "dropout live in evaluation",
                "        rngs = rng_per_sequence(rng, len(idx))\n        logits, _",
                "        rngs = rng_per_sequence(rng or np.random.default_rng(0), len(idx))\n        logits, _",
            ),
        ],
        "test_layers.py::test_layer_parity_float64[softmax]": [
            ("softmax overflows", "np.exp(x - x.max(axis=-1, keepdims=True))", "np.exp(x)"),
        ],
        "test_layers.py::test_layer_parity_float64[scaled_dot_product_attention]": [
            ("scores not divided by sqrt(hs)", "scores / math.sqrt(hs)", "scores"),
            ("scores divided by hs", "scores / math.sqrt(hs)", "scores / hs"),
            ("mask off by one: the own token is not seen", "k=1 + keys - queries)", "k=keys - queries)"),
            ("the mask forgets that the queries are the last ones", "k=1 + keys - queries)", "k=1)"),
        ],
        "test_layers.py::test_layer_parity_float64[attention]": [
            ("a tile sees one key too few", "slice(0, num_keys - T + end)", "slice(0, max(1, num_keys - T + end - 1))"),
            ("a tile of queries sees all keys", "slice(0, num_keys - T + end)", "slice(0, num_keys)"),
            ("keys get the gradient of one tile: = for +=", "dk[:, :, keys] +=", "dk[:, :, keys] ="),
            ("values get the gradient of one tile: = for +=", "dv[:, :, keys] +=", "dv[:, :, keys] ="),
            (
                "every tile's backward gets what the last tile saved",
                "(dheads[:, :, queries], tile_saved)",
                "(dheads[:, :, queries], tiles_saved[-1][2])",
            ),
            ("k, q, v in the forward pass", "    q, k, v = qkv", "    k, q, v = qkv"),
            (
                "heads' gradient cut along the wrong axis",
                "dy.reshape(B, T, n_head, C // n_head).swapaxes(1, 2)",
                "dy.reshape(B, n_head, T, C // n_head)",
            ),
        ],
        "test_semantics.py::test_the_future_changes_nothing[numpy]": [
            ("mask off by one: the next token is seen", "k=1 + keys - queries)", "k=2 + keys - queries)"),
            ("a finite mask", "np.where(future, -np.inf, att)", "np.where(future, -1e9, att)"),
        ],
        "test_layers.py::test_layer_finite_differences[attention]": [
            ("gradients taken apart as q, v, k", "dq, dk, dv = dqkv", "dq, dv, dk = dqkv"),
        ],
        "test_semantics.py::test_heads_are_interchangeable[numpy]": [
            (
                "heads take every nh-th channel",
                "    q, k, v = qkv.transpose(2, 0, 3, 1, 4)",
                "    q, k, v = qkv.reshape(B, T, 3, C // n_head, n_head).transpose(2, 0, 4, 1, 3)",
            ),
        ],
        "test_layers.py::test_layer_parity_float64[block]": [
            ("the MLP reads the stream without its LayerNorm", "mlp_forward(branch, select", "mlp_forward(x, select"),
            (
                "the second LayerNorm with the first one's gain",
                'layernorm_forward(x, params["ln_2.weight"]',
                'layernorm_forward(x, params["ln_1.weight"]',
            ),
        ],
        "test_semantics.py::test_ignored_targets_count_for_nothing[numpy]": [
            (
                "ignored targets count in the loss",
                "(log_sum - at_target)[targets >= 0].sum()",
                "(log_sum - at_target).sum()",
            ),
            ("the mean is over ignored targets too", "count = int((targets >= 0).sum())", "count = targets.size"),
        ],
        "test_model.py::test_parity_of_a_batch_and_its_uneven_pieces": [
            (
                "pieces of a batch weigh alike",
                "loss, loss_saved = cross_entropy_forward(logits, targets, count)",
                "loss, loss_saved = cross_entropy_forward(logits, targets, max(own_count, 1))",
            ),
        ],
        "test_semantics.py::test_models_share_no_weights": [
            ("models share the caller's weights", "copy=params[name].flags.writeable)", "copy=False)"),
        ],
        "test_semantics.py::test_calls_leave_nothing_behind[numpy]": [
            (
                "the gradient is kept for the next call",
                "        dlogits = cross_entropy_backward(loss_saved)\n",
                (
                    "        dlogits = cross_entropy_backward(loss_saved)\n"
                    '        if hasattr(self, "kept"):\n'
                    "            dlogits = dlogits + self.kept\n"
                    "        self.kept = 1e-3\n"
                ),
            ),
        ],
        "test_sampling.py::test_the_cache_changes_nothing[numpy]": [
            ("cached tokens all stand at position 0", 'params["wpe.weight"][start:])', 'params["wpe.weight"])'),
            (
                "start off by one: a token stands at the position before its own",
                'params["wpe.weight"][start:])',
                'params["wpe.weight"][max(0, start - 1) :])',
            ),
            (
                "start off by one: a token's key overwrites the one before it",
                "        end = start + T\n",
                "        start = max(0, start - 1)\n        end = start + T\n",
            ),
            (
                "keys are not cached",
                "k_cache[:, :, start:end], v_cache[:, :, start:end] = k, v",
                "v_cache[:, :, start:end] = v",
            ),
        ],
        "test_bad_input.py::test_bad_ids[negative]": [
            ("negative ids wrap around", "if smallest < low or largest", "if largest"),
        ],
        "test_bad_input.py::test_bad_ids[too large]": [
            ("ids may be V", "largest >= vocab_size", "largest > vocab_size"),
        ],
        "test_bad_input.py::test_weights_that_are_not_finite[wte.weight]": [
            ("weights that are NaN go on", "if not np.isfinite(logits).all():", "if False:"),
        ],
        "test_bad_input.py::test_bad_ids[float]": [
            (
                "float ids are truncated",
                "if not np.issubdtype(ids.dtype, np.integer)",
                "if not np.issubdtype(ids.dtype, np.number)",
            ),
        ],
        "test_bad_input.py::test_bad_sampling[temperature NaN]": [
            (
                "a temperature of NaN is taken",
                "if not 0 <= temperature < math.inf",
                "if temperature < 0 or temperature == math.inf",
            ),
        ],
        "test_bad_input.py::test_bad_learning_rates[nan]": [
            ("a learning rate of NaN is taken", "if not 0 <= lr < math.inf", "if lr < 0 or lr == math.inf"),
        ],
        "test_bad_input.py::test_bad_params[a single NaN]": [
            ("one good entry is enough", "isfinite(params[name]).all()", "isfinite(params[name]).any()"),
        ],
        "test_bad_input.py::test_numbers_of_numpy_in_a_config_become_those_of_python": [
            ("sizes stay NumPy's", "object.__setattr__(self, name, int(value))", "pass"),
        ],
        "test_bad_input.py::test_bad_sampling[top_k 0]": [
            ("top_k 0 is taken", "or top_k < 1)", "or top_k < 0)"),
        ],
        "test_muon.py::test_orthogonalize_maps_each_singular_value_by_the_polynomial[square]": [
            ("two digits of a Newton-Schulz coefficient exchanged", "-4.7750", "-4.7570"),
            ("the square of the Gram matrix left out", "c * gram @ gram", "c * gram"),
        ],
        "test_muon.py::test_orthogonalize_of_a_tall_matrix_is_that_of_its_transpose": [
            ("a tall matrix not transposed", "tall = g.shape[-2] > g.shape[-1]", "tall = False"),
        ],
        "test_muon.py::test_orthogonalize_brings_singular_values_into_the_band[random-huge-float64]": [
            ("a norm whose squares overflow", "(np.abs(x).max(axis=(-2, -1), keepdims=True) + tiny)", "1"),
        ],
        "test_muon.py::test_orthogonalize_of_a_stack_is_that_of_each": [
            ("a stack divided by one norm", "np.linalg.norm(x, axis=(-2, -1), keepdims=True)", "np.linalg.norm(x)"),
        ],
        "test_muon.py::test_muon": [
            ("no look-ahead", "ahead = self.momentum * m + (1 - self.momentum) * grad", "ahead = m"),
            (
                "wide matrices scaled, not tall ones",
                "math.sqrt(max(1, rows / columns))",
                "math.sqrt(max(1, columns / rows))",
            ),
            ("the scale without its root", "math.sqrt(max(1, rows / columns))", "max(1, rows / columns)"),
            (
                "Muon's decay coupled: a part of the gradient",
                "grad = grads[name]\n            m = self.momentum",
                "grad = grads[name] + self.weight_decay * param\n            m = self.momentum",
            ),
        ],
        "test_muon.py::test_muon_orthogonalises_q_k_and_v_apart[numpy]": [
            (
                "q, k and v orthogonalised as one matrix",
                'maps = 3 if name.endswith("c_attn.weight") else 1',
                "maps = 1",
            ),
        ],
        "test_muon.py::test_muon_trains_the_matrices_inside_blocks": [
            ("embeddings given to Muon", 'name.startswith("h.") and ndim == 2', "ndim == 2"),
        ],
        "test_muon.py::test_muon_moves_nothing_without_a_gradient_but_by_decay[numpy]": [
            ("a matrix of zeros becomes NaN", "tiny = np.finfo(g.dtype).tiny", "tiny = 0"),
        ],
    },
    "torchgpt.py": {
        "test_muon.py::test_muon_is_the_same_in_both_engines_for_200_steps": [
            (
                "PyTorch's Muon without the look-ahead",
                "ahead = momentum * m + (1 - momentum) * param.grad",
                "ahead = m",
            ),
            (
                "PyTorch's Muon scales wide matrices",
                "math.sqrt(max(1, rows / columns))",
                "math.sqrt(max(1, columns / rows))",
            ),
            (
                "PyTorch's Muon decays by the weight_decay alone",
                "lr * (scale * update + weight_decay * param)",
                "lr * scale * update + weight_decay * param",
            ),
        ],
        "test_muon.py::test_muon_orthogonalises_q_k_and_v_apart[torch]": [
            ("PyTorch's q, k and v as one matrix", 'maps = 3 if name.endswith("c_attn.weight") else 1', "maps = 1"),
        ],
        "test_muon.py::test_orthogonalize_is_the_same_in_pytorch[(36, 12)]": [
            ("PyTorch's orthogonalize does not transpose back", "return x.mT if tall else x", "return x"),
        ],
        "test_model.py::test_parity_float64[explicit]": [
            ("scores not divided by sqrt(hs)", "scores / math.sqrt(hs)", "scores"),
            ("scores divided by hs", "scores / math.sqrt(hs)", "scores / hs"),
        ],
        "test_semantics.py::test_the_future_changes_nothing[explicit]": [
            ("mask off by one", ".triu(1 + keys - queries)", ".triu(2 + keys - queries)"),
            ("a finite mask", "masked_fill(future, -math.inf)", "masked_fill(future, -1e9)"),
        ],
        "test_semantics.py::test_the_future_changes_nothing[sdpa]": [
            ("no mask in the fused kernel", "is_causal=bool(T > 1)", "is_causal=False"),
        ],
        "test_sampling.py::test_the_cache_changes_nothing[torch]": [
            ("a single query sees the first token alone", "is_causal=bool(T > 1)", "is_causal=True"),
            (
                "cached tokens all stand at position 0",
                "self.wpe.weight[start : start + idx.shape[1]]",
                "self.wpe.weight[: idx.shape[1]]",
            ),
            (
                "start off by one: a token's key overwrites the one before it",
                "            end = start + T\n",
                "            start = max(0, start - 1)\n            end = start + T\n",
            ),
            (
                "the cache outlives the window",
                "window, start = window[:, 1:], 0",
                "window, start = window[:, 1:], start - 1",
            ),
            (
                "the prompt's beginning is kept, not its end",
                "idx[:, -config.block_size :]",
                "idx[:, : config.block_size]",
            ),
        ],
        "test_semantics.py::test_the_key_bias_has_no_effect[sdpa]": [
            ("k, q, v", "        q, k, v = qkv", "        k, q, v = qkv"),
        ],
        "test_semantics.py::test_heads_are_interchangeable[sdpa]": [
            (
                "heads take every nh-th channel",
                "q, k, v = qkv.permute(2, 0, 3, 1, 4)",
                "q, k, v = qkv.view(B, T, 3, C // self.n_head, self.n_head).permute(2, 0, 4, 1, 3)",
            ),
        ],
        "test_model.py::test_parity_float64[sdpa]": [
            ("the head learns nothing", "head = self.wte.weight", "head = self.wte.weight.detach()"),
            ("heads put together along the wrong axis", "heads.transpose(1, 2).reshape", "heads.reshape"),
        ],
        "test_semantics.py::test_evaluation_does_not_depend_on_dropout[sdpa]": [
            ("dropout live in evaluation", "self.config.dropout if self.training else 0.0", "self.config.dropout"),
            (
                "the MLP has a rate of its own",
                "F.dropout(self.c_proj(hidden), dropout)",
                "F.dropout(self.c_proj(hidden))",
            ),
        ],
        "test_semantics.py::test_evaluation_does_not_depend_on_dropout[explicit]": [
            ("attention's weights have a rate of their own", "F.dropout(probs, dropout)", "F.dropout(probs)"),
        ],
        "test_dropout.py::test_torch_drops_with_the_rate_that_it_is_given[sdpa]": [
            ("the fused kernel does not drop", "dropout_p=dropout, ", ""),
        ],
        "test_dropout.py::test_dropout_parity": [
            ("no dropout after attention", "return F.dropout(self.c_proj(y), dropout)", "return self.c_proj(y)"),
            ("no dropout of the embeddings", "        x = F.dropout(x, dropout)\n", ""),
            ("no dropout in training", "self.config.dropout if self.training else 0.0", "0.0"),
        ],
        "test_layers.py::test_layer_parity_float64[mlp]": [
            ("GELU by the error function", 'approximate="tanh"', 'approximate="none"'),
        ],
        "test_layers.py::test_layer_parity_float64[block]": [
            (
                "the MLP's residual starts after the LayerNorm",
                "x = x + self.mlp(self.ln_2(x), dropout)",
                "x = self.ln_2(x) + self.mlp(self.ln_2(x), dropout)",
            ),
        ],
        "test_semantics.py::test_the_tied_matrix_gets_both_gradients": [],
        "test_semantics.py::test_ignored_targets_count_for_nothing[sdpa]": [
            ("token 0 is ignored, not -1", "ignore_index=-1", "ignore_index=0"),
        ],
        "test_semantics.py::test_generation_never_drops[sdpa]": [
            ("generation drops", "start:], 0.0, kv_cache", "start:], self.config.dropout, kv_cache"),
            (
                "generation switches the mode",
                "            with torch.no_grad():\n",
                "            self.eval()\n            with torch.no_grad():\n",
            ),
        ],
        "test_bad_input.py::test_new_tokens_are_int64_whatever_the_prompt[uint8]": [
            ("new tokens get the prompt's dtype", "rng).to(idx.device)", "rng).to(torch.uint8)"),
        ],
        "test_bad_input.py::test_finite_weights_whose_logits_are_not[float64]": [
            ("weights are judged in float32", "param.detach().double()", "param.detach().float()"),
        ],
        "test_sampling.py::test_the_sampler_inverts_the_distribution[torch]": [
            ("multiplied by the temperature", ") / temperature)", ") * temperature)"),
        ],
        "test_sampling.py::test_top_k_keeps_ties_and_nothing_else[torch]": [
            ("top-k drops what ties with the k-th", "logits < kth, -math.inf", "logits <= kth, -math.inf"),
        ],
        "test_sampling.py::test_no_token_without_probability_is_drawn_at_the_ends[torch]": [
            ("u = 0 draws what has no probability", "right=True", "right=False"),
        ],
        "test_sampling.py::test_the_sampler_works_in_float64[torch]": [
            ("the sampler works in float32", "logits.detach().cpu().double()", "logits.detach().cpu().float()"),
        ],
    },
    "training/parallel.py": {
        "test_model.py::test_parity_of_one_thread_and_many": [
            (
                "the last sequences of a batch get no thread",
                "slice(length * i // n, length * (i + 1) // n)",
                "slice(length // n * i, length // n * (i + 1))",
            ),
            ("the loss of the first thread alone", "        loss += other_loss\n", ""),
            ("the gradients of the first thread alone", "grad += others[name]", "grad += 0"),
            ("each part divides by its own targets", "rng=part_rngs, count=count)", "rng=part_rngs)"),
            ("parts of an evaluation weigh alike", " * targets[part].size", " * targets.size / threads"),
        ],
        "test_dropout.py::test_parity_of_a_batch_and_its_pieces_with_dropout": [
            ("every part drops what the first one does", "rngs[part]", "rngs[: part.stop - part.start]"),
        ],
    },
    "training/config.py": {
        "test_semantics.py::test_the_learning_rate_of_every_step": [
            ("warm-up starts at 0: off by one", "(step + 1) / config.warmup_steps", "step / config.warmup_steps"),
            (
                "the decay goes below its floor",
                "(config.learning_rate - config.min_lr)",
                "(config.learning_rate - config.min_lr) - config.min_lr * progress",
            ),
            ("the line is the square of one", "left = 1 - progress if", "left = (1 - progress) ** 2 if"),
            ("Muon's rate falls along a cosine", '("linear" if config.optimizer == "muon" else "cosine")', '"cosine"'),
            ("the rate rises again after its end", "    if step >= decay_steps:\n        return config.min_lr\n", ""),
        ],
    },
    "training/flops.py": {
        "test_export.py::test_the_operations_are_those_that_pytorch_counts": [
            ("every token attends to the whole window", "(config.block_size + 1) / 2", "config.block_size"),
            ("a lookup counts as a product", 'len(shape) == 2 and name != "wpe.weight"', "len(shape) == 2"),
        ],
    },
    "training/evaluate.py": {
        "test_semantics.py::test_the_evaluation_predicts_each_token_once": [
            ("evaluation skips the last short window", "    if rest:\n", "    if False:\n"),
            ("evaluation weighs a short window like a long one", ", targets.size)", ", len(targets) * block_size)"),
            ("evaluation divides by one token too many", "total / (len(tokens) - 1)", "total / len(tokens)"),
        ],
    },
    "common/cli.py": {
        "test_cli.py::test_a_module_that_nobody_can_install_is_a_bug[training]": [
            ("a bug of the project's own asks for an installation", "if not can_be_installed(error.name)", "if False"),
        ],
        "test_cli.py::test_an_exit_status_is_handed_on[2]": [
            ("flags that make no sense end well", "status = stop.code or 0", "status = 0"),
        ],
    },
    "common/startup.py": {
        "test_cli.py::test_a_module_that_nobody_can_install_is_a_bug[resource]": [
            ("what Python itself lacks is to be installed", " or module in sys.stdlib_module_names", ""),
        ],
    },
    "bench/subwords.py": {
        "test_bench_subwords.py::test_what_follows_from_a_result": [
            (
                "the bigram's loss is left in nats per token",
                'self.run.baselines["bigram"] * self.bits / self.nats_per_token',
                'self.run.baselines["bigram"]',
            ),
            ("a step learns from as many characters as tokens", " / self.tokens_per_char", ""),
        ],
        "test_bench_subwords.py::test_speeds_are_relative_to_the_first": [
            ("how many times as slow", "statistics.median(chars / own)", "statistics.median(own / chars)"),
            ("how many times as slow, with quartiles", "ratio(chars, own)", "ratio(own, chars)"),
            ("the time of a character, not characters a second", "Speed(1 / statistics", "Speed(1 * statistics"),
        ],
        "test_bench_subwords.py::test_characters_per_second_are_those_of_all_steps_and_of_the_whole_sample": [
            ("one step's characters for the time of five", "(STEPS * r.chars_per_step)", "r.chars_per_step"),
            ("the length of the sample is left out", "times[r.name] / len(text)", "times[r.name] / SAMPLE_CHARS"),
        ],
        "test_bench_subwords.py::test_the_plot_is_over_characters_and_over_seconds": [
            ("seconds from the wrong end", "n / speed.chars_per_s for", "n * speed.chars_per_s for"),
        ],
    },
    "tools/export.py": {
        "test_export.py::test_the_report_is_the_notes_and_the_sizes": [
            ("what was changed in an import is not said", "    for note in notes:\n        print(note)\n", ""),
        ],
        "test_export.py::test_the_recipe_of_an_imported_model_keeps_its_dtype": [
            (
                "float64 weights go on in float32",
                '"float64" if params["wte.weight"].dtype == np.float64 else "auto"',
                '"auto"',
            ),
        ],
    },
    "tools/sizes.py": {
        "test_export.py::test_every_number_of_info[auto]": [
            ("training takes 3 times the weights", "millions(4 * N * dtype", "millions(3 * N * dtype"),
            ("keys are cached, values are not", "kept = 2 * config.n_layer", "kept = config.n_layer"),
            ("backward costs as much as forward", "millions(3 * forward)", "millions(2 * forward)"),
            ("the estimate counts attention twice", "2 * N + 4 * config.n_layer", "2 * N + 8 * config.n_layer"),
        ],
        "test_export.py::test_every_number_of_info[float64]": [
            ("float64 weights take 4 bytes", 'np.float64 if settings.training.dtype == "float64" else ', ""),
        ],
    },
    "tools/hf.py": {
        "test_hf.py::test_the_folder_says_what_the_model_is": [
            ("texts are cut to one token", '"model_max_length": config.block_size', '"model_max_length": 1'),
            (
                "ids that stand for nothing may be drawn",
                "if tokenizer.vocab_size < config.vocab_size",
                "if tokenizer.vocab_size > config.vocab_size",
            ),
        ],
        "test_hf.py::test_only_linear_layers_are_transposed": [
            ("the MLP's weights are not transposed", "(attn|mlp)", "attn"),
        ],
    },
    "tools/onnx_graph.py": {
        "test_onnx.py::test_onnxruntime_gives_the_same_logits": [
            ("GELU by the error function", 'approximate="tanh"', 'approximate="none"'),
            ("scores not divided by sqrt(hs)", "1 / np.sqrt(hs), dtype", "1 / hs, dtype"),
            ("a token sees the future, not the past", '"LessOrEqual", keys, queries', '"LessOrEqual", queries, keys'),
            ("LayerNorm's eps is 1e-6", "epsilon=1e-5", "epsilon=1e-6"),
        ],
    },
    "training/batches.py": {
        "test_semantics.py::test_the_evaluation_predicts_each_token_once": [
            ("the target is the token itself", "windows[:, :-1], windows[:, 1:]", "windows[:, :-1], windows[:, :-1]"),
        ],
        "test_loop.py::test_random_windows_reach_both_ends": [
            (
                "random windows never begin at the last place",
                "rng.integers(len(tokens) - T, size",
                "rng.integers(len(tokens) - T - 1, size",
            ),
        ],
    },
    "training/loop.py": {
        "test_loop.py::test_the_wait_before_the_next_save_follows_from_the_last_one": [
            ("the wait ignores how long a save took", "max(SAVE_SECONDS, SAVE_RATIO * (now - began))", "SAVE_SECONDS"),
        ],
        "test_loop.py::test_the_clock_leaves_out_evaluations_and_saves": [
            ("evaluations count as training", "self.step_began += took", "pass"),
        ],
        "test_loop.py::test_the_seconds_of_a_run_continue_after_a_resume": [
            ("the seconds of a run begin again after a resume", "self.began = now - seconds", "self.began = now"),
        ],
        "test_loop.py::test_of_two_equal_losses_the_earlier_stays_best": [
            (
                "of two equal losses the later one is best",
                "loss < self.state.best_loss",
                "loss <= self.state.best_loss",
            ),
        ],
        "test_loop.py::test_metrics_are_on_the_disk_before_the_checkpoint_that_knows_them": [
            ("metrics are not flushed before a checkpoint", "            self.metrics.sync()  #", "            #"),
        ],
        "test_loop.py::test_each_estimate_has_random_windows_of_its_own": [
            ("all estimates use one seed", "config.seed, self.state.step)", "config.seed, 0)"),
        ],
    },
    "training/run.py": {
        "test_fuzz.py::test_the_names_of_leftovers": [
            ("files of others are deleted", r"\.\w{8}\.new", r".*\.new"),
        ],
    },
    "common/tensors.py": {
        "test_tensors.py::test_a_flipped_bit_anywhere_is_found": [
            ("damage is not seen", "    if digest.hexdigest() != seal:", "    if False:"),
        ],
        "test_tensors.py::test_what_is_not_finite_is_neither_written_nor_read[nan]": [
            ("NaN is written", "            if not np.isfinite(piece).all():", "            if False:"),
            (
                "NaN is read",
                "        if not all(np.isfinite(piece).all() for piece in pieces(array)):",
                "        if False:",
            ),
        ],
        "test_tensors.py::test_all_dtypes_are_read[BF16]": [
            ("bfloat16 is the lower half", "(array.astype(np.uint32) << 16)", "array.astype(np.uint32)"),
        ],
    },
}

MUTANTS = [
    Mutant(name, "numpygpt.py", replaced, by, KILLERS_OF_MISTAKES.get(name, KILLERS_OF_MISTAKES[function]))
    for function, rows in MISTAKES.items()
    for name, replaced, by in rows
] + [
    Mutant(name, file, replaced, by, test)
    for file, tests in TABLE.items()
    for test, rows in tests.items()
    for name, replaced, by in rows
]

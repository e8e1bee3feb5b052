"""Known mistakes in the functions that learn.exercises asks for: function -> what is wrong, what is replaced, by what.

Each replaced text stands exactly once in numpygpt.py. learn.exercises compares a learner's tensors with what comes out
of each mistake; and the test suite must fail for each (tests/mutants/table.py names the test).
"""

MISTAKES: dict[str, list[tuple[str, str, str]]] = {
    "softmax_backward": [
        ("softmax's backward without its row sum", "(dprobs - sum_last_axis(dprobs * probs))", "dprobs"),
        ("the row sum of dprobs, not of dprobs * probs", "sum_last_axis(dprobs * probs))", "sum_last_axis(dprobs))"),
        ("softmax's backward without the factor probs", "return probs * (dprobs -", "return (dprobs -"),
        ("one sum over all rows, not one for each row", "sum_last_axis(dprobs * probs))", "(dprobs * probs).sum())"),
        (
            "a score acts on its own probability alone",
            "(dprobs - sum_last_axis(dprobs * probs))",
            "(1 - probs) * dprobs",
        ),
    ],
    "cross_entropy_backward": [
        ("the loss's gradient not divided", "    dlogits /= count\n", ""),
        ("the loss's gradient divided twice", "dlogits /= count", "dlogits /= count * count"),
        ("the loss's gradient divided by ignored tokens too", "dlogits /= count", "dlogits /= targets.size"),
        ("ignored targets push all logits down", "    dlogits[targets < 0] = 0\n", ""),
        ("the 1 at the target is not subtracted", "    dlogits[b, t, targets[b, t]] -= 1\n", ""),
        ("the 1 at the target is added", "dlogits[b, t, targets[b, t]] -= 1", "dlogits[b, t, targets[b, t]] += 1"),
    ],
    "linear_backward": [
        ("the bias's gradient of one token, not of all", "sum_tokens(dflat)", "dflat[0]"),
        ("the bias's gradient averaged over tokens", "sum_tokens(dflat)", "sum_tokens(dflat) / len(dflat)"),
        ("the weight's gradient averaged over tokens", "dflat.T @ flat", "dflat.T @ flat / len(flat)"),
        ("the weight's gradient of the last token, not of all", "dflat.T @ flat", "dflat[-1:].T @ flat[-1:]"),
    ],
    "layernorm_backward": [
        ("LayerNorm's backward without the mean", "(dxhat - mean_last_axis(dxhat) -", "(dxhat -"),
        ("LayerNorm's backward without the projection", " - xhat * mean_last_axis(dxhat * xhat))", ")"),
        ("LayerNorm's backward without 1 / std", "dx = rstd * (dxhat", "dx = (dxhat"),
        ("mean and variance taken for constants", "dx = rstd * (dxhat -", "dx = rstd * dxhat + 0 * ("),
        ("LayerNorm's backward without the gain", "dxhat = dout * weight", "dxhat = dout"),
        ("the projection's mean without xhat", "mean_last_axis(dxhat * xhat)", "mean_last_axis(dxhat)"),
        ("the sum of dxhat, not its mean", "(dxhat - mean_last_axis(dxhat) -", "(dxhat - sum_last_axis(dxhat) -"),
        ("the sum of dxhat * xhat, not its mean", "xhat * mean_last_axis(dxhat *", "xhat * sum_last_axis(dxhat *"),
        ("the projection not multiplied by xhat", "- xhat * mean_last_axis(dxhat *", "- mean_last_axis(dxhat *"),
        ("the gain's gradient times the gain", "sum_tokens(dout * xhat)", "sum_tokens(dout * xhat * weight)"),
        ("the gain's gradient without xhat", "dweight = sum_tokens(dout * xhat)", "dweight = sum_tokens(dout)"),
        ("the shift's gradient times the gain", "sum_tokens(dout) if", "sum_tokens(dout * weight) if"),
    ],
    "gelu_backward": [
        ("the derivative of x^3 is x^2", "3 * GELU_CUBIC", "GELU_CUBIC"),
        ("the derivative of x^3 is 3 x", "3 * GELU_CUBIC * x * x)", "3 * GELU_CUBIC * x)"),
        ("the derivative of tanh is 1 - tanh", "(1 - tanh * tanh)", "(1 - tanh)"),
        ("no chain rule through u", " (1 - tanh * tanh) * slope)", " (1 - tanh * tanh))"),
        ("the slope of u without sqrt(2/pi)", "slope = GELU_SCALE * (1", "slope = (1"),
        ("the product rule's first half alone", " + x * (1 - tanh * tanh) * slope)", ")"),
        ("the product rule loses its first half", "(1 + tanh + x * ", "(x * "),
    ],
    "embedding_backward": [
        ("a repeated token gets one of its gradients: += for np.add.at", "np.add.at(dwte, idx, dx)", "dwte[idx] += dx"),
        ("positions get the gradient of one sequence", "dx.sum(axis=0)", "dx[0]"),
        ("positions get the mean over sequences", "dx.sum(axis=0)", "dx.mean(axis=0)"),
        ("positions' gradient at the end of the table", "dwpe[:T] = dx", "dwpe[-T:] = dx"),
    ],
    "dropout_forward": [
        ("what is kept is not scaled up", "x.dtype.type(1 / (1 - p))", "x.dtype.type(1)"),
        ("what is kept is scaled by 1 / p", "x.dtype.type(1 / (1 - p))", "x.dtype.type(1 / p)"),
        ("what is kept is scaled down, by 1 - p", "x.dtype.type(1 / (1 - p))", "x.dtype.type(1 - p)"),
        ("dropped with 1 - p", ">= p for rng", "< p for rng"),
        ("evaluation scaled by 1 - p", "        return x, None\n", "        return x * (1 - p), None\n"),
        ("one mask in all places", "[rng.random(x", "[np.random.default_rng(rng.bit_generator.seed_seq).random(x"),
    ],
    "dropout_backward": [
        ("dropout's backward forgets the mask", "return dout if scale is None else dout * scale", "return dout"),
        ("what is kept gets its gradient unscaled", "None else dout * scale", "None else dout * (scale > 0)"),
    ],
    "scaled_dot_product_attention_backward": [
        ("the scores' gradient not divided by sqrt(hs)", "dscores = datt / math.sqrt(hs)", "dscores = datt"),
        ("the scores' gradient divided by hs", "dscores = datt / math.sqrt(hs)", "dscores = datt / hs"),
        ("values get the gradient of undropped weights", "dv = weights.swapaxes", "dv = probs.swapaxes"),
        ("values' weights not transposed", "dv = weights.swapaxes(-1, -2) @", "dv = weights @"),
        ("attention's weights get a gradient where dropped", "dropout_backward(dweights, scale)", "dweights"),
        ("attention's backward without the softmax's", "datt = softmax_backward(dprobs, probs)", "datt = dprobs"),
        ("softmax's backward with the dropped weights", "backward(dprobs, probs)\n", "backward(dprobs, weights)\n"),
        ("queries get the gradient from queries", "dq = dscores @ k", "dq = dscores @ q"),
        ("keys get the gradient from keys", "dk = dscores.swapaxes(-1, -2) @ q", "dk = dscores.swapaxes(-1, -2) @ k"),
        ("queries get the gradient of the unmasked sum", "dq = dscores @ k", "dq = (dweights / math.sqrt(hs)) @ k"),
        ("keys' scores not transposed", "dk = dscores.swapaxes(-1, -2) @ q", "dk = dscores @ q"),
    ],
    "block_backward": [
        ("gradient through the MLP, not around it", "dx + dbranch\n    dbranch, attn", "dbranch\n    dbranch, attn"),
        ("gradient through attention, not around it", "dx + dbranch\n    grads |=", "dbranch\n    grads |="),
        ("gradient around the MLP, not through it", "dx + dbranch\n    dbranch, attn", "dx\n    dbranch, attn"),
        ("gradient around attention, not through it", "dx + dbranch\n    grads |=", "dx\n    grads |="),
        ("attention gets the MLP branch's gradient alone", "(dx, attn_saved)", "(dbranch, attn_saved)"),
        (
            "the stream's gradient sent through the second LayerNorm, not around it",
            "layernorm_backward(dbranch, ln_2_saved)\n    dx = dx + dbranch\n",
            "layernorm_backward(dx + dbranch, ln_2_saved)\n    dx = dbranch\n",
        ),
        (
            "the stream's gradient sent through the first LayerNorm, not around it",
            "layernorm_backward(dbranch, ln_1_saved)\n    dx = dx + dbranch\n",
            "layernorm_backward(dx + dbranch, ln_1_saved)\n    dx = dbranch\n",
        ),
    ],
    "gpt_backward": [
        ("the head's gradient alone", "= dwte + dwte_head", "= dwte_head"),
        ("the embedding's gradient alone", "= dwte + dwte_head", "= dwte"),
        ("the embeddings get a gradient where dropped", "    dx = dropout_backward(dx, embedding_scale)\n", ""),
        ("gradient around the last LayerNorm", '    dx, grads["ln_f.weight"]', '    _, grads["ln_f.weight"]'),
        ("the blocks' gradients in the wrong order", "reversed(range(config.n_layer))", "range(config.n_layer)"),
    ],
    "clip_grad_norm": [
        ("the norm of each tensor is clipped", "*= scale\n", "*= min(1, max_norm / (np.linalg.norm(grad) + 1e-6))\n"),
        ("small gradients are scaled up", "if scale < 1 and", "if"),
        ("the norm after clipping is returned", "    return norm\n", "    return min(norm, max_norm)\n"),
        ("a norm that is not finite makes all gradients NaN", "scale < 1 and math.isfinite(norm)", "not scale >= 1"),
        ("no square root", "norm = math.sqrt(sum(", "norm = (sum("),
        ("divided by the norm, whatever max_norm is", "scale = max_norm / (norm", "scale = 1 / (norm"),
    ],
    "AdamW.step": [
        (
            "L2 in place of decoupled decay",
            "grad, m, v = grads[name], self.m[name], self.v[name]\n",
            (
                "grad, m, v = grads[name], self.m[name], self.v[name]\n"
                "            if param.ndim >= 2:\n"
                "                grad = grad + self.weight_decay * param\n"
                "                param /= 1 - lr * self.weight_decay\n"
            ),
        ),
        ("decay does not follow the learning rate", "1 - lr * self.weight_decay", "1 - self.weight_decay"),
        (
            "no bias correction",
            "1 - beta1**self.t)\n            v_hat = v / (1 - beta2**self.t)",
            "1)\n            v_hat = v",
        ),
        ("m is not corrected", "m_hat = m / (1 - beta1**self.t)", "m_hat = m"),
        ("v is not corrected", "v_hat = v / (1 - beta2**self.t)", "v_hat = v"),
        ("v is corrected like m", "v / (1 - beta2**self.t)", "v / (1 - beta1**self.t)"),
        ("bias correction one step late", "        self.t += 1\n        beta1", "        beta1"),
        ("epsilon inside the root", "(np.sqrt(v_hat) + self.eps)", "np.sqrt(v_hat + self.eps)"),
        (
            "epsilon before the bias correction",
            "(np.sqrt(v_hat) + self.eps)",
            "((np.sqrt(v) + self.eps) / math.sqrt(1 - beta2**self.t))",
        ),
        ("m forgets as fast as v", "m += (1 - beta1) * grad", "m += (1 - beta2) * grad"),
        ("v of the gradient, not of its square", "(1 - beta2) * grad**2", "(1 - beta2) * abs(grad)"),
        ("no root of v", "(np.sqrt(v_hat) + self.eps)", "(v_hat + self.eps)"),
        (
            "m and v are not kept for the next step",
            "self.m[name], self.v[name]\n",
            "0 * self.m[name], 0 * self.v[name]\n",
        ),
        (
            "parameters bound to new arrays, not changed in place",
            "            if param.ndim >= 2:\n",
            "            param = param.copy()\n            if param.ndim >= 2:\n",
        ),
        ("biases and gains decay", "if param.ndim >= 2:", "if True:"),
        ("gains decay, because their name ends in weight", "if param.ndim >= 2:", 'if name.endswith("weight"):'),
        ("no decay", "param *= 1 - lr * self.weight_decay", "pass"),
    ],
    "sample": [
        ("multiplied by the temperature", ") / temperature", ") * temperature"),
        ("the temperature is not used", ") / temperature", ")"),
        ("top-k keeps one too many", "-top_k, axis=-1)[:, -top_k, None]", "-top_k - 1, axis=-1)[:, -top_k - 1, None]"),
        (
            "top-k drops what ties with the k-th",
            "logits[logits < kth] = -np.inf",
            'np.put_along_axis(logits, np.argsort(-logits, kind="stable")[:, top_k:], -np.inf, axis=-1)',
        ),
        ("one random number for all rows", "rng.random(len(logits))", "rng.random(1)"),
        ("u = 0 draws what has no probability", "(cdf > threshold)", "(cdf >= threshold)"),
        ("the sampler works in float32", "logits = logits.astype(np.float64)", "logits = logits.astype(np.float32)"),
    ],
    "GPT._stream": [
        ("the cache outlives the window", "window[:, 1:], 0", "window[:, 1:], start - 1"),
        ("the context is cropped one token early", "window.shape[1] > config.b", "window.shape[1] >= config.b"),
        ("the prompt's beginning is kept, not its end", "idx[:, -config.block_size :]", "idx[:, : config.block_size]"),
        ("each new token stands at position 0", "None, kv_cache, start, for", "None, kv_cache, 0, for"),
    ],
}

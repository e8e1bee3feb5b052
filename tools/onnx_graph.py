"""The GPT as an ONNX graph, node by node: the third time that this architecture is written down, and the shortest.

The initializers have the names and the layout of our parameters, so the weights go in as they are. The lines of
numpygpt.py can be followed: the residual stream is kept as rows (B T, C), and becomes (B, nh, T, hs) for attention
only. B and T are free; T beyond block_size fails, as there is no such position. No dropout: a graph is for use.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from common.errors import UserError
from common.files import write_new
from numpygpt import GPT, GPTConfig, Params

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise UserError("ONNX needs the package onnx: pip install onnx onnxruntime") from error

OPSET = 20  # the first with Gelu; LayerNormalization came with 17
IR_VERSION = 9  # what runtimes of that opset read
TOLERANCE = {"float32": 1e-5, "float64": 1e-6}  # of compare; onnxruntime has Gelu's constants in float32 even then
MAX_FILE_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB: larger weights lie in a file beside it


class Graph:
    """Nodes, and the constants that they use."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, output: str, op: str, *inputs: str, **attributes: Any) -> str:
        """One more node -> the name of its output, which is the node's as well."""
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: DTypeLike = np.int64) -> str:
        self.constants[name] = np.array(value, dtype)
        return name


def build(config: GPTConfig, dtype: np.dtype) -> onnx.GraphProto:
    """The graph, idx (B, T) int64 -> logits (B, T, V) of dtype, with its constants; the weights are yet to come."""
    nh, hs, V = config.n_head, config.n_embd // config.n_head, config.vocab_size
    g = Graph()
    zero, one, two = (g.constant(name, value) for name, value in (("zero", 0), ("one", 1), ("two", 2)))
    rows = g.constant("shape of rows", [-1, config.n_embd])
    scale = g.constant("1 / sqrt(hs)", 1 / np.sqrt(hs), dtype)
    excluded = g.constant("-inf", -np.inf, dtype)

    def linear(x: str, name: str, output: str) -> str:
        """x @ weight.T + bias, as everywhere here: Gemm transposes for us."""
        bias = [f"{name}.bias"] if config.bias else []
        return g.add(output, "Gemm", x, f"{name}.weight", *bias, transB=1)

    def layernorm(x: str, name: str) -> str:
        bias = [f"{name}.bias"] if config.bias else []
        return g.add(name, "LayerNormalization", x, f"{name}.weight", *bias, axis=-1, epsilon=1e-5)

    shape = g.add("B, T", "Shape", "idx")
    T = g.add("T", "Gather", shape, one)
    positions = g.add("positions", "Range", zero, T, one)
    queries, keys = (
        g.add(f"positions of {name}", "Unsqueeze", positions, axis) for name, axis in (("queries", one), ("keys", zero))
    )
    past_or_self = g.add("past or self", "LessOrEqual", keys, queries)  # (T, T)
    qkv_shape = g.add("B, T, 3, nh, hs", "Concat", shape, g.constant("3, nh, hs", [3, nh, hs]), axis=0)

    token, position = (
        g.add(f"{name} of idx", "Gather", f"{name}.weight", ids) for name, ids in (("wte", "idx"), ("wpe", positions))
    )
    x = g.add("x", "Reshape", g.add("wte + wpe", "Add", token, position), rows)
    for h in (f"h.{i}" for i in range(config.n_layer)):
        qkv = linear(layernorm(x, f"{h}.ln_1"), f"{h}.attn.c_attn", f"{h}.attn.qkv")
        qkv = g.add(f"{h}.attn.qkv by head", "Reshape", qkv, qkv_shape)
        q, k, v = (
            g.add(f"{h}.attn.{name} by token", "Gather", qkv, which, axis=2)
            for name, which in (("q", zero), ("k", one), ("v", two))
        )
        q, v = (
            g.add(f"{h}.attn.{name}", "Transpose", part, perm=(0, 2, 1, 3)) for name, part in (("q", q), ("v", v))
        )  # (B, nh, T, hs)
        k = g.add(f"{h}.attn.k", "Transpose", k, perm=(0, 2, 3, 1))  # (B, nh, hs, T)
        att = g.add(f"{h}.attn.q @ k", "MatMul", q, k)
        att = g.add(f"{h}.attn.att", "Mul", att, scale)
        att = g.add(f"{h}.attn.att, masked", "Where", past_or_self, att, excluded)
        probs = g.add(f"{h}.attn.probs", "Softmax", att, axis=-1)
        heads = g.add(f"{h}.attn.heads", "MatMul", probs, v)
        heads = g.add(f"{h}.attn.heads by token", "Transpose", heads, perm=(0, 2, 1, 3))
        y = g.add(f"{h}.attn.y", "Reshape", heads, rows)
        x = g.add(f"{h}.x after attn", "Add", x, linear(y, f"{h}.attn.c_proj", f"{h}.attn.out"))

        hidden = linear(layernorm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc", f"{h}.mlp.hidden")
        hidden = g.add(f"{h}.mlp.gelu", "Gelu", hidden, approximate="tanh")
        x = g.add(f"{h}.x after mlp", "Add", x, linear(hidden, f"{h}.mlp.c_proj", f"{h}.mlp.out"))

    by_row = g.add("logits of rows", "Gemm", layernorm(x, "ln_f"), "wte.weight", transB=1)  # the tied head
    logits_shape = g.add("B, T, V", "Concat", shape, g.constant("V", [V]), axis=0)
    g.add("logits", "Reshape", by_row, logits_shape)

    kind = helper.np_dtype_to_tensor_dtype(dtype)
    inputs = [helper.make_tensor_value_info("idx", TensorProto.INT64, ["B", "T"])]
    outputs = [helper.make_tensor_value_info("logits", kind, ["B", "T", V])]
    constants = [numpy_helper.from_array(value, name) for name, value in g.constants.items()]
    return helper.make_graph(g.nodes, "GPT", inputs, outputs, constants)


def write_onnx(file: Path, config: GPTConfig, params: Params) -> None:
    """Write the model to a new file, and have onnx.checker look at every node and infer every shape. Raises OSError.

    Weights too large for the file itself go into a second one, <file>.data.
    """
    graph = build(config, params["wte.weight"].dtype)
    if sum(param.nbytes for param in params.values()) > MAX_FILE_BYTES:
        graph.initializer.extend(write_beside(file.with_name(f"{file.name}.data"), params))
    else:
        graph.initializer.extend(numpy_helper.from_array(param, name) for name, param in params.items())
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="reference-gpt")
    write_new(file, model.SerializeToString())
    onnx.checker.check_model(str(file), full_check=True)


def write_beside(path: Path, params: Params) -> Iterator[TensorProto]:
    """Write the weights into a file of their own, each at a multiple of 4,096 bytes -> where they are, one by one."""
    with open(path, "xb") as data:
        for name, param in params.items():
            data.seek(-data.tell() % 4096, os.SEEK_CUR)
            place = {"location": path.name, "offset": str(data.tell()), "length": str(param.nbytes)}
            data.write(np.ascontiguousarray(param).data)
            tensor = TensorProto(name=name, dims=param.shape, data_type=helper.np_dtype_to_tensor_dtype(param.dtype))
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=value)
            yield tensor
        data.flush()
        os.fsync(data.fileno())


def compare(file: Path, config: GPTConfig, params: Params) -> float | None:
    """How far onnxruntime's logits for the file are from numpygpt's, over 3 batches; None if there is no onnxruntime.

    The largest difference, relative to the largest logit; NaN if there is one.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    model, rng, apart = GPT(config, params), np.random.default_rng(0), []
    for B, T in ((1, 1), (1, min(config.block_size, 32)), (3, min(config.block_size, 5))):
        idx = rng.integers(config.vocab_size, size=(B, T))
        ours, theirs = model.forward(idx)[0], session.run(["logits"], {"idx": idx})[0]
        apart.append(np.abs(theirs - ours).max() / (np.abs(ours).max() or 1.0))
    return float(np.max(apart))  # which keeps a NaN, where Python's max would lose it

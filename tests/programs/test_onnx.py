"""tools/onnx_graph.py: the graph, run by onnxruntime, against both engines; and what torch.export makes of torchgpt."""

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import numpygpt
from numpygpt import GPTConfig
from tests.helpers import assert_close, property_test, random_weights, rms, torch_twin
from tests.strategies import SEEDS, TYPICAL, Example, examples

onnx = pytest.importorskip("onnx", reason="needs onnx: pip install -r requirements-dev.txt")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -r requirements-dev.txt")

from tools import onnx_graph  # noqa: E402  without onnx it cannot be imported

FLOAT32 = 1e-5  # 4e-6 was the worst of a thousand examples
FLOAT64 = 1e-6  # 2e-7; onnxruntime has Gelu's constants in float32 even then

CONFIG = GPTConfig(vocab_size=7, block_size=6, n_layer=2, n_head=2, n_embd=8, dropout=0.1)
MEANING = "The graph is another function than numpygpt's."


def write(folder: Path, config: GPTConfig, params: dict[str, np.ndarray]) -> "onnxruntime.InferenceSession":
    """The model, checked by onnx and loaded by onnxruntime, which is told to keep its errors to itself."""
    onnx_graph.write_onnx(folder / "gpt.onnx", config, params)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "gpt.onnx", options, providers=["CPUExecutionProvider"])


@property_test(
    example=examples(),
    dtype=st.sampled_from([np.float32, np.float32, np.float64]),
    seed=SEEDS,
    always=[{"example": typical, "dtype": np.float64, "seed": 0} for typical in TYPICAL],
)
def test_onnxruntime_gives_the_same_logits(example: Example, dtype: type, seed: int) -> None:
    """One file, and batches of several shapes: neither B nor T is fixed."""
    config, rng = example.config, np.random.default_rng(seed)
    if config.n_embd < 5:
        # LayerNorm over 3 or 4 channels may divide by next to nothing: what float32 rounds away is then worth 1e-5.
        dtype = np.float64
    params = {name: param.astype(dtype) for name, param in example.params.items()}
    with TemporaryDirectory() as folder:
        session = write(Path(folder), config, params)
    model = numpygpt.GPT(config, params, dtype=np.float64)  # the truth about the weights as they are
    for B, T in {example.idx.shape, (1, 1), (2, config.block_size), (3, 1)}:
        idx = rng.integers(config.vocab_size, size=(B, T))
        (logits,) = session.run(["logits"], {"idx": idx})
        assert logits.dtype == dtype
        ours = model.forward(idx)[0]
        gate = FLOAT32 if dtype == np.float32 else FLOAT64
        kind = f"onnxruntime, {np.dtype(dtype).name}"
        assert_close(kind, "logits", logits, ours, gate, scale=max(1.0, rms(ours)), meaning=MEANING)


def test_weights_too_large_for_one_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = random_weights(CONFIG, 1)
    whole = write(tmp_path, CONFIG, params)
    (tmp_path / "two").mkdir()
    monkeypatch.setattr(onnx_graph, "MAX_FILE_BYTES", 1000)
    parts = write(tmp_path / "two", CONFIG, params)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["gpt.onnx", "gpt.onnx.data"]
    idx = np.arange(6)[None]
    np.testing.assert_array_equal(parts.run(None, {"idx": idx})[0], whole.run(None, {"idx": idx})[0])


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    """Names, shapes and opset; each weight once, under its name, the head's being wte's."""
    write(tmp_path, CONFIG, random_weights(CONFIG, 1))
    model = onnx.load(tmp_path / "gpt.onnx")
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", onnx_graph.OPSET)]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {"idx": ["B", "T"], "logits": ["B", "T", 7]}
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer if "." in tensor.name}
    assert weights == numpygpt.param_shapes(CONFIG)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)


def test_positions_and_ids_that_are_none_fail(tmp_path: Path) -> None:
    """Rather than wrap or repeat, even where a single position could be taken for all."""
    for block_size in (1, 6):
        (folder := tmp_path / str(block_size)).mkdir()
        config = dataclasses.replace(CONFIG, block_size=block_size)
        session = write(folder, config, random_weights(config, 1))
        for idx in (np.zeros((1, block_size + 1), np.int64), np.full((1, 1), 7)):
            with pytest.raises(Exception, match="out of data bounds"):
                session.run(None, {"idx": idx})


def test_what_is_found_is_said(tmp_path: Path) -> None:
    """How far apart the logits are, and that some of them are no numbers."""
    params = random_weights(CONFIG, 1)
    for wrong, found in ((0, lambda apart: apart < FLOAT64), (1, lambda apart: apart > 0.01), (np.nan, np.isnan)):
        (folder := tmp_path / str(wrong)).mkdir()
        write(folder, CONFIG, params | {"ln_f.bias": params["ln_f.bias"] + wrong})
        assert found(onnx_graph.compare(folder / "gpt.onnx", CONFIG, params)), wrong


def test_torch_export_follows_torchgpt(tmp_path: Path) -> None:
    """As docs/ecosystem.md shows it: with B and T free, saved and loaded."""
    config = dataclasses.replace(CONFIG, n_layer=1, dropout=0.0)
    model = torch_twin(config, random_weights(config, 1), attention="explicit")
    free = {"idx": {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("T", min=1, max=config.block_size)}}
    program = torch.export.export(model, (torch.zeros(2, 3, dtype=torch.int64),), dynamic_shapes=free)
    torch.export.save(program, tmp_path / "gpt.pt2")
    loaded = torch.export.load(tmp_path / "gpt.pt2").module()
    for B, T in ((1, 1), (2, 3), (3, 6)):
        idx = torch.from_numpy(np.random.default_rng(0).integers(7, size=(B, T)))
        ours = model(idx)[0].detach().numpy()
        assert_close("torch.export", "logits", loaded(idx)[0].detach().numpy(), ours, 1e-13, meaning=MEANING)

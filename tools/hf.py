"""GPT-2 as Hugging Face and nanoGPT keep it, into our config, weights and tokenizer and back. Needs neither of them.

A Hugging Face folder is config.json, model.safetensors (or shards with an index) and tokenizer files. Three things
differ from ours, and they are dealt with here, at the border:

    names      a prefix, transformer., before ours; buffers that hold masks; sometimes the head, though it is tied
    layout     a linear layer, Conv1D, keeps its weight as (in, out), so it is transposed
    biases     always there: a model without gets zeros, and config.json a field "bias" that says so

nanoGPT has our layout, and torch.compile may have put _orig_mod. before every name. Whatever a config.json asks for
that this architecture is not is refused by name. A safetensors file is mapped into memory, not read, and written piece
by piece: a model passes through in little more memory than its file takes. Pickles are not read at all: they can run
code.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, shorten
from common.files import new_file, read_json, write_new
from common.tensors import DTYPES, Stored, open_tensors, write_tensors
from data.bpe import BPETokenizer
from data.gpt2_bpe import END_OF_TEXT
from data.tokenizers import Tokenizer
from numpygpt import GPTConfig, Params, param_shapes
from tools.hf_tokenizer import TOKENIZER, TOKENIZER_CONFIG, to_hf
from training.config import ModelFlags

__all__ = ["Imported", "read_hf", "read_nanogpt", "write_hf"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# Beside the sizes, what a GPT-2 config.json may say. The first value is GPT-2's default, which a file may leave out.
ARCHITECTURE = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh form
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")

PREFIXES = re.compile(r"^(_orig_mod\.)?(transformer\.)?")
MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
CONV1D = re.compile(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight")
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Imported:
    """A model from elsewhere, in our terms."""

    config: GPTConfig
    params: Params  # one dtype, float32 or float64; where that is the file's, read-only views of the mapped file
    notes: tuple[str, ...]  # what was changed on the way, for people to read


def map_weights(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name. Nothing but its header is read.

    Raises UserError if there is no such file, if anything else is in it or nothing at all, or if the name is one that
    pickles go by.
    """
    refuse_pickle(path)
    tensors = open_tensors(path, "weights as safetensors").tensors
    if not tensors:
        raise UserError(f"{path} holds no tensors: expected a model's weights")
    return tensors


def refuse_pickle(path: Path) -> None:
    """Raises UserError if the name is one that pickles go by. Nothing is opened."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when it is read: convert it to safetensors where you trust it, "
            "as docs/ecosystem.md shows"
        )


# ---------------------------------------------------------------------------------------------------------------------
# In


def read_hf(source: Path) -> Imported:
    """A GPT-2 folder, or its weights file with config.json beside it. Raises UserError."""
    if not source.exists():
        raise UserError(f"no folder or file {str(source)!r}: expected a GPT-2 model")
    folder = source if source.is_dir() else source.parent
    stored = dict(find_weights(source))
    path = folder / CONFIG
    if not path.exists():
        raise UserError(f"{folder} has no {CONFIG}: expected the folder of a GPT-2 model")
    config, notes = read_hf_config(path)
    params, converted = read_params(source, by_our_names(stored, source), config, conv1d=True)
    if not config.bias:  # as write_hf says it
        for name in [name for name in params if name.endswith(".bias")]:
            if params.pop(name).any():
                raise UserError(f"{path}: bias is false, but {name} is not zero")
    return Imported(config, params, (*notes, *converted))


def read_nanogpt(path: Path, n_head: int) -> Imported:
    """A nanoGPT state dict saved as safetensors; its sizes are its tensors', but for n_head. Raises UserError."""
    tensors = by_our_names(map_weights(path), path)
    shapes = {name: tensors[name].shape for name in ("wte.weight", "wpe.weight") if name in tensors}
    if len(shapes) < 2 or any(len(shape) != 2 for shape in shapes.values()):
        raise UserError(f"{path} is no nanoGPT model: it needs wte.weight (V, C) and wpe.weight (T, C)")
    (V, C), (T, _) = shapes.values()
    n_layer = len({name.split(".")[1] for name in tensors if name.startswith("h.")})
    config = sized(path, V, T, n_layer=n_layer, n_head=n_head, n_embd=C, dropout=0.0, bias="ln_f.bias" in tensors)
    params, notes = read_params(path, tensors, config, conv1d=False)
    return Imported(config, params, tuple(notes))


def find_weights(source: Path) -> Iterator[tuple[str, Stored]]:
    """(name, tensor) of a weights file, or of a folder's: one file, or shards with an index. Raises UserError."""
    if not source.is_dir():
        yield from map_weights(source).items()
        return
    if (source / WEIGHTS).exists():
        yield from map_weights(source / WEIGHTS).items()
        return
    index = source / INDEX
    if not index.exists():
        for path in sorted(source.iterdir()):
            refuse_pickle(path)
        raise UserError(f"{source} has no weights: expected {WEIGHTS}, or shards with {INDEX}")
    places = read_json(index, "the index of the shards").get("weight_map")
    if type(places) is not dict or not all(type(file) is str and Path(file).name == file for file in places.values()):
        raise UserError(f"{index}: weight_map must say which file of this folder each tensor is in")
    shards = {file: map_weights(source / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in shards[file]:
            raise UserError(f"{source / file}: tensor {shorten(name)} is missing, which {INDEX} says is here")
        yield name, shards[file][name]


def read_hf_config(path: Path) -> tuple[GPTConfig, list[str]]:
    """The sizes in a config.json, and what to say about it. Raises UserError if it is not of our architecture."""
    fields = read_json(path, "the configuration of a GPT-2 model")
    if fields.get("model_type") != "gpt2":
        raise UserError(f"{path}: model_type must be 'gpt2', got {shorten(fields.get('model_type'))}")
    for name, allowed in ARCHITECTURE.items():
        value = fields.get(name, allowed[0])
        if value not in allowed or type(value) is not type(allowed[0]):
            expected = " or ".join(map(repr, allowed))
            raise UserError(f"{path}: {name} is {shorten(value)}, but this architecture has {expected}")
    if fields.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config is there, but this architecture has no quantized weights")
    dropouts = {name: fields.get(name, 0.1) for name in DROPOUTS}
    for name, value in dropouts.items():
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise UserError(f"{path}: {name} must be a number in [0, 1), got {shorten(value)}")
    C, inner = fields.get("n_embd", 768), fields.get("n_inner")
    if inner is not None and (type(C) is not int or inner != 4 * C):
        raise UserError(f"{path}: n_inner is {shorten(inner)}, but this architecture has 4 n_embd")
    config = sized(
        path,
        fields.get("vocab_size", 50257),
        fields.get("n_positions", 1024),
        n_layer=fields.get("n_layer", 12),
        n_head=fields.get("n_head", 12),
        n_embd=C,
        dropout=dropouts["resid_pdrop"],
        bias=fields.get("bias", True),
    )
    notes = []
    if len(set(dropouts.values())) > 1:
        said = ", ".join(f"{name} {value}" for name, value in dropouts.items())
        notes.append(f"there is one dropout for all places: {config.dropout} instead of {said}")
    return config, notes


def sized(path: Path, vocab_size: int, block_size: int, **sizes: Any) -> GPTConfig:
    """The GPTConfig with sizes from a file. Raises UserError that names the file."""
    try:
        config = GPTConfig(vocab_size, block_size, **sizes)
        ModelFlags(**asdict(config))  # which knows what sizes are out of reach
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return config


def by_our_names(stored: dict[str, Stored], source: Path) -> dict[str, Stored]:
    """The tensors without their prefixes, and without the buffers that hold masks. Raises UserError."""
    tensors: dict[str, Stored] = {}
    for name, tensor in stored.items():
        ours = PREFIXES.sub("", name)
        if MASK.fullmatch(ours):
            continue
        if ours in tensors:
            raise UserError(f"{source}: {tensors[ours].name} and {name} are the same tensor")
        tensors[ours] = tensor
    return tensors


def read_params(
    source: Path, tensors: dict[str, Stored], config: GPTConfig, *, conv1d: bool
) -> tuple[Params, list[str]]:
    """All parameters of the config in our layout, and what to say about them. Raises UserError that names the tensor.

    source: the folder or file that the tensors are from
    conv1d: linear layers are (in, out), as in Hugging Face's GPT-2, and it always has biases
    """
    shapes = param_shapes(GPTConfig(**asdict(config) | {"bias": config.bias or conv1d}))
    head = tensors.pop(HEAD, None)
    for name in [*shapes, *tensors]:
        if name not in tensors or name not in shapes:
            fault = "missing" if name in shapes else "not of this model"
            raise UserError(f"{source}: tensor {shorten(name)} is {fault}")
    for name, shape in shapes.items():
        expected = shape[::-1] if conv1d and CONV1D.fullmatch(name) else shape
        tensor = tensors[name]
        if tensor.shape != expected:
            hint = f"; that is the layout of {'nanoGPT' if conv1d else 'Hugging Face'}"
            other = hint if tensor.shape == expected[::-1] and CONV1D.fullmatch(name) else ""
            raise UserError(f"{tensor.path}: {tensor.name} must have shape {expected}, got {tensor.shape}{other}")

    kinds = {tensor.dtype for tensor in tensors.values()}
    dtype = np.float64 if "F64" in kinds else np.float32
    params = {}
    for name in shapes:
        array = tensors[name].read().astype(dtype, copy=False)
        params[name] = array.T if conv1d and CONV1D.fullmatch(name) else array
    if head is not None and not np.array_equal(head.read(), params["wte.weight"]):
        raise UserError(f"{head.path}: {head.name} is not wte.weight, but this architecture's head is tied to it")
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    said = [names[kind] for kind in sorted(kinds) if np.dtype(DTYPES[kind]) != dtype]
    return params, [f"weights of {' and '.join(said)} are kept as {np.dtype(dtype).name}"] if said else []


# ---------------------------------------------------------------------------------------------------------------------
# Out


def write_hf(folder: Path, config: GPTConfig, params: Params, tokenizer: Tokenizer) -> None:
    """A folder that AutoModelForCausalLM and AutoTokenizer load. Raises UserError, OSError."""
    end = token_id(tokenizer, END_OF_TEXT)
    model = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        **{name: allowed[0] for name, allowed in ARCHITECTURE.items()},
        **{name: config.dropout for name in DROPOUTS},
        "bos_token_id": end,
        "eos_token_id": end,
        "torch_dtype": params["wte.weight"].dtype.name,
    }
    if not config.bias:
        model["bias"] = False
    # A text is at most the window: Hugging Face does not move it. Ids that stand for no token are never drawn here.
    generation: dict[str, Any] = {"max_length": config.block_size, "bos_token_id": end, "eos_token_id": end}
    if tokenizer.vocab_size < config.vocab_size:
        generation["suppress_tokens"] = list(range(tokenizer.vocab_size, config.vocab_size))
    ends = {} if end is None else {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.block_size,
        "clean_up_tokenization_spaces": False,
        **ends,
    }
    files = {
        CONFIG: model,
        GENERATION_CONFIG: generation,
        TOKENIZER: to_hf(tokenizer),
        TOKENIZER_CONFIG: tokens,
    }
    for name, content in files.items():
        write_new(folder / name, json.dumps(content, indent=2, ensure_ascii=False).encode())

    tensors = {}
    for name, shape in param_shapes(GPTConfig(**asdict(config) | {"bias": True})).items():
        param = params[name] if name in params else np.zeros(shape, params["wte.weight"].dtype)
        tensors["transformer." + name] = param.T if CONV1D.fullmatch(name) else param
    with new_file(folder / WEIGHTS) as file:
        write_tensors(file, tensors, {"format": "pt"})


def token_id(tokenizer: Tokenizer, special_token: str) -> int | None:
    """The id of a special token, or None if there is no such token."""
    if isinstance(tokenizer, BPETokenizer) and special_token in tokenizer.special_tokens:  # characters have none at all
        return 256 + len(tokenizer.merges) + tokenizer.special_tokens.index(special_token)
    return None

"""tools/hf.py and tools/hf_tokenizer.py: Hugging Face's GPT-2 in and out, with transformers as the witness; nanoGPT in.

Weights go through files, as users' do: what transformers saves is read here, what is written here is loaded by it.
"""

import dataclasses
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import numpygpt
from common.errors import UserError
from data import verse
from data.bpe import BPETokenizer
from data.gpt2_bpe import END_OF_TEXT, gpt2_byte_order
from data.tokenizers import CharTokenizer, Tokenizer
from numpygpt import GPTConfig
from tests.helpers import Arrays, assert_close, random_weights, rms, uncancelled_scales
from tests.strategies import SEEDS, Example, examples
from tools import hf
from tools.hf import read_hf, read_hf_config, read_nanogpt, write_hf
from tools.hf_tokenizer import byte_symbols, from_hf, read_tokenizer, to_hf

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for anything anywhere else

# The gates, and the worst that a thousand examples gave.
LOGITS, GRADIENTS = 1e-12, 1e-12  # 1.2e-14, 2.4e-13

CONFIG = GPTConfig(vocab_size=7, block_size=6, n_layer=2, n_head=2, n_embd=8, dropout=0.1)
NAMES = CharTokenizer("abcdefg")
TEXT = verse.write(6000, 3) + "Ünïcode: naïve façade, 日本語, привет!  12 345\t\n\n\n  we'll they're I'd\u200d🙂\r\n"
BPE = BPETokenizer.train(TEXT, 400, special_tokens=[END_OF_TEXT])
TOKENIZERS = {"characters": CharTokenizer.from_text(TEXT), "bpe": BPE, "bpe, no end": BPETokenizer.train(TEXT, 300)}


def gpt2(config: GPTConfig, seed: int, dtype: torch.dtype = torch.float64, **options: object) -> torch.nn.Module:
    """Hugging Face's GPT-2 with weights that PyTorch drew, all of which matter."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
    sizes = {"vocab_size": config.vocab_size, "n_positions": config.block_size, "n_embd": config.n_embd}
    ends = {"bos_token_id": None, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=config.n_layer, n_head=config.n_head, **sizes, **ends, **options)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(float(param.ndim == 1) / 2, 0.5, generator=generator)
    return model.to(dtype).eval()


def in_our_layout(arrays: Arrays) -> Arrays:
    """Hugging Face's tensors by our names, (out, in): written down once more, for the tests."""
    arrays = {name.removeprefix("transformer."): array for name, array in arrays.items()}
    linear = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {name: array.T if name.endswith(linear) else array for name, array in arrays.items()}


def with_biases(example: Example) -> Example:
    """The example for a model of Hugging Face's, which always has them and brings its own weights."""
    return dataclasses.replace(example, config=dataclasses.replace(example.config, bias=True), params={})


# ---------------------------------------------------------------------------------------------------------------------
# From Hugging Face


@given(example=examples().map(with_biases), seed=SEEDS, shards=st.booleans())
def test_a_folder_of_transformers_is_the_same_function(
    example: Example, seed: int, shards: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Logits and every gradient of what transformers saved, in one file or in shards, computed by NumPy."""
    folder = tmp_path_factory.mktemp("hf")
    theirs = gpt2(example.config, seed)
    theirs.save_pretrained(folder, max_shard_size="2KB" if shards else "1GB")
    model = read_hf(folder)
    assert dataclasses.replace(model.config, dropout=0.0) == example.config
    ours = numpygpt.GPT(model.config, model.params)

    idx, targets = (np.ascontiguousarray(ids).astype(np.int64) for ids in (example.idx, example.targets))
    logits = theirs(torch.from_numpy(idx)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), ignore_index=-1)
    loss.backward()
    expected = in_our_layout({name: param.grad.numpy() for name, param in theirs.named_parameters()})

    what, meaning = "NumPy and transformers", "The weights were not read as they were written."
    size = max(1.0, rms(logits.detach().numpy()))
    assert_close(what, "logits", ours.forward(idx)[0], logits.detach().numpy(), LOGITS, scale=size, meaning=meaning)
    our_loss, grads = ours.loss_and_grads(idx, targets)
    assert_close(what, "loss", our_loss, loss.detach().numpy(), LOGITS, scale=size, meaning=meaning)
    scales = uncancelled_scales(ours, idx, targets)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        scale = max(rms(expected[name]), scales[name])
        assert_close(what, name, grad, expected[name], GRADIENTS, scale=scale, meaning=meaning)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_each_dtype_is_read_as_transformers_reads_it(dtype: str, tmp_path: Path) -> None:
    theirs = gpt2(CONFIG, 1, getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    model = read_hf(tmp_path)
    kept = torch.float64 if dtype == "float64" else torch.float32
    for name, param in in_our_layout({n: p.detach().to(kept).numpy() for n, p in theirs.named_parameters()}).items():
        assert model.params[name].dtype == param.dtype
        np.testing.assert_array_equal(model.params[name], param)
    said = [f"weights of {dtype} are kept as float32"] if dtype in ("float16", "bfloat16") else []
    assert list(model.notes) == said


def test_names_without_prefix_masks_and_a_tied_head_are_understood(tmp_path: Path) -> None:
    """As in the oldest files of GPT-2, and in those that keep what they need not."""
    gpt2(CONFIG, 1, torch.float32).save_pretrained(tmp_path)
    expected = read_hf(tmp_path).params
    tensors = {n.removeprefix("transformer."): a for n, a in load_file(tmp_path / "model.safetensors").items()}
    for i in range(CONFIG.n_layer):
        tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 6, 6), np.uint8))
        tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        params = read_hf(source).params
        assert list(params) == list(expected)
        for name, param in params.items():
            np.testing.assert_array_equal(param, expected[name])


def test_weights_that_need_no_change_stay_in_the_file(tmp_path: Path) -> None:
    gpt2(CONFIG, 1, torch.float32).save_pretrained(tmp_path)
    params = read_hf(tmp_path).params
    model = numpygpt.GPT(CONFIG, params)
    assert not params["wte.weight"].flags.writeable
    assert not params["wte.weight"].flags.owndata
    assert model.params["wte.weight"] is params["wte.weight"] or np.shares_memory(
        model.params["wte.weight"], params["wte.weight"]
    )


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ({}, 124_439_808),
        ({"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354_823_168),
        ({"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774_030_080),
        ({"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    ],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_all_sizes_of_gpt2(sizes: dict, count: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_ctx": 1024, **sizes}))
    config, notes = read_hf_config(tmp_path / "config.json")
    assert sum(int(np.prod(shape)) for shape in numpygpt.param_shapes(config).values()) == count
    assert (config.dropout, notes) == (0.1, [])


def test_dropouts_that_differ_are_said(tmp_path: Path) -> None:
    gpt2(CONFIG, 1, attn_pdrop=0.0, resid_pdrop=0.3).save_pretrained(tmp_path)
    model = read_hf(tmp_path)
    assert model.config.dropout == 0.3
    assert model.notes == (
        "there is one dropout for all places: 0.3 instead of resid_pdrop 0.3, embd_pdrop 0.1, attn_pdrop 0.0",
    )


# ---------------------------------------------------------------------------------------------------------------------
# To Hugging Face, and back


@given(example=examples(), dtype=st.sampled_from([np.float64, np.float32]))
def test_transformers_loads_what_is_written(
    example: Example, dtype: type, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same logits, in the run's own dtype; and back again, every bit."""
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
    folder = tmp_path_factory.mktemp("out")
    params = {name: param.astype(dtype) for name, param in example.params.items()}
    write_hf(folder, example.config, params, CharTokenizer("a"))

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert theirs.dtype == torch.from_numpy(np.zeros(1, dtype)).dtype
    idx = np.ascontiguousarray(example.idx).astype(np.int64)
    with torch.no_grad():
        logits = theirs.double()(torch.from_numpy(idx)).logits.numpy()
    ours = numpygpt.GPT(example.config, params, dtype=np.float64).forward(idx)[0]
    meaning = "The weights were not written as transformers reads them."
    assert_close("transformers", "logits", logits, ours, LOGITS, scale=max(1.0, rms(ours)), meaning=meaning)

    back = read_hf(folder)
    assert (back.config, back.notes) == (example.config, ())
    assert list(back.params) == list(params)
    for name, param in params.items():
        assert back.params[name].dtype == dtype
        assert back.params[name].tobytes() == param.tobytes(), name


def test_the_folder_says_what_the_model_is() -> None:
    """What transformers takes from it beside the weights: the window, and the ids that stand for nothing."""
    config = dataclasses.replace(CONFIG, vocab_size=9, bias=False)
    with TemporaryDirectory() as folder:
        write_hf(Path(folder), config, random_weights(config, 1), NAMES)
        said = {path.name: json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
    assert said["tokenizer_config.json"]["model_max_length"] == config.block_size
    assert said["generation_config.json"]["max_length"] == config.block_size
    assert said["generation_config.json"]["suppress_tokens"] == [7, 8]
    sizes = {"vocab_size": 9, "n_positions": 6, "n_layer": 2, "n_head": 2, "n_embd": 8, "bias": False}
    rest = {"torch_dtype": "float64", "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    assert (sizes | rest).items() <= said["config.json"].items()


def test_a_folder_of_ours_is_saved_by_transformers_and_read_again(tmp_path: Path) -> None:
    """What says that there are no biases survives transformers, too."""
    config = dataclasses.replace(CONFIG, bias=False)
    params = random_weights(config, 1)
    (tmp_path / "ours").mkdir()
    write_hf(tmp_path / "ours", config, params, NAMES)
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    back = read_hf(tmp_path / "theirs")
    assert back.config == config
    for name, param in back.params.items():
        np.testing.assert_array_equal(param, params[name])
    assert read_tokenizer(tmp_path / "theirs", None) == NAMES


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def library(tokenizer: Tokenizer) -> object:
    """The same in Hugging Face's library."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -r requirements-dev.txt")
    return tokenizers.Tokenizer.from_str(json.dumps(to_hf(tokenizer)))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_tokenizers_give_the_same_ids_and_texts(name: str, data: st.DataObject) -> None:
    ours, theirs = TOKENIZERS[name], library(TOKENIZERS[name])
    pieces = st.sampled_from(sorted(set(TEXT)) + TEXT.split()[:80] + ["  ", "\n \n", " 's", "'ll "])
    text = "".join(data.draw(st.lists(pieces, max_size=30)))
    ids = ours.encode(text).tolist()
    assert theirs.encode(text).ids == ids
    assert theirs.decode(ids, skip_special_tokens=False) == text
    any_ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=20))
    assert theirs.decode(any_ids, skip_special_tokens=False) == ours.decode(any_ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_tokenizers_come_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As written here, and as the library writes it after reading that."""
    assert from_hf(json.loads(json.dumps(to_hf(tokenizer))), tmp_path) == tokenizer
    assert from_hf(json.loads(library(tokenizer).to_str()), tmp_path) == tokenizer


def test_unknown_characters_are_refused_there_as_here() -> None:
    with pytest.raises(Exception, match="WordLevel"):
        library(NAMES).encode("abcx")


def test_special_tokens() -> None:
    """Hugging Face reads a special token wherever it is written; here that must be asked for."""
    ids = library(BPE).encode(f"a{END_OF_TEXT}b").ids
    assert ids == BPE.encode(f"a{END_OF_TEXT}b", allowed_special=[END_OF_TEXT]).tolist()
    with pytest.raises(UserError, match="written like another token"):
        to_hf(BPETokenizer((), ("a",)))


def theirs_trained(**options: object) -> object:
    """A byte-level BPE that Hugging Face's library has trained."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers: pip install -r requirements-dev.txt")
    tokenizer = tokenizers.ByteLevelBPETokenizer(**options)
    tokenizer.train_from_iterator(TEXT.splitlines(True), vocab_size=350, min_frequency=2, show_progress=False)
    return tokenizer


def test_a_tokenizer_that_the_library_trained(tmp_path: Path) -> None:
    """In its tokenizer.json, with a special token added, and in GPT-2's two files."""
    theirs = theirs_trained()
    theirs.save_model(str(tmp_path))
    theirs.add_special_tokens([END_OF_TEXT])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = read_tokenizer(tmp_path, None)
    assert ours.special_tokens == (END_OF_TEXT,)
    assert theirs.encode(TEXT).ids == ours.encode(TEXT).tolist()
    assert read_tokenizer(tmp_path / "elsewhere", str(tmp_path / "tokenizer.json")) == ours

    (tmp_path / "tokenizer.json").unlink()
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {END_OF_TEXT: len(vocab)}))
    assert read_tokenizer(tmp_path, None) == ours
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"vocab\.json: its ids are not"):
        read_tokenizer(tmp_path, None)


# ---------------------------------------------------------------------------------------------------------------------
# The files beside a tokenizer


FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": True}
GPT2 = BPETokenizer(BPE.merges, (END_OF_TEXT,), gpt2_byte_order()[0])  # numbered as GPT-2 numbers the bytes
END_ID = GPT2.vocab_size - 1
SIDE_FILES = {
    "added_tokens.json": {"added_tokens.json": {"<eot>": END_ID + 1, "<pad>": END_ID + 2}},
    "tokenizer_config.json": {
        "tokenizer_config.json": {
            "added_tokens_decoder": {
                str(END_ID + 2): {"content": "<pad>", **FLAGS},
                str(END_ID): {"content": END_OF_TEXT, **FLAGS},
                str(END_ID + 1): {"content": "<eot>", **FLAGS},
            },
            "eos_token": "<eot>",
            "add_bos_token": False,
            "model_max_length": 1024,
        },
    },
    "all three": {
        "added_tokens.json": {"<eot>": END_ID + 1, "<pad>": END_ID + 2},
        "tokenizer_config.json": {"pad_token": None, "added_tokens_decoder": {str(END_ID + 1): {"content": "<eot>"}}},
        "special_tokens_map.json": {
            "bos_token": END_OF_TEXT,
            "pad_token": {"content": "<pad>", **FLAGS},
            "additional_special_tokens": ["<eot>"],
        },
    },
}


def gpt2_files(folder: Path, **others: dict) -> Path:
    """A folder as GPT-2's: vocab.json, merges.txt and other JSON files, named without their ending."""
    fields = to_hf(GPT2)["model"]
    merges = "\n".join(" ".join(pair) for pair in fields["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    for name, content in {"vocab": fields["vocab"], **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("base", ["merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("files", SIDE_FILES.values(), ids=SIDE_FILES)
def test_tokens_that_side_files_add_are_read_and_written(files: dict, base: str, tmp_path: Path) -> None:
    """A failure: a token is lost without a word, and its row of the model with it."""
    gpt2_files(tmp_path, **{name.removesuffix(".json"): content for name, content in files.items()})
    if base == "tokenizer.json":
        (tmp_path / "tokenizer.json").write_text(json.dumps(to_hf(GPT2)), encoding="utf-8")
        (tmp_path / "merges.txt").unlink()
    ours = read_tokenizer(tmp_path, None)
    assert ours == dataclasses.replace(GPT2, special_tokens=(END_OF_TEXT, "<eot>", "<pad>"))
    text = f"a<eot><pad>{END_OF_TEXT} b"
    ids = ours.encode(text, allowed_special=ours.special_tokens).tolist()
    assert [one for one in ids if one >= END_ID] == [END_ID + 1, END_ID + 2, END_ID]
    assert ours.decode(ids) == text
    assert library(ours).encode(text).ids == ids
    assert from_hf(to_hf(ours), tmp_path) == ours


def test_transformers_reads_added_tokens_alike(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements-dev.txt")
    settings = {"tokenizer_class": "GPT2Tokenizer", **SIDE_FILES["tokenizer_config.json"]["tokenizer_config.json"]}
    theirs = transformers.AutoTokenizer.from_pretrained(gpt2_files(tmp_path, tokenizer_config=settings))
    ours = read_tokenizer(tmp_path, None)
    text = f"The king<eot> {END_OF_TEXT}we'll<pad>"
    assert theirs.encode(text) == ours.encode(text, allowed_special=ours.special_tokens).tolist()
    theirs.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again", None) == ours


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"added_tokens": {"<eot>": END_ID + 5}},
            r"added_tokens\.json: token '<eot>' has id .*, but the next free one",
        ),
        ({"added_tokens": {"<eot>": "x"}}, r"added_tokens\.json: the id of token '<eot>' must be a whole number"),
        ({"added_tokens": {END_OF_TEXT: 3}}, r"added_tokens\.json: token '<\|endoftext\|>' has id 3, but "),
        ({"added_tokens": {"": END_ID + 1}}, r"added_tokens\.json: special token '' is empty"),
        ({"added_tokens": {"a": END_ID + 1, "b": END_ID + 1}}, r"added_tokens\.json: token 'a' has id"),
        ({"added_tokens": {"<a>": END_ID + 1, "<b>": END_ID + 1}}, r"'<b>' and '<a>' both have id"),
        ({"special_tokens_map": {"pad_token": "<pad>"}}, r"special_tokens_map\.json: pad_token '<pad>' is no token"),
        ({"tokenizer_config": {"mask_token": "<mask>"}}, r"tokenizer_config\.json: mask_token '<mask>' is no token"),
        ({"special_tokens_map": {"additional_special_tokens": ["<x>"]}}, "additional_special_tokens '<x>' is no"),
        ({"special_tokens_map": {"eos_token": 5}}, r"special_tokens_map\.json: an added token is 5"),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder must be an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<a>"}}}}, "id of token '<a>' must be"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {str(END_ID + 1): {"content": "<mask>", "lstrip": True}}}},
            r"tokenizer_config\.json: token '<mask>' has lstrip",
        ),
        ({"vocab": to_hf(GPT2)["model"]["vocab"] | {"<eot>": END_ID + 1}}, r"vocab\.json: .* token '<eot>' must have"),
    ],
)
def test_side_files_that_ours_cannot_follow_are_refused_by_name(files: dict, fault: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=fault):
        read_tokenizer(gpt2_files(tmp_path, **files), None)


def test_a_tokenizer_of_characters_cannot_be_given_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_hf(NAMES)))
    assert read_tokenizer(tmp_path, None) == NAMES
    (tmp_path / "added_tokens.json").write_text('{"<eot>": 7}')
    with pytest.raises(
        UserError, match=r"added_tokens\.json: a tokenizer of characters has no special tokens, but '<eot>'"
    ):
        read_tokenizer(tmp_path, None)


def changed(**parts: object) -> dict:
    """BPE's tokenizer.json with parts of it replaced; model__x replaces x of the model."""
    fields = json.loads(json.dumps(to_hf(BPE)))
    for name, value in parts.items():
        inside = fields["model"] if name.startswith("model__") else fields
        inside[name.removeprefix("model__")] = value
    return fields


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VOCAB = to_hf(BPE)["model"]["vocab"]


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({}, "it is no tokenizer.json: expected a tokenizer.json, or GPT-2's merges.txt"),
        (changed(model=None), "it is no tokenizer.json"),
        (VOCAB, "it is a list of tokens and their ids, as GPT-2's vocab.json"),
        (changed(model={"type": "Unigram"}), "'Unigram'"),
        (changed(normalizer={"type": "NFC"}), "normalizer must be None"),
        (changed(pre_tokenizer=None), "pre_tokenizer must be"),
        (changed(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "pre_tokenizer must be"),
        (changed(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}), "pre_tokenizer must be"),
        (changed(decoder={"type": "Fuse"}), "decoder must be"),
        (changed(model__dropout=0.1), "dropout is 0.1"),
        (changed(model__end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (changed(model__byte_fallback=True), "byte_fallback is True"),
        (changed(model__vocab=[]), "needs vocab"),
        (changed(added_tokens=["a"]), "an added token is 'a'"),
        (changed(added_tokens=[{"content": "x", "id": 1}]), "the ids must be 0 to"),
        (changed(model__vocab=VOCAB | {"x y": -1}), "the ids must be 0 to"),
        (changed(model__vocab=VOCAB | {"x y": 400}), "'x y', id 400, is made by no merge"),
        (changed(model__merges=[["a", "b", "c"]]), "merge 0 must be of two tokens"),
        (changed(model__merges=[["a", "no such token"]]), "merge 0 must be of two tokens"),
        (changed(model__merges=to_hf(BPE)["model"]["merges"][::-1]), "must make the token with id 256"),
        (
            changed(
                added_tokens=[{"content": "<s>", "id": 0}],
                model__merges=[],
                model__vocab={symbol: place for place, symbol in enumerate(["<s>", *byte_symbols().values()])},
            ),
            "id 0 is '<s>'",
        ),
        (changed(added_tokens=[], model__merges=[], model__vocab={"a": 0, "b": 1}), "id 2 is 'missing'"),
        (to_hf(NAMES) | {"decoder": None}, "decoder must be"),
        (to_hf(NAMES) | {"model": {"type": "WordLevel", "vocab": {"ab": 0}}}, "single characters"),
        (to_hf(NAMES) | {"model": {"type": "WordLevel", "vocab": {"b": 0, "a": 1}}}, "by code point"),
        (to_hf(NAMES) | {"model": {"type": "WordLevel", "vocab": {"b": 0, "a": 2}}}, "the ids must be 0 to 1"),
    ],
)
def test_tokenizers_that_ours_is_not_are_refused(fields: dict, fault: str) -> None:
    with pytest.raises(UserError, match=r"^here/tokenizer\.json: ") as refusal:
        from_hf(fields, Path("here/tokenizer.json"))
    assert fault in str(refusal.value)


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


def nanogpt(config: GPTConfig, params: Arrays, prefix: str) -> Arrays:
    """The state dict of nanoGPT's model: our layout, its names, the tied head again, and the buffers of its masks."""
    masks = {f"h.{i}.attn.bias": np.ones((1, 1, 6, 6), np.float32) for i in range(config.n_layer)}
    head = {f"{prefix}lm_head.weight": params["wte.weight"]}
    return {f"{prefix}transformer.{name}": array for name, array in (params | masks).items()} | head


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt(prefix: str, bias: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, bias=bias, dropout=0.0)
    params = {name: param.astype(np.float32) for name, param in random_weights(config, 1).items()}
    save_file(nanogpt(config, params, prefix), tmp_path / "nano.safetensors")
    model = read_nanogpt(tmp_path / "nano.safetensors", n_head=2)
    assert (model.config, model.notes) == (config, ())
    assert list(model.params) == list(params)
    for name, param in params.items():
        np.testing.assert_array_equal(model.params[name], param)


def test_the_two_layouts_are_not_taken_for_each_other(tmp_path: Path) -> None:
    params = {name: param.astype(np.float32) for name, param in random_weights(CONFIG, 1).items()}
    save_file(nanogpt(CONFIG, params, ""), tmp_path / "model.safetensors")
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", CONFIG, params, NAMES)
    with pytest.raises(UserError, match=r"c_attn.weight must have shape \(24, 8\), .* the layout of Hugging Face"):
        read_nanogpt(tmp_path / "hf" / "model.safetensors", n_head=2)
    (tmp_path / "config.json").write_text((tmp_path / "hf" / "config.json").read_text())
    with pytest.raises(UserError, match=r"c_attn.weight must have shape \(8, 24\), .* the layout of nanoGPT"):
        read_hf(tmp_path)
    with pytest.raises(UserError, match="n_embd must be a multiple of n_head"):
        read_nanogpt(tmp_path / "model.safetensors", n_head=3)
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="is no nanoGPT model"):
        read_nanogpt(tmp_path / "other.safetensors", n_head=2)


def test_only_linear_layers_are_transposed() -> None:
    assert [name for name in numpygpt.param_shapes(CONFIG) if hf.CONV1D.fullmatch(name) and ".0." in name] == [
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
    ]

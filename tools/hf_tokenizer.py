"""Tokenizers for Hugging Face and back: the tokenizer.json of the library `tokenizers`, which is not needed here.

Characters are its WordLevel model with a splitter that isolates each one; byte-pair encoding is its byte-level BPE, as
GPT-2's. Ours numbers the 256 bytes first, then one token for each merge in order, then special tokens: a tokenizer.json
with other ids, another splitter, or a normalizer is refused by name.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from common.errors import UserError, shorten
from common.files import read_json
from data.bpe import BPETokenizer
from data.gpt2_bpe import END_OF_TEXT, gpt2_byte_order, gpt2_tokenizer, load_merges
from data.tokenizers import CharTokenizer, Tokenizer, foreign_kind, load

TOKENIZER, MERGES, VOCAB = "tokenizer.json", "merges.txt", "vocab.json"
ADDED_TOKENS, SPECIAL_TOKENS_MAP = "added_tokens.json", "special_tokens_map.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MAX_BYTES = 32 << 20

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
EACH_CHARACTER = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}


def to_hf(tokenizer: Tokenizer) -> dict:
    """What tokenizer.json holds for the same ids. Raises UserError if it cannot say them."""
    model: dict[str, object]
    parts: dict[str, object]
    if isinstance(tokenizer, CharTokenizer):
        # Words of one character. WordLevel fails on unknown ones where BPE would drop them: the token that it names
        # for them is none of the vocabulary.
        vocab = {character: place for place, character in enumerate(tokenizer.characters)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "unknown character"}
        parts = {
            "added_tokens": [],
            "pre_tokenizer": EACH_CHARACTER,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
        }
    else:
        assert isinstance(tokenizer, BPETokenizer)
        symbols = byte_symbols()
        names = [
            "".join(symbols[byte] for byte in token) for token in tokenizer.token_bytes[: 256 + len(tokenizer.merges)]
        ]
        names += tokenizer.special_tokens
        vocab = {name: place for place, name in enumerate(names)}
        merges = [[names[left], names[right]] for left, right in tokenizer.merges]
        if len(vocab) < len(names):
            raise UserError(
                "a special token is written like another token, which Hugging Face's format cannot tell apart"
            )
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        }
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [{"id": vocab[token], "content": token, **flags} for token in tokenizer.special_tokens]
        parts = {
            "added_tokens": added,
            "pre_tokenizer": BYTE_LEVEL,
            "post_processor": BYTE_LEVEL,
            "decoder": BYTE_LEVEL,
        }
    return {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, **parts, "model": model}


def read_tokenizer(source: Path, named: str | None) -> Tokenizer:
    """The tokenizer that was named, gpt2 or a file, or else the one in the folder of source. Raises UserError."""
    if named == "gpt2":
        return gpt2_tokenizer()
    if named is not None:
        path = Path(named)
        if path.suffix != ".json":
            return load_merges(path)
        fields = read_json(path, "a tokenizer.json", max_bytes=MAX_BYTES)
        return load(path) if "kind" in fields else from_hf(fields, path)
    folder = source if source.is_dir() else source.parent
    path, merges = folder / TOKENIZER, folder / MERGES
    added = added_tokens(folder)
    if path.exists():
        tokenizer = from_hf(read_json(path, "a tokenizer.json", max_bytes=MAX_BYTES), path)
    elif merges.exists():
        tokenizer = load_merges(merges)
        check_ids(folder / VOCAB, tokenizer, added)
    else:
        raise UserError(f"{folder} has no {TOKENIZER}: name one with --tokenizer, gpt2 or a file")
    tokenizer = with_added(tokenizer, added)
    for where, name, token in named_special_tokens(folder):
        if token not in ids_of(tokenizer):
            raise UserError(
                f"{where}: {name} {shorten(token)} is no token of this tokenizer, and no file gives it an id"
            )
    return tokenizer


def check_ids(path: Path, tokenizer: BPETokenizer, added: dict[str, tuple[Path, int]]) -> None:
    """Raises UserError unless vocab.json numbers the tokens as ours does; those that other files add may be in it."""
    expected, found = ids_of(tokenizer), read_json(path, f"the ids of {MERGES}", max_bytes=MAX_BYTES)
    for token in [*expected, *found]:
        if found.get(token) != expected.get(token) and (token in expected or token not in added):
            raise UserError(
                f"{path}: its ids are not those of the 256 bytes, the merges of {MERGES}, and {END_OF_TEXT}: token "
                f"{shorten(token)} must have {shorten(expected.get(token, 'none'))}, got {shorten(found.get(token))}"
            )


def ids_of(tokenizer: Tokenizer) -> dict[str, int]:
    """{token as Hugging Face's files write it: id}."""
    return to_hf(tokenizer)["model"]["vocab"]


# ---------------------------------------------------------------------------------------------------------------------
# The files beside it


def added_tokens(folder: Path) -> dict[str, tuple[Path, int]]:
    """{token: (file, id)} of what added_tokens.json and tokenizer_config.json add. Raises UserError."""
    added = {}
    path = folder / ADDED_TOKENS
    if path.exists():
        for token, number in read_json(path, "tokens and their ids").items():
            added[token] = path, number
    path = folder / TOKENIZER_CONFIG
    if path.exists():
        decoder = read_json(path, "the settings of a tokenizer").get("added_tokens_decoder", {})
        if type(decoder) is not dict:
            raise UserError(f"{path}: added_tokens_decoder must be an object, got {shorten(decoder)}")
        for number, token in decoder.items():
            content = content_of(token, f"{path}: ")
            added[content] = path, int(number) if number.isascii() and number.isdigit() and len(number) < 10 else number
    return added


def with_added(tokenizer: Tokenizer, added: dict[str, tuple[Path, int]]) -> Tokenizer:
    """The tokenizer with the added tokens that it does not have yet, as special tokens. Raises UserError.

    Ours numbers special tokens one after another, after all others; and a tokenizer of characters has none.
    """
    ids, new = ids_of(tokenizer), dict[int, str]()
    for token, (path, number) in added.items():
        if type(number) is not int:
            raise UserError(f"{path}: the id of token {shorten(token)} must be a whole number, got {shorten(number)}")
        if token not in ids:
            if number in new:
                raise UserError(f"{path}: {shorten(token)} and {shorten(new[number])} both have id {number}")
            new[number] = token
        elif ids[token] != number:
            raise UserError(f"{path}: token {shorten(token)} has id {number}, but {ids[token]} in the tokenizer itself")
    for expected, (number, token) in enumerate(sorted(new.items()), start=tokenizer.vocab_size):
        path, _ = added[token]
        if not isinstance(tokenizer, BPETokenizer):
            raise UserError(f"{path}: a tokenizer of characters has no special tokens, but {shorten(token)} is one")
        if number != expected:
            raise UserError(
                f"{path}: token {shorten(token)} has id {number}, but the next free one is {expected}: special tokens "
                "must be numbered without a gap after all others"
            )
    if not isinstance(tokenizer, BPETokenizer) or not new:
        return tokenizer
    try:
        return replace(tokenizer, special_tokens=(*tokenizer.special_tokens, *(new[number] for number in sorted(new))))
    except UserError as error:  # an empty token, or half of a character
        raise UserError(f"{path}: {error}") from error


def named_special_tokens(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """(file, name, token) of every token that special_tokens_map.json or tokenizer_config.json gives a role."""
    for file in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        path = folder / file
        if not path.exists():
            continue
        for name, value in read_json(path, "the roles of special tokens").items():
            if name.endswith("_token") and value is not None and type(value) is not bool:  # add_bos_token is a setting
                yield path, name, content_of(value, f"{path}: ")
            elif name == "additional_special_tokens" and type(value) is list:
                for token in value:
                    yield path, name, content_of(token, f"{path}: ")


def content_of(token: object, where: str = "") -> str:
    """The text of a token, written as a string or as an object with settings. Raises UserError."""
    if type(token) is str:
        return token
    if type(token) is not dict or type(token.get("content")) is not str:
        raise UserError(f"{where}an added token is {shorten(token)}")
    for setting in ("lstrip", "rstrip", "single_word"):
        if token.get(setting):
            raise UserError(
                f"{where}token {shorten(token['content'])} has {setting}, but special tokens here are read wherever "
                "they stand, and take nothing with them"
            )
    return token["content"]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json


def from_hf(fields: dict, path: Path) -> Tokenizer:
    """The tokenizer that gives the same ids as a tokenizer.json of the library. Raises UserError if ours cannot."""
    model = fields.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    try:
        if not isinstance(model, dict):
            found = foreign_kind(fields) or "no tokenizer.json"
            raise UserError(f"it is {found}: expected a tokenizer.json, or GPT-2's merges.txt (vocab.bpe)")
        if kind == "WordLevel":
            return characters_from_hf(fields, model)
        if kind == "BPE":
            return bpe_from_hf(fields, model)
        raise UserError(f"a tokenizer must be byte-level BPE or single characters, got {shorten(kind)}")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def characters_from_hf(fields: dict, model: dict) -> CharTokenizer:
    """What to_hf made of a CharTokenizer. Raises UserError for any other."""
    vocab = model.get("vocab")
    expect_parts(fields, {"normalizer": None, "pre_tokenizer": EACH_CHARACTER, "decoder": {"type": "Fuse"}})
    if added := fields.get("added_tokens"):
        raise UserError(f"a tokenizer of characters has no special tokens, but {shorten(added)} are added")
    if type(vocab) is not dict or not all(len(character) == 1 for character in vocab):
        raise UserError("a WordLevel model must be of single characters")
    return CharTokenizer("".join(in_order(vocab)))


def bpe_from_hf(fields: dict, model: dict) -> BPETokenizer:
    """A byte-level BPE. Raises UserError unless its ids are the bytes, the merges in order, then special tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    expect_parts(fields, {"normalizer": None, "pre_tokenizer": byte_level, "decoder": {"type": "ByteLevel"}})
    for name in (
        "dropout",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        if model.get(name):
            raise UserError(f"{name} is {shorten(model[name])}, but these tokenizers have none")
    vocab, merges, added = model.get("vocab"), model.get("merges"), fields.get("added_tokens", [])
    if type(vocab) is not dict or type(merges) is not list or type(added) is not list:
        raise UserError("a BPE model needs vocab, merges and added_tokens")
    vocab = dict(vocab)
    for token in added:
        if type(token) is not dict:
            raise UserError(f"an added token is {shorten(token)}")
        vocab[content_of(token)] = token.get("id")
    names = in_order(vocab)

    bytes_of = {symbol: byte for byte, symbol in byte_symbols().items()}
    if sorted(names[:256]) != sorted(bytes_of):
        odd = next((name for name in names if name not in bytes_of), "missing")
        raise UserError(
            f"the first 256 ids must be the bytes, in any order, but id {vocab.get(odd, len(vocab))} is {shorten(odd)}"
        )
    pairs = []
    for place, merge in enumerate(merges):
        pair = merge.split(" ") if type(merge) is str else merge
        if type(pair) is not list or len(pair) != 2 or not all(type(one) is str and one in vocab for one in pair):
            raise UserError(f"merge {place} must be of two tokens, got {shorten(merge)}")
        if vocab.get("".join(pair)) != 256 + place:
            raise UserError(f"merge {place}, {shorten(pair)}, must make the token with id {256 + place}")
        pairs.append((vocab[pair[0]], vocab[pair[1]]))
    special = names[256 + len(pairs) :]
    ours = {token["content"] for token in added}
    for token in special:
        if token not in ours and token != END_OF_TEXT:
            raise UserError(f"token {shorten(token)}, id {vocab[token]}, is made by no merge and is no added token")
    return BPETokenizer(tuple(pairs), tuple(special), bytes(bytes_of[name] for name in names[:256]))


def in_order(vocab: dict[str, int]) -> list[str]:
    """The tokens by their ids. Raises UserError unless these are 0, 1, 2 and so on."""
    if not all(type(place) is int for place in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"the ids must be 0 to {len(vocab) - 1}, each once")
    return sorted(vocab, key=vocab.__getitem__)


def expect_parts(fields: dict, expected: dict[str, dict | None]) -> None:
    """Raises UserError unless each part of a tokenizer.json has the fields that are expected, or their defaults."""
    for part, wanted in expected.items():
        got = fields.get(part)
        matches = (
            got is None
            if wanted is None
            else type(got) is dict and (wanted.items() <= ({"use_regex": True} | got).items())
        )
        if not matches:
            raise UserError(f"{part} must be {shorten(wanted)}, got {shorten(got)}")


def byte_symbols() -> dict[int, str]:
    """The character that stands for each byte in GPT-2's files."""
    order, symbols = gpt2_byte_order()
    return dict(zip(order, symbols, strict=True))

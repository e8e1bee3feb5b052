"""What every tokenizer checks: texts that can be written as UTF-8, and ids that are in the vocabulary."""

import re
from collections.abc import Collection, Iterable

import numpy as np

from common.errors import UserError, shorten


def check_no_surrogate(text: str) -> None:
    """Raise UserError, with the place, for half of a surrogate pair: it is no character, and UTF-8 cannot write it."""
    if not text.isascii() and (found := re.search("[\ud800-\udfff]", text)):
        raise UserError(
            f"lone surrogate U+{ord(found[0]):04X} at position {found.start()}: it is half of a character; "
            "the text was decoded wrongly"
        )


def check_special(allowed: Collection[str], special_tokens: Collection[str]) -> None:
    """Raise UserError if one of the special tokens that are to be read in a text is none of the tokenizer's."""
    for token in allowed:
        if token not in special_tokens:
            raise UserError(f"{shorten(token)} is no special token of this tokenizer: {shorten(special_tokens)}")


def as_ids(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """(n,) integers, each in [0, vocab_size). Raises UserError for anything else."""
    try:
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    except ValueError as error:  # a list of lists of unequal lengths
        raise UserError("token ids must be one row of whole numbers, not lists within a list") from error
    if array.ndim != 1:
        raise UserError(f"token ids must be one row, not an array of shape {array.shape}; decode row by row")
    if array.size == 0:
        return array.astype(np.int32)  # an empty list has no type to check
    if array.dtype.kind not in "iu":
        raise UserError(f"token ids must be whole numbers, not {array.dtype}")
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        at = int(np.argmax(outside))
        raise UserError(
            f"token id {array[at]} at position {at} is outside the vocabulary: expected 0 to {vocab_size - 1}"
        )
    return array


def as_id(one: int, vocab_size: int) -> int:
    """One id in [0, vocab_size). Raises UserError for anything else."""
    return int(as_ids([one], vocab_size)[0])

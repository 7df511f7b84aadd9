"""Text as tokens: the ids that a file of the `tokenizers` library gives it."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from distcond.errors import DataError

NUM_BYTES = 256
"The vocabulary of a text without a tokenizer."
PIECE_BYTES = 2**16
"About how long a text is encoded at once: beyond it, tokens do not cross the end of a line."
BATCH_PIECES = 16
"Encoded by one call, for which the library takes many times their size."


def vocabulary_of(tokenizer: str) -> int:
    """One more than the highest token id of a tokenizer's file; 256 without one. Raises DataError as `encoder` does."""
    return _vocabulary(*_identity(tokenizer)) if tokenizer else NUM_BYTES


def sha256_of(tokenizer: str) -> str:
    """What tells tokenizers apart: the hash of the file; empty without one."""
    return _identity(tokenizer)[1] if tokenizer else ""


def dtype_of(vocabulary: int) -> np.dtype[Any]:
    """How ids are kept on disk: uint8 for bytes, else uint16 or uint32."""
    return np.dtype(np.uint8 if vocabulary <= 2**8 else np.uint16 if vocabulary <= 2**16 else np.uint32)


def encoder(tokenizer: str, errors: str = "strict") -> Callable[[bytes, str], np.ndarray]:
    """What encodes lines of UTF-8 with their file's name: ids in the type of `dtype_of`, without special tokens.

    errors: what happens to bytes that are not UTF-8, as of bytes.decode: strict or replace (by U+FFFD).
    Raises DataError if the library, or the file, is missing or no tokenizer; a strict encoder does for what is not UTF-8.
    """
    model = _open(*_identity(tokenizer))
    dtype = dtype_of(vocabulary_of(tokenizer))

    def encode(data: bytes, name: str) -> np.ndarray:
        texts, ids = (_decoded(piece, name, errors) for piece in _pieces(data)), [np.empty(0, dtype)]
        while batch := list(itertools.islice(texts, BATCH_PIECES)):
            ids += (np.array(one.ids, dtype) for one in model.encode_batch_fast(batch, add_special_tokens=False))
        return np.concatenate(ids)

    return encode


def decoder(tokenizer: str) -> Callable[[list[int]], str]:
    """What makes a text of ids. Raises DataError as `encoder` does."""
    model = _open(*_identity(tokenizer))
    return lambda ids: str(model.decode(ids, skip_special_tokens=False))


def _pieces(data: bytes) -> Iterator[bytes]:
    """Cut after the last line that ends within PIECE_BYTES; a longer line is a piece of its own."""
    start = 0
    while start < len(data):
        end = len(data)
        if end - start > PIECE_BYTES:
            end = data.rfind(b"\n", start, start + PIECE_BYTES) + 1 or data.find(b"\n", start) + 1 or end
        yield data[start:end]
        start = end


def _decoded(piece: bytes, name: str, errors: str) -> str:
    try:
        return piece.decode(errors=errors)
    except UnicodeDecodeError as error:
        near = piece[max(0, error.start - 10) : error.start + 10]
        raise DataError(
            f"data.tokenizer reads UTF-8, which {name or 'a row'} is not ({error.reason} near {near!r}); "
            "leave it out of the data, or train on bytes, with data.tokenizer=''."
        ) from error


def _identity(tokenizer: str) -> tuple[str, str]:
    """Path and sha256 of the file, by which it is kept open."""
    path = Path(tokenizer).expanduser().absolute()
    try:
        return str(path), hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(
            f"data.tokenizer={tokenizer} cannot be read ({error.strerror}); name a tokenizer.json of the tokenizers library."
        ) from error


@cache
def _vocabulary(path: str, sha256: str) -> int:
    return max(_open(path, sha256).get_vocab(with_added_tokens=True).values(), default=0) + 1


@cache
def _open(path: str, sha256: str) -> Any:
    try:
        import tokenizers  # here, because few runs need it
    except ImportError as error:
        raise DataError("data.tokenizer needs the tokenizers library; run: pip install 'distcond[tokenizers]'") from error
    try:
        model = tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises Exception itself
        raise DataError(
            f"data.tokenizer={path} is no tokenizer ({' '.join(str(error).split())[:200]}); name a tokenizer.json of the "
            "tokenizers library."
        ) from error
    model.no_truncation()
    model.no_padding()
    return model

"""Text to token ids at the speed of the fastest library that gives the tokenizer's own ids, one
thread a process.

Two libraries encode 10 to 100 times faster than the ones that define the ids: fastokens and
gigatoken. One is used only after it gave the same ids for every text of
`data_tools.tokenizers.equality` and for a sample of the input.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any, Protocol

import numpy as np

from data_tools.tokenizers.equality import difference, fixed_texts
from data_tools.tokenizers.sentencepiece import to_tokenizer_json
from llada.errors import RunError, UserError, did_you_mean
from llada.tokenizer import I64, Tokenizer

BACKENDS = ("auto", "gigatoken", "fastokens", "library")
"""What a user can ask for. `library` is the one that defines the ids: tokenizers or sentencepiece.
"""
_FAST = ("fastokens", "gigatoken")
"""In the order in which `auto` tries them. Neither is always the faster; fastokens knows the newer
Unicode and needs no other package.
"""


class Encoder(Protocol):
    """Attributes:
    name: library and version, as in "fastokens 0.3.5".
    """

    name: str

    def encode(self, texts: list[str]) -> tuple[I64, I64]:
        """The ids of all texts one after the other, and how many each has. No token is added and
        none is read from text.
        """
        ...


def choose_encoder(
    tokenizer: Tokenizer, sample: Sequence[str], wanted: str = "auto"
) -> tuple[Encoder, str]:
    """The fastest encoder that gives the tokenizer's own ids.

    Args:
        tokenizer: defines the ids.
        sample: texts of the input, on which the ids are compared; a megabyte takes the time that
            the tokenizer's own library needs for it.
        wanted: one of BACKENDS.

    Returns:
        The encoder, and why a faster one was not taken ("" when there is nothing to say).

    Raises:
        UserError: `wanted` is none of BACKENDS, or names a library that cannot be used for this
            tokenizer.
    """
    if wanted not in BACKENDS:
        raise UserError(
            f"--backend: '{wanted}' is none of"
            f" {', '.join(BACKENDS)}{did_you_mean(wanted, BACKENDS)}"
        )
    library = _Library(tokenizer)
    if wanted == "library":
        return library, ""
    reasons = []
    for backend in _FAST if wanted == "auto" else (wanted,):
        try:
            encoder = _open_fast(tokenizer, backend)
            _check(encoder, tokenizer, sample)
        except _Unusable as problem:
            reasons.append(str(problem))
        else:
            return encoder, "; ".join(reasons)
    if wanted != "auto":
        raise UserError(
            f"--backend: '{wanted}' cannot be used for {tokenizer.name}: {reasons[0]}; 'auto' takes"
            " another one"
        )
    return library, "; ".join(reasons)


def open_encoder(tokenizer: Tokenizer, name: str) -> Encoder:
    """The encoder of a name that `choose_encoder` gave, for a worker process: nothing is compared
    again.

    Args:
        tokenizer: the one it was chosen for.
        name: `Encoder.name`.

    Raises:
        RunError: the library is missing here or has another version.
    """
    library = _Library(tokenizer)
    if name == library.name:
        return library
    backend = name.split(" ")[0]
    try:
        encoder = _open_fast(tokenizer, backend) if backend in _FAST else None
    except _Unusable as problem:
        raise RunError(
            f"--backend: '{name}' was chosen and cannot be used here: {problem}"
        ) from None
    if encoder is None or encoder.name != name:
        raise RunError(
            f"--backend: '{name}' was chosen and here is"
            f" {library.name if encoder is None else encoder.name}"
        )
    return encoder


class _Unusable(Exception):
    """Why a fast library is not used."""


class _Library:
    """The library that defines the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        package = "tokenizers" if isinstance(tokenizer.definition, str) else "sentencepiece"
        self.name = f"{package} {metadata.version(package)}"
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[I64, I64]:
        return self._tokenizer.encode_batch(texts, one_thread=True)


class _Fast:
    """One of the fast libraries.

    Args:
        name: library and version.
        encode: texts -> (ids of any integer type, where each text's ids start, and where the last
            ones end).
        prefix: put before every text that is not empty.
    """

    def __init__(
        self, name: str, encode: Callable[[list[str]], tuple[Any, Any]], prefix: str
    ) -> None:
        self.name, self._encode, self._prefix = name, encode, prefix

    def encode(self, texts: list[str]) -> tuple[I64, I64]:
        if not texts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self._prefix:
            texts = [text and self._prefix + text for text in texts]
        try:
            ids, starts = self._encode(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of theirs is not an Exception
            raise RunError(
                f"{self.name} failed on a text: {_first_line(error)}; the encoder 'library'"
                " avoids it"
            ) from error
        return ids.astype(np.int64), np.diff(starts.astype(np.int64))


def _open_fast(tokenizer: Tokenizer, backend: str) -> _Fast:
    try:
        name = f"{backend} {metadata.version(backend)}"
        with _problems_of(backend):
            definition, prefix = _definition(tokenizer)
            return _Fast(name, _opened(_OPEN[backend], definition), prefix)
    except (ImportError, metadata.PackageNotFoundError) as error:
        missing = error.name if isinstance(error, ImportError) and error.name else backend
        raise _Unusable(
            f"{backend} is not installed" if missing == backend else f"{backend} lacks {missing}"
        ) from None


@lru_cache(maxsize=2)
def _opened(
    opener: Callable[[str], Callable[[list[str]], tuple[Any, Any]]], definition: str
) -> Callable[[list[str]], tuple[Any, Any]]:
    """Once a process: a large vocabulary takes half a second."""
    return opener(definition)


@contextmanager
def _problems_of(backend: str) -> Iterator[None]:
    """Whatever goes wrong inside a fast library, except that it is missing, means that it is not
    used.
    """
    try:
        yield
    except (_Unusable, ImportError, KeyboardInterrupt, SystemExit):
        raise
    except RunError as error:
        raise _Unusable(str(error).split(";")[0]) from None
    except BaseException as error:  # a panic of theirs is not an Exception
        raise _Unusable(f"{backend} cannot read it: {_first_line(error)}") from None


@dataclass(frozen=True)
class _Pair:
    """Equal to every other pair of the same library, version and ids."""

    name: str
    fingerprint: str
    encoder: Encoder = field(compare=False)
    tokenizer: Tokenizer = field(compare=False)


@lru_cache(maxsize=8)
def _difference_on_fixed_texts(pair: _Pair) -> str | None:
    """Takes a second; the same for every input, so that a process which prepares many corpora asks
    once.
    """
    return difference(
        pair.encoder.encode, _Library(pair.tokenizer).encode, fixed_texts(pair.tokenizer)
    )


def _check(encoder: _Fast, tokenizer: Tokenizer, sample: Sequence[str]) -> None:
    backend = encoder.name.split(" ")[0]
    with _problems_of(backend):
        found = _difference_on_fixed_texts(
            _Pair(encoder.name, tokenizer.fingerprint, encoder, tokenizer)
        )
        found = found or difference(encoder.encode, _Library(tokenizer).encode, sample)
    if found:
        raise _Unusable(f"{backend} differs on {found}")


def _definition(tokenizer: Tokenizer) -> tuple[str, str]:
    """A tokenizer.json in which no special token is known, so that none is read from text; and what
    to put before a text.
    """
    if isinstance(tokenizer.definition, bytes):
        return to_tokenizer_json(tokenizer.definition)
    definition = json.loads(tokenizer.definition)
    definition["added_tokens"] = [
        token for token in definition.get("added_tokens") or [] if not token.get("special")
    ]
    definition["post_processor"] = None
    return json.dumps(definition, ensure_ascii=False), ""


def _open_fastokens(definition: str) -> Callable[[list[str]], tuple[Any, Any]]:
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read when it encodes for the first time
    import fastokens

    encoder = fastokens.Tokenizer.from_json_str(definition)

    def encode(texts: list[str]) -> tuple[Any, Any]:
        ids, starts = encoder.encode_batch_flat(texts)
        return np.frombuffer(ids, "<u4"), np.frombuffer(starts, "<u8")

    return encode


def _open_gigatoken(definition: str) -> Callable[[list[str]], tuple[Any, Any]]:
    import awkward  # noqa: F401 (what it returns its ids in; imported only when it does)
    import gigatoken

    encoder = gigatoken.Tokenizer.from_json(definition)

    def encode(texts: list[str]) -> tuple[Any, Any]:
        layout = encoder.encode_batch(texts, parallel=False).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data)

    return encode


_OPEN = {"fastokens": _open_fastokens, "gigatoken": _open_gigatoken}


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]

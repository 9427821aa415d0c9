"""Text to token ids with the fastest library that gives the tokenizer's own ids, on one thread.

The libraries tokenizers and sentencepiece define the ids. Two others, fastokens and gigatoken,
encode 10 to 100 times faster. One of these is used only if it gives the same ids for every text of
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
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_tools.tokenizers.equality import first_difference, fixed_texts
from data_tools.tokenizers.sentencepiece import to_tokenizer_json
from llada.arrays import I64
from llada.errors import RunError, UserError, did_you_mean
from llada.tokenizer import Tokenizer

BACKENDS = ("auto", "gigatoken", "fastokens", "library")
"""Encoders that a user can request. `library` is the one that defines the ids."""
_FAST = ("fastokens", "gigatoken")
"""Fast libraries in the order in which `auto` tries them. Neither is always faster; fastokens
implements a newer Unicode and needs no other package.
"""

UnsignedInts: TypeAlias = npt.NDArray[np.unsignedinteger]
EncodeFlat: TypeAlias = Callable[[list[str]], tuple[UnsignedInts, UnsignedInts]]
"""Texts -> the ids of all texts, concatenated, and the offset at which the ids of each text start,
followed by the end of the ids.
"""


class Encoder(Protocol):
    """Turns text into token ids.

    Attributes:
        name: library and version, such as "fastokens 0.3.5".
    """

    name: str

    def encode(self, texts: list[str]) -> tuple[I64, I64]:
        """Encode texts. No special token is added, and none is recognized in text.

        Returns:
            The ids of all texts, concatenated, int64 [tokens], and the number of ids of each text,
            int64 [texts].
        """
        ...


def choose_encoder(
    tokenizer: Tokenizer, sample: Sequence[str], requested: str = "auto"
) -> tuple[Encoder, str]:
    """Return the fastest encoder that gives the tokenizer's own ids.

    Args:
        tokenizer: tokenizer that defines the ids.
        sample: texts of the input on which ids are compared. The comparison takes as long as the
            tokenizer's own library needs for them.
        requested: one of BACKENDS.

    Returns:
        The encoder, and why no faster one was chosen ("" if there is nothing to explain).

    Raises:
        UserError: `requested` is not in BACKENDS, or names a library that cannot be used for this
            tokenizer.
    """
    if requested not in BACKENDS:
        raise UserError(
            f"--backend: '{requested}' is not one of"
            f" {', '.join(BACKENDS)}{did_you_mean(requested, BACKENDS)}"
        )
    library = _LibraryEncoder(tokenizer)
    if requested == "library":
        return library, ""
    candidates = _FAST if requested == "auto" else (requested,)
    reasons = []
    for backend in candidates:
        try:
            encoder = _open_fast(tokenizer, backend)
            _check_equality(encoder, tokenizer, sample)
        except _Unusable as problem:
            reasons.append(str(problem))
        else:
            return encoder, "; ".join(reasons)
    if requested != "auto":
        raise UserError(
            f"--backend: '{requested}' cannot be used for {tokenizer.name}: {reasons[0]}; 'auto'"
            " takes another one"
        )
    return library, "; ".join(reasons)


def open_encoder(tokenizer: Tokenizer, name: str) -> Encoder:
    """Open an encoder by name in a worker process; nothing is compared again.

    Args:
        tokenizer: tokenizer for which the encoder was chosen.
        name: `Encoder.name` of the encoder that `choose_encoder` returned.

    Raises:
        RunError: the library is missing here or has another version.
    """
    library = _LibraryEncoder(tokenizer)
    if name == library.name:
        return library
    available: Encoder = library
    backend = name.split(" ")[0]
    if backend in _FAST:
        try:
            available = _open_fast(tokenizer, backend)
        except _Unusable as problem:
            raise RunError(
                f"--backend: expected {name}, which cannot be used on this machine: {problem}"
            ) from None
    if available.name != name:
        raise RunError(f"--backend: expected {name}, found {available.name} on this machine")
    return available


class EncoderFailed(RunError):
    """A fast library failed on a text.

    Args:
        reason: what happened, for messages.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; the encoder 'library' avoids it"


class _Unusable(Exception):
    """The reason for which a fast library is not used."""


# -- the encoders ----------------------------------------------------------------------------------


class _LibraryEncoder:
    """The library that defines the ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        package = "tokenizers" if isinstance(tokenizer.definition, str) else "sentencepiece"
        self.name = f"{package} {metadata.version(package)}"
        self._tokenizer = tokenizer

    def encode(self, texts: list[str]) -> tuple[I64, I64]:
        return self._tokenizer.encode_batch(texts, one_thread=True)


class _FastEncoder:
    """One of the fast libraries.

    Args:
        name: library and version.
        encode_flat: function of the library.
        prefix: text put before every text that is not empty.
    """

    def __init__(self, name: str, encode_flat: EncodeFlat, prefix: str) -> None:
        self.name = name
        self._encode_flat = encode_flat
        self._prefix = prefix

    def encode(self, texts: list[str]) -> tuple[I64, I64]:
        if not texts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        texts = self._with_prefix(texts)
        try:
            ids, starts = self._encode_flat(texts)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is not an Exception
            raise EncoderFailed(f"{self.name} failed on a text: {_first_line(error)}") from error
        offsets = starts.astype(np.int64)
        return ids.astype(np.int64), offsets[1:] - offsets[:-1]

    def _with_prefix(self, texts: list[str]) -> list[str]:
        if not self._prefix:
            return texts
        prefixed: list[str] = []
        for text in texts:
            if text:
                text = self._prefix + text
            prefixed.append(text)
        return prefixed


def _open_fast(tokenizer: Tokenizer, backend: str) -> _FastEncoder:
    """Open a fast library for a tokenizer. Raises _Unusable if that is not possible."""
    try:
        name = f"{backend} {metadata.version(backend)}"
        with _unusable_on_failure(backend):
            definition, prefix = _definition_without_specials(tokenizer)
            return _FastEncoder(name, _open_once(_OPENERS[backend], definition), prefix)
    except (ImportError, metadata.PackageNotFoundError) as error:
        missing = backend
        if isinstance(error, ImportError) and error.name:
            missing = error.name
        if missing == backend:
            raise _Unusable(f"{backend} is not installed") from None
        raise _Unusable(f"{backend} lacks {missing}") from None


@lru_cache(maxsize=2)
def _open_once(opener: Callable[[str], EncodeFlat], definition: str) -> EncodeFlat:
    """Open a library, once per process: a large vocabulary takes half a second."""
    return opener(definition)


@contextmanager
def _unusable_on_failure(backend: str) -> Iterator[None]:
    """Turn the errors of a fast library into _Unusable, unless it cannot be imported."""
    try:
        yield
    except (_Unusable, ImportError, KeyboardInterrupt, SystemExit):
        raise
    except EncoderFailed as error:
        raise _Unusable(error.reason) from None
    except BaseException as error:  # a panic in Rust is not an Exception
        raise _Unusable(f"{backend} cannot read it: {_first_line(error)}") from None


def _definition_without_specials(tokenizer: Tokenizer) -> tuple[str, str]:
    """Return a tokenizer.json without special tokens, so that none is recognized in text, and the
    prefix to put before every text.
    """
    if isinstance(tokenizer.definition, bytes):
        return to_tokenizer_json(tokenizer.definition)
    definition = json.loads(tokenizer.definition)
    added_tokens = definition.get("added_tokens") or []
    definition["added_tokens"] = [token for token in added_tokens if not token.get("special")]
    definition["post_processor"] = None
    return json.dumps(definition, ensure_ascii=False), ""


def _open_fastokens(definition: str) -> EncodeFlat:
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # read at the first call that encodes
    import fastokens

    encoder = fastokens.Tokenizer.from_json_str(definition)

    def encode_flat(texts: list[str]) -> tuple[UnsignedInts, UnsignedInts]:
        ids, starts = encoder.encode_batch_flat(texts)
        return np.frombuffer(ids, "<u4"), np.frombuffer(starts, "<u8")

    return encode_flat


def _open_gigatoken(definition: str) -> EncodeFlat:
    # gigatoken returns an awkward array, and imports awkward only then. Importing it now notices
    # its absence before anything is encoded.
    import awkward  # noqa: F401
    import gigatoken

    encoder = gigatoken.Tokenizer.from_json(definition)

    def encode_flat(texts: list[str]) -> tuple[UnsignedInts, UnsignedInts]:
        layout = encoder.encode_batch(texts, parallel=False).layout
        return np.asarray(layout.content.data), np.asarray(layout.offsets.data)

    return encode_flat


_OPENERS = {"fastokens": _open_fastokens, "gigatoken": _open_gigatoken}


def _first_line(error: BaseException) -> str:
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:120]


# -- the comparison --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CheckedPair:
    """An encoder and its tokenizer; pairs with the same library, version and ids are equal."""

    name: str
    fingerprint: str
    encoder: Encoder = field(compare=False)
    tokenizer: Tokenizer = field(compare=False)


@lru_cache(maxsize=8)
def _difference_on_fixed_texts(pair: _CheckedPair) -> str | None:
    """Compare on the fixed texts, once per process, because it takes a second."""
    library = _LibraryEncoder(pair.tokenizer)
    return first_difference(pair.encoder.encode, library.encode, fixed_texts(pair.tokenizer))


def _check_equality(encoder: _FastEncoder, tokenizer: Tokenizer, sample: Sequence[str]) -> None:
    """Raise _Unusable if an encoder gives other ids than the tokenizer's own library."""
    backend = encoder.name.split(" ")[0]
    pair = _CheckedPair(encoder.name, tokenizer.fingerprint, encoder, tokenizer)
    with _unusable_on_failure(backend):
        text = _difference_on_fixed_texts(pair)
        if not text:
            library = _LibraryEncoder(tokenizer)
            text = first_difference(encoder.encode, library.encode, sample)
    if text:
        raise _Unusable(f"{backend} differs on {text}")

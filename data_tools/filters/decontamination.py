"""Documents that repeat evaluation texts: those that share a run of n words with one."""

from __future__ import annotations

import codecs
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.readers.compression import open_file
from data_tools.readers.json_arrays import BrokenArray, elements, holds_array
from llada.errors import UserError

U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]

# Blocks of scripts without spaces between words: ideographs, kana, hangul syllables. Where they
# hold what is not \w, it is no word.
_ALONE = (
    "\u3005-\u3007\u3040-\u30ff\u3192-\u3195\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f"
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_ALONE}]+|(?=\w)[{_ALONE}]")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")
_MULTIPLIER = 0x9E3779B97F4A7C15
_FILTER_BITS = 24
_JSON = (".jsonl", ".json")


def words_of(text: str) -> list[str]:
    r"""The words of a text: lower-cased runs of \w; every ideograph, kana and hangul syllable is a
    word of its own.
    """
    lowered = text.lower()
    return (_ASCII_WORD if lowered.isascii() else _WORD).findall(lowered)


class Contamination:
    """Finds documents that share at least one n-gram of words with an evaluation text. Exact; can
    be sent to other processes.

    Words of the evaluation are numbered, others are 0. An n-gram of a document is looked up by a
    hash of its n numbers, then compared. Memory: 20 bytes a word of the evaluation, its vocabulary,
    and at most 16 MiB.

    Args:
        evaluation_texts: read once.
        ngram: n, words.

    Attributes:
        texts: evaluation texts, those too short among them.
        too_short: texts of fewer than n words, which cannot be found.
        ngrams: different n-grams that are looked for.

    Raises:
        UserError: n less than 1; no text of n words or more.
    """

    def __init__(self, evaluation_texts: Iterable[str], ngram: int = 13) -> None:
        if ngram < 1:
            raise UserError(f"--decontaminate-ngram: {ngram} is less than 1")
        self.ngram = ngram
        self.texts = self.too_short = 0
        self._numbers: dict[str, int] = {}
        parts: list[I32] = []
        for text in evaluation_texts:
            words = words_of(text)
            self.texts += 1
            if len(words) < ngram:
                self.too_short += 1
                continue
            numbers = (self._numbers.setdefault(word, len(self._numbers) + 1) for word in words)
            parts.append(np.fromiter(chain(numbers, (0,)), dtype=np.int32, count=len(words) + 1))
        if not parts:
            raise UserError(
                f"--decontaminate: none of the {self.texts} evaluation texts has {ngram} words or"
                " more"
            )
        self._words = np.concatenate(parts)
        self._places, self._hashes = self._index()
        self.ngrams = len(self._places)
        # The first bits of every hash: most n-grams of a document need no search.
        bits = min(_FILTER_BITS, (16 * self.ngrams).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, dtype=np.bool_)
        self._filter[self._hashes >> self._shift] = True

    def summary(self) -> str:
        """What is looked for, and what cannot be found."""
        short = (
            f"; {self.too_short:,} of them have fewer than {self.ngram} words and cannot be found"
            if self.too_short
            else ""
        )
        return (
            f"{self.ngrams:,} runs of {self.ngram} words of {self.texts:,} evaluation texts{short}"
        )

    def overlaps(self, texts: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Whether each text shares an n-gram with an evaluation text [len(texts)]."""
        found = np.zeros(len(texts), dtype=np.bool_)
        rows = [words_of(text) for text in texts]
        lengths = np.fromiter((len(row) + 1 for row in rows), dtype=np.int64, count=len(rows))
        # Behind every text stands a word that no evaluation has: no n-gram crosses from one to the
        # next.
        every = chain.from_iterable(chain(row, ("",)) for row in rows)
        words = np.fromiter(
            map(self._numbers.get, every, repeat(0)), dtype=np.int32, count=int(lengths.sum())
        )
        starts = _known_runs(words, self.ngram)
        if not len(starts):
            return found
        hashes = _hashes(words, starts, self.ngram)
        likely = self._filter[hashes >> self._shift]
        starts, hashes = starts[likely], hashes[likely]
        low, high = (np.searchsorted(self._hashes, hashes, side=side) for side in ("left", "right"))
        owners = np.searchsorted(np.cumsum(lengths), starts, side="right")
        offsets = np.arange(self.ngram)
        for candidate in np.flatnonzero(high > low):
            owner = owners[candidate]
            if not found[owner]:
                # more than one where hashes collide
                places = self._places[low[candidate] : high[candidate], None] + offsets
                found[owner] = (
                    (self._words[places] == words[starts[candidate] + offsets]).all(axis=1).any()
                )
        return found

    def _index(self) -> tuple[npt.NDArray[np.int64], U64]:
        """Where every different n-gram stands in the evaluation's words, by hash, and
        the hashes.
        """
        starts = _known_runs(self._words, self.ngram)
        hashes = _hashes(self._words, starts, self.ngram)
        order = np.argsort(hashes, kind="stable")
        starts, hashes = starts[order], hashes[order]
        again = np.zeros(len(starts), dtype=np.bool_)  # the n-gram before, once more
        again[1:] = hashes[1:] == hashes[:-1]
        for offset in range(self.ngram):
            again[1:] &= self._words[starts[1:] + offset] == self._words[starts[:-1] + offset]
        return starts[~again], hashes[~again]


def _known_runs(words: I32, ngram: int) -> npt.NDArray[np.int64]:
    """Where n words begin none of which is 0."""
    unknown = np.concatenate([[0], np.cumsum(words == 0)])
    return (
        np.flatnonzero(unknown[ngram:] == unknown[:-ngram])
        if len(words) >= ngram
        else np.empty(0, dtype=np.int64)
    )


def _hashes(words: I32, starts: npt.NDArray[np.int64], ngram: int) -> U64:
    """A polynomial over the n words from each start, modulo 2^64."""
    result = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(ngram):
        result = (result + words[starts + offset].astype(np.uint64)) * np.uint64(_MULTIPLIER)
    return result


# -- evaluation texts ------------------------------------------------------------------------------


def evaluation_texts(
    paths: Sequence[str | Path], setting: str = "--decontaminate"
) -> Iterator[str]:
    """The texts of files: every string in a record of JSON Lines or of a JSON array (.jsonl, .json;
    .gz and .zst too), nested ones too; any other file whole.

    Args:
        paths: files.
        setting: that names them, for messages.

    Raises:
        UserError: a file that is missing, cannot be read, is not UTF-8 or not JSON, or has no text.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{setting}: no file '{path}'")
        found = False
        try:
            for text in _texts_of(path, setting):
                found = found or bool(text.strip())
                yield text
        except UnicodeDecodeError as error:
            raise UserError(f"{setting}: {path} is not UTF-8 ({error})") from None
        except (OSError, EOFError, zlib.error, BrokenArray) as error:
            raise UserError(f"{setting}: {path}: cannot be read ({error})") from None
        if not found:
            raise UserError(f"{setting}: no text in {path}")


def _texts_of(path: Path, setting: str) -> Iterator[str]:
    import orjson

    with open_file(str(path)) as file:
        if not _is_json(path):
            yield file.read().decode("utf-8-sig")
            return
        for where, raw in _records(path, file):
            try:
                record = orjson.loads(raw)
            except ValueError as error:
                raise UserError(f"{setting}: {path}{where}: not JSON ({error})") from None
            yield from _strings(record)


def _records(path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """The elements of an array, else the lines that are not blank, and how messages say which one
    it is.
    """
    if holds_array(str(path)):
        for number, element in enumerate(elements(file, sys.maxsize), start=1):
            assert element.content is not None
            yield f", element {number}", element.content
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f":{number}", line.removeprefix(codecs.BOM_UTF8)


def _is_json(path: Path) -> bool:
    inner = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    return inner.suffix.lower() in _JSON


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)

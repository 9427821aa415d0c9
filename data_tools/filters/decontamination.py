"""Find documents that overlap evaluation texts: that share an n-gram of words with one."""

from __future__ import annotations

import codecs
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from data_tools.readers.compression import open_file
from data_tools.readers.input_file import extension
from data_tools.readers.json_arrays import elements, holds_array
from data_tools.readers.records import BrokenFile
from llada.arrays import I64, U64
from llada.errors import UserError

I32 = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

# Blocks of scripts without spaces between words: ideographs, kana, hangul syllables. Each of their
# characters that \w matches is a word.
_SINGLE_CHARACTER_WORDS = (
    "\u3005-\u3007\u3040-\u30ff\u3192-\u3195\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uac00-\ud7a3\uf900-\ufaff\uff66-\uff9f"
    "\U0001aff0-\U0001b16f\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[^\W{_SINGLE_CHARACTER_WORDS}]+|(?=\w)[{_SINGLE_CHARACTER_WORDS}]")
_ASCII_WORD = re.compile(r"[a-z0-9_]+")

_MULTIPLIER = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd: spreads small numbers over all bits."""
_MAX_FILTER_BITS = 24
_UNKNOWN = 0
"""Number of all words that are in no evaluation text, and so in no n-gram."""
_JSON_EXTENSIONS = (".jsonl", ".json")


def words_of(text: str) -> list[str]:
    r"""Return the words of a text: lower-cased runs of \w. Every ideograph, kana and hangul
    syllable is a word of its own.
    """
    lowered = text.lower()
    if lowered.isascii():
        return _ASCII_WORD.findall(lowered)  # the same words, found faster
    return _WORD.findall(lowered)


class Contamination:
    """Finds documents that share at least one n-gram of words with an evaluation text.

    The words of the evaluation texts are numbered from 1; all other words have the number 0. An
    n-gram of a document is looked up by a hash of its n numbers, and then compared, so the result
    is exact. An instance can be sent to other processes.

    Memory: 20 bytes per word of the evaluation texts, their vocabulary, and at most 16 MiB.

    Args:
        evaluation_texts: texts to look for; iterated over once.
        ngram: number of words in an n-gram.

    Attributes:
        texts: number of evaluation texts, those too short included.
        too_short: number of texts of fewer than n words, which no document can overlap.
        ngrams: number of distinct n-grams.

    Raises:
        UserError: n is less than 1, or no text has n words.
    """

    def __init__(self, evaluation_texts: Iterable[str], ngram: int = 13) -> None:
        if ngram < 1:
            raise UserError(f"--decontaminate-ngram: {ngram} is less than 1")
        self.ngram = ngram
        self.texts = 0
        self.too_short = 0
        self._numbers: dict[str, int] = {}
        self._words = self._number_words(evaluation_texts)
        self._starts, self._hashes = self._index()
        self.ngrams = len(self._starts)
        # A filter of the first bits that occur among the hashes. With 16 times as many entries as
        # hashes, most n-grams of a document need no search.
        bits = min(_MAX_FILTER_BITS, (16 * self.ngrams).bit_length())
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, dtype=np.bool_)
        self._filter[self._hashes >> self._shift] = True

    def _number_words(self, evaluation_texts: Iterable[str]) -> I32:
        """Return the numbers of the words of all texts that are long enough, with _UNKNOWN after
        each text so that no n-gram crosses from one to the next.
        """
        numbers_of_texts: list[I32] = []
        for text in evaluation_texts:
            words = words_of(text)
            self.texts += 1
            if len(words) < self.ngram:
                self.too_short += 1
                continue
            numbers: list[int] = []
            for word in words:
                new_number = len(self._numbers) + 1
                numbers.append(self._numbers.setdefault(word, new_number))
            numbers.append(_UNKNOWN)
            numbers_of_texts.append(np.array(numbers, dtype=np.int32))
        if not numbers_of_texts:
            raise UserError(
                f"--decontaminate: none of the {self.texts} evaluation texts has {self.ngram} words"
                " or more"
            )
        return np.concatenate(numbers_of_texts)

    def _index(self) -> tuple[I64, U64]:
        """Return where each distinct n-gram starts in the words of the evaluation texts, sorted by
        hash, and the hashes.
        """
        starts = _starts_of_known_ngrams(self._words, self.ngram)
        hashes = _hash_ngrams(self._words, starts, self.ngram)
        order = np.argsort(hashes, kind="stable")
        starts = starts[order]
        hashes = hashes[order]
        # Equal n-grams have equal hashes, so they are neighbors now. If different n-grams share a
        # hash, equal ones may be apart, and one is in the index twice, which does no harm.
        repeats = np.zeros(len(starts), dtype=np.bool_)
        repeats[1:] = hashes[1:] == hashes[:-1]
        for offset in range(self.ngram):
            repeats[1:] &= self._words[starts[1:] + offset] == self._words[starts[:-1] + offset]
        return starts[~repeats], hashes[~repeats]

    def summary(self) -> str:
        """Describe the evaluation texts in a line."""
        summary = f"{self.ngrams:,} runs of {self.ngram} words of {self.texts:,} evaluation texts"
        if self.too_short:
            summary += (
                f"; {self.too_short:,} of them have fewer than {self.ngram} words and cannot be"
                " found"
            )
        return summary

    def overlaps(self, texts: Sequence[str]) -> Bools:
        """Return whether each text shares an n-gram with an evaluation text [len(texts)]."""
        result = np.zeros(len(texts), dtype=np.bool_)
        words, lengths = self._numbers_of(texts)
        starts = _starts_of_known_ngrams(words, self.ngram)
        if not len(starts):
            return result
        hashes = _hash_ngrams(words, starts, self.ngram)
        passes_filter = self._filter[hashes >> self._shift]
        starts = starts[passes_filter]
        hashes = hashes[passes_filter]
        # The n-grams of the index with the same hash are low..high-1.
        low = np.searchsorted(self._hashes, hashes, side="left")
        high = np.searchsorted(self._hashes, hashes, side="right")
        text_of = np.searchsorted(np.cumsum(lengths), starts, side="right")
        offsets = np.arange(self.ngram)
        for candidate in np.flatnonzero(high > low):
            text = text_of[candidate]
            if result[text]:
                continue
            # [n-grams with this hash, n]; more than one where hashes collide
            known = self._starts[low[candidate] : high[candidate], None] + offsets
            own = starts[candidate] + offsets
            result[text] = (self._words[known] == words[own]).all(axis=1).any()
        return result

    def _numbers_of(self, texts: Sequence[str]) -> tuple[I32, I64]:
        """Return the numbers of the words of texts, int32 [words], and how many each text has,
        int64 [texts]. Each text ends with _UNKNOWN, so that no n-gram crosses to the next.
        """
        rows = [words_of(text) for text in texts]
        lengths = np.fromiter((len(row) + 1 for row in rows), dtype=np.int64, count=len(rows))
        # The empty word is in no vocabulary.
        all_words = chain.from_iterable(chain(row, ("",)) for row in rows)
        numbers = map(self._numbers.get, all_words, repeat(_UNKNOWN))
        return np.fromiter(numbers, dtype=np.int32, count=int(lengths.sum())), lengths


def _starts_of_known_ngrams(words: I32, ngram: int) -> I64:
    """Return the positions at which n known words in a row start."""
    if len(words) < ngram:
        return np.empty(0, dtype=np.int64)
    # An n-gram has no unknown word if there are as many before its end as before its start.
    unknown_before = np.concatenate([[0], np.cumsum(words == _UNKNOWN)])
    return np.flatnonzero(unknown_before[ngram:] == unknown_before[:-ngram])


def _hash_ngrams(words: I32, starts: I64, ngram: int) -> U64:
    """Hash the n words from each start, with a polynomial modulo 2^64: uint64 wraps around."""
    result = np.zeros(len(starts), dtype=np.uint64)
    for offset in range(ngram):
        result = (result + words[starts + offset].astype(np.uint64)) * np.uint64(_MULTIPLIER)
    return result


# -- evaluation texts ------------------------------------------------------------------------------


def evaluation_texts(
    paths: Sequence[str | Path], setting: str = "--decontaminate"
) -> Iterator[str]:
    """Yield the texts of files. Of JSON Lines and JSON arrays (.jsonl and .json, also with .gz or
    .zst), these are all strings in the records, nested ones included; any other file is one text.

    Args:
        paths: files of evaluation texts.
        setting: option that names them, for messages.

    Raises:
        UserError: a file is missing, cannot be read, is not UTF-8 or not JSON, or has no text.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise UserError(f"{setting}: no file '{path}'")
        has_text = False
        try:
            for text in _texts_of(path, setting):
                has_text = has_text or bool(text.strip())
                yield text
        except UnicodeDecodeError as error:
            raise UserError(f"{setting}: {path} is not UTF-8 ({error})") from None
        except (OSError, EOFError, zlib.error, BrokenFile) as error:
            raise UserError(f"{setting}: {path}: cannot be read ({error})") from None
        if not has_text:
            raise UserError(f"{setting}: no text in {path}")


def _texts_of(path: Path, setting: str) -> Iterator[str]:
    import orjson

    with open_file(str(path)) as file:
        if extension(path) not in _JSON_EXTENSIONS:
            yield file.read().decode("utf-8-sig")
            return
        for position, raw in _json_records(path, file):
            try:
                record = orjson.loads(raw)
            except ValueError as error:
                raise UserError(f"{setting}: {path}{position}: not JSON ({error})") from None
            yield from _strings(record)


def _json_records(path: Path, file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield the elements of an array, or the lines that are not blank, each with its position for
    messages.
    """
    if holds_array(str(path)):
        for number, element in enumerate(elements(file, sys.maxsize), start=1):
            assert element.content is not None  # no element is too long
            yield f", element {number}", element.content
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield f":{number}", line.removeprefix(codecs.BOM_UTF8)


def _strings(value: object) -> Iterator[str]:
    """Yield every string in a JSON value, without names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)

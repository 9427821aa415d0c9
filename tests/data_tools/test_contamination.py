"""Contamination against brute force: words by character, n-grams as tuples in a set."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.filters import decontamination as module
from data_tools.filters.decontamination import Contamination, evaluation_texts, words_of
from llada.errors import UserError

IDEOGRAPHIC = (
    "IDEOGRAPHIC ITERATION",
    "IDEOGRAPHIC CLOSING",
    "IDEOGRAPHIC NUMBER",
    "IDEOGRAPHIC ANNOTATION",
)
KANA = ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "HENTAIGANA")
CJK = ("CJK UNIFIED", "CJK COMPATIBILITY", "HANGUL SYLLABLE", *IDEOGRAPHIC, *KANA)


def plain_words(text: str) -> list[str]:
    """Letter by letter, scripts by the names of their characters."""
    words, word = [], ""
    for character in [*text.lower(), " "]:
        in_word = character.isalnum() or character == "_"
        alone = in_word and unicodedata.name(character, "").startswith(CJK)
        if word and (alone or not in_word):
            words.append(word)
            word = ""
        if alone:
            words.append(character)
        elif in_word:
            word += character
    return words


def plain_overlaps(evaluation: list[str], texts: list[str], n: int) -> list[bool]:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = plain_words(text)
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    known = set().union(*map(grams, evaluation))
    return [bool(known & grams(text)) for text in texts]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, World_2! it's", ["hello", "world_2", "it", "s"]),
        ("GRÖSSE—naïve Ⅷ", ["grösse", "naïve", "ⅷ"]),
        ("日本語のテスト・abc漢字", [*"日本語のテスト", "abc", *"漢字"]),
        ("한국어 text", [*"한국어", "text"]),
        ("", []),
        (" ...\n", []),
    ],
)
def test_words(text: str, words: list[str]):
    assert words_of(text) == words == plain_words(text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=40))
def test_words_of_any_text(text: str):
    assert words_of(text) == plain_words(text)


def test_words_of_every_character():
    for start in range(0, sys.maxunicode + 1, 1 << 12):
        characters = [
            chr(i)
            for i in range(start, start + (1 << 12))
            if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")
        ]
        text = "x".join(characters)
        assert words_of(text) == plain_words(text)


vocabulary = ["a", "b", "C", "c", "日", "本", "ß", "x1", "_"]
one_text = st.lists(st.sampled_from([*vocabulary, "unknown"]), max_size=12).map(" ".join)


@settings(max_examples=200, deadline=None)
@given(
    evaluation=st.lists(one_text, min_size=1, max_size=5),
    texts=st.lists(one_text, max_size=6),
    n=st.integers(1, 4),
    data=st.data(),
)
def test_overlaps_are_those_of_brute_force(evaluation: list[str], texts: list[str], n: int, data):
    short = sum(len(plain_words(text)) < n for text in evaluation)
    if short == len(evaluation):
        with pytest.raises(UserError, match=f"has {n} words or more"):
            Contamination(evaluation, n)
        return
    contamination = Contamination(evaluation, n)
    assert (contamination.texts, contamination.too_short) == (len(evaluation), short)
    assert contamination.ngrams == len(
        {tuple(w[i : i + n]) for w in map(plain_words, evaluation) for i in range(len(w) - n + 1)}
    )
    result = contamination.overlaps(texts)
    assert result.dtype == np.bool_
    assert result.tolist() == plain_overlaps(evaluation, texts, n)


@settings(max_examples=50, deadline=None)
@given(evaluation=st.lists(one_text, min_size=1, max_size=5), texts=st.lists(one_text, max_size=6))
def test_colliding_hashes_change_nothing(evaluation: list[str], texts: list[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MULTIPLIER", 1 << 63)  # two hashes in all
        evaluation = [*evaluation, "a b c", "b a c", "c c c c", "a a b c"]
        assert Contamination(evaluation, 3).overlaps(texts).tolist() == plain_overlaps(
            evaluation, texts, 3
        )


def test_thirteen_words_by_default_and_none_across_texts():
    words = [f"w{i}" for i in range(20)]
    contamination = Contamination([" ".join(words), "too short"])
    assert (contamination.ngram, contamination.too_short, contamination.ngrams) == (13, 1, 8)
    texts = [
        " ".join(words[3:16]),
        " ".join(words[3:15]),
        " ".join(words[15:]),
        "",
        "W3, w4;" + "-".join(words[5:16]),
        " ".join(words[:7]),
    ]
    assert contamination.overlaps(texts).tolist() == [True, False, False, False, True, False]
    assert contamination.overlaps([]).tolist() == []
    across = Contamination([" ".join(words[:10]) + " end", "start " + " ".join(words[10:])], 5)
    assert not across.overlaps([" ".join(words[7:13])])[0]


def test_another_process_finds_the_same(tmp_path: Path):
    """Strings hash otherwise there."""
    contamination = Contamination(["one two three four", "five six seven"], 3)
    texts = ["x two three four", "two three five", "five six seven"]
    (tmp_path / "c.pickle").write_bytes(pickle.dumps((contamination, texts)))
    code = (
        "import pickle,sys; c, t = pickle.load(open(sys.argv[1], 'rb'));"
        " print(c.overlaps(t).tolist())"
    )
    root = str(Path(__file__).parents[2])
    process = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c.pickle"],
        env={"PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (
        process.stdout.strip()
        == str(contamination.overlaps(texts).tolist())
        == "[True, False, True]"
    )


def test_a_megabyte_takes_no_second():
    """The aim is 0.1 s on one core; a machine may be slow and shared."""
    generator = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(20000)])
    texts = [" ".join(words[generator.integers(0, len(words), 1500)]) for _ in range(60)]
    evaluation = [
        " ".join(words[generator.permutation(len(words))]) for _ in range(3)
    ]  # every word is known, no n-gram is
    contamination = Contamination(evaluation)
    started = time.process_time()
    assert not contamination.overlaps(texts).any()
    assert sum(map(len, texts)) / 1e6 / (time.process_time() - started) > 1


# -- evaluation texts ------------------------------------------------------------------------------


def test_texts_of_files(tmp_path: Path):
    records = [
        {"question": "q one", "choices": {"text": ["a", "b"], "n": 3}, "answer": None},
        "bare",
        ["x", [{"y": "z"}]],
    ]
    lines = "\ufeff" + "\n\n".join(json.dumps(record) for record in records)
    (tmp_path / "e.jsonl").write_text(lines)
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "t.txt").write_text("\ufeffwhole\ntext\n")
    (tmp_path / "t.md.gz").write_bytes(gzip.compress(b"packed", mtime=0))
    (tmp_path / "array.json").write_text(json.dumps(records, indent=1))
    strings = ["q one", "a", "b", "bare", "x", "z"]
    assert list(evaluation_texts([tmp_path / "array.json"])) == strings
    assert list(evaluation_texts([tmp_path / "e.jsonl"])) == strings
    everything = [str(tmp_path / name) for name in ("t.txt", "e.json.gz", "t.md.gz")]
    assert list(evaluation_texts(everything)) == ["whole\ntext\n", *strings, "packed"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no file '"),
        ("a.jsonl", b'{"a": "b"}\n{"a"\n', "a.jsonl:2: not JSON"),
        (
            "a.json",
            b'["b", {"a"]',
            "a.json: cannot be read (element 2, which begins at byte 5, does not end)",
        ),
        ("a.json", b'["b", {"a"}]', "a.json, element 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n', "no text in"),
        ("a.txt", b" \n", "no text in"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-9], "cannot be read"),
        ("a.txt.gz", b"plain", "cannot be read"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(evaluation_texts([tmp_path / name]))
    assert str(caught.value).startswith("--decontaminate: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_settings_are_one_line():
    with pytest.raises(UserError, match="--decontaminate-ngram: 0 is less than 1"):
        Contamination(["a b"], 0)
    with pytest.raises(UserError, match="none of the 2 evaluation texts has 13 words or more"):
        Contamination(["a b", ""])

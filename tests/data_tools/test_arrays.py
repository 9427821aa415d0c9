"""JSON arrays read element by element, against the standard library's parser, which reads them
whole.
"""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.readers.json_arrays import elements, holds_array
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs
from data_tools.readers.records import BrokenFile
from data_tools.readers.report import Report
from llada.data.manifest import SPLITS, Manifest
from llada.errors import UserError
from llada.tokenizer import train_byte_level_bpe
from tests.data_tools.corpora import documents_of
from tests.preparation import prepare_sft

SCALARS = st.none() | st.booleans() | st.integers() | st.text(alphabet='a"\\\\[]{},: \n\u00e9')
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
)


def parsed(content: bytes, longest: int = 10**6, chunk: int = 1 << 10) -> list[Any]:
    return [
        None if raw is None else json.loads(raw)
        for _, raw in elements(io.BytesIO(content), longest, chunk)
    ]


@settings(max_examples=150, deadline=None)
@given(
    array=st.lists(VALUES, max_size=5),
    chunk=st.integers(1, 9),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
)
def test_every_element_in_chunks_of_any_size(array, chunk, indent, ascii):
    content = json.dumps(array, indent=indent, ensure_ascii=ascii).encode()
    for frame in (b"%b", b"\xef\xbb\xbf\n %b \r\n"):
        assert parsed(frame % content, chunk=chunk) == array
    assert all(
        content[start : start + len(raw)] == raw
        for start, raw in elements(io.BytesIO(content), 10**6, chunk)
    )


@settings(max_examples=150, deadline=None)
@given(array=st.lists(VALUES, min_size=1, max_size=4), data=st.data())
def test_an_array_that_is_cut_off_is_never_whole(array, data):
    content = json.dumps(array).encode()
    with pytest.raises(BrokenFile):
        parsed(
            content[: data.draw(st.integers(0, len(content) - 1))],
            chunk=data.draw(st.integers(1, 9)),
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1, 2", "element 2, which begins at byte 3, does not end"),
        (b'[{"a": "b}]', "element 1, which begins at byte 1, does not end"),
        (b"[1,]", "element 2 is missing before byte 3"),
        (b"[,1]", "element 1 is missing before byte 1"),
        (b"[1,,2]", "element 2 is missing before byte 3"),
        (b"[1] [2]", "the array ends before byte 4, the file goes on"),
        (b"[1}", "element 1, which begins at byte 1, ends with a brace that nothing opens"),
        (b'{"a": []}', "does not begin with ["),
        (b"", "does not begin with ["),
    ],
)
def test_damage_is_named(content: bytes, message: str):
    for chunk in (1, 100):
        with pytest.raises(BrokenFile) as caught:
            parsed(content, chunk=chunk)
        assert message in str(caught.value)


def test_memory_holds_an_element_and_not_the_array():
    small, large = b'{"text": "%b"}' % (b"a\\n" * 100), b'{"text": "%b"}' % (b"a" * 3_000_000)
    content = b"[" + b",".join([*[small] * 10_000, large, small]) + b"]"
    tracemalloc.start()
    small_and_too_long = sum(
        1 if raw == small else 100_000 * (raw is None)
        for _, raw in elements(io.BytesIO(content), 1000, 1 << 12)
    )
    assert small_and_too_long == 110_001  # 10,001 small elements, one too long
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


# -- as an input -----------------------------------------------------------------------------------


def packed(path: Path, content: bytes) -> Path:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(
        path.suffix, bytes
    )
    path.write_bytes(pack(content))
    return path


def texts(path: Path, report: Report | None = None, **options: Any) -> list[str]:
    return list(read_inputs([path], ReadOptions(**options), report or Report()))


@pytest.mark.parametrize("name", ["a.json", "a.JSON", "a.json.gz", "a.json.zst"])
def test_an_array_is_known_by_its_first_character(tmp_path: Path, name: str):
    wanted = ["one", "two \u2028 \n", "3"]
    path = packed(
        tmp_path / name,
        (" " * 5000 + json.dumps([{"text": text} for text in wanted], indent=2)).encode(),
    )
    assert holds_array(str(path))
    assert texts(path) == wanted
    lines = packed(tmp_path / f"lines-{name}", b'{"text": "[1"}\n{"text": "2]"}\n')
    assert not holds_array(str(lines))
    assert texts(lines) == ["[1", "2]"]


def test_bad_elements(tmp_path: Path):
    path = packed(
        tmp_path / "a.json", b'[{"text": "a"}, {"text": nope}, {"txt": "b"}, 7, {"text": "c"}]'
    )
    with pytest.raises(
        UserError,
        match=(
            r"a.json, element 2: not JSON .*; --skip-bad counts such elements and leaves them out$"
        ),
    ):
        texts(path)
    report = Report()
    assert texts(path, report, skip_bad=True) == ["a", "c"]
    assert report.skipped == {"elements not JSON": 1, "elements without the field": 2}
    assert [entry["line"] for entry in report.listed] == [2, 3, 4]
    long = packed(tmp_path / "long.json", b'[{"text": "a"}, {"text": "%b"}]' % (b"b" * 2_000_000))
    report = Report()
    assert texts(long, report, max_length=10) == ["a"]
    assert report.skipped == {"elements too long to read": 1}
    deep = packed(
        tmp_path / "deep.json", b'[{"text": "a"}, {"text": %b%b}]' % (b"[" * 3000, b"]" * 3000)
    )
    with pytest.raises(UserError, match=r"deep.json, element 2: not JSON"):
        texts(deep)


def test_damaged_arrays(tmp_path: Path):
    cut = packed(tmp_path / "cut.json", b'[{"text": "a"}, {"text": "b"}, {"te')
    with pytest.raises(
        UserError,
        match=(
            r"cut.json: breaks off after 2 documents \(element 3, which begins at byte 30, does not"
            r" end\); --skip-bad"
        ),
    ):
        texts(cut)
    report = Report()
    assert texts(cut, report, skip_bad=True) == ["a", "b"]
    assert report.skipped == {"files that break off": 1}
    with pytest.raises(
        UserError,
        match=r"first.json: cannot be read \(element 1, which begins at byte 1, does not end\)",
    ):
        texts(packed(tmp_path / "first.json", b'[{"te'))
    with pytest.raises(UserError, match=r"no document in .*empty.json"):
        texts(packed(tmp_path / "empty.json", b"[ ]"))
    with pytest.raises(
        UserError, match=r"a.jsonl:1: not JSON .* one JSON array has to end with .json"
    ):
        texts(packed(tmp_path / "a.jsonl", b'[\n{"text": "a"}\n]'))


def test_conversations_in_an_array_are_those_of_lines(tmp_path: Path):
    """Alpaca's and ShareGPT's forms, as they are published."""
    tokenizer = train_byte_level_bpe(iter(["instruction input output human gpt value"] * 5), 300)
    tokenizer.save(tmp_path / "tokenizer")
    alpaca = [
        {"instruction": f"Add {i}.", "input": "1" * (i % 2), "output": str(i)} for i in range(20)
    ]
    share = [
        {
            "id": i,
            "conversations": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": "a"}],
        }
        for i in range(20)
    ]
    for name, records in (("alpaca", alpaca), ("share", share)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records, indent=4))
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps(record) + "\n" for record in records)
        )
        for suffix in ("json", "jsonl"):
            prepare_sft(
                [tmp_path / f"{name}.{suffix}"],
                tmp_path / "tokenizer",
                tmp_path / f"{name}-{suffix}",
                validation_fraction=0.2,
            )
        for split in SPLITS:
            assert (
                documents_of(tmp_path / f"{name}-json", split)
                == documents_of(tmp_path / f"{name}-jsonl", split)
                != []
            )
        assert (
            Manifest.load(tmp_path / f"{name}-json").shards
            == Manifest.load(tmp_path / f"{name}-jsonl").shards
        )
    assert "Add 3.\n\n1" in "".join(
        tokenizer.decode(ids)
        for split in SPLITS
        for ids in documents_of(tmp_path / "alpaca-json", split)
    )
    (tmp_path / "bad.json").write_text(
        json.dumps([*alpaca[:2], {"instruction": "q", "output": ""}])
    )
    with pytest.raises(UserError, match=r"bad.json, element 3: the response \(turn 2\) is empty"):
        prepare_sft([tmp_path / "bad.json"], tmp_path / "tokenizer", tmp_path / "bad")

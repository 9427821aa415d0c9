"""Sources in slices: whatever the cuts, every document once, in order, with its line; tables as
lines; memory bounded by lengths.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_tools.job.work_plan import cut
from data_tools.readers.input_file import Extent
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import measure, read_inputs, read_texts
from data_tools.readers.report import Report
from data_tools.readers.sources import find_sources
from llada.data.manifest import LEFT_OUT, Manifest
from llada.errors import UserError
from llada.tokenizer import train_byte_level_bpe
from tests.preparation import prepare

TEXTS = [f"{i} " + "größer 🙂 " * (i * 7 % 11) for i in range(60)]


def sliced(path: Path | str, size: int, **options: Any) -> tuple[list[list[str]], Report]:
    """The documents of every unit of `size` bytes."""
    settings, report = ReadOptions(**options), Report()
    sources = find_sources([path], settings, report)
    units, _ = cut([measure(source, settings, report) or Extent(0, 0) for source in sources], size)
    texts_of_units = []
    for unit in units:
        texts_of_units.append(
            [
                text
                for piece in unit
                for text in read_texts(sources[piece.source], piece.slice, settings, report)
            ]
        )
    return texts_of_units, report


# -- cutting ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    extents=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 50), st.integers(0, 400)).map(lambda pair: Extent(*pair)),
            st.lists(st.integers(0, 90), max_size=9).map(
                lambda sizes: Extent(len(sizes), sum(sizes), sizes)
            ),
        ),
        max_size=8,
    ),
    size=st.integers(1, 300),
)
def test_units_tile_the_sources(extents: list[Extent], size: int):
    units, text = cut(extents, size)
    positions = [
        (piece.source, position)
        for unit in units
        for piece in unit
        for position in range(piece.start, piece.stop)
    ]
    assert positions == [
        (source, position)
        for source, extent in enumerate(extents)
        for position in range(extent.length)
    ]
    largest = max(
        [
            max(e.sizes, default=0) if e.sizes is not None else -(-e.text_bytes // max(e.length, 1))
            for e in extents
        ],
        default=0,
    )
    assert all(part <= size + largest for part in text)
    # a piece is rounded down once
    assert all(part + len(unit) >= size for part, unit in zip(text[:-1], units[:-1], strict=True))
    assert len(units) == len(text)


def test_small_files_are_put_together_and_large_ones_cut(tmp_path: Path):
    for number in range(30):
        (tmp_path / f"{number:02d}.txt").write_text("x" * 100)
    units, _ = sliced(tmp_path, 1000)
    assert [len(unit) for unit in units] == [10, 10, 10]
    (tmp_path / "30.jsonl").write_text(
        "".join(json.dumps({"text": "y" * 89}) + "\n" for _ in range(50))
    )  # 102 bytes each
    units, _ = sliced(tmp_path, 1000)
    assert [len(unit) for unit in units[:3]] == [10, 10, 10]
    assert all(len(unit) in (9, 10) for unit in units[3:-1])
    assert sum(len(unit) for unit in units) == 80


# -- JSON Lines ------------------------------------------------------------------------------------


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
        min_size=1,
        max_size=8,
    ),
    blank=st.integers(0, 3),
    last_newline=st.booleans(),
    size=st.integers(1, 60),
)
def test_lines_wherever_they_are_cut(
    tmp_path: Path, texts: list[str], blank: int, last_newline: bool, size: int
):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = ("\n" * blank + "\n".join(lines) + "\n" * last_newline).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    units, report = sliced(tmp_path / "a.jsonl", size)
    assert [text for unit in units for text in unit] == texts
    assert not report.skipped


@pytest.mark.parametrize("size", [7, 100, 10_000])
def test_a_bad_line_has_its_number_in_the_file(size: int, tmp_path: Path):
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows[41] = "oops"
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"a.jsonl:42: not JSON"):
        sliced(tmp_path / "a.jsonl", size)
    _, report = sliced(tmp_path / "a.jsonl", size, skip_bad=True)
    assert [(line["line"], line["reason"]) for line in report.listed] == [(42, "lines not JSON")]
    assert report.listed[0]["path"] == str(tmp_path / "a.jsonl")


def test_lengths(tmp_path: Path):
    texts = ["ä" * 5, "b" * 9, "c" * 10, "d" * 20, "e" * 21, "🙂" * 5, "🙂" * 6]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    report = Report()
    texts_read = list(
        read_inputs([tmp_path / "a.jsonl"], ReadOptions(min_length=10, max_length=20), report)
    )
    assert texts_read == ["ä" * 5, "c" * 10, "d" * 20, "🙂" * 5]
    assert report.skipped == {
        "documents shorter than --min-length": 1,
        "documents longer than --max-length": 2,
    }
    (tmp_path / "b.txt").write_text("f" * 21)
    with pytest.raises(
        UserError,
        match=r"no document in .*b.txt \(left out: 1 documents longer than --max-length\)",
    ):
        list(read_inputs([tmp_path / "b.txt"], ReadOptions(max_length=20), Report()))
    for wrong, message in (
        ({"min_length": 0}, "--min-length: 0"),
        ({"max_length": 5, "min_length": 6}, "--max-length: 5 is less than"),
    ):
        with pytest.raises(UserError, match=message):
            ReadOptions(**wrong)


def test_a_line_does_not_need_its_length_in_memory(tmp_path: Path):
    """Two lines and a file of 120 MB, read in a process that may take 70 MB more of addresses than
    it has after its imports.
    """
    line = b'{"text": "' + b"x" * 120_000_000 + b'"}\n'
    small = b'{"text": "small"}\n'
    (tmp_path / "a.jsonl").write_bytes(small + line + small)
    with gzip.open(tmp_path / "b.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(small + line + small)
    (tmp_path / "c.txt").write_bytes(b"y" * 120_000_000)
    script = (
        "import sys, resource, gzip, orjson\n"
        "from data_tools.readers.options import ReadOptions\n"
        "from data_tools.readers.reading import read_inputs\n"
        "from data_tools.readers.report import Report\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 70_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "report = Report()\n"
        "texts = list(read_inputs([sys.argv[1]], ReadOptions(max_length=4 << 20), report))\n"
        "print(len(texts), dict(report.skipped))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (
        result.stdout
        == "4 {'lines too long to read': 2, 'documents longer than --max-length': 1}\n"
    ), result.stderr


# -- tables ----------------------------------------------------------------------------------------


def write_table(path: Path, rows: list[dict[str, Any]], group: int) -> None:
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=group)
        return
    stream = path.stem.endswith("stream")
    with (
        pa.OSFile(str(path), "wb") as sink,
        (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=group)


ROWS = [{"id": i, "text": text, "other": "z" * 50} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.stream.arrow"])
@pytest.mark.parametrize("size", [1, 300, 10**6])
def test_tables(name: str, size: int, tmp_path: Path):
    write_table(tmp_path / name, ROWS, 7)
    units, report = sliced(tmp_path / name, size)
    assert [text for unit in units for text in unit] == TEXTS
    assert len(units) == (9 if size == 1 else 1 if size == 10**6 else len(units))
    assert not report.skipped
    with pytest.raises(
        UserError,
        match=(
            r"--text-field: .* has no column 'txt', there are: id, text, other \(did you mean"
            r" 'text'\?\)"
        ),
    ):
        sliced(tmp_path / name, size, text_field="txt")
    with pytest.raises(UserError, match=rf"{name}:1: field 'id' is not a string but int"):
        sliced(tmp_path / name, size, text_field="id")
    (tmp_path / name).write_bytes(
        (tmp_path / name).read_bytes()[: 100 if "stream" not in name else 40]
    )
    with pytest.raises(UserError, match=rf"--input: .*{name}: cannot be read \("):
        sliced(tmp_path / name, size)
    (tmp_path / "b.txt").write_text("b")
    units, report = sliced(tmp_path, size)
    assert units == [["b"]]
    assert report.skipped == {"files unreadable": 1}


def test_rows_without_text_have_their_number(tmp_path: Path):
    rows = [*ROWS[:20], {**ROWS[20], "text": None}, *ROWS[21:]]
    write_table(tmp_path / "a.parquet", rows, 7)
    with pytest.raises(
        UserError, match=r"a.parquet:21: field 'text' is not a string but NoneType.* such rows and"
    ):
        sliced(tmp_path / "a.parquet", 100)
    _, report = sliced(tmp_path / "a.parquet", 100, skip_bad=True)
    assert report.skipped == {"rows whose field is not a string": 1}


@pytest.mark.parametrize("named", [True, False])
def test_a_row_that_is_not_utf8_is_one_bad_row(named: bool, tmp_path: Path):
    raw = [text.encode() for text in TEXTS]
    raw[20] = b"\xff\xfe"
    buffers = pa.array(raw, pa.binary()).buffers()
    column = pa.Array.from_buffers(pa.string(), len(raw), buffers)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=7)
    source = tmp_path / "a.parquet" if named else tmp_path
    for size in (100, 10**6):
        with pytest.raises(UserError, match=r"a.parquet:21: not UTF-8"):
            sliced(source, size)
        units, report = sliced(source, size, skip_bad=True)
        assert [text for unit in units for text in unit] == [*TEXTS[:20], *TEXTS[21:]]
        assert report.skipped == {"rows not UTF-8": 1}


@pytest.mark.parametrize("size", [1, 10**6])
def test_a_damaged_row_group_is_never_left_out_silently(size: int, tmp_path: Path):
    parquet.write_table(
        pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=10, compression="snappy"
    )
    (tmp_path / "b.txt").write_text("b")
    column = parquet.ParquetFile(tmp_path / "a.parquet").metadata.row_group(3).column(1)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xaa" * column.total_compressed_size
    (tmp_path / "a.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"a.parquet: breaks off after \d+ documents"):
        sliced(tmp_path, size)
    _, report = sliced(tmp_path, size, skip_bad=True)
    assert report.skipped == {"files that break off": 1}


def test_compressed_tables_are_refused(tmp_path: Path):
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(UserError, match=r"a.parquet.gz: unpack it first"):
        sliced(tmp_path / "a.parquet.gz", 10)


@pytest.fixture()
def saved(tmp_path: Path) -> Path:
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:3]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    splits["test"].save_to_disk(tmp_path / "one")
    for number in range(3):
        (tmp_path / "files").mkdir(exist_ok=True)
        lines = (json.dumps(row) + "\n" for row in ROWS[20 * number : 20 * (number + 1)])
        (tmp_path / "files" / f"{number}.jsonl").write_text("".join(lines))
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "texts"),
    [
        ("saved", {}, TEXTS),
        ("saved", {"split": "test"}, TEXTS[:3]),
        ("one", {}, TEXTS[:3]),
        ("files", {}, TEXTS),
        ("files", {"split": "train[:25%]"}, TEXTS[:15]),
    ],
)
def test_datasets(
    name: str,
    options: dict[str, str],
    texts: list[str],
    streaming: bool,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "cache")
    if streaming and "[" in options.get("split", ""):  # the library slices no stream
        with pytest.raises(UserError, match=r"--input: hf:.*files: cannot be loaded as a dataset"):
            sliced(f"hf:{saved / name}", 200, streaming=True, **options)
        return
    units, _ = sliced(f"hf:{saved / name}", 200, streaming=streaming, **options)
    assert [text for unit in units for text in unit] == texts
    assert len(units) == (3 if streaming and name == "files" else 1 if streaming else len(units))
    assert len(units) > 1 or streaming or len(texts) < 4


def test_datasets_that_are_refused(saved: Path):
    with pytest.raises(
        UserError,
        match=(
            r"--split: hf:.*saved has no split 'tran', there are: train, test \(did you mean"
            r" 'train'\?\)"
        ),
    ):
        sliced(f"hf:{saved / 'saved'}", 200, split="tran")
    with pytest.raises(UserError, match=r"--input: hf:.*nowhere: cannot be loaded as a dataset"):
        sliced(f"hf:{saved / 'nowhere'}", 200)
    with pytest.raises(UserError, match=r"--text-field: .* has no column 'txt'"):
        sliced(f"hf:{saved / 'saved'}", 200, text_field="txt")


# -- patterns, the whole command -------------------------------------------------------------------


def test_patterns(tmp_path: Path):
    for name in ("a/1.txt", "a/2.md", "b/3.txt", "b/c/4.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    report = Report()
    assert list(read_inputs([f"{tmp_path}/*/*.txt"], ReadOptions(), report)) == [
        "a/1.txt",
        "b/3.txt",
    ]
    assert list(read_inputs([f"{tmp_path}/**/*.txt"], ReadOptions(), report)) == [
        "a/1.txt",
        "b/3.txt",
        "b/c/4.txt",
    ]
    with pytest.raises(UserError, match=r"no file matches '.*\*.csv'"):
        list(read_inputs([f"{tmp_path}/*.csv"], ReadOptions(), report))
    assert list(read_inputs([tmp_path / "a", f"{tmp_path}/a/*"], ReadOptions(), report)) == [
        "a/1.txt",
        "a/2.md",
    ]
    assert report.skipped == {"files read already under another name": 2}
    with pytest.raises(UserError, match=r"2.md' is read already as .*2.md"):
        list(read_inputs([tmp_path / "a", tmp_path / "a" / "2.md"], ReadOptions(), report))


def test_what_is_left_out_is_listed_and_evaluation_texts_are_kept_out(tmp_path: Path):
    from data_tools.job.options import DecontaminationOptions

    train_byte_level_bpe(iter(TEXTS), 300).save(tmp_path / "tokenizer")
    question = "what is the capital of the largest country in the whole wide world today"
    (tmp_path / "evaluation.jsonl").write_text(
        json.dumps({"question": question, "choices": ["a", "b"]}) + "\n"
    )
    rows = [
        *ROWS[:10],
        {"text": f"Somebody asked: {question.title()}? Nobody knew."},
        {"txt": "bad"},
        *ROWS[10:],
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {}
    for drop in (False, True):
        rule = DecontaminationOptions((str(tmp_path / "evaluation.jsonl"),), 13, drop)
        manifest = prepare(
            [tmp_path / "a.jsonl"],
            tmp_path / "tokenizer",
            tmp_path / f"corpus-{drop}",
            skip_bad=True,
            decontamination=rule,
            unit_bytes=500,
        )
        counts[drop] = sum(entry.documents for entry in manifest.shards)
        reason = {"documents that overlap an evaluation text": 1}
        assert (manifest.noted, manifest.skipped) == (
            ({}, {**reason, "lines without the field": 1})
            if drop
            else (reason, {"lines without the field": 1})
        )
        listed = [
            json.loads(line)
            for line in (tmp_path / f"corpus-{drop}" / LEFT_OUT).read_text().splitlines()
        ]
        assert [(line["line"], line["reason"]) for line in listed] == [
            (12, "lines without the field")
        ]
        assert Manifest.load(tmp_path / f"corpus-{drop}").options["decontaminate"]["drop"] is drop
    assert counts == {False: 61, True: 60}

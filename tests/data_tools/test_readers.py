"""Readers: what is a document, what is left out and counted, what is refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.readers.formats import FORMATS, TEXT, Format
from data_tools.readers.input_file import InputFile, measure_whole_file
from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import measure, read_inputs, read_texts, sample_texts
from data_tools.readers.records import Record, RecordStream
from data_tools.readers.report import Report
from data_tools.readers.sources import parse_extensions
from llada.errors import UserError
from llada.tokenizer import train_byte_level_bpe
from tests.preparation import prepare
from tests.stand_ins import like

TEXTS = ["eins", "zwei\nZeilen", "drei é 🙂", " \n"]


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)
    ).encode()


def read_all(*inputs: Path, **options) -> tuple[list[str], Report]:
    report = Report()
    return list(read_inputs(inputs, ReadOptions(**options), report)), report


def refusal(*inputs: Path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_all(*inputs, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- JSON Lines

FRAMES = b"".join(
    zstandard.ZstdCompressor().compress(line + b"\n") for line in jsonl(TEXTS).splitlines()
)
COMPRESSED = {
    "a.jsonl": jsonl(TEXTS),
    "a.json": jsonl(TEXTS),
    "a.JSONL": jsonl(TEXTS),
    "a.jsonl.gz": gzip.compress(jsonl(TEXTS)),
    "a.json.gz": gzip.compress(jsonl(TEXTS)),
    "members.jsonl.gz": gzip.compress(jsonl(TEXTS[:2])) + gzip.compress(jsonl(TEXTS[2:])),
    "a.jsonl.zst": zstandard.ZstdCompressor().compress(jsonl(TEXTS)),
    "a.json.zst": zstandard.ZstdCompressor().compress(jsonl(TEXTS)),
    "frames.jsonl.zst": FRAMES,
}


@pytest.mark.parametrize("name", COMPRESSED)
def test_jsonl_in_every_wrapping(name: str, tmp_path: Path):
    path = tmp_path / name
    path.write_bytes(COMPRESSED[name])
    texts, report = read_all(path)
    assert texts == TEXTS
    assert not report.skipped


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=6
    ).filter(any),
    ascii_only=st.booleans(),
    cuts=st.lists(st.integers(0, 200), max_size=4).map(sorted),
)
def test_any_text_comes_back_wherever_frames_end(
    tmp_path: Path, texts: list[str], ascii_only: bool, cuts: list[int]
):
    content = "".join(
        json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts
    ).encode()
    parts = [
        content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)
    ]
    for suffix, compress in (("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)):
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(compress(part) for part in parts if part))
        texts_read, report = read_all(path)
        assert texts_read == [text for text in texts if text]
        assert report.skipped["documents empty"] == texts.count("")


def test_long_lines_and_much_text_through_zstd(tmp_path: Path):
    texts = [f"{i} " + "abc é " * (i * 3001 % 70_001) for i in range(40)]
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(texts)))
    assert read_all(tmp_path / "a.jsonl.zst")[0] == texts


def test_a_byte_order_mark_and_blank_lines_are_no_text(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + jsonl(["eins"]) + b"\n  \n" + jsonl(["zwei"])
    )
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfdrei\r\n")
    texts, report = read_all(tmp_path / "a.jsonl", tmp_path / "b.txt")
    assert texts == ["eins", "zwei", "drei\r\n"]
    assert not report.skipped


BAD_LINES = [
    (b"{oops", "not JSON", "lines not JSON"),
    (b'{"text": "a\xff"}', "not JSON", "lines not JSON"),
    (b'{"text": "\\ud800"}', "not JSON", "lines not JSON"),
    (
        b'{"txt": "a", "id": 1}',
        (
            r"field 'text' is missing, there are: txt, id \(did you mean 'txt'\?\); choose it with"
            r" --text-field"
        ),
        None,
    ),
    (b'["text"]', "a JSON list, not an object with the field 'text'", "lines without the field"),
    (b'{"text": 3}', "field 'text' is not a string but int", "lines whose field is not a string"),
    (
        b'{"text": null}',
        "field 'text' is not a string but NoneType",
        "lines whose field is not a string",
    ),
]


@pytest.mark.parametrize(("line", "message", "reason"), BAD_LINES)
def test_a_bad_line_is_refused_or_counted(
    line: bytes, message: str, reason: str | None, tmp_path: Path
):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["eins"]) + b"\n" + line + b"\n" + jsonl(["zwei"]))
    with pytest.raises(
        UserError, match=rf"^{path}:3: {message}.*--skip-bad counts such lines and leaves them out$"
    ):
        read_all(path)
    texts, report = read_all(path, skip_bad=True)
    assert texts == ["eins", "zwei"]
    assert report.skipped == {reason or "lines without the field": 1}


def test_another_field(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS, "content"))
    assert read_all(tmp_path / "a.jsonl", text_field="content")[0] == TEXTS
    assert "there are: id, content" in refusal(tmp_path / "a.jsonl")


def test_empty_documents_are_counted(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["", "eins", ""]))
    texts, report = read_all(tmp_path / "a.jsonl")
    assert texts == ["eins"]
    assert report.skipped == {"documents empty": 2}


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_breaks_off(suffix: str, tmp_path: Path):
    texts = [
        os.urandom(300).hex() for _ in range(400)
    ]  # does not compress well: the break lies in the middle
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(level=1).compress
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / f"a.jsonl{suffix}"
    packed = pack(jsonl(texts))
    # Flushed in blocks, so that some documents come out before the break.
    if suffix == ".zst":
        compressor = zstandard.ZstdCompressor().compressobj()
        packed = b"".join(
            compressor.compress(line + b"\n") + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
            for line in jsonl(texts).splitlines()
        )
        packed += compressor.flush()
    path.write_bytes(packed[: len(packed) // 2])
    for source in (path, path.parent):  # never silently, in a folder neither
        assert "breaks off after" in refusal(source)
    texts_read, report = read_all(path.parent, skip_bad=True)
    assert 0 < len(texts_read) < len(texts)
    assert texts_read == texts[: len(texts_read)]
    assert report.skipped == {"files that break off": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.txt.gz"])
def test_a_file_that_is_not_what_its_name_says(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(b"plain text")
    (tmp_path / "b.txt").write_text("b")
    assert refusal(tmp_path / name).startswith(f"--input: {tmp_path / name}: cannot be read (")
    texts, report = read_all(tmp_path)
    assert texts == ["b"]
    assert report.skipped == {"files unreadable": 1}


# --- text, code and folders


def test_a_folder(tmp_path: Path):
    root = tmp_path / "in"
    contents = {
        "b.py": b"print()\n",
        "a/z.TXT": "größer\n".encode(),
        "a/y.md": b"# y",
        "a.txt.gz": gzip.compress(b"packed"),
        "c/lines.jsonl": jsonl(["eins", "zwei"]),
        "c/more.json.gz": gzip.compress(jsonl(["drei"])),
        "c/table.xyz": b"1,2",
        "c/package.json": b"{}",
        "c/Makefile": b"all:",
        "c/empty.txt": b"",
        "c/latin.txt": "größer".encode("latin-1"),
        ".hidden.txt": b"no",
        ".git/config.txt": b"no",
        "c/__pycache__/x.py": b"no",
    }
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    texts, report = read_all(root)
    read_in_order = {
        "a/y.md": ["# y"],
        "a/z.TXT": ["größer\n"],
        "a.txt.gz": ["packed"],
        "b.py": ["print()\n"],
        "c/lines.jsonl": ["eins", "zwei"],
        "c/more.json.gz": ["drei"],
    }
    assert texts == [text for texts_of_file in read_in_order.values() for text in texts_of_file]
    assert report.skipped == {
        "files with another extension": 3,
        "documents empty": 1,
        "files not UTF-8": 1,
    }

    train_byte_level_bpe(iter(TEXTS), 300).save(tmp_path / "tokenizer")
    manifest = prepare([root], tmp_path / "tokenizer", tmp_path / "corpus")
    assert manifest.sources == [
        {"path": str(root / name), "bytes": len(contents[name]), "documents": len(texts_of_file)}
        for name, texts_of_file in read_in_order.items()
    ]
    assert manifest.skipped == report.skipped

    texts, report = read_all(root, extensions=parse_extensions(["xyz", ".MD"]))
    assert texts == ["# y", "eins", "zwei", "drei", "1,2"]
    assert report.skipped == {"files with another extension": 7}


def test_links(tmp_path: Path):
    root, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for folder in (root / "a", elsewhere):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(folder.name)
    (root / "a" / "loop").symlink_to(root, target_is_directory=True)
    (root / "outside").symlink_to(elsewhere, target_is_directory=True)
    (root / "self.txt").symlink_to("self.txt")
    (root / "gone.txt").symlink_to("nothing.txt")
    (root / "file.txt").symlink_to(elsewhere / "x.txt")
    os.mkfifo(root / "pipe.txt")
    texts, report = read_all(root)
    assert texts == ["a", "elsewhere"]
    assert report.skipped == {"links to folders": 2, "files unreadable": 3}
    assert read_all(root / "outside")[0] == ["elsewhere"]  # named, a link is followed


def test_unreadable_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "in" / "closed").mkdir(parents=True)
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(name)

    def guarded_open(path, *arguments, **options):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, *arguments, **options)

    def guarded_walk(folder, onerror):
        for path, folders, files in os.walk(folder, onerror=onerror):
            if path.endswith("closed"):
                onerror(PermissionError(13, "Permission denied", path))
            else:
                yield path, folders, files

    # Not by chmod: root may read everything.
    monkeypatch.setattr("data_tools.readers.compression.open", guarded_open, raising=False)
    monkeypatch.setattr("data_tools.readers.sources.os", like(os, walk=guarded_walk))
    texts, report = read_all(tmp_path / "in")
    assert texts == ["b.txt"]
    assert report.skipped == {"files unreadable": 1, "folders unreadable": 1}
    assert "a.txt: cannot be read ([Errno 13] Permission denied" in refusal(
        tmp_path / "in" / "a.txt"
    )
    assert (
        refusal(tmp_path / "in" / "closed")
        == f"--input: {tmp_path}/in/closed: cannot be read (Permission denied)"
    )


def test_named_inputs_that_are_refused(tmp_path: Path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    (tmp_path / "blank.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_text("oops\n")
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.xyz").write_text("1")
    os.mkfifo(tmp_path / "pipe")
    good = tmp_path / "good.txt"
    for name, message in {
        "missing.txt": "--input: no file or folder '{}'",
        "good.txt/below": "--input: no file or folder '{}'",
        "empty.txt": "--input: {} is empty",
        "latin.txt": (
            "--input: {}: byte 2 is not UTF-8; a file that is not text needs the extension of its"
            " format: .jsonl, .json (also with .gz or .zst), .parquet, .arrow"
        ),
        "blank.jsonl": "--input: no document in {} (left out: 1 documents empty)",
        "bad.jsonl": "--input: no document in {} (left out: 1 lines not JSON)",
        "pipe": "--input: '{}' is neither a file nor a folder",
    }.items():
        path = tmp_path / name
        assert refusal(good, path, skip_bad=True) == message.format(path)
    folder = tmp_path / "folder"
    assert (
        refusal(folder)
        == f"--input: no document in {folder} (left out: 1 files with another extension)"
    )
    assert read_all(good, folder)[0] == ["good"]
    assert "is given twice" in refusal(good, tmp_path / "folder" / ".." / "good.txt")
    assert refusal() == "--input: give at least one file or folder"


def test_what_is_missing_is_found_before_anything_is_read(tmp_path: Path):
    (tmp_path / "good.txt").write_text("good")
    documents = read_inputs([tmp_path / "good.txt", tmp_path / "missing"], ReadOptions(), Report())
    with pytest.raises(UserError, match="no file or folder"):
        next(documents)


def test_a_format_that_is_not_registered_is_not_read_as_another():
    source = InputFile("a.xyz", "xyz", named=True, bytes=1, stamp="")
    with pytest.raises(KeyError, match="xyz"):
        measure(source, ReadOptions(), Report())
    with pytest.raises(KeyError, match="xyz"):
        list(read_texts(source, None, ReadOptions(), Report()))


def test_a_file_that_is_not_utf8_from_some_place_on_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A reader that decodes line by line must not lose the rest of a file without a word."""

    def read_lines(source, slice_, options, report):
        lines = Path(source.path).read_bytes().splitlines()
        records = (Record(i, {"text": line.decode()}) for i, line in enumerate(lines, 1))
        return RecordStream(records, lambda: 0)

    monkeypatch.setitem(FORMATS, TEXT, Format(measure_whole_file, read_lines))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"eins\nzwei\n\xff\n")
    message = r"a.txt: breaks off after 2 documents \('utf-8' codec .*; --skip-bad keeps those"
    with pytest.raises(UserError, match=message):
        read_all(tmp_path / "in")
    texts, report = read_all(tmp_path / "in", skip_bad=True)
    assert texts == ["eins", "zwei"]
    assert report.skipped == {"files that break off": 1}


def test_extensions():
    assert parse_extensions(None) is None
    assert parse_extensions(["py", ".MD, txt", "c.gz"]) == {".py", ".md", ".txt", ".c"}
    with pytest.raises(UserError, match=r"--ext: ', .' names no extension"):
        parse_extensions([", ."])


def test_a_sample_stops_at_its_limit_and_spreads_over_many_files(tmp_path: Path):
    for i in range(100):
        (tmp_path / f"{i:02d}.txt").write_text(f"{i:02d}" * 50)
    texts = list(sample_texts([tmp_path], 1000, ReadOptions()))
    assert [text[:2] for text in texts] == [f"{i:02d}" for i in range(0, 100, 10)]
    (tmp_path / "one.jsonl").write_bytes(jsonl(["x" * 100] * 50))
    assert list(sample_texts([tmp_path / "one.jsonl"], 1000, ReadOptions())) == ["x" * 100] * 10

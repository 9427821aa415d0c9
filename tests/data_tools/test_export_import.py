"""Export against the texts, import against Megatron's own builder and against our own preparation
of the same texts.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.tools.export import export
from data_tools.tools.import_datasets import ImportOptions, import_datasets
from data_tools.tools.megatron import IndexedDataset
from llada.data.manifest import SPLITS, Manifest
from llada.data.verify import verify_corpus
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data_tools.commands import expect_refusal, refusal, shown
from tests.data_tools.corpora import documents_of, shard_files
from tests.preparation import prepare

WORDS = ["masked", "größer", "🙂", "the", "\n", "0x1F", "\t", "\u2028", "日本語", "model", " "]


def texts(n: int) -> list[str]:
    generator = np.random.default_rng(3)
    return [
        f"{i} "
        + " ".join(WORDS[k] for k in generator.integers(0, len(WORDS), generator.integers(0, 30)))
        for i in range(n)
    ]


TEXTS = texts(150)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """texts.jsonl, the tokenizer `tok` and the corpus `corpus`, a quarter of it held out."""
    folder = tmp_path_factory.mktemp("export")
    train_byte_level_bpe(iter(TEXTS), 330).save(folder / "tok")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    )
    prepare(
        [folder / "texts.jsonl"],
        folder / "tok",
        folder / "corpus",
        validation_fraction=0.25,
        shard_tokens=700,
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(root: Path) -> Tokenizer:
    return Tokenizer.load(root / "tok")


# -- export ----------------------------------------------------------------------------------------


def unpacked(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return (
        zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data)).read()
        if path.suffix == ".zst"
        else data
    )


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_exported_text_prepares_to_the_same_shards(root: Path, tmp_path: Path, suffix: str):
    output = tmp_path / f"out.{suffix}"
    shown("export", root / "corpus", "--output", output, "--text-field", "body")
    lines = [json.loads(line) for line in unpacked(output).splitlines()]
    assert sorted(line["body"] for line in lines) == sorted(TEXTS)
    assert all(list(line) == ["body"] for line in lines)
    prepare(
        [output],
        root / "tok",
        tmp_path / "again",
        text_field="body",
        validation_fraction=0.25,
        shard_tokens=700,
    )
    assert shard_files(tmp_path / "again") == shard_files(root / "corpus")
    first = output.read_bytes()
    assert "exists; --force replaces it" in refusal(
        "export", root / "corpus", "--output", output, "--text-field", "body"
    )
    shown("export", root / "corpus", "--output", output, "--text-field", "body", "--force")
    assert output.read_bytes() == first


def test_one_split_is_exported(root: Path, tmp_path: Path):
    made = {
        split: export(root / "corpus", tmp_path / f"{split}.jsonl", split=split) for split in SPLITS
    }
    exported = {
        split: [json.loads(line)["text"] for line in (tmp_path / f"{split}.jsonl").open("rb")]
        for split in SPLITS
    }
    assert sorted(chain(*exported.values())) == sorted(TEXTS)
    manifest = Manifest.load(root / "corpus")
    for split in SPLITS:
        documents, _, text_bytes = manifest.totals(split)
        assert len(exported[split]) == made[split].documents == documents
        assert (
            made[split].text_bytes
            == made[split].prepared_bytes
            == text_bytes
            == sum(len(t.encode()) for t in exported[split])
        )


def test_a_tokenizer_that_changes_text_is_said(root: Path, tmp_path: Path):
    definition = json.loads((root / "tok" / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "t.jsonl").write_text('{"text": "İSTANBUL, ISTANBUL"}\n')
    prepare(
        [tmp_path / "t.jsonl"],
        tmp_path / "tokenizer.json",
        tmp_path / "corpus",
        validation_fraction=0,
    )
    assert "not the text as it was prepared, which has 19 bytes" in shown(
        "export", tmp_path / "corpus", "--output", tmp_path / "o.jsonl"
    )


def test_what_cannot_be_exported(root: Path, tmp_path: Path):
    corpus = root / "corpus"
    before = sorted(root.iterdir())
    expect_refusal(
        lambda: export(corpus, tmp_path / "o.jsonl", split="valid"),
        "--split",
        "'valid'",
        "did you mean 'validation'?",
    )
    expect_refusal(lambda: export(corpus, tmp_path / "o.txt"), "--output", ".jsonl.zst")
    expect_refusal(lambda: export(tmp_path, tmp_path / "o.jsonl"), "not a prepared corpus")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 3)
    expect_refusal(
        lambda: export(corpus, tmp_path / "c.jsonl" / "o.jsonl"), "--output", "Not a directory"
    )
    shown(
        "prepare-sft",
        "--input",
        tmp_path / "c.jsonl",
        "--tokenizer",
        root / "tok",
        "--output",
        tmp_path / "sft",
    )
    expect_refusal(lambda: export(tmp_path / "sft", tmp_path / "o.jsonl"), "conversations")
    assert not list(tmp_path.glob("*o.*"))
    assert sorted(root.iterdir()) == before


def test_a_damaged_shard_is_not_exported(root: Path, tmp_path: Path):
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    path = tmp_path / "corpus" / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    expect_refusal(
        lambda: export(tmp_path / "corpus", tmp_path / "o.jsonl"), "train-00001.bin", "checksum"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


# -- import ----------------------------------------------------------------------------------------

EVERYTHING_TRAINS = ImportOptions(validation_fraction=0)
DTYPES = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.uint16]


def build(path: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> Path:
    """With Megatron's own builder: documents of sequences of ids."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{path}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{path}.idx")
    return path


sequences = st.lists(st.lists(st.integers(0, 100), max_size=5), max_size=4)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(sequences, max_size=9),
    dtype=st.sampled_from(DTYPES),
    limit=st.integers(1, 30),
)
def test_datasets_are_read_as_they_were_built(tmp_path_factory, documents, dtype, limit):
    path = build(tmp_path_factory.mktemp("dataset") / "d.v1", documents, dtype)
    dataset = IndexedDataset(path)
    assert dataset.num_documents == len(documents)
    expected = [list(chain.from_iterable(document)) for document in documents]
    documents_read: list[list[int]] = []
    for first, flat, lengths in dataset.runs(limit):
        assert first == len(documents_read)
        assert len(lengths) == 1 or len(flat) <= limit
        documents_read += [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])]
    assert documents_read == expected


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.uint16])
def test_import_gives_what_prepare_gives(root: Path, tmp_path: Path, tokenizer, dtype, suffix: str):
    eos = tokenizer.eos_id
    rows = [tokenizer.encode(text).tolist() for text in TEXTS]
    # Documents in pieces, some with EOS, some empty; in two datasets.
    documents = [[ids[: i % 7], ids[i % 7 :], [eos] * (i % 3 > 0)] for i, ids in enumerate(rows)]
    paths = [
        build(tmp_path / "a", [*documents[:70], [], [[eos]], [[], []]], dtype),
        build(tmp_path / "b", documents[70:], dtype),
    ]
    words = [
        "--tokenizer",
        root / "tok",
        "--output",
        tmp_path / "out",
        "--validation-fraction",
        0.25,
        "--shard-tokens",
        700,
    ]
    output = shown("import", *(f"{path}{suffix}" for path in paths), *words)
    assert shard_files(tmp_path / "out") == shard_files(root / "corpus")
    manifest, prepared = Manifest.load(tmp_path / "out"), Manifest.load(root / "corpus")
    assert manifest.shards == prepared.shards  # bytes of text among them
    assert manifest.tokenizer_fingerprint == prepared.tokenizer_fingerprint
    assert manifest.skipped == {"empty documents": 3}
    assert [source["documents"] for source in manifest.sources] == [70, 80]
    assert f"EOS appended to {sum(i % 3 == 0 for i in range(150))} documents" in output
    assert "left out: 3 empty documents" in output
    assert verify_corpus(tmp_path / "out") == []


def test_import_of_our_own_shards(root: Path, tmp_path: Path):
    shards = sorted((root / "corpus").glob("*.idx"))
    made = import_datasets(shards, root / "tok", tmp_path / "out", EVERYTHING_TRAINS)
    assert (made.eos_added, made.special_inside) == (0, 0)
    assert documents_of(tmp_path / "out", "train") == [
        ids for split in SPLITS for ids in documents_of(root / "corpus", split)
    ]


def test_special_tokens_that_are_missing_are_added(root: Path, tmp_path: Path):
    definition = json.loads((root / "tok" / "tokenizer.json").read_text())
    definition["added_tokens"] = [
        entry for entry in definition["added_tokens"] if entry["content"] == "<|endoftext|>"
    ]
    definition["added_tokens"][0]["id"] = own = len(definition["model"]["vocab"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    data = build(tmp_path / "d", [[[5, 6, own]], [[7, own]]])
    arguments = ([data], tmp_path / "tokenizer.json", tmp_path / "out")
    expect_refusal(lambda: import_datasets(*arguments), "no mask token", "--add-special-tokens")
    adding = ImportOptions(validation_fraction=0, add_special_tokens=True)
    manifest = import_datasets(*arguments, adding).manifest
    assert manifest.vocab_size == own + 6
    assert documents_of(tmp_path / "out", "train") == [[5, 6, own], [7, own]]
    # An id that only the added tokens have is not one of the data's tokenizer.
    more = build(tmp_path / "e", [[[5, own + 1]]])
    expect_refusal(
        lambda: import_datasets([more], *arguments[1:], adding, force=True),
        "document 0",
        f"0..{own}",
    )


def test_bos_inside_is_said(root: Path, tmp_path: Path, tokenizer):
    data = build(tmp_path / "d", [[[tokenizer.bos_id, 5, 6]], [[7]], [[8, tokenizer.eos_id, 9]]])
    made = import_datasets([data], root / "tok", tmp_path / "out", EVERYTHING_TRAINS)
    assert (made.special_inside, made.eos_added) == (2, 3)
    assert made.manifest.totals("train")[2] == 5  # the letters alone


def test_another_tokenizer_is_noticed(root: Path, tmp_path: Path, tokenizer):
    """Of the same size, so no id is beyond it: by its EOS and by what the decoded text is encoded
    to.
    """
    code = Path(__file__).read_text()
    other = train_byte_level_bpe(iter([code]), tokenizer.vocab_size)
    ids = [other.encode(code[start : start + 100]).tolist() for start in range(0, 4000, 100)]
    without, with_eos = (
        build(tmp_path / "without", [[own] for own in ids]),
        build(tmp_path / "with", [[[*own, other.eos_id]] for own in ids]),
    )
    words = ("--tokenizer", root / "tok", "--output", tmp_path / "out")
    assert other.eos_id == tokenizer.eos_id
    message = refusal("import", without, *words)
    assert message.startswith(
        f"import: {without}.bin was made with another tokenizer: encoding the text of its ids"
        " gives "
    )
    assert (
        f"; none of its 40 documents ends with this tokenizer's EOS, id {tokenizer.eos_id};"
        " --tokenizer must be" in message
    )
    assert not (tmp_path / "out").exists()
    assert f"warning: {with_eos}.bin: encoding the text of its ids gives" in shown(
        "import", with_eos, *words
    )
    # The right tokenizer, of a tool that appends no EOS: the documents say nothing else against it.
    other.save(tmp_path / "right")
    made = import_datasets([without], tmp_path / "right", tmp_path / "out", force=True)
    assert (made.eos_added, len(made.doubts)) == (40, 1)
    assert made.doubts[0].startswith(
        f"{without}.bin: none of its 40 documents ends with this tokenizer's EOS"
    )
    assert (
        import_datasets([with_eos], tmp_path / "right", tmp_path / "out", force=True).doubts == []
    )


@pytest.mark.parametrize(
    ("bad", "what"), [(-1, "not one of"), (400, "not one of"), ("mask", "the mask token")]
)
def test_wrong_ids_are_refused(root: Path, tmp_path: Path, tokenizer, bad, what: str):
    token_id = tokenizer.mask_id if bad == "mask" else bad
    data = build(tmp_path / "d", [[[5]], [], [[6], [7, token_id]], [[400]]])
    expect_refusal(
        lambda: import_datasets([data], root / "tok", tmp_path / "out"),
        f"{data}.bin",
        "document 2",
        f"id {token_id}",
        what,
    )
    assert not (tmp_path / "out").exists()


def test_options_that_are_refused(root: Path, tmp_path: Path):
    data = build(tmp_path / "d", [[[5]], [[6]]])
    words = ("--tokenizer", root / "tok", "--output", tmp_path / "out")
    assert "--validation-fraction: 1.0 is not in [0, 1)" in refusal(
        "import", data, *words, "--validation-fraction", 1
    )
    assert "given twice" in refusal("import", data, f"{data}.idx", *words)
    empty = build(tmp_path / "e", [[], []])
    assert "no document" in refusal("import", empty, *words)
    assert not (tmp_path / "out").exists()


def damage(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def test_damaged_datasets_are_refused(tmp_path: Path):
    def fresh() -> Path:
        return build(tmp_path / "d", [[[5, 6], [7]], [[8]]])

    path = fresh()
    (tmp_path / "d.bin").rename(tmp_path / "x.bin")
    expect_refusal(lambda: IndexedDataset(path), "d.bin: no such file")
    expect_refusal(lambda: IndexedDataset(tmp_path / "x.bin"), "x.idx: no such file")
    lengths, pointers, indices = 34, 34 + 4 * 3, 34 + 12 * 3
    for offset, data, message in (
        (0, b"X", "not the index of a Megatron dataset"),
        (9, b"\x02", "version 2"),
        (
            17,
            b"\x06",
            (
                "dtype code 6 is float64, which is not a dtype of token ids;"
                " allowed are 1, 2, 3, 4, 5, 8"
            ),
        ),
        (17, b"\x09", "dtype code 9 is unknown"),
        (18, b"\x04", "4 sequences"),
        (lengths, b"\x03", "sequence 1 does not begin"),
        (lengths + 3, b"\xff", "sequence 0 does not begin"),
        (pointers + 8, b"\x01", "sequence 1 does not begin"),
        (indices, b"\x01", "document index 0 is out of order"),
        (indices + 8, b"\x09", "document index 2 is out of order"),
        (indices + 16, b"\x02", "its documents end at sequence 2, it has 3"),
    ):
        fresh()
        damage(tmp_path / "d.idx", offset, data)
        expect_refusal(lambda: IndexedDataset(path), "d.idx", message)
    fresh()
    with (tmp_path / "d.bin").open("ab") as file:
        file.write(b"\0\0\0\0")
    expect_refusal(lambda: IndexedDataset(path), "d.bin: 20 bytes, its index ends at 16")
    fresh()
    (tmp_path / "d.idx").write_bytes((tmp_path / "d.idx").read_bytes()[:-8])
    expect_refusal(lambda: IndexedDataset(path), "d.idx", "bytes, 3 sequences")
    (tmp_path / "d.idx").write_bytes(b"MMID")
    expect_refusal(lambda: IndexedDataset(path), "not the index")


# -- datatrove -------------------------------------------------------------------------------------


def test_what_datatrove_tokenized_is_imported(root: Path, tmp_path: Path):
    """With the example of the documentation, in a process of its own."""
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    (example,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        if "datatrove" in block
    ]
    shutil.copytree(root / "tok", tmp_path / "tokenizer")
    (tmp_path / "cleaned").mkdir()
    for part in range(2):
        lines = "".join(
            json.dumps({"text": text}) + "\n" for text in TEXTS[75 * part : 75 * (part + 1)]
        )
        (tmp_path / "cleaned" / f"{part}.jsonl").write_text(lines)
    (tmp_path / "example.py").write_text(example)
    ran = subprocess.run(
        [sys.executable, "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    datasets = sorted((tmp_path / "tokenized").glob("*.idx"))
    assert [path.name for path in datasets] == ["web_00000_tokens.idx", "web_00001_tokens.idx"]
    made = import_datasets(
        datasets,
        root / "tok",
        tmp_path / "out",
        ImportOptions(validation_fraction=0.25, shard_tokens=700),
    )
    assert (made.eos_added, made.special_inside) == (0, 0)
    for split in SPLITS:
        assert documents_of(tmp_path / "out", split) == documents_of(root / "corpus", split)
    assert made.manifest.shards == Manifest.load(root / "corpus").shards


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_what_is_exported_datatrove_reads(root: Path, tmp_path: Path, suffix: str):
    from datatrove.pipeline.readers import JsonlReader

    folder = tmp_path / "exported"
    folder.mkdir()
    export(root / "corpus", folder / f"corpus.{suffix}")
    read = [document.text for document in JsonlReader(str(folder)).run()]
    assert sorted(read) == sorted(TEXTS)
    expected = [
        Tokenizer.load(root / "tok").decode(ids[:-1])
        for split in SPLITS
        for ids in documents_of(root / "corpus", split)
    ]
    assert read == expected

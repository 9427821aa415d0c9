"""The corpus format against Megatron's own reader and against plain recomputation; every kind of
damage is found.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada.data.corpus import Corpus
from llada.data.manifest import FORMAT_VERSION, TEXT, Manifest
from llada.data.shard_format import token_dtype
from llada.data.shard_reader import ShardReader
from llada.data.shard_writer import ShardWriter
from llada.data.verify import verify_corpus
from llada.errors import UserError

EOS, MASK, VOCABULARY = 9, 10, 11
UINT16, INT32 = np.dtype("<u2"), np.dtype("<i4")

documents_of_ids = st.lists(
    st.lists(st.integers(0, EOS - 1), max_size=7).map(lambda ids: [*ids, EOS]),
    min_size=1,
    max_size=12,
)
shared_folder = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def join(documents: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(documents))


def write(
    folder: Path,
    documents: list[list[int]],
    name: str = "train_00000",
    dtype=UINT16,
    split: str = "train",
    parts: int = 1,
):
    """Write documents in `parts` calls; returns the entry."""
    with ShardWriter(folder, name, dtype, split) as writer:
        for part in range(parts):
            chosen = documents[
                part * len(documents) // parts : (part + 1) * len(documents) // parts
            ]
            writer.append(
                np.array(join(chosen), dtype=np.int64),
                [len(document) for document in chosen],
                5 * len(chosen),
            )
        return writer.close()


def make_manifest(shards) -> Manifest:
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version="0",
        kind=TEXT,
        dtype="uint16",
        vocab_size=VOCABULARY,
        padded_vocab_size=128,
        mask_id=MASK,
        eos_id=EOS,
        tokenizer_fingerprint="f" * 64,
        options={"validation_fraction": 0.005},
        sources=[{"path": "a.txt", "bytes": 10, "documents": 2}],
        skipped={"empty": 1},
        shards=list(shards),
    )


TRAIN = [[1, 2, 3, EOS], [EOS], [4, EOS], [5, 6, 7, 8, EOS]]
VALIDATION = [[8, EOS], [1, 1, EOS]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound corpus: two training shards and one of validation."""
    entries = [
        write(tmp_path, TRAIN),
        write(tmp_path, VALIDATION, "validation_00000", split="validation"),
        write(tmp_path, TRAIN[::-1], "train_00001"),
    ]
    make_manifest(entries).save(tmp_path)
    return tmp_path


def overwrite(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def flip(path: Path, offset: int) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 1]))


def reseal(folder: Path, name: str) -> None:
    """Give the manifest the checksums and sizes of a shard's present files, as a tool with a defect
    would have written them.
    """
    manifest = Manifest.load(folder)
    new = {}
    for kind in ("bin", "idx"):
        content = (folder / f"{name}.{kind}").read_bytes()
        new |= {f"{kind}_bytes": len(content), f"{kind}_xxh3": xxhash.xxh3_64_hexdigest(content)}
    replace(
        manifest, shards=[replace(e, **new) if e.name == name else e for e in manifest.shards]
    ).save(folder)


# -- one shard -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [UINT16, INT32])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write(tmp_path, TRAIN, "shard.v1", dtype, parts=3)
    dataset = IndexedDataset(str(tmp_path / "shard.v1"))
    assert [document.tolist() for document in dataset] == TRAIN
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert dataset.index.dtype == dtype


@pytest.mark.parametrize("dtype", [UINT16, INT32])
def test_files_are_byte_for_byte_megatrons(tmp_path: Path, dtype):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    for document in TRAIN:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write(tmp_path, TRAIN, "ours", dtype)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (
            tmp_path / f"theirs.{kind}"
        ).read_bytes()


def test_token_dtype_is_megatrons_choice():
    from megatron.core.datasets.indexed_dataset import DType

    for rows in (128, 65499, 65500, 65536, 126464):
        assert token_dtype(rows) == np.dtype(DType.optimal_dtype(rows))


@shared_folder
@given(documents=documents_of_ids, parts=st.integers(1, 4), data=st.data())
def test_tokens_and_document_starts_round_trip(tmp_path: Path, documents, parts, data):
    write(tmp_path, documents, parts=parts)
    shard = ShardReader(tmp_path / "train_00000")
    flat = join(documents)
    assert (shard.num_tokens, shard.num_documents) == (len(flat), len(documents))
    start = data.draw(st.integers(0, len(flat)))
    stop = data.draw(st.integers(start, len(flat)))
    tokens = shard.tokens(start, stop)
    assert tokens.tolist() == flat[start:stop]
    assert tokens.dtype == np.int64
    # Plainly: a document starts wherever the token before is EOS, since only document ends are EOS
    # here.
    expected = [i for i in range(start + 1, stop) if flat[i - 1] == EOS]
    assert shard.document_starts(start, stop).tolist() == expected


def test_tokens_are_a_copy(tmp_path: Path):
    write(tmp_path, TRAIN)
    shard = ShardReader(tmp_path / "train_00000")
    tokens = shard.tokens(0, 4)
    tokens[:] = MASK
    assert shard.tokens(0, 4).tolist() == TRAIN[0]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_tokens_outside_the_shard_are_an_error(tmp_path: Path, start, stop):
    write(tmp_path, TRAIN)
    with pytest.raises(IndexError, match="of 12"):
        ShardReader(tmp_path / "train_00000").tokens(start, stop)


def test_entry_says_what_was_written(tmp_path: Path):
    entry = write(tmp_path, TRAIN, parts=2)
    files = [(tmp_path / f"train_00000.{kind}").read_bytes() for kind in ("bin", "idx")]
    assert (entry.documents, entry.tokens, entry.text_bytes, entry.max_token_id) == (4, 12, 20, EOS)
    assert (entry.bin_bytes, entry.idx_bytes) == tuple(map(len, files))
    assert (entry.bin_xxh3, entry.idx_xxh3) == tuple(map(xxhash.xxh3_64_hexdigest, files))


def test_an_empty_shard(tmp_path: Path):
    with ShardWriter(tmp_path, "none", UINT16, "train") as writer:
        writer.append([], [], 0)
    shard = ShardReader(tmp_path / "none")
    assert (shard.num_tokens, shard.num_documents, shard.document_starts(0, 5).tolist()) == (
        0,
        0,
        [],
    )
    make_manifest([writer.close()]).save(tmp_path)
    assert verify_corpus(tmp_path) == []


def test_nothing_has_its_name_before_close(tmp_path: Path):
    with ShardWriter(tmp_path, "a", UINT16, "train") as writer:
        writer.append([1, EOS], [2], 1)
        assert [path.suffix.partition("-")[0] for path in tmp_path.iterdir()] == [".partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_an_exception_leaves_nothing(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "a", UINT16, "train") as writer:
        writer.append([1, EOS], [2], 1)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_exception_leaves_an_older_shard_alone(tmp_path: Path):
    write(tmp_path, TRAIN)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "train_00000", UINT16, "train"):
        raise KeyboardInterrupt
    assert ShardReader(tmp_path / "train_00000").num_tokens == 12


def test_a_failure_while_the_index_is_put_in_place_leaves_nothing(tmp_path: Path):
    (tmp_path / "a.idx").mkdir()
    writer = ShardWriter(tmp_path, "a", UINT16, "train")
    writer.append([1, EOS], [2], 1)
    with pytest.raises(OSError):
        writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.idx"]


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([1, EOS], [1], "add up"),
        ([1, EOS], [2, 0], ">= 1"),
        ([1, EOS], [3, -1], ">= 1"),
        ([65536, EOS], [2], "do not fit uint16"),
        ([-1, EOS], [2], "do not fit uint16"),
    ],
)
def test_wrong_documents_are_refused(tmp_path: Path, tokens, lengths, message):
    with (
        pytest.raises(ValueError, match=message),
        ShardWriter(tmp_path, "a", UINT16, "train") as writer,
    ):
        writer.append(tokens, lengths, 1)
    assert list(tmp_path.iterdir()) == []


def test_other_dtypes_and_a_closed_writer_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="int64"):
        ShardWriter(tmp_path, "a", np.int64, "train")
    with ShardWriter(tmp_path, "a", UINT16, "train") as writer:
        writer.close()
        with pytest.raises(ValueError, match="closed"):
            writer.append([EOS], [1], 0)


@pytest.mark.parametrize("kind", ["bin", "idx"])
@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "missing"])
def test_a_shard_of_another_size_is_refused_when_opened(tmp_path: Path, kind, change):
    write(tmp_path, TRAIN)
    path = tmp_path / f"train_00000.{kind}"
    if change == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(
            {"shorter": content[:-1], "longer": content + b"\0\0", "empty": b""}[change]
        )
    with pytest.raises(
        UserError,
        match=(
            f"train_00000.{kind}:"
            f" {'missing from' if change == 'missing' else 'truncated or altered'}"
        ),
    ):
        ShardReader(tmp_path / "train_00000")


@pytest.mark.parametrize("offset", [0, 9, 17, 18, 26])
def test_a_wrong_header_is_refused_when_opened(tmp_path: Path, offset):
    write(tmp_path, TRAIN)
    flip(tmp_path / "train_00000.idx", offset)
    with pytest.raises(UserError, match=r"train_00000.idx: truncated or altered"):
        ShardReader(tmp_path / "train_00000")


# -- manifest and corpus ---------------------------------------------------------------------------


def test_manifest_and_shards_come_back(folder: Path):
    corpus = Corpus.open(folder)
    manifest = corpus.manifest
    assert manifest == make_manifest(manifest.shards)
    assert [entry.name for entry in manifest.of("train")] == ["train_00000", "train_00001"]
    assert manifest.totals("train") == (8, 24, 40)
    assert manifest.totals("validation") == (2, 5, 10)
    assert manifest.totals("test") == (0, 0, 0)
    read = [shard.tokens(0, shard.num_tokens).tolist() for shard in corpus.shards("train")]
    assert read == [join(TRAIN), join(TRAIN[::-1])]
    assert (corpus.folder, corpus.tokenizer_folder) == (folder, folder / "tokenizer")
    assert verify_corpus(folder) == []
    assert not list(folder.glob("*.partial"))


def test_fingerprint_follows_content_not_names(folder: Path, tmp_path_factory):
    manifest = Manifest.load(folder)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    same = make_manifest(
        [write(elsewhere, TRAIN, "x", parts=4), write(elsewhere, TRAIN[::-1], "y")]
    )
    assert same.fingerprint("train") == manifest.fingerprint("train")
    others = [
        replace(same, tokenizer_fingerprint="0" * 64),
        replace(same, shards=same.shards[::-1]),
        replace(same, shards=same.shards[:1]),
        # other boundaries, same tokens
        make_manifest([write(elsewhere, [[1, 2, 3, EOS, EOS], *TRAIN[2:]], "z"), same.shards[1]]),
    ]
    prints = [
        manifest.fingerprint("train"),
        manifest.fingerprint("validation"),
        *(other.fingerprint("train") for other in others),
    ]
    assert len(set(prints)) == len(prints)


def test_a_folder_without_manifest_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"not a prepared corpus .*llada data prepare"):
            Corpus.open(path)
        assert len(verify_corpus(path)) == 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text[:-40], "not JSON"),
        (lambda text: "[]", "no checksum"),
        (lambda text: text.replace('"mask_id": 10', '"mask_id": 8'), "checksum does not match"),
        (lambda text: text.replace('"documents": 4', '"documents": 5'), "checksum does not match"),
        (lambda text: text.replace('"a.txt"', '"b.txt"'), "checksum does not match"),
    ],
)
def test_an_edited_manifest_is_refused(folder: Path, edit, message):
    path = folder / "manifest.json"
    edited = edit(path.read_text())
    assert edited != path.read_text()
    path.write_text(edited)
    with pytest.raises(UserError, match=f"manifest.json: truncated or altered.*{message}"):
        Corpus.open(folder)
    assert len(verify_corpus(folder)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(format_version=1), "format_version 1 is not 3"),
        (lambda content: content.pop("rows"), "fields are not those"),
        (lambda content: content["shards"][0].pop("tokens"), "fields of a shard"),
    ],
)
def test_a_sealed_manifest_of_other_fields_is_refused(folder: Path, change, message):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**content, "checksum": hashlib.sha256(canonical).hexdigest()}))
    with pytest.raises(UserError, match=message):
        Manifest.load(folder)


def test_an_unreadable_manifest_is_refused(tmp_path: Path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(UserError, match=r"manifest.json: cannot be read"):
        Manifest.load(tmp_path)


def test_a_failed_save_keeps_the_old_manifest(folder: Path):
    manifest = Manifest.load(folder)
    with pytest.raises(TypeError):
        replace(manifest, options={"path": Path("x")}).save(folder)
    assert Manifest.load(folder) == manifest
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(
    "name", ["train_00001.bin", "train_00001.idx", "validation_00000.bin", "validation_00000.idx"]
)
@pytest.mark.parametrize("change", ["truncated", "missing"])
def test_a_lost_or_truncated_file_is_refused_when_opened(folder: Path, name, change):
    path = folder / name
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(
        UserError,
        match=(
            f"{name}:"
            f" {'missing from the corpus' if change == 'missing' else 'truncated or altered'}"
        ),
    ):
        Corpus.open(folder)
    found = verify_corpus(folder, hashes=False)
    assert len(found) == 1 and name in found[0]


@pytest.mark.parametrize("name", ["train_00000.bin", "train_00000.idx"])
def test_any_flipped_byte_is_found(folder: Path, name):
    """Every byte of the file, one at a time."""
    path = folder / name
    sound = path.read_bytes()
    for offset in range(len(sound)):
        flip(path, offset)
        assert any(name in line and "checksum" in line for line in verify_corpus(folder)), offset
        path.write_bytes(sound)
    assert verify_corpus(folder) == []


def test_a_shard_of_other_counts_than_the_manifest_says_is_refused(folder: Path):
    manifest = Manifest.load(folder)
    for change in ({"documents": 5}, {"tokens": 11}):
        replace(manifest, shards=[replace(manifest.shards[0], **change)]).save(folder)
        with pytest.raises(
            UserError, match=r"train_00000.idx: truncated or altered .*the manifest says"
        ):
            for shard in Corpus.open(folder).shards("train"):
                shard.check()
        assert len(verify_corpus(folder)) == 1
    replace(manifest, dtype="int32").save(folder)
    with pytest.raises(UserError, match="dtype: uint16"):
        for shard in Corpus.open(folder).shards("train"):
            shard.check()


@pytest.mark.parametrize(
    ("offset", "token", "message"),
    [
        (1, MASK, "1 ids are the mask token 10, the first at token 1"),
        (2, VOCABULARY, "1 ids are not in 0..10, the first at token 2"),
        (4, 1, "1 documents do not end with EOS 9, the first is document 1"),
    ],
)
@pytest.mark.parametrize("hashes", [True, False])
def test_wrong_tokens_with_right_checksums_are_found(folder: Path, offset, token, message, hashes):
    overwrite(folder / "train_00000.bin", 2 * offset, int(token).to_bytes(2, "little"))
    reseal(folder, "train_00000")
    assert any(message in line for line in verify_corpus(folder, hashes=hashes))


def test_a_wrong_highest_id_is_found(folder: Path):
    manifest = Manifest.load(folder)
    replace(manifest, shards=[replace(manifest.shards[0], max_token_id=3)]).save(folder)
    assert [
        line.endswith("the highest id is 9, the manifest says 3") for line in verify_corpus(folder)
    ] == [True]


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (34 + 4, "document 1 does not start"),  # a length
        (34 + 4 * 4 + 8, "document 1 does not start"),  # a byte offset
        (34 + 4 * 12, "document 0 does not start"),  # a document index
        (34 + 4 * 12 + 8 * 4, "the last document index is 5, not 4"),
    ],
)
def test_a_wrong_index_with_right_checksums_is_found(folder: Path, offset, message):
    flip(folder / "train_00000.idx", offset)
    reseal(folder, "train_00000")
    assert [message in line for line in verify_corpus(folder)] == [True]


def test_checks_and_index_work_in_pieces(folder: Path, tmp_path_factory, monkeypatch):
    """With pieces of three tokens or documents the files are the same and the same problems are
    found.
    """
    for module in ("shard_writer", "corpus", "verify"):
        monkeypatch.setattr(f"llada.data.{module}.CHUNK", 3)
    again = tmp_path_factory.mktemp("again")
    assert write(again, TRAIN, parts=2) == Manifest.load(folder).shards[0]
    assert verify_corpus(folder) == []
    overwrite(folder / "train_00000.bin", 2 * 8, MASK.to_bytes(2, "little"))
    flip(folder / "train_00001.idx", 34 + 4 * 4 + 8 * 4 + 8 * 3)
    for name in ("train_00000", "train_00001"):
        reseal(folder, name)
    first, second = verify_corpus(folder, hashes=False)[0], verify_corpus(folder, hashes=False)[-1]
    assert "the first at token 8" in first
    assert "document 3 does not start" in second

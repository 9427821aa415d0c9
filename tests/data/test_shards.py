"""One shard against Megatron's own reader and writer, and against plain recomputation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada.data.shard_format import token_dtype
from llada.data.shard_reader import ShardReader
from llada.data.shard_writer import ShardWriter
from llada.data.verify import verify_corpus
from llada.errors import UserError
from tests.data.format_corpus import (
    EOS,
    INT32,
    MASK,
    TRAIN,
    UINT16,
    flip,
    join,
    make_manifest,
    write_shard,
)

documents_of_ids = st.lists(
    st.lists(st.integers(0, EOS - 1), max_size=7).map(lambda ids: [*ids, EOS]),
    min_size=1,
    max_size=12,
)
shared_folder = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("dtype", [UINT16, INT32])
def test_megatron_reads_what_we_write(tmp_path: Path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    write_shard(tmp_path, TRAIN, "shard.v1", dtype, parts=3)
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
    write_shard(tmp_path, TRAIN, "ours", dtype)
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
    write_shard(tmp_path, documents, parts=parts)
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
    write_shard(tmp_path, TRAIN)
    shard = ShardReader(tmp_path / "train_00000")
    tokens = shard.tokens(0, 4)
    tokens[:] = MASK
    assert shard.tokens(0, 4).tolist() == TRAIN[0]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_tokens_outside_the_shard_are_an_error(tmp_path: Path, start, stop):
    write_shard(tmp_path, TRAIN)
    with pytest.raises(IndexError, match="of 12"):
        ShardReader(tmp_path / "train_00000").tokens(start, stop)


def test_entry_says_what_was_written(tmp_path: Path):
    entry = write_shard(tmp_path, TRAIN, parts=2)
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
    write_shard(tmp_path, TRAIN)
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
    write_shard(tmp_path, TRAIN)
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
    write_shard(tmp_path, TRAIN)
    flip(tmp_path / "train_00000.idx", offset)
    with pytest.raises(UserError, match=r"train_00000.idx: truncated or altered"):
        ShardReader(tmp_path / "train_00000")

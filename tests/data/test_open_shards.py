"""Shards that open when they are read: the same tokens and documents, few open files, and damage
met late is named alike.
"""

from __future__ import annotations

import gc
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada.config import build_config
from llada.data import shard_reader
from llada.data.corpus import Corpus
from llada.data.manifest import FORMAT_VERSION, TEXT, TRAIN, Manifest
from llada.data.open_files import OpenFiles
from llada.data.pretrain import PretrainData, WindowReader
from llada.data.shard_reader import ShardReader
from llada.data.shard_writer import ShardWriter
from llada.errors import UserError

EOS, MASK, LENGTH, SHARDS = 90, 91, 8, 40


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of many shards of ten windows and a bit."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    entries = []
    for i in range(SHARDS):
        lengths = rng.integers(1, 15, 14)
        ids = rng.integers(0, EOS, int(lengths.sum()))
        ids[np.cumsum(lengths) - 1] = EOS
        with ShardWriter(folder, f"train-{i:05d}", np.uint16, TRAIN) as writer:
            writer.append(ids, lengths, len(ids))
            entries.append(writer.close())
    fields = {
        "tool_version": "0",
        "vocab_size": 92,
        "padded_vocab_size": 128,
        "mask_id": MASK,
        "eos_id": EOS,
        "tokenizer_fingerprint": "f",
    }
    Manifest(
        FORMAT_VERSION,
        kind=TEXT,
        dtype="uint16",
        options={},
        sources=[],
        skipped={},
        shards=entries,
        **fields,
    ).save(folder)
    return folder


@pytest.fixture
def corpus(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def run_config(corpus: Path, **data: Any) -> Any:
    return build_config(
        {
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": 20, "micro": 4},
            "data": {
                "sequence_length": LENGTH,
                "mixture": [{"path": str(corpus)}],
                "document_mask": True,
                **data,
            },
            "model": {
                "num_layers": 1,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "ffn_hidden_size": 64,
                "vocab_size": 128,
            },
            "schedule": {"stages": [{"shape": "constant", "start": 1e-3}]},
        }
    )


def expected_windows(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and document starts of every window, from the plain files; a document starts after
    each EOS.
    """
    windows = []
    for path in sorted(folder.glob("*.bin")):
        ids = np.fromfile(path, np.uint16).tolist()
        for first in range(0, len(ids) - LENGTH + 1, LENGTH):
            starts = [k for k in range(1, LENGTH) if ids[first + k - 1] == EOS]
            windows.append((ids[first : first + LENGTH], starts))
    return windows


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_any_number_of_open_files_reads_the_same(sound: Path, capacity: int) -> None:
    gc.collect()  # closes the files of readers that earlier tests left in reference cycles
    before = open_files()
    reader = WindowReader(Corpus.open(sound, open_files=OpenFiles(capacity)), TRAIN, LENGTH)
    expected = expected_windows(sound)
    assert reader.num_instances == len(expected)
    for window in np.random.default_rng(1).permutation(reader.num_instances).tolist():
        assert (
            reader.tokens(window).tolist(),
            reader.document_starts(window).tolist(),
        ) == expected[window]
        assert open_files() <= before + min(capacity, 2 * SHARDS)
    assert open_files() == before + min(capacity, 2 * SHARDS)
    del reader
    assert open_files() == before


def test_threads_share_open_files(sound: Path) -> None:
    """With room for one file each read takes it from another thread."""
    reader = WindowReader(Corpus.open(sound, open_files=OpenFiles(1)), TRAIN, LENGTH)
    expected = expected_windows(sound)

    def read(thread: int) -> bool:
        order = np.random.default_rng(thread).permutation(reader.num_instances).tolist()
        return all(
            (reader.tokens(w).tolist(), reader.document_starts(w).tolist()) == expected[w]
            for w in order
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_opening_looks_at_the_manifest_alone_unless_this_rank_verifies(corpus: Path) -> None:
    for path in [*corpus.glob("*.bin"), *corpus.glob("*.idx")]:
        path.unlink()
    data = PretrainData(run_config(corpus))
    assert len(data.mixture.lookup(np.arange(9))[1]) == 9
    with pytest.raises(
        UserError, match=r"data.mixture.0.path: .*train-00000.bin: missing from the corpus"
    ):
        PretrainData(run_config(corpus), verify=True)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-00007.bin", "missing", r"train-00007.bin: missing from the corpus .*; put it back"),
        ("train-00007.idx", "missing", r"train-00007.idx: missing from the corpus .*; put it back"),
        (
            "train-00007.bin",
            "short",
            r"train-00007.bin: truncated or altered \(\d+ bytes, the manifest says \d+\); prepare",
        ),
        (
            "train-00007.idx",
            "short",
            r"train-00007.idx: truncated or altered \(\d+ bytes, 14 documents need \d+\); prepare",
        ),
        ("train-00007.idx", "header", r"train-00007.idx: truncated or altered \(its header"),
        (
            "train-00007.idx",
            "another",
            r"train-00007.idx: truncated or altered \(documents: 1, the manifest says 14\)",
        ),
    ],
)
def test_damage_is_met_when_it_is_read(corpus: Path, name: str, change: str, message: str) -> None:
    reader = WindowReader(Corpus.open(corpus, check_sizes=False), TRAIN, LENGTH)
    path = corpus / name
    content = path.read_bytes()
    path.unlink()
    if change == "short":
        path.write_bytes(content[:-2])
    if change == "header":
        path.write_bytes(b"X" + content[1:])
    if change == "another":
        with ShardWriter(corpus, "other", np.uint16, TRAIN) as writer:
            writer.append([1, EOS], [2], 1)
        (corpus / "other.idx").rename(path)
    bad = range(*reader.first_windows[7:9].tolist())
    read = reader.tokens if path.suffix == ".bin" else reader.document_starts
    for window in range(reader.num_instances):
        if window in bad:
            with pytest.raises(UserError, match=message) as error:
                read(window)
            assert "\n" not in str(error.value)
        else:
            read(window)


def test_a_file_that_shrinks_while_it_is_open_is_named(corpus: Path) -> None:
    reader = WindowReader(Corpus.open(corpus), TRAIN, LENGTH)
    reader.tokens(0)
    os.truncate(corpus / "train-00000.bin", 20)
    with pytest.raises(
        UserError, match=r"train-00000.bin: truncated or altered \(it ends at byte 20\)"
    ):
        reader.tokens(1)


def test_the_order_goes_through_all_shards_at_once(sound: Path) -> None:
    """The first tenth of an epoch touches shards as drawing without replacement does, not one after
    the other.
    """
    data = PretrainData(run_config(sound))
    reader = data.readers[TRAIN][0]
    _, windows = data.mixture.lookup(np.arange(reader.num_instances))
    shards = np.searchsorted(reader.first_windows, windows, side="right") - 1
    counts = np.bincount(shards[: 2 * SHARDS], minlength=SHARDS)
    drawn = np.random.default_rng(0)
    untouched = [
        (np.bincount(drawn.permutation(shards)[: 2 * SHARDS], minlength=SHARDS) == 0).sum()
        for _ in range(2000)
    ]
    assert np.quantile(untouched, 0.0005) <= (counts == 0).sum() <= np.quantile(untouched, 0.9995)
    neighbours = np.corrcoef(shards[:-1], shards[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(len(shards))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 3), st.integers(1, 400)), min_size=1, max_size=120),
    block=st.sampled_from([2, 3, 8, 1024]),
    random=st.randoms(),
)
def test_documents_are_found_in_indices_of_any_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], block: int, random: Any
) -> None:
    """Long documents beside short ones, sorted or not, read in pieces of a few pointers."""
    monkeypatch.setattr(shard_reader, "_POINTERS_PER_READ", block)
    if random.random() < 0.5:
        lengths = sorted(lengths)
    with ShardWriter(tmp_path, "a", np.uint16, TRAIN) as writer:
        writer.append(np.zeros(sum(lengths), dtype=np.int64), lengths, 1)
    shard, starts = ShardReader(tmp_path / "a"), np.cumsum([0, *lengths[:-1]])
    for _ in range(20):
        first, last = sorted(random.randint(0, sum(lengths)) for _ in range(2))
        expected = starts[(starts > first) & (starts < last)]
        assert shard.document_starts(first, last).tolist() == expected.tolist()

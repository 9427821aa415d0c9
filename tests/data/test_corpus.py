"""Manifest and corpus: what is written is read, and every kind of damage is found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from llada.data.corpus import Corpus
from llada.data.manifest import Manifest
from llada.data.verify import verify_corpus
from llada.errors import UserError
from tests.data.format_corpus import (
    EOS,
    MASK,
    TRAIN,
    VOCABULARY,
    flip,
    join,
    make_manifest,
    overwrite,
    reseal,
    write_corpus,
    write_shard,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound corpus."""
    write_corpus(tmp_path)
    return tmp_path


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
        [write_shard(elsewhere, TRAIN, "x", parts=4), write_shard(elsewhere, TRAIN[::-1], "y")]
    )
    assert same.fingerprint("train") == manifest.fingerprint("train")
    joined = write_shard(elsewhere, [[1, 2, 3, EOS, EOS], *TRAIN[2:]], "z")
    others = [
        replace(same, tokenizer_fingerprint="0" * 64),
        replace(same, shards=same.shards[::-1]),
        replace(same, shards=same.shards[:1]),
        # other boundaries, same tokens
        make_manifest([joined, same.shards[1]]),
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
        (lambda content: content.update(dtype="nonsense"), "dtype 'nonsense' is not a token dtype"),
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
    problems = verify_corpus(folder, hashes=False)
    assert len(problems) == 1 and name in problems[0]


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


def test_checks_and_index_work_in_chunks(folder: Path, tmp_path_factory, monkeypatch):
    """With chunks of three tokens or documents, the same files are written and the same problems
    found.
    """
    for name in ("data.shard_writer.CHUNK", "data.verify.CHUNK", "files._CHUNK"):
        monkeypatch.setattr(f"llada.{name}", 3)
    again = tmp_path_factory.mktemp("again")
    assert write_shard(again, TRAIN, parts=2) == Manifest.load(folder).shards[0]
    assert verify_corpus(folder) == []
    overwrite(folder / "train_00000.bin", 2 * 8, MASK.to_bytes(2, "little"))
    flip(folder / "train_00001.idx", 34 + 4 * 4 + 8 * 4 + 8 * 3)
    for name in ("train_00000", "train_00001"):
        reseal(folder, name)
    problems = verify_corpus(folder, hashes=False)
    assert "the first at token 8" in problems[0]
    assert "document 3 does not start" in problems[-1]

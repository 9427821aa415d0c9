"""Merged and split corpora against the documents they were made from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.tools.copying import token_bytes
from data_tools.tools.merge import merge
from data_tools.tools.split import split
from llada.data.corpus import Corpus
from llada.data.manifest import CONVERSATIONS, SPLITS, Manifest
from llada.data.shard_format import REPLY_FIELDS
from llada.data.verify import verify_corpus
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data_tools.commands import expect_refusal, refusal, shown
from tests.data_tools.corpora import documents_of, shard_files, write_corpus
from tests.preparation import prepare, prepare_sft

SMALL = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LENGTHS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_level_bpe(iter(["the masked model größer 🙂 reads the text"] * 3), 290)


def ids_of(lengths: list[list[int]], start: int = 0) -> list[list[list[int]]]:
    """Shards of documents of these lengths (without EOS); every id tells where it stands, all below
    200.
    """
    counter = iter(range(start, 10**6))
    return [[[next(counter) % 200 for _ in range(length)] for length in shard] for shard in lengths]


def flat(shards: list[list[list[int]]], eos: int) -> list[list[int]]:
    return [[*ids, eos] for ids in chain.from_iterable(shards)]


@SMALL
@given(one=LENGTHS, two=LENGTHS, held_out=LENGTHS, limit=st.integers(1, 40))
def test_merge_keeps_every_document_in_order(
    tmp_path_factory, tokenizer, one, two, held_out, limit
):
    folder = tmp_path_factory.mktemp("merge")
    first, second, third = ids_of(one), ids_of(two, 1000), ids_of(held_out, 77)
    write_corpus(folder / "a", tokenizer, first, third)
    write_corpus(folder / "b", tokenizer, second)
    manifest = merge([folder / "a", folder / "b"], folder / "out", shard_tokens=limit)
    assert documents_of(folder / "out", "train") == flat(first, tokenizer.eos_id) + flat(
        second, tokenizer.eos_id
    )
    assert documents_of(folder / "out", "validation") == flat(third, tokenizer.eos_id)
    assert verify_corpus(folder / "out") == []
    for name in SPLITS:
        entries = manifest.of(name)
        documents = iter(documents_of(folder / "out", name))
        for number, entry in enumerate(entries):
            own = [next(documents) for _ in range(entry.documents)]
            assert entry.tokens - len(own[-1]) < limit  # full with its last document, not before
            assert entry.tokens >= limit or number == len(entries) - 1
        assert sum(e.text_bytes for e in entries) == sum(
            Manifest.load(folder / c).totals(name)[2] for c in "ab"
        )


@SMALL
@given(train=LENGTHS, held_out=LENGTHS, data=st.data())
def test_merging_the_parts_gives_the_whole(tmp_path_factory, tokenizer, train, held_out, data):
    folder = tmp_path_factory.mktemp("split")
    whole = write_corpus(folder / "whole", tokenizer, ids_of(train), ids_of(held_out, 50))
    documents = sum(map(len, train))
    parts = data.draw(st.integers(1, min(documents, 5)), label="parts")
    made = split(whole, parts, folder / "parts")
    folders = sorted((folder / "parts").iterdir())
    assert [path.name for path in folders] == [f"part-{i:05d}" for i in range(parts)]
    for name in SPLITS:
        assert list(
            chain.from_iterable(documents_of(path, name) for path in folders)
        ) == documents_of(whole, name)
        assert sum(m.totals(name)[2] for m in made) == Manifest.load(whole).totals(name)[2]
    tokens = [m.totals("train")[1] for m in made]
    longest = max(map(len, documents_of(whole, "train")))
    assert all(m.totals("train")[0] >= 1 for m in made)
    if longest * parts <= sum(tokens):  # no document fills more than a part
        assert max(abs(count - sum(tokens) / parts) for count in tokens) <= longest + parts
    if parts == 1:
        return
    merged = merge(folders, folder / "again", shard_tokens=12)
    for name in SPLITS:
        assert documents_of(folder / "again", name) == documents_of(whole, name)
    old = Manifest.load(whole)
    assert (merged.sources, merged.skipped) == (old.sources, old.skipped)


@pytest.mark.parametrize("lengths", [[[0, 90, 0, 0]], [[90], [0, 0], [0]], [[0, 0, 0], [90]]])
def test_every_part_has_a_document_beside_a_long_one(
    tmp_path: Path, tokenizer, lengths: list[list[int]]
):
    whole = write_corpus(tmp_path / "whole", tokenizer, ids_of(lengths))
    assert [m.totals("train")[0] for m in split(whole, 4, tmp_path / "parts")] == [1, 1, 1, 1]


def test_merging_the_parts_of_a_prepared_corpus_gives_its_files(tmp_path: Path, tokenizer):
    texts = [f"document {i}: " + "größer 🙂 the text " * (i % 9) for i in range(120)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer.save(tmp_path / "tok")
    whole = prepare(
        [tmp_path / "t.jsonl"],
        tmp_path / "tok",
        tmp_path / "whole",
        validation_fraction=0.2,
        shard_tokens=900,
    )
    output = shown("split", tmp_path / "whole", "--parts", 4, "--output", tmp_path / "parts")
    assert output.count("train ") == 4
    folders = sorted((tmp_path / "parts").iterdir())
    for folder in folders:
        manifest = Manifest.load(folder)
        for name in SPLITS:  # bytes of text are exact, not shared
            decoded = [tokenizer.decode(ids[:-1]) for ids in documents_of(folder, name)]
            assert manifest.totals(name)[2] == sum(len(text.encode()) for text in decoded)
    shown("merge", *folders, "--output", tmp_path / "again", "--shard-tokens", 900)
    assert shard_files(tmp_path / "again") == shard_files(tmp_path / "whole")
    merged = Manifest.load(tmp_path / "again")
    assert merged.shards == whole.shards
    assert [entry["path"] for entry in merged.options["merged"]] == [
        str(folder) for folder in folders
    ]
    assert merged.options["validation_fraction"] == 0.2


def test_conversations_keep_their_replies(tmp_path: Path, tokenizer):
    tokenizer.save(tmp_path / "tok")
    for name, n in (("a", 30), ("b", 17)):
        turns = [
            [
                {"role": role, "content": f"{name} {i} {k} " * (1 + i % 4)}
                for k in range(1 + i % 2)
                for role in ("user", "assistant")
            ]
            for i in range(n)
        ]
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
        )
        prepare_sft(
            [tmp_path / f"{name}.jsonl"],
            tmp_path / "tok",
            tmp_path / name,
            validation_fraction=0.3,
            shard_tokens=400,
        )

    def conversations(folder: Path, name: str) -> list[tuple[list[int], list[list[int]]]]:
        """Ids and rows of replies of every document, the rows by a plain search."""
        corpus = Corpus.open(folder)
        documents = []
        for entry in corpus.manifest.of(name):
            shard, rows = corpus.shard(entry), corpus.replies(entry)
            starts = np.concatenate([[0], np.cumsum(shard.lengths[:])])
            for i in range(shard.num_documents):
                documents.append(
                    (
                        shard.tokens(int(starts[i]), int(starts[i + 1])).tolist(),
                        rows[rows[:, 0] == i, 1:].tolist(),
                    )
                )
        return documents

    merged = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "ab", shard_tokens=350)
    assert merged.kind == CONVERSATIONS
    assert verify_corpus(tmp_path / "ab") == []
    parts = split(tmp_path / "ab", 3, tmp_path / "parts")
    for name in SPLITS:
        expected = conversations(tmp_path / "a", name) + conversations(tmp_path / "b", name)
        assert conversations(tmp_path / "ab", name) == expected
        assert (
            list(
                chain.from_iterable(
                    conversations(tmp_path / "parts" / f"part-0000{i}", name) for i in range(3)
                )
            )
            == expected
        )
        for folder, manifest in [
            (tmp_path / "ab", merged),
            *((tmp_path / "parts" / f"part-0000{i}", m) for i, m in enumerate(parts)),
        ]:
            own = conversations(folder, name)
            texts = [
                tokenizer.decode(ids[row[2] : row[3]], skip_special_tokens=True)
                for ids, rows in own
                for row in rows
            ]
            assert manifest.totals(name)[2] == sum(len(text.encode()) for text in texts)
    assert len(REPLY_FIELDS) == 5


def test_bytes_of_text_are_shared_where_tokens_do_not_tell(tmp_path: Path, tokenizer):
    """As with a tokenizer that normalises: the sum of a shard stays, cut by tokens."""
    whole = write_corpus(tmp_path / "whole", tokenizer, ids_of([[3, 5, 4]]))
    manifest = Manifest.load(whole)
    replace(manifest, shards=[replace(entry, text_bytes=1000) for entry in manifest.shards]).save(
        whole
    )
    made = split(whole, 3, tmp_path / "parts")
    assert sum(m.totals("train")[2] for m in made) == 1000
    for part in made:
        assert part.totals("train")[2] == pytest.approx(
            1000 * part.totals("train")[1] / manifest.totals("train")[1], abs=1
        )


def test_bytes_of_tokens(tokenizer):
    text = "größer 🙂 the masked € model\n"
    assert token_bytes(tokenizer)[tokenizer.encode(text)].sum() == len(text.encode())
    assert token_bytes(tokenizer)[[tokenizer.eos_id, tokenizer.mask_id]].sum() == 0


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture()
def pair(tmp_path: Path, tokenizer) -> Path:
    """Corpora `a` and `b`."""
    write_corpus(tmp_path / "a", tokenizer, ids_of([[3, 4], [5]]), ids_of([[2]], 30))
    write_corpus(tmp_path / "b", tokenizer, ids_of([[6, 1]], 90))
    return tmp_path


def test_merge_refuses_what_does_not_belong_together(pair: Path, tokenizer):
    out = pair / "out"
    other = train_byte_level_bpe(iter(["abc abc"] * 3), 270)
    write_corpus(pair / "other", other, ids_of([[3]]))
    mine = Manifest.load(pair / "a")
    expect_refusal(
        lambda: merge([pair / "a", pair / "other"], out),
        mine.tokenizer_fingerprint,
        other.fingerprint,
        "tokenizers",
    )
    write_corpus(pair / "kind", tokenizer, ids_of([[3]]), kind=CONVERSATIONS, shards=[])
    expect_refusal(lambda: merge([pair / "a", pair / "kind"], out), "kinds", "text", CONVERSATIONS)
    expect_refusal(lambda: merge([pair / "a"], out), "two folders")
    expect_refusal(lambda: merge([pair / "a", pair / "nothing"], out), "not a prepared corpus")
    assert not out.exists()


def test_the_same_data_twice_is_refused(pair: Path):
    def twice(*names: str) -> None:
        expect_refusal(
            lambda: merge([pair / name for name in names], pair / "out"),
            "the same data",
            str(pair / names[-1]),
        )

    shutil.copytree(pair / "a", pair / "copy")
    twice("a", "a")
    twice("a", "b", "copy")
    merge([pair / "a", pair / "b"], pair / "ab")
    twice("ab", "b")
    split(pair / "a", 2, pair / "halves")
    split(pair / "a", 3, pair / "thirds")
    twice("b", "a", "halves/part-00001")
    twice("halves/part-00001", "halves/part-00001")
    twice("halves/part-00001", "thirds/part-00000")
    twice("ab", "halves/part-00000")
    split(pair / "ab", 2, pair / "half_of_both")
    twice("half_of_both/part-00000", "ab")
    made = merge(
        [pair / "halves/part-00000", pair / "b", pair / "halves/part-00001"], pair / "again"
    )
    assert made.totals("train")[0] == 5
    twice("again", "a")


@pytest.mark.parametrize(
    "name", ["train-00000.bin", "train-00000.idx", "train-00001.bin", "validation-00000.idx"]
)
def test_a_flipped_bit_is_refused(pair: Path, name: str):
    path = pair / "a" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    before = sorted(pair.iterdir())
    expect_refusal(lambda: merge([pair / "b", pair / "a"], pair / "out"), name)
    expect_refusal(lambda: split(pair / "a", 2, pair / "out"), name)
    assert sorted(pair.iterdir()) == before


def test_ids_past_the_vocabulary_are_refused(pair: Path, tokenizer):
    write_corpus(pair / "bad", tokenizer, [[[5, tokenizer.vocab_size + 3]]])
    expect_refusal(
        lambda: merge([pair / "a", pair / "bad"], pair / "out"), "train-00000.bin", "not in 0.."
    )


def test_more_parts_than_documents_are_refused(pair: Path):
    expect_refusal(lambda: split(pair / "a", 4, pair / "out"), "--parts: 4", "1..3")
    expect_refusal(lambda: split(pair / "a", 0, pair / "out"), "--parts: 0")


def test_outputs_are_replaced_on_request_only(pair: Path):
    for command, words in (
        ("merge", [pair / "a", pair / "b"]),
        ("split", [pair / "a", "--parts", 2]),
    ):
        shown(command, *words, "--output", pair / command)
        assert "exists; --force" in refusal(command, *words, "--output", pair / command)
        shown(command, *words, "--output", pair / command, "--force")
    (pair / "split" / "notes.txt").write_text("mine")
    expect_refusal(lambda: split(pair / "a", 2, pair / "split", force=True), "notes.txt")
    assert (pair / "split" / "notes.txt").exists()

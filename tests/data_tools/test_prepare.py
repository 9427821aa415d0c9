"""Preparation against plain recomputation: token stream, split, shards; and nothing left behind
when it fails.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from data_tools.batches import in_batches
from data_tools.documents import text as module
from data_tools.job import worker
from data_tools.job.finish import summary
from data_tools.job.options import ExecutionOptions
from data_tools.tools.verify import verify_prepared_corpus
from llada.data.corpus import Corpus
from llada.data.manifest import Manifest
from llada.data.verify import verify_corpus
from llada.errors import RunError, UserError
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data_tools.corpora import inspection
from tests.preparation import prepare
from tests.stand_ins import like

WORDS = [
    "masked",
    "diffusion",
    "größer",
    "🙂",
    "the",
    "<|mdm_mask|>",
    "<|endoftext|>",
    "\n",
    "0x1F",
    "model",
]


def documents(n: int) -> list[str]:
    """Texts of 1 to some hundred characters, special tokens spelt out in them."""
    generator = np.random.default_rng(7)
    return [
        f"{i} "
        + " ".join(WORDS[k] for k in generator.integers(0, len(WORDS), generator.integers(0, 40)))
        for i in range(n)
    ]


TEXTS = documents(300)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "made"
    train_byte_level_bpe(iter(TEXTS), 320).save(folder)
    return folder


@pytest.fixture()
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def held_out(text: str, fraction: float) -> bool:
    return xxhash.xxh3_64(text.encode("utf-8")).intdigest() < fraction * 2**64


def stored(folder: Path, split: str) -> list[list[list[int]]]:
    """Shards -> documents -> ids, by the manifest's and the index's numbers."""
    corpus = Corpus.open(folder)
    shards = []
    for entry in corpus.manifest.of(split):
        flat = np.fromfile(folder / f"{entry.name}.bin", corpus.manifest.dtype).tolist()
        ends = np.cumsum(corpus.shard(entry).lengths).tolist()
        assert ends[-1] == len(flat)
        shards.append([flat[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    return shards


@pytest.mark.parametrize("fraction", [0.0, 0.3])
@pytest.mark.parametrize("limit", [40, 500, 2**28])
def test_the_token_stream(
    fraction: float,
    limit: int,
    tokenizer: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(worker, "BATCH_BYTES", 1000)
    manifest = prepare(
        [source], tokenizer, tmp_path / "corpus", validation_fraction=fraction, shard_tokens=limit
    )
    encoder = Tokenizer.load(tokenizer)
    for split in ("train", "validation"):
        texts = [text for text in TEXTS if held_out(text, fraction) == (split == "validation")]
        assert (len(texts) > 50) == (split == "train" or fraction > 0)
        shards: list[list[list[int]]] = [[]]
        for text in texts:
            if sum(map(len, shards[-1])) >= limit:
                shards.append([])
            shards[-1].append([*encoder.encode(text).tolist(), encoder.eos_id])
        assert stored(tmp_path / "corpus", split) == [shard for shard in shards if shard]
        tokens = sum(len(document) for shard in shards for document in shard)
        assert manifest.totals(split) == (
            len(texts),
            tokens,
            sum(len(text.encode()) for text in texts),
        )
        assert [entry.name for entry in manifest.of(split)] == [
            f"{split}-{i:05d}" for i, shard in enumerate(shards) if shard
        ]
    ids = [
        i
        for split in ("train", "validation")
        for shard in stored(tmp_path / "corpus", split)
        for d in shard
        for i in d[:-1]
    ]
    assert not {encoder.mask_id, encoder.eos_id} & set(ids)
    assert verify_corpus(tmp_path / "corpus") == []


def test_the_folder_is_self_contained_and_the_same_again(
    tokenizer: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("one", "two"):
        prepare([source], tokenizer, tmp_path / name, validation_fraction=0.1, shard_tokens=1000)
        monkeypatch.setattr(worker, "BATCH_BYTES", 700)  # how documents are grouped changes nothing
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    manifest = Manifest.load(tmp_path / "one")
    copy = Tokenizer.load(tmp_path / "one" / "tokenizer")
    assert (
        copy.fingerprint == Tokenizer.load(tokenizer).fingerprint == manifest.tokenizer_fingerprint
    )
    assert (manifest.padded_vocab_size, manifest.vocab_size, manifest.mask_id, manifest.eos_id) == (
        384,
        320,
        copy.mask_id,
        copy.eos_id,
    )
    assert manifest.sources == [
        {"path": str(source), "bytes": source.stat().st_size, "documents": 300}
    ]
    assert manifest.options["shard_tokens"] == 1000
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_megatron_reads_it(tokenizer: Path, source: Path, tmp_path: Path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prepare([source], tokenizer, tmp_path / "corpus", validation_fraction=0.0)
    encoder = Tokenizer.load(tokenizer)
    dataset = IndexedDataset(str(tmp_path / "corpus" / "train-00000"))
    assert [dataset[i].tolist() for i in range(len(dataset))] == [
        [*encoder.encode(text), encoder.eos_id] for text in TEXTS
    ]


def test_special_tokens_are_added_to_the_copy(tokenizer: Path, source: Path, tmp_path: Path):
    definition = json.loads((tokenizer / "tokenizer.json").read_text())
    definition["added_tokens"] = []
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps(definition))
    with pytest.raises(UserError, match=r"has no mask token.*--add-special-tokens"):
        prepare([source], plain, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    manifest = prepare([source], plain, tmp_path / "corpus", add_special_tokens=True)
    assert Tokenizer.load(tmp_path / "corpus" / "tokenizer").mask_id == manifest.mask_id == 316
    assert manifest.vocab_size == 320


def test_what_is_left_out_is_counted(tokenizer: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "eins"}\noops\n{"text": 1}\n{"text": ""}\n')
    (folder / "b.xyz").write_text("1")
    manifest = prepare(
        [folder], tokenizer, tmp_path / "corpus", skip_bad=True, validation_fraction=0.0
    )
    assert manifest.skipped == {
        "documents empty": 1,
        "files with another extension": 1,
        "lines not JSON": 1,
        "lines whose field is not a string": 1,
    }
    count = len(Tokenizer.load(tokenizer).encode("eins")) + 1
    assert summary(manifest).splitlines() == [
        (
            f"train: 1 documents, {count} tokens, 4 bytes of text, {4 / count:.2f} bytes per token,"
            " 1 shard"
        ),
        (
            "validation: no documents; training on this corpus has no validation"
            " (--validation-fraction is 0)"
        ),
        "left out: 1 documents empty",
        "left out: 1 files with another extension",
        "left out: 1 lines not JSON",
        "left out: 1 lines whose field is not a string",
    ]


# --- failures leave nothing


class _Interrupted:
    """An encoder that fails at its second batch."""

    def __init__(self, tokenizer: Tokenizer, error: BaseException) -> None:
        self.tokenizer, self.error, self.calls = tokenizer, error, 0

    def encode(self, texts: list[str]):
        self.calls += 1
        if self.calls == 2:
            raise self.error
        return self.tokenizer.encode_batch(texts)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), RunError),
        (UserError("x"), UserError),
        (ValueError("x"), ValueError),
    ],
)
def test_nothing_is_left_behind(
    error: BaseException,
    seen,
    tokenizer: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(worker, "BATCH_BYTES", 1000)
    broken = _Interrupted(Tokenizer.load(tokenizer), error)
    monkeypatch.setattr(module, "open_encoder", lambda *_: broken)
    before = contents(tmp_path)
    with pytest.raises(seen) as caught:
        prepare([source], tokenizer, tmp_path / "a" / "b" / "corpus", shard_tokens=100)
    assert broken.calls == 2
    assert seen is not RunError or "No space left on device" in str(caught.value)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_failed_replacement_keeps_what_was_there(
    tokenizer: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "corpus"
    prepare([source], tokenizer, output)
    before = contents(output)
    (tmp_path / "bad.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match=r"bad.jsonl:1: not JSON"):
        prepare([source, tmp_path / "bad.jsonl"], tokenizer, output, force=True)
    assert contents(output) == before

    def no_second_rename(old: Path, new: Path) -> None:
        if Path(new) == output and str(old).endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        os.rename(old, new)

    monkeypatch.setattr("llada.outputs.os", like(os, rename=no_second_rename))
    with pytest.raises(
        RunError, match=r"Input/output error.*everything is written and kept in .*corpus.partial"
    ):
        prepare([source], tokenizer, output, force=True, validation_fraction=0.5)
    assert contents(output) == before
    monkeypatch.undo()
    # only the name was missing
    prepare([source], tokenizer, output, force=True, validation_fraction=0.5)
    assert Manifest.load(output).options["validation_fraction"] == 0.5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad.jsonl",
        "corpus",
        "texts.jsonl",
    ]


def test_force(tokenizer: Path, source: Path, tmp_path: Path):
    output = tmp_path / "corpus"
    prepare([source], tokenizer, output, shard_tokens=1000)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    prepare([source], tokenizer, output, shard_tokens=1000)  # the same again: it is there already
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before
    other = (
        r"--output: '.*corpus' exists, a corpus prepared with other settings \(shard_tokens 1000,"
        r" now 268435456\); --force replaces"
    )
    with pytest.raises(UserError, match=other):
        prepare([source], tokenizer, output)
    prepare([source], tokenizer, output, force=True)
    assert not (output / "train-00001.bin").exists()
    assert verify_prepared_corpus(output) == []

    (output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not a prepared corpus \(it contains 'notes.txt'\)"):
        prepare([source], tokenizer, output, force=True)
    assert (output / "notes.txt").read_text() == "mine"

    empty, other, file = tmp_path / "empty", tmp_path / "other", tmp_path / "file"
    empty.mkdir()
    (other / "tokenizer").mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="exists; --force"):
        prepare([source], tokenizer, empty)
    prepare([source], tokenizer, empty, force=True)
    assert verify_prepared_corpus(empty) == []
    with pytest.raises(UserError, match=r"not a prepared corpus \(it has no manifest.json\)"):
        prepare([source], tokenizer, other, force=True)
    with pytest.raises(UserError, match="is not a folder"):
        prepare([source], tokenizer, file, force=True)
    with pytest.raises(UserError, match="cannot be created"):
        prepare([source], tokenizer, file / "below")
    assert file.read_text() == "mine"


def test_force_through_a_link_replaces_its_target(tokenizer: Path, source: Path, tmp_path: Path):
    prepare([source], tokenizer, tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1", target_is_directory=True)
    prepare([source], tokenizer, tmp_path / "latest", force=True, validation_fraction=0.5)
    assert (tmp_path / "latest").is_symlink()
    assert Manifest.load(tmp_path / "v1").options["validation_fraction"] == 0.5


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_fractions_that_are_refused(fraction: float, tokenizer: Path, source: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"--validation-fraction: .* is not in \[0, 1\)"):
        prepare([source], tokenizer, tmp_path / "corpus", validation_fraction=fraction)
    assert not (tmp_path / "corpus").exists()


def test_shard_tokens_must_be_positive(tokenizer: Path, source: Path, tmp_path: Path):
    with pytest.raises(UserError, match="--shard-tokens: 0 is less than 1"):
        prepare([source], tokenizer, tmp_path / "corpus", shard_tokens=0)


@pytest.mark.parametrize("wrong", ["mask", "past", "negative"])
def test_ids_that_no_text_may_have(
    wrong: str, tokenizer: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = Tokenizer.load(tokenizer)
    bad_id = {"mask": honest.mask_id, "past": honest.vocab_size, "negative": -1}[wrong]
    encode = Tokenizer.encode_batch

    def spoilt(self: Tokenizer, texts: list[str], one_thread: bool = False):
        flat, lengths = encode(self, texts, one_thread)
        # not in what is tried when a tokenizer is loaded
        flat[5 if len(texts) > 3 else slice(0)] = bad_id
        return flat, lengths

    monkeypatch.setattr(Tokenizer, "encode_batch", spoilt)
    with pytest.raises(
        UserError,
        match=(
            rf"gave id {bad_id} for text; allowed are 0..319 without the mask token"
            rf" {honest.mask_id}"
        ),
    ):
        prepare(
            [source], tokenizer, tmp_path / "corpus", execution=ExecutionOptions(backend="library")
        )
    assert not (tmp_path / "corpus").exists()


# --- looking at a corpus, training a tokenizer


def test_describe(tokenizer: Path, source: Path, tmp_path: Path):
    manifest = prepare(
        [source], tokenizer, tmp_path / "corpus", validation_fraction=0.2, shard_tokens=2000
    )
    shown = inspection(tmp_path / "corpus", samples=10**6).splitlines()  # all of them
    assert all(line in shown for line in summary(manifest).splitlines())
    train = [text for text in TEXTS if not held_out(text, 0.2)]
    encoder = Tokenizer.load(tokenizer)
    lengths = [len(encoder.encode(text)) + 1 for text in train]
    first = shown.index("train: documents by length in tokens, EOS counted") + 1
    rows = [
        line.replace(",", "").split()
        for line in shown[first : shown.index("", first)]
        if " to " in line[:30]
    ]
    assert [int(row[2]) for row in rows] == [2 * int(row[0]) - 1 for row in rows]
    assert [int(row[3]) for row in rows] == [
        sum(int(row[0]) <= length <= int(row[2]) for length in lengths) for row in rows
    ]
    assert sum(int(row[3]) for row in rows) == len(train)
    starts = [encoder.decode([*encoder.encode(text), encoder.eos_id][:40]) for text in train]
    assert [line for line in shown if line.startswith("train document ")] == [
        f"train document {i}: {s!r}" for i, s in enumerate(starts)
    ]
    few = [
        line
        for line in inspection(tmp_path / "corpus", samples=2).splitlines()
        if line.startswith("train document ")
    ]
    assert few == [f"train document {i}: {starts[i]!r}" for i in (0, len(train) - 1)]
    assert not [
        line
        for line in inspection(tmp_path / "corpus", samples=0).splitlines()
        if " document " in line
    ]


def test_check_finds_damage_and_another_tokenizer(tokenizer: Path, source: Path, tmp_path: Path):
    corpus = tmp_path / "corpus"
    assert "not a prepared corpus" in verify_prepared_corpus(corpus)[0]
    prepare([source], tokenizer, corpus)
    assert verify_prepared_corpus(corpus) == []
    train_byte_level_bpe(iter(["another text"] * 9), 300).save(corpus / "tokenizer")
    assert ["its fingerprint differs" in line for line in verify_prepared_corpus(corpus)] == [True]
    (corpus / "tokenizer" / "tokenizer.json").unlink()
    assert "no tokenizer in this folder" in verify_prepared_corpus(corpus)[0]
    path = corpus / "train-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    assert any(
        "train-00000.bin" in line and "checksum" in line for line in verify_prepared_corpus(corpus)
    )


def test_progress_goes_to_its_stream(
    capsys: pytest.CaptureFixture[str], tokenizer: Path, source: Path, tmp_path: Path
):
    prepare([source], tokenizer, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    manifest = prepare(
        [source], tokenizer, tmp_path / "corpus", execution=ExecutionOptions(stream=shown)
    )
    assert capsys.readouterr() == ("", "")
    line = " ".join(shown.getvalue().split())
    assert f"{sum(entry.tokens for entry in manifest.shards):,} tokens" in line
    assert "MB/s" in line and "tokens/s" in line


def test_memory_does_not_grow_with_the_number_of_batches():
    alive = 0

    def texts() -> Iterator[str]:
        nonlocal alive
        for _ in range(1000):
            alive += 1
            yield "x" * 100

    sizes = []
    for batch in in_batches(texts(), len, 500):
        sizes.append(len(batch))
        assert alive == sum(sizes)  # nothing is read ahead of what is written
    assert sizes == [5] * 200


# -- against the libraries alone -------------------------------------------------------------------


def test_ids_are_those_of_the_tokenizers_library(tokenizer: Path, source: Path, tmp_path: Path):
    from tokenizers import Tokenizer as Fast

    prepare([source], tokenizer, tmp_path / "corpus", validation_fraction=0.0)
    fast = Fast.from_file(str(tokenizer / "tokenizer.json"))
    fast.encode_special_tokens = True
    eos = fast.token_to_id("<|endoftext|>")
    assert stored(tmp_path / "corpus", "train") == [
        [[*fast.encode(text, add_special_tokens=False).ids, eos] for text in TEXTS]
    ]


def test_ids_are_those_of_sentencepiece(source: Path, tmp_path: Path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    written = io.BytesIO()
    options = {
        "vocab_size": 330,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=written, **options)
    model = tmp_path / "some.model"
    model.write_bytes(written.getvalue())
    with pytest.raises(
        UserError, match=r"some.model: the tokenizer has no mask token .*--add-special-tokens"
    ):
        prepare([source], model, tmp_path / "corpus")
    manifest = prepare(
        [source], model, tmp_path / "corpus", add_special_tokens=True, validation_fraction=0.0
    )
    theirs = SentencePieceProcessor(model_file=str(model))
    assert stored(tmp_path / "corpus", "train") == [
        [[*theirs.encode(text), theirs.eos_id()] for text in TEXTS]
    ]
    assert manifest.mask_id >= theirs.get_piece_size()
    assert verify_prepared_corpus(tmp_path / "corpus") == []


@pytest.mark.parametrize(("words", "dtype"), [(65401, "uint16"), (65402, "int32")])
def test_ids_take_four_bytes_from_65500_rows(words: int, dtype: str, tmp_path: Path):
    """65,401 words, the unknown word and 6 special tokens are 511 x 128 rows; one word more makes
    it 512 x 128 = 65,536.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    fast = Fast(
        models.WordLevel(
            {word: i for i, word in enumerate(["[UNK]", *(f"w{i}" for i in range(words))])},
            unk_token="[UNK]",
        )
    )
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text(f"w0 w1 w{words - 1}")
    corpus = tmp_path / "corpus"
    manifest = prepare(
        [tmp_path / "a.txt"],
        tmp_path / "words.json",
        corpus,
        add_special_tokens=True,
        validation_fraction=0.0,
    )
    assert (manifest.dtype, manifest.padded_vocab_size) == (
        dtype,
        65408 if dtype == "uint16" else 65536,
    )
    assert stored(corpus, "train") == [[[1, 2, words, manifest.eos_id]]]
    assert verify_prepared_corpus(corpus) == []

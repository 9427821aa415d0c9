"""Statistics against plain counting; verification names the file that was damaged."""

from __future__ import annotations

import json
import math
import statistics as plain
from pathlib import Path

import numpy as np
import pytest

from data_tools.tools.corpus_statistics import corpus_statistics, sampled_lengths
from data_tools.tools.statistics_report import format_statistics
from data_tools.tools.verify import verify_prepared_corpus
from llada.data.corpus import Corpus
from llada.data.verify import verify_corpus
from llada.errors import UserError
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data_tools.commands import refusal, shown
from tests.data_tools.corpora import documents_of, inspection, write_corpus
from tests.preparation import prepare_sft


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_level_bpe(iter(["some text"] * 3), 270)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Two training shards and one of validation, lengths from 1 to some thousand."""
    generator = np.random.default_rng(2)
    lengths = [[int(2 ** generator.uniform(0, 11)) - 1 for _ in range(n)] for n in (90, 41, 20)]
    shards = [
        [generator.integers(65, 90, length).tolist() for length in shard] for shard in lengths
    ]
    return write_corpus(
        tmp_path_factory.mktemp("inspect") / "corpus", tokenizer, shards[:2], shards[2:]
    )


def test_statistics_are_those_of_plain_counting(corpus: Path, tokenizer: Tokenizer):
    printed = json.loads(
        shown("inspect", corpus, "--json", "--samples", 5, "--sequence-length", 100)
    )
    assert printed["tokenizer"]["eos_id"] == tokenizer.eos_id
    assert printed["skipped"] == {"empty documents": 2}
    for split in ("train", "validation"):
        documents = documents_of(corpus, split)
        numbers = printed["splits"][split]
        lengths = sorted(map(len, documents))
        assert (numbers["documents"], numbers["tokens"]) == (len(lengths), sum(lengths))
        text_bytes = sum(len(tokenizer.decode(ids[:-1]).encode()) for ids in documents)
        assert numbers["bytes_per_token"] == pytest.approx(text_bytes / sum(lengths))
        own = numbers["lengths"]
        assert own["documents_read"] == len(lengths)
        assert own["mean"] == pytest.approx(plain.mean(lengths))
        assert own["median"] == plain.median_low(lengths)
        assert own["p90"] == lengths[math.ceil(0.9 * len(lengths)) - 1]
        assert own["p99"] == lengths[math.ceil(0.99 * len(lengths)) - 1]
        assert own["max"] == lengths[-1]
        for bar in own["histogram"]:
            assert bar["documents"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
        assert sum(bar["documents"] for bar in own["histogram"]) == len(lengths)
        sizes = [shard.num_tokens for shard in Corpus.open(corpus).shards(split)]
        assert numbers["windows"]["windows"] == sum(size // 100 for size in sizes)
        assert numbers["windows"]["tail_tokens"] == sum(size % 100 for size in sizes)
        assert [s["start"] for s in numbers["samples"]] == [
            tokenizer.decode(documents[s["document"]][:40]) for s in numbers["samples"]
        ]
        assert len(numbers["samples"]) == 5


def test_text_shows_the_same(corpus: Path):
    text = shown("inspect", corpus, "--samples", 1, "--sequence-length", 100)
    assert text == inspection(corpus, 1, 100) + "\n"
    numbers = json.loads(shown("inspect", corpus, "--json", "--sequence-length", 100))["splits"][
        "train"
    ]
    lengths, windows = numbers["lengths"], numbers["windows"]
    assert (
        f"median {lengths['median']:,}, 90 % up to {lengths['p90']:,}, 99 % up to"
        f" {lengths['p99']:,}, longest {lengths['max']:,}" in text
    )
    assert (
        f"{windows['windows']:,} windows of 100 tokens; {windows['tail_tokens']:,} tokens (" in text
    )
    assert "windows of" not in shown("inspect", corpus)
    assert "train document 0: '" in text
    assert "--sequence-length: 0" in refusal("inspect", corpus, "--sequence-length", 0)


def test_large_corpora_are_sampled_and_say_so(tmp_path: Path, tokenizer: Tokenizer):
    """Lengths grow along the corpus: a sample that leaves a part out would show it."""
    lengths = [1 + i // 300 for i in range(30_000)]
    shards = [
        [[65] * (length - 1) for length in part]
        for part in (lengths[:7000], lengths[7000:7003], lengths[7003:])
    ]
    folder = write_corpus(tmp_path / "c", tokenizer, shards)
    opened = Corpus.open(folder)
    assert sampled_lengths(opened.shards("train"), 30_000).tolist() == lengths
    everything = corpus_statistics(opened, samples=0, max_exact=8192)
    sampled = everything["splits"]["train"]["lengths"]
    assert 0.8 * 8192 <= sampled["documents_read"] <= 8192
    assert (
        f"EOS counted, of {sampled['documents_read']:,} of the 30,000 documents"
        in format_statistics(everything, opened)
    )
    assert sampled["mean"] == pytest.approx(plain.mean(lengths))
    stretch = 30_000 / 8 / 300  # of which one block is read, in units of length
    assert sampled["median"] == pytest.approx(50, abs=stretch / 2)
    assert sampled["p90"] == pytest.approx(90, abs=stretch / 2)


def test_the_picture_is_one(corpus: Path, tmp_path: Path):
    from PIL import Image

    shown("inspect", corpus, "--png", tmp_path / "lengths.png")
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.format == "PNG"
        assert len(set(picture.convert("L").resize((40, 40)).tobytes())) > 5  # not blank
    assert "does not end with .png" in refusal("inspect", corpus, "--png", tmp_path / "lengths.svg")
    assert "--png: " in refusal(
        "inspect", corpus, "--png", tmp_path / "lengths.png" / "lengths.png"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["lengths.png"]


# -- verify ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_a_flipped_bit_in_any_file_is_named(tmp_path: Path, tokenizer: Tokenizer, workers: int):
    tokenizer.save(tmp_path / "tok")
    records = [{"prompt": f"question {i}", "response": "yes " * (i % 7 + 1)} for i in range(40)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    folder = tmp_path / "corpus"
    prepare_sft(
        [tmp_path / "c.jsonl"], tmp_path / "tok", folder, validation_fraction=0.3, shard_tokens=500
    )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".bin", ".idx", ".replies")
    )
    assert {path.suffix for path in files} == {".bin", ".idx", ".replies"}
    assert len(files) >= 9
    assert verify_prepared_corpus(folder, workers) == []
    for path in [*files, folder / "manifest.json", folder / "tokenizer" / "tokenizer.json"]:
        name = str(path.parent if path.name == "tokenizer.json" else path)
        sound = path.read_bytes()
        last = len(sound) - 2  # the newline after JSON is not part of it
        for offset in (0, last // 2, last):
            changed = bytearray(sound)
            changed[offset] ^= 4
            path.write_bytes(changed)
            problems = verify_prepared_corpus(folder, workers)
            assert problems
            assert all(name in line for line in problems), (path, offset, problems)
        path.unlink()
        problems = verify_prepared_corpus(folder, workers)
        assert problems
        assert all(
            str(path.parent if path.suffix == ".json" else path) in line for line in problems
        )
        path.write_bytes(sound)
    assert verify_prepared_corpus(folder, workers) == []


def test_verify_on_the_command_line(corpus: Path):
    assert shown("verify", corpus, "--workers", 2).startswith("ok: 3 shards, 151 documents, ")
    assert "--workers: 0 is less than 1" in refusal("verify", corpus, "--workers", 0)
    assert "not a prepared corpus" in refusal("verify", corpus / "tokenizer")


def test_every_shard_is_reported_when_done(corpus: Path):
    seen: list[str] = []
    assert verify_corpus(corpus, workers=2, progress=lambda entry: seen.append(entry.name)) == []
    assert sorted(seen) == ["train-00000", "train-00001", "validation-00000"]


def test_a_bar_goes_to_stderr(capsys: pytest.CaptureFixture[str]):
    from data_tools.job.progress import progress_bar

    with progress_bar(True, "verifying", 10) as done:
        done(4)
        done(6)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "verifying" in captured.err
    assert "100%" in captured.err
    with progress_bar(False, "verifying", 10) as done:
        done(10)
    assert capsys.readouterr().err == ""


def test_unsound_folders_are_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="not a prepared corpus"):
        inspection(tmp_path)

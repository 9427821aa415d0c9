"""`llada data ...` as users type it. A user's mistake arrives as UserError, which the top level
prints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llada.data.manifest import Manifest
from llada.errors import UserError
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data_tools.commands import llada_data, refusal, shown


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.txt, b.txt, c.jsonl, a tokenizer `tok` and a corpus `corpus` of all three."""
    folder = tmp_path_factory.mktemp("root")
    for name in "ab":
        (folder / f"{name}.txt").write_text(
            f"{name}: the quick brown fox jumps over the lazy dog\n" * 20
        )
    (folder / "c.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(50))
    )
    inputs = [folder / name for name in ("a.txt", "b.txt", "c.jsonl")]
    shown("tokenizer", "train", "--input", *inputs, "--vocab-size", 300, "--output", folder / "tok")
    shown(
        "prepare",
        "--input",
        *inputs,
        "--tokenizer",
        folder / "tok",
        "--output",
        folder / "corpus",
        "--validation-fraction",
        0.2,
    )
    return folder


def test_inputs_in_every_form(root: Path, tmp_path: Path):
    a, b, c = (root / name for name in ("a.txt", "b.txt", "c.jsonl"))
    for i, words in enumerate(
        (
            [f"--input={a}", b, c],
            ["--input", a, "--input", b, "--input", c],
            ["--input", a, b, "--input", c],
        )
    ):
        shown("prepare", *words, "--tokenizer", root / "tok", "--output", tmp_path / str(i))
        sources = Manifest.load(tmp_path / str(i)).sources
        assert sorted((source["path"], source["documents"]) for source in sources) == [
            (str(a), 1),
            (str(b), 1),
            (str(c), 50),
        ]


def test_prepare_prints_what_it_made(root: Path, tmp_path: Path):
    output = tmp_path / "corpus"
    text = shown(
        "prepare",
        "--input",
        root / "c.jsonl",
        "--tokenizer",
        root / "tok",
        "--output",
        output,
        "--validation-fraction",
        0,
    )
    assert "train: 50 documents, " in text
    assert "validation: no documents; training on this corpus has no validation" in text
    assert text.endswith(f"\n{output}\n")


def test_every_option_arrives(root: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"body": "one two"}\n{"body": "three"}\noops\n')
    (folder / "b.xyz").write_text("1,2,3")
    (folder / "c.txt").write_text("not read")
    words = [
        "prepare",
        "--input",
        folder,
        "--tokenizer",
        root / "tok",
        "--output",
        tmp_path / "out",
        "--text-field",
        "body",
        "--ext",
        "xyz",
    ]
    words += ["--shard-tokens", 2, "--validation-fraction", 0.25, "--add-special-tokens"]
    assert f"{folder}/a.jsonl:3: not JSON" in refusal(*words)
    assert not (tmp_path / "out").exists()
    assert "left out: 1 lines not JSON" in shown(*words, "--skip-bad")
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.options == {
        "unit_bytes": None,
        "dedup": False,
        "decontaminate": None,
        "min_length": 1,
        "max_length": 64 << 20,
        "dataset": {"split": "train", "name": None, "revision": None, "streaming": False},
        "validation_fraction": 0.25,
        "add_special_tokens": True,
        "text_field": "body",
        "extensions": [".xyz"],
        "skip_bad": True,
        "shard_tokens": 2,
    }
    assert len(manifest.shards) == sum(entry.documents for entry in manifest.shards) == 3
    assert "exists" in refusal(*words, "--skip-bad", "--dedup")
    shown(*words, "--skip-bad", "--force")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--input", "nothing"], "--input: no file or folder 'nothing'"),
        (["--validation-fraction", "1"], "--validation-fraction: 1.0 is not in [0, 1)"),
        (["--tokenizer", "nothing"], "nothing: no such tokenizer"),
        (["--ext", "."], "--ext: '.' names no extension"),
        (["--text-field", "body"], "field 'body' is missing, there are: text"),
        (["--input", ""], "--input: '' is not a valid file or folder name"),
        (["--output", ""], "--output: '' is not a valid file or folder name"),
        (["--output", "/"], "--output: '/' is not a valid file or folder name"),
        (["--output", "x" * 250], "cannot be created (File name too long)"),
        (
            ["--input", "data_tools", "--output", "data_tools/corpus"],
            "--output: 'data_tools/corpus' lies inside data_tools, which is only read",
        ),
        (
            ["--max-length", str(10**30)],
            "is more than 1,099,511,627,776 bytes, and a document has to fit into memory",
        ),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(Path(__file__).parents[2])
    given = [
        "--input",
        root / "c.jsonl",
        "--tokenizer",
        root / "tok",
        "--output",
        tmp_path / "out",
    ]
    assert message in refusal("prepare", *given, *words)
    assert not list(tmp_path.iterdir())


def test_missing_options_are_usage_errors(root: Path, tmp_path: Path):
    assert (
        llada_data("prepare", "--input", root / "a.txt", "--output", tmp_path / "x").exit_code == 2
    )
    assert (
        llada_data("prepare", "--tokenizer", root / "tok", "--output", tmp_path / "x").exit_code
        == 2
    )
    assert (
        llada_data(
            "tokenizer", "train", "--input", root / "a.txt", "--output", tmp_path / "x"
        ).exit_code
        == 2
    )


def test_inspect(root: Path):
    text = shown("inspect", root / "corpus", "--samples", 1)
    assert "train: documents by length in tokens" in text
    assert "train document 0: " in text
    assert "not a prepared corpus" in refusal("inspect", root / "tok")


def test_verify(root: Path, tmp_path: Path):
    manifest = Manifest.load(root / "corpus")
    tokens = sum(entry.tokens for entry in manifest.shards)
    assert shown("verify", root / "corpus") == f"ok: 2 shards, 52 documents, {tokens:,} tokens\n"
    assert "not a prepared corpus" in refusal("verify", tmp_path)

    damaged = tmp_path / "corpus"
    shown(
        "prepare",
        "--input",
        root / "c.jsonl",
        "--tokenizer",
        root / "tok",
        "--output",
        damaged,
        "--validation-fraction",
        0.3,
    )
    for name in ("train-00000.bin", "validation-00000.idx"):
        path = damaged / name
        path.write_bytes(path.read_bytes()[:-1])
    result = llada_data("verify", damaged)
    assert isinstance(result.exception, UserError)
    lines = result.output.splitlines()
    assert len(lines) == 2
    assert "train-00000.bin" in lines[0]
    assert "validation-00000.idx" in lines[1]
    assert str(result.exception) == f"{damaged}: 2 problems, the first: {lines[0]}"
    shown(
        "prepare",
        "--input",
        root / "c.jsonl",
        "--tokenizer",
        root / "tok",
        "--output",
        damaged,
        "--force",
    )
    (damaged / "train-00000.bin").unlink()
    result = llada_data("verify", damaged)
    assert "train-00000.bin" in str(result.exception)
    assert result.output == ""  # a single problem is said once


def test_a_tokenizer_that_was_replaced(root: Path, tmp_path: Path):
    """By another valid one of the same size: every command that reads token ids with it refuses."""
    shown(
        "prepare",
        "--input",
        root / "c.jsonl",
        "--tokenizer",
        root / "tok",
        "--output",
        tmp_path / "corpus",
    )
    shutil.rmtree(tmp_path / "corpus" / "tokenizer")
    train_byte_level_bpe(iter(["sphinx of black quartz judge my vow"] * 9), 300).save(
        tmp_path / "corpus" / "tokenizer"
    )
    message = f"{tmp_path / 'corpus' / 'tokenizer'}: not the tokenizer of this corpus"
    for words in (
        ["verify", tmp_path / "corpus"],
        ["inspect", tmp_path / "corpus"],
        ["merge", root / "corpus", tmp_path / "corpus", "--output", tmp_path / "out"],
        ["split", tmp_path / "corpus", "--parts", 2, "--output", tmp_path / "out"],
        ["export", tmp_path / "corpus", "--output", tmp_path / "out.jsonl"],
    ):
        assert message in refusal(*words)
    assert os.listdir(tmp_path) == ["corpus"]


def test_outputs_inside_a_corpus(root: Path, tmp_path: Path):
    inside = root / "corpus" / "new"
    for words in (
        ["split", root / "corpus", "--parts", 2],
        ["export", root / "corpus"],
        ["merge", root / "corpus", tmp_path / "other"],
    ):
        if words[0] == "merge":
            shown(
                "prepare",
                "--input",
                root / "b.txt",
                "--tokenizer",
                root / "tok",
                "--output",
                tmp_path / "other",
            )
        output = inside.with_suffix(".jsonl") if words[0] == "export" else inside
        assert f"--output: '{output}' lies inside {root / 'corpus'}, which is only read" in refusal(
            *words, "--output", output
        )


@pytest.mark.parametrize(
    "name", ["manifest.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
)
def test_files_that_are_nested_too_deep(name: str, root: Path, tmp_path: Path):
    shutil.copytree(root / "corpus", tmp_path / "corpus")
    (tmp_path / "corpus" / name).write_text('{"a":' * 3000 + "1" + "}" * 3000)
    assert "not JSON" in refusal("verify", tmp_path / "corpus")


def test_tokenizer_train(root: Path, tmp_path: Path):
    words = [
        "tokenizer",
        "train",
        "--input",
        root / "a.txt",
        root / "b.txt",
        "--vocab-size",
        270,
        "--output",
        tmp_path / "t",
    ]
    lines = shown(*words).splitlines()
    made = Tokenizer.load(tmp_path / "t")
    assert (
        lines[0] == f"{tmp_path / 't'}: 270 ids, 384 rows, mask {made.mask_id}, EOS {made.eos_id}"
    )
    texts = [(root / name).read_text() for name in ("a.txt", "b.txt")]
    ratio = sum(map(len, texts)) / sum(len(made.encode(text)) for text in texts)
    size = sum(map(len, texts))
    assert lines[1] == f"trained on {size:,} of {size:,} bytes of text"
    assert lines[2].startswith(f"{ratio:.2f} bytes per token, {1 / ratio:.3f} tokens per byte, ")
    assert "exists; --force replaces a tokenizer" in refusal(*words)
    shown(*words, "--force")
    sampled = [
        *words[:-4],
        "--vocab-size",
        295,
        "--kind",
        "bpe",
        "--sample-bytes",
        1500,
        "--output",
        tmp_path / "piece",
    ]
    assert f"trained on {size // 2:,} of {size:,} bytes of text" in shown(*sampled)
    assert (tmp_path / "piece" / "tokenizer.model").is_file()
    assert "'unigrm' is not one of byte-bpe, unigram, bpe (did you mean 'unigram'?)" in refusal(
        *words, "--force", "--kind", "unigrm"
    )
    assert "--sample-bytes: 0 is less than 1" in refusal(*words, "--force", "--sample-bytes", 0)
    assert "--vocab-size: 1000000000000 exceeds the maximum of 10,000,000" in refusal(
        *words, "--force", "--vocab-size", 10**12
    )
    many = shown(
        "tokenizer",
        "train",
        "--input",
        root / "c.jsonl",
        "--vocab-size",
        5000,
        "--output",
        tmp_path / "many",
    )
    assert "(requested 5,000; the text has too few distinct pairs)" in many


def test_tokenizer_info(root: Path, tmp_path: Path):
    made = Tokenizer.load(root / "tok")
    lines = shown("tokenizer", "info", root / "tok").splitlines()
    assert lines[:-1] == [
        f"{root / 'tok'}: {made.vocab_size} ids, 384 rows, fingerprint {made.fingerprint}",
        "kind: tokenizer.json, byte-level BPE",
        f" bos: {made.bos_id} <|startoftext|>",
        f" eos: {made.eos_id} <|endoftext|>",
        f" pad: {made.pad_id} <|endoftext|>",
        f"mask: {made.mask_id} <|mdm_mask|>",
        "further special tokens: "
        + ", ".join(
            f"{made.id_of(name)} {name}"
            for name in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        ),
    ]
    assert lines[-1].startswith("encoder: ")
    measured = shown(
        "tokenizer", "info", root / "tok", "--input", root / "c.jsonl", "--input", root / "a.txt"
    ).splitlines()
    texts = [f"line {i}" for i in range(50)] + [(root / "a.txt").read_text()]
    size, tokens, words = (
        sum(map(f, texts))
        for f in (len, lambda text: len(made.encode(text)), lambda text: len(text.split()))
    )
    assert measured[:-1] == lines
    fit = (
        f"{size / tokens:.2f} bytes per token, {tokens / size:.3f} tokens per byte,"
        f" {tokens / words:.2f} tokens per word"
    )
    assert measured[-1] == f"{fit} on {size:,} bytes, a sample of the input"
    assert "no file or folder" in refusal("tokenizer", "info", root / "tok", "--input", "nothing")
    definition = json.loads((root / "tok" / "tokenizer.json").read_text())
    definition["added_tokens"] = []
    (tmp_path / "plain.json").write_text(json.dumps(definition))
    text = shown("tokenizer", "info", tmp_path / "plain.json")
    assert "mask: none" in text
    assert "--add-special-tokens" in text
    assert "no such tokenizer" in refusal("tokenizer", "info", tmp_path / "none")


def test_the_commands_are_quick_to_import():
    heavy = [
        "numpy",
        "torch",
        "tokenizers",
        "xxhash",
        "orjson",
        "zstandard",
        "pydantic",
        "megatron",
    ]
    code = f"import sys, data_tools.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]"

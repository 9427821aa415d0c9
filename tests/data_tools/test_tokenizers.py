"""Training of tokenizers: every text comes back, the same input gives the same bytes, the sample is
of the whole input.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools.tokenizers.passages import sample_passages
from data_tools.tokenizers.sentencepiece_training import train_sentencepiece
from data_tools.tokenizers.training import train_tokenizer
from llada.errors import UserError
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer, train_byte_level_bpe

TEXTS = [
    "The cat sat on the mat; the dog sat on the log.",
    "Über-cool naïve façade — 1234567 numbers, 日本語 and 🙂.",
    "def f(x):\n    return x ** 2  # squares\n\n\nclass A:\n\tdef g(self):\n\t\tpass\r\n",
    "hello hello hello world world <|mdm_mask|> </s> [MASK] \u2581 \u2585 \0 \uf8ff",
] * 5
PIECES = ("unigram", "bpe")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.text(
    "\u2581\uf8ffAB \n\t\r\0\u2585a1日\ufeff", max_size=12
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"]) / "json"


@pytest.fixture(scope="module")
def pieces(library: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("pieces")
    return {
        kind: train_tokenizer([library], 600, folder / kind, kind=kind).tokenizer for kind in PIECES
    }


# -- the command -----------------------------------------------------------------------------------


def test_train_byte_level(source: Path, tmp_path: Path):
    made = train_tokenizer([source], 320, tmp_path / "t")
    loaded = Tokenizer.load(tmp_path / "t")
    assert loaded.fingerprint == made.tokenizer.fingerprint
    assert loaded.padded_vocab_size == 384
    size, tokens = sum(len(t.encode()) for t in TEXTS), sum(len(loaded.encode(t)) for t in TEXTS)
    assert (made.fit.text_bytes, made.fit.tokens, made.fit.words) == (
        size,
        tokens,
        sum(len(t.split()) for t in TEXTS),
    )
    assert (made.text_bytes, made.sample_bytes) == (size, size)
    assert loaded.fingerprint == train_byte_level_bpe(iter(TEXTS), 320).fingerprint

    with pytest.raises(UserError, match="exists; --force replaces a tokenizer"):
        train_tokenizer([source], 330, tmp_path / "t")
    (tmp_path / "bad.jsonl").write_text("oops\n")
    with pytest.raises(UserError, match=r"bad.jsonl:1: not JSON"):
        train_tokenizer([tmp_path / "bad.jsonl"], 330, tmp_path / "t", force=True)
    with pytest.raises(UserError, match="vocab_size: 100 is less than 262"):
        train_tokenizer([source], 100, tmp_path / "t", force=True)
    assert Tokenizer.load(tmp_path / "t").fingerprint == loaded.fingerprint
    # another kind takes its place whole
    train_tokenizer([source], 330, tmp_path / "t", force=True, kind="bpe")
    assert sorted(
        path.name for path in (tmp_path / "t").iterdir() if "special" not in path.name
    ) == [
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert Tokenizer.load(tmp_path / "t").vocab_size == 330
    (tmp_path / "t" / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"not a tokenizer \(it contains 'model.safetensors'\)"):
        train_tokenizer([source], 320, tmp_path / "t", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "t"]


@pytest.mark.parametrize("kind", PIECES)
def test_sentencepiece_vocabulary(pieces: dict[str, Tokenizer], kind: str):
    tokenizer = pieces[kind]
    assert (tokenizer.vocab_size, tokenizer.padded_vocab_size) == (600, 640)
    assert [tokenizer.id_of(token) for token in SPECIAL_TOKENS] == list(range(594, 600))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (
        594,
        595,
        595,
        596,
    )
    assert [tokenizer.token(i) for i in tokenizer.encode("self 2026")][-4:] == ["2", "0", "2", "6"]
    assert tokenizer.encode("        return").size <= 4  # indentation is few tokens
    assert (
        len(tokenizer.encode(" a")) <= 2
        and tokenizer.encode("a").tolist() != tokenizer.encode(" a").tolist()
    )


@settings(max_examples=150, deadline=None)
@given(text=any_text)
@example(text="\u2581 a\u2581b \u2581\u2581")
@example(text="\uf8ff \uf8ffA \uf8ffB \uf8ff\uf8ffA")
@example(text="  a  \r\n\t\0 ")
def test_sentencepiece_round_trip(pieces: dict[str, Tokenizer], text: str):
    for tokenizer in pieces.values():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not (ids >= 594).any()


@pytest.mark.parametrize("kind", PIECES)
def test_text_without_spaces_still_gives_a_space(kind: str):
    """Without a piece for it, a space would be the bytes of U+2581 and come back as that."""
    tokenizer = train_sentencepiece(["abcabcabcab\ncab"] * 30, 268, kind)
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_sentencepiece_itself_gives_the_text_back(pieces: dict[str, Tokenizer]):
    """The rules are in the model, not in our code."""
    from sentencepiece import SentencePieceProcessor

    for tokenizer in pieces.values():
        theirs = SentencePieceProcessor(model_proto=tokenizer.definition)
        for text in TEXTS[:4]:
            assert theirs.decode(theirs.encode(text)) == text
            assert theirs.encode(text) == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("kind", ["byte-bpe", *PIECES])
def test_the_same_input_gives_the_same_bytes(library: Path, tmp_path: Path, kind: str):
    """In another process with other threads and hashes, at another time and place, from
    a sample.
    """
    size = 1200 if kind == "byte-bpe" else 500
    code = (
        "import sys; from data_tools.tokenizers.training import train_tokenizer;"
        " train_tokenizer([sys.argv[1]], int(sys.argv[2]), sys.argv[3], kind=sys.argv[4],"
        " sample_bytes=30000)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
        "TMPDIR": str(tmp_path),
    }
    subprocess.run(
        [sys.executable, "-c", code, library, str(size), tmp_path / "a", kind],
        env=environment,
        check=True,
    )
    train_tokenizer([library], size, tmp_path / "b", kind=kind, sample_bytes=30000)
    digests = [
        {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (tmp_path / name).iterdir()
        }
        for name in "ab"
    ]
    assert digests[0] == digests[1]
    assert str(tmp_path).encode() not in b"".join(
        path.read_bytes() for path in (tmp_path / "a").iterdir()
    )


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (
            ["hello world\n"] * 5,
            5000,
            r"vocab_size: 5000 is more than the text can fill; at most \d+ with this sample",
        ),
        (
            ["".join(map(chr, range(0x4E00, 0x5000)))],
            300,
            r"vocab_size: 300 has no room for the characters of the text; at least \d+ with",
        ),
        ([" \n \n"], 300, "--input: no text to train on, only spaces and line ends"),
        (["some text"], 263, "vocab_size: 263 is less than 264"),
    ],
)
def test_what_sentencepiece_cannot_do_is_one_line(
    kind: str, texts: list[str], size: int, message: str
):
    with pytest.raises(UserError, match=message) as refusal:
        train_sentencepiece(texts, size, kind)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", PIECES)
def test_the_limits_in_messages_are_right(kind: str):
    """At the size that the message names, training works; one beyond it does not."""
    texts = ["hello world how are you\n"] * 5
    with pytest.raises(UserError, match="at most") as refusal:
        train_sentencepiece(texts, 5000, kind)
    most = int(str(refusal.value).split("at most ")[1].split()[0])
    assert train_sentencepiece(texts, most, kind).vocab_size == most
    with pytest.raises(UserError, match="at most"):
        train_sentencepiece(texts, most + 1, kind)
    with pytest.raises(UserError, match="at least") as refusal:
        train_sentencepiece(texts, 265, kind)
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    assert train_sentencepiece(texts, least, kind).vocab_size == least


def test_a_line_longer_than_sentencepiece_takes_is_trained_on():
    line = "the quick brown fox jumps over the lazy dog " * 20_000
    tokenizer = train_sentencepiece([line], 330, "bpe")
    assert len(tokenizer.encode(" jumps over the lazy dog")) == 5


# -- the sample ------------------------------------------------------------------------------------


def test_all_is_kept_when_it_fits():
    sample = sample_passages(iter(TEXTS), 10**6)
    assert sample.passages == TEXTS
    assert sample.kept_bytes == sample.text_bytes == sum(len(text.encode()) for text in TEXTS)


@settings(max_examples=50, deadline=None)
@given(
    texts=st.lists(st.text("ab \n日", min_size=1, max_size=30), max_size=30),
    repeat=st.integers(1, 400),
)
def test_long_texts_are_cut_without_loss(texts: list[str], repeat: int):
    whole = [text * repeat for text in texts]
    sample = sample_passages(iter(whole), 1 << 40)
    assert "".join(sample.passages) == "".join(whole)
    assert all(0 < len(passage) <= 4096 for passage in sample.passages)


def test_the_sample_is_bounded_and_of_the_whole_input():
    texts = [f"document {i}: {'x' * (i % 97)}\n" for i in range(20_000)]
    total = sum(map(len, texts))
    sample = sample_passages(iter(texts), total // 20)
    assert total / 20 * 0.99 < sample.kept_bytes <= total // 20
    assert sample.kept_bytes == sum(map(len, sample.passages))
    numbers = [int(passage.split()[1][:-1]) for passage in sample.passages]
    assert numbers == sorted(numbers)
    tenths = [sum(1 for number in numbers if number // 2000 == tenth) for tenth in range(10)]
    expected = len(numbers) / 10  # binomial: five standard deviations
    assert all(abs(count - expected) < 5 * expected**0.5 for count in tenths)
    assert sample_passages(iter(texts), total // 20) == sample
    # Among equal texts some are kept: the place is part of the key.
    assert 0 < len(sample_passages(iter(["same\n"] * 1000), 1000).passages) <= 200


def test_memory_of_the_sample_does_not_grow_with_the_input():
    import tracemalloc

    def peak(number: int) -> int:
        tracemalloc.start()
        sample_passages((f"{i} {'y' * 2000}" for i in range(number)), 200_000)
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return high

    assert peak(20_000) < 1.2 * peak(2_000)


def test_a_sample_without_room_is_refused():
    with pytest.raises(UserError, match="--sample-bytes: 3 is too small"):
        sample_passages(iter(["a longer text"]), 3)

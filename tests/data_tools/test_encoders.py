"""Fast encoders against the libraries that define the ids; one that differs, fails or is missing is
never used silently.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.tokenizers import encoders
from data_tools.tokenizers.encoders import BACKENDS, choose_encoder, open_encoder
from data_tools.tokenizers.equality import first_difference, fixed_texts
from data_tools.tokenizers.sentencepiece_training import train_sentencepiece
from llada.errors import RunError, UserError
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer, train_byte_level_bpe

LIBRARY = [
    path.read_text()
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / "json").glob("*.py"))
]
ALL_ASCII = "".join(map(chr, range(0x21, 0x7F)))
USABLE = {  # what each library can do for each tokenizer
    "bytes": ("fastokens", "gigatoken"),
    "bpe": ("fastokens", "gigatoken"),
    "prefix": ("fastokens", "gigatoken"),
    "small": (
        "gigatoken",
    ),  # without pieces for some digits, fastokens reads the text "<0x07>" as a byte
    "charsmap": (),
    "unigram": (),
    "words": (),
}
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    LIBRARY
).map(lambda text: text[200:900])


def _prefix_model(**options: object) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    given = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "minloglevel": 2,
        **options,
    }
    lines = (line for text in [*LIBRARY, *[ALL_ASCII] * 9] for line in text.splitlines())
    SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **given)
    return model.getvalue()


@pytest.fixture(autouse=True)
def _nothing_is_open() -> None:
    """What an earlier test opened stays open in the process."""
    encoders._open_once.cache_clear()


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    folder = tmp_path_factory.mktemp("kinds")
    made = {"bytes": train_byte_level_bpe(iter(LIBRARY), 700)}
    made |= {
        kind: train_sentencepiece([*LIBRARY, *[ALL_ASCII] * 9], 500, kind)
        for kind in ("bpe", "unigram")
    }
    made["small"] = train_sentencepiece(LIBRARY, 500, "bpe")
    options = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["[INST]", "\n\n"],
    }
    (folder / "prefix.model").write_bytes(_prefix_model(**options))
    (folder / "charsmap.model").write_bytes(_prefix_model(remove_extra_whitespaces=False))
    fast = Fast(models.WordLevel({"[UNK]": 0, "def": 1, "return": 2}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.save(str(folder / "words.json"))
    for name in ("prefix.model", "charsmap.model", "words.json"):
        made[name.split(".")[0]] = Tokenizer.load(
            folder / name, require_mask=False
        ).with_special_tokens()
    return made


def theirs(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """One text at a time with the library itself, without our code."""
    if isinstance(tokenizer.definition, bytes):
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_proto=tokenizer.definition).encode
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(tokenizer.definition)
    fast.encode_special_tokens = True
    return lambda text: fast.encode(text, add_special_tokens=False).ids


def rows(encoder: encoders.Encoder, texts: list[str]) -> list[list[int]]:
    flat, lengths = encoder.encode(texts)
    assert flat.dtype == lengths.dtype == np.int64
    assert len(lengths) == len(texts) and lengths.sum() == len(flat)
    return [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] if texts else []


# -- the same ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", USABLE)
def test_the_ids_are_the_librarys(kinds: dict[str, Tokenizer], kind: str, backend: str):
    tokenizer = kinds[kind]
    package = "sentencepiece" if isinstance(tokenizer.definition, bytes) else "tokenizers"
    expected = {"auto": (*USABLE[kind], package)[0], "library": package}.get(backend, backend)
    if backend not in (*USABLE[kind], "auto", "library"):
        with pytest.raises(
            UserError,
            match=(
                rf"--backend: '{backend}' cannot be used for .*: {backend} .*'auto' takes"
                r" another one"
            ),
        ):
            choose_encoder(tokenizer, LIBRARY, backend)
        return
    encoder, note = choose_encoder(tokenizer, LIBRARY, backend)
    assert encoder.name.split(" ")[0] == expected
    assert (note == "") == (
        expected
        == ("fastokens" if backend == "auto" else backend if backend != "library" else package)
    )
    texts = [*LIBRARY, "", *LIBRARY[0].splitlines(keepends=True)]
    assert rows(encoder, texts) == [theirs(tokenizer)(text) for text in texts]
    assert rows(encoder, []) == []


@pytest.fixture(scope="module")
def pairs(kinds: dict[str, Tokenizer]) -> list[tuple[encoders.Encoder, Callable[[str], list[int]]]]:
    """Fast encoders, and the library of each."""
    return [
        (choose_encoder(kinds[kind], [], name)[0], theirs(kinds[kind]))
        for kind in ("bytes", "bpe", "prefix")
        for name in USABLE[kind]
    ]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(any_text, max_size=5))
def test_any_text_gives_the_librarys_ids(
    pairs: list[tuple[encoders.Encoder, Callable[[str], list[int]]]], texts: list[str]
):
    for encoder, library in pairs:
        assert rows(encoder, texts) == [library(text) for text in texts]


@pytest.mark.parametrize("kind", USABLE)
def test_special_tokens_are_text(kinds: dict[str, Tokenizer], kind: str):
    tokenizer = kinds[kind]
    special = {tokenizer.id_of(name) for name in (*SPECIAL_TOKENS, "<s>", "</s>")} - {None}
    for backend in (*USABLE[kind], "library"):
        encoder, _ = choose_encoder(tokenizer, [], backend)
        for name in (*SPECIAL_TOKENS, "<s>", "</s>", "<unk>"):
            flat, _ = encoder.encode([name, f"a{name}b", f"{name}{name}", f" {name} \n"])
            assert not special & set(flat.tolist())


def test_the_checks_hold_what_they_promise(kinds: dict[str, Tokenizer]):
    texts = fixed_texts(kinds["prefix"])
    together = "\n".join(texts)
    for wanted in (
        *SPECIAL_TOKENS,
        "<s>",
        "</s>",
        "<0x41>",
        "\r\n",
        "\t",
        "\0",
        "\u200d",
        "\ufeff",
        "\u2581",
        "\U0010ffff",
        "e\u0301",
        " " * 100,
    ):
        assert wanted in together
    letters = [c for c in map(chr, range(0x20, 0x3000)) if c.isprintable()]
    assert not [c for c in letters if c not in together]
    assert fixed_texts(kinds["prefix"]) == texts
    assert sum(map(len, texts)) < 1_500_000  # takes about a second


# -- one that differs, fails or is missing ---------------------------------------------------------


def spoil(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    change: Callable[[list[str], np.ndarray], np.ndarray],
) -> None:
    """Make a fast library give other ids, under another version so that no earlier check of it
    counts.
    """
    real, version = encoders._OPENERS[backend], encoders.metadata.version

    def opened(definition: str) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
        encode = real(definition)

        def spoiled(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids, starts = encode(texts)
            return change(texts, ids.copy()), starts

        return spoiled

    monkeypatch.setitem(encoders._OPENERS, backend, opened)
    monkeypatch.setattr(
        encoders.metadata,
        "version",
        lambda name: f"{version(name)}.{id(change)}" if name == backend else version(name),
    )


@pytest.mark.parametrize("where", ["fixed", "sample"])
def test_a_library_that_differs_is_not_used(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch, where: str
):
    trigger = {"fixed": "<s>hi</s>", "sample": "a very special phrase of the input"}[where]

    def change(texts: list[str], ids: np.ndarray) -> np.ndarray:
        if any(trigger in text for text in texts):
            ids[-1] ^= 1
        return ids

    spoil(monkeypatch, "fastokens", change)
    sample = ["before", f"line one\nline two\nhere is {trigger} and more\nline four\n" * 3]
    encoder, note = choose_encoder(kinds["bytes"], sample)
    assert encoder.name.startswith("gigatoken ")
    assert note.startswith("fastokens differs on '") and trigger[:9] in note and "\n" not in note
    with pytest.raises(
        UserError, match=r"--backend: 'fastokens' cannot be used for .*: fastokens differs on"
    ):
        choose_encoder(kinds["bytes"], sample, "fastokens")
    spoil(monkeypatch, "gigatoken", change)
    encoder, note = choose_encoder(kinds["bytes"], sample)
    assert encoder.name.startswith("tokenizers ")
    assert "fastokens differs on" in note and "gigatoken differs on" in note


class Panic(BaseException):
    """As a panic of a Rust library arrives."""


def test_a_library_that_fails(kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch):
    def change(texts: list[str], ids: np.ndarray) -> np.ndarray:
        if any("boom" in text for text in texts):
            raise Panic("index out of range\nmore")
        return ids

    spoil(monkeypatch, "fastokens", change)
    encoder, _ = choose_encoder(kinds["bytes"], ["fine"], "fastokens")
    with pytest.raises(
        RunError,
        match=r"fastokens .* failed on a text: index out of range; the encoder 'library' avoids it",
    ):
        encoder.encode(["boom"])
    encoder, note = choose_encoder(kinds["bytes"], ["boom"])
    assert encoder.name.startswith("gigatoken ")
    assert "failed on a text: index out of range" in note


def test_without_the_fast_libraries(kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fastokens", None)
    encoder, note = choose_encoder(kinds["bytes"], LIBRARY)
    assert (encoder.name.split(" ")[0], note) == ("gigatoken", "fastokens is not installed")
    monkeypatch.setitem(sys.modules, "awkward", None)
    encoders._open_once.cache_clear()
    assert (
        choose_encoder(kinds["bytes"], LIBRARY)[1]
        == "fastokens is not installed; gigatoken lacks awkward"
    )
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.delitem(sys.modules, "awkward")
    encoder, note = choose_encoder(kinds["bytes"], LIBRARY)
    assert (encoder.name.split(" ")[0], note) == (
        "tokenizers",
        "fastokens is not installed; gigatoken is not installed",
    )
    with pytest.raises(
        UserError,
        match=(
            r"--backend: 'gigatoken' cannot be used for .*: gigatoken is not installed; 'auto'"
            r" takes another one"
        ),
    ):
        choose_encoder(kinds["bytes"], LIBRARY, "gigatoken")
    assert rows(encoder, LIBRARY) == [theirs(kinds["bytes"])(text) for text in LIBRARY]


def test_a_name_that_is_none(kinds: dict[str, Tokenizer]):
    with pytest.raises(
        UserError,
        match=r"--backend: 'fasttokens' is not one of auto, .* \(did you mean 'fastokens'\?\)",
    ):
        choose_encoder(kinds["bytes"], [], "fasttokens")


def test_difference_names_a_short_text():
    def length(text: str) -> list[int]:
        return [len(text)]

    def encode(
        of: Callable[[str], list[int]],
    ) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
        return lambda texts: (
            np.array([i for t in texts for i in of(t)], np.int64),
            np.array([len(of(t)) for t in texts], np.int64),
        )

    def other(text: str) -> list[int]:
        return [len(text) + ("\u1acf" in text)]

    texts = ["fine", "x" * 3000, f"{'y ' * 400}\n{'z' * 500}\u1acf{'z' * 500}\nend"]
    assert first_difference(encode(length), encode(length), texts) is None
    shown = first_difference(encode(other), encode(length), texts)
    assert shown is not None and "\\u1acf" in shown and len(shown) < 60
    assert first_difference(encode(other), encode(length), texts[:2]) is None


# -- in worker processes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("bytes", "fastokens"),
        ("bytes", "gigatoken"),
        ("bytes", "library"),
        ("bpe", "fastokens"),
        ("unigram", "library"),
    ],
)
def test_a_worker_opens_it_by_name_and_uses_one_thread(
    kinds: dict[str, Tokenizer], tmp_path: Path, kind: str, backend: str
):
    encoder, _ = choose_encoder(kinds[kind], LIBRARY, backend)
    texts = [f"{i}\n{text}" for i in range(20) for text in LIBRARY]
    given = tmp_path / "given.pickle"
    given.write_bytes(pickle.dumps((kinds[kind], encoder.name, texts)))
    code = """if True:
        import json, os, pickle, sys
        import numpy
        from data_tools.tokenizers.encoders import open_encoder
        tokenizer, name, texts = pickle.load(open(sys.argv[1], "rb"))
        before = len(os.listdir("/proc/self/task"))
        encoder = open_encoder(tokenizer, name)
        flat, lengths = encoder.encode(texts)
        threads = len(os.listdir("/proc/self/task")) - before
        parallel = os.environ.get("TOKENIZERS_PARALLELISM")
        print(json.dumps([encoder.name, threads, int(flat.sum()), lengths.tolist(), parallel]))
    """
    names = ("TOKENIZERS_PARALLELISM", "FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, given],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    flat, lengths = encoder.encode(texts)
    name, threads, total, theirs_lengths, parallelism = json.loads(done.stdout)
    assert (name, total, theirs_lengths, parallelism) == (
        encoder.name,
        int(flat.sum()),
        lengths.tolist(),
        None,
    )
    assert (
        threads <= 1
        # a pool of one works while the caller waits; with two cores a pool of all of them would be
        # two
    )
    assert done.stderr == ""


def test_a_worker_with_other_libraries_stops(
    kinds: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(RunError, match=r"--backend: expected fastokens 0.0.1, found fastokens \d"):
        open_encoder(kinds["bytes"], "fastokens 0.0.1")
    with pytest.raises(
        RunError,
        match=r"--backend: expected sentencepiece 0.2.3, found tokenizers \d",
    ):
        open_encoder(kinds["bytes"], "sentencepiece 0.2.3")
    name = choose_encoder(kinds["bytes"], [])[0].name
    encoders._open_once.cache_clear()
    monkeypatch.setitem(sys.modules, "fastokens", None)
    with pytest.raises(
        RunError,
        match=(
            f"--backend: expected {name}, which cannot be used on this machine: fastokens is not"
            " installed"
        ),
    ):
        open_encoder(kinds["bytes"], name)

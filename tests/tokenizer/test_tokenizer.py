"""The tokenizer against the libraries it wraps; text is never special; every refusal."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada.errors import UserError
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer, train_byte_level_bpe

TEXTS = [
    "The cat sat on the mat; the dog sat on the log.",
    "Über-cool naïve façade — 1234567 numbers, 日本語 and 🙂.",
    "def f(x):\n    return x ** 2  # squares\n",
    "hello hello hello world world <|mdm_mask|> </s> [MASK]",
] * 5
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_byte_level_bpe(iter(TEXTS), 330)


@pytest.fixture(scope="module")
def bpe_folder(bpe: Tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    bpe.save(folder)
    return folder


def sentencepiece_model(path: Path, **options) -> Path:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    settings = {
        "vocab_size": 330,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "minloglevel": 2,
        **options,
    }
    SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def piece_model(tmp_path_factory) -> Path:
    return sentencepiece_model(tmp_path_factory.mktemp("sentencepiece") / "some.model")


@pytest.fixture(scope="module")
def piece(piece_model: Path) -> Tokenizer:
    return Tokenizer.load(piece_model, require_mask=False).with_special_tokens()


def word_level(
    path: Path, words: list[str], added: list[str] = (), special: bool = True, **config
) -> Path:
    """A folder with a word-level tokenizer.json; `config` goes to tokenizer_config.json."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    fast = Fast(
        models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]")
    )
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens = [AddedToken(token, special=special, normalized=False) for token in added]
    if special:
        fast.add_special_tokens(tokens)
    else:
        fast.add_tokens(tokens)
    path.mkdir(exist_ok=True)
    fast.save(str(path / "tokenizer.json"))
    if config:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


# -- training --------------------------------------------------------------------------------------


def test_special_tokens_take_the_last_ids_and_count(bpe: Tokenizer):
    assert bpe.vocab_size == 330
    assert bpe.padded_vocab_size == 384
    assert [bpe.id_of(token) for token in SPECIAL_TOKENS] == list(range(324, 330))
    assert (bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.mask_id) == (324, 325, 325, 326)
    names = {
        "bos": "<|startoftext|>",
        "eos": "<|endoftext|>",
        "pad": "<|endoftext|>",
        "mask": "<|mdm_mask|>",
    }
    assert bpe.special_tokens() == {role: (name, bpe.id_of(name)) for role, name in names.items()}


def test_training_repeats_itself_in_another_process(bpe: Tokenizer):
    code = (
        "import sys, json; from llada.tokenizer import train_byte_level_bpe as t;"
        " print(t(iter(json.load(sys.stdin)), 330).fingerprint);assert not {'torch',"
        " 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "RAYON_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(TEXTS),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == bpe.fingerprint


def test_text_that_cannot_fill_the_vocabulary():
    assert train_byte_level_bpe(iter(["ab"]), 5000).vocab_size == 256 + 1 + 6
    assert train_byte_level_bpe(iter([]), 262).vocab_size == 262


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(UserError, match=r"vocab_size: 261 is less than 262"):
        train_byte_level_bpe(iter(TEXTS), 261)


@settings(max_examples=60, deadline=None)
@given(text=any_text)
def test_byte_level_round_trip(bpe: Tokenizer, text: str):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert ids.dtype == np.int64
    assert not (ids >= 324).any()


# -- text is never special -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "piece"])
def test_literal_special_tokens_are_text(kind: str, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    special = {tokenizer.id_of(token) for token in (*SPECIAL_TOKENS, "<s>", "</s>")} - {None}
    assert len(special) == {"bpe": 6, "piece": 8}[kind]
    for token in (*SPECIAL_TOKENS, "<s>", "</s>"):
        for text in (token, f"a{token}b", f"a {token} b\n{token}{token}"):
            flat, _ = tokenizer.encode_batch([text, text])
            assert not special & set(flat.tolist())
            assert not special & set(tokenizer.encode(text).tolist())
            assert tokenizer.decode(tokenizer.encode(text)).split() == text.split()


def test_pickling_keeps_text_ordinary(bpe: Tokenizer, piece: Tokenizer):
    """The library's own pickle forgets encode_special_tokens."""
    for tokenizer in (bpe, piece):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.fingerprint == tokenizer.fingerprint
        text = "a<|mdm_mask|>b"
        assert again.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert again.mask_id not in again.encode(text)


def test_a_special_token_that_is_a_word_of_the_model_is_refused(tmp_path: Path):
    """A word-level model that splits at spaces only reads "[MASK]" as a word of its own."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import pre_tokenizers

    folder = word_level(tmp_path, ["a", "b", "[MASK]", "</s>"])
    fast = Fast.from_file(str(folder / "tokenizer.json"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"'</s>' is encoded as the special token </s>"):
        Tokenizer.load(folder)


@pytest.mark.parametrize("token", ["<|mdm_mask|>", "<|endoftext|>"])
def test_a_user_defined_sentencepiece_symbol_as_special_token_is_refused(
    tmp_path: Path, token: str
):
    path = sentencepiece_model(
        tmp_path / "tokenizer.model", user_defined_symbols=[token], eos_id=-1
    )
    with pytest.raises(UserError, match="is encoded as the special token") as refusal:
        Tokenizer.load(path, require_mask=False)
    assert token in str(refusal.value)


def test_a_control_symbol_of_sentencepiece_is_a_mask_token(tmp_path: Path):
    tokenizer = Tokenizer.load(
        sentencepiece_model(tmp_path / "m.model", control_symbols=["[MASK]"])
    )
    assert tokenizer.token(tokenizer.mask_id) == "[MASK]"
    assert tokenizer.mask_id not in tokenizer.encode("a [MASK] b")


def test_an_ordinary_added_token_with_a_role_becomes_special(tmp_path: Path):
    """Otherwise its name in a text would be read as the mask."""
    folder = word_level(tmp_path, ["a", "b"], ["[MASK]", "</s>"], special=False)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.mask_id, tokenizer.eos_id) == (3, 4)
    assert not {3, 4} & set(tokenizer.encode("a [MASK] b </s>").tolist())
    assert tokenizer.decode([1, 3, 2], skip_special_tokens=True) == "a b"
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").fingerprint == tokenizer.fingerprint


# -- agreement with the libraries ------------------------------------------------------------------


def test_autotokenizer_agrees(bpe: Tokenizer, bpe_folder: Path):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(bpe_folder)
    roles = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id)
    assert roles == (bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.mask_id)
    assert len(theirs) == bpe.vocab_size
    plain = [text for text in TEXTS if "<|" not in text]
    for text in plain:
        assert theirs(text, add_special_tokens=False).input_ids == bpe.encode(text).tolist()
        assert theirs.decode(bpe.encode(text)) == text
    # With its switch for it, also on text that spells special tokens.
    spelled = theirs(TEXTS[3], add_special_tokens=False, split_special_tokens=True).input_ids
    assert spelled == bpe.encode(TEXTS[3]).tolist()


def test_what_transformers_saves_is_loaded(bpe: Tokenizer, bpe_folder: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(bpe_folder).save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.vocab_size, again.mask_id, again.eos_id, again.pad_id) == (
        bpe.vocab_size,
        bpe.mask_id,
        bpe.eos_id,
        bpe.pad_id,
    )
    assert again.encode(TEXTS[1]).tolist() == bpe.encode(TEXTS[1]).tolist()


def test_sentencepiece_agrees(piece: Tokenizer, piece_model: Path):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(piece_model))
    for text in TEXTS[:4]:
        assert piece.encode(text).tolist() == theirs.encode(text)
        assert piece.decode(piece.encode(text)) == theirs.decode(theirs.encode(text))
    assert (piece.bos_id, piece.eos_id) == (theirs.bos_id(), theirs.eos_id())


@pytest.mark.parametrize("kind", ["bpe", "piece"])
def test_a_batch_is_its_texts_one_by_one(kind: str, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    texts = [*TEXTS[:4], "", "x"]
    flat, lengths = tokenizer.encode_batch(texts)
    rows = [tokenizer.encode(text).tolist() for text in texts]
    assert [part.tolist() for part in np.split(flat, np.cumsum(lengths)[:-1])] == rows
    assert flat.dtype == lengths.dtype == np.int64
    empty, none = tokenizer.encode_batch([])
    assert (empty.size, none.size) == (0, 0)


def test_truncation_and_padding_of_the_file_are_not_applied(
    bpe: Tokenizer, bpe_folder: Path, tmp_path: Path
):
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(bpe_folder / "tokenizer.json"))
    fast.enable_truncation(4)
    fast.enable_padding(length=64)
    fast.save(str(tmp_path / "other.json"))
    assert (
        Tokenizer.load(tmp_path / "other.json").encode(TEXTS[0]).tolist()
        == bpe.encode(TEXTS[0]).tolist()
    )


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bpe", "piece"])
def test_decode_with_special_tokens(kind: str, request):
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode("the cat sat").tolist()
    words = [int(i) for i in tokenizer.encode("the cat")]
    mixed = [tokenizer.bos_id, *words, tokenizer.mask_id, *ids[len(words) :], tokenizer.eos_id]
    bos, eos = tokenizer.token(tokenizer.bos_id), tokenizer.token(tokenizer.eos_id)
    assert tokenizer.decode(mixed) == f"{bos}the cat<|mdm_mask|> sat{eos}"
    assert tokenizer.decode(np.array(mixed), skip_special_tokens=True) == "the cat sat"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.padded_vocab_size + 5]) == ""


def test_tokens_for_people(bpe: Tokenizer, piece: Tokenizer):
    newline, space = bpe.encode("\n")[0], bpe.encode(" ")[0]
    assert (bpe.token(newline), bpe.token(space), bpe.token(bpe.mask_id)) == (
        "\\n",
        " ",
        "<|mdm_mask|>",
    )
    assert bpe.token(bpe.vocab_size) == f"<{bpe.vocab_size}>"
    part = bpe.encode("☃")[0]  # the first byte of three
    assert bpe.token(part).isprintable() and "\ufffd" not in bpe.token(part)
    assert "".join(piece.token(i) for i in piece.encode("the cat")) == " the cat"
    assert piece.token(piece.padded_vocab_size) == f"<{piece.padded_vocab_size}>"


# -- roles and special tokens ----------------------------------------------------------------------


def test_roles_from_the_config_come_first(tmp_path: Path):
    added = ["<x>", "<y>", "<z>", "</s>", "[MASK]"]
    config = {
        "eos_token": "<x>",
        "mask_token": {"content": "<y>", "special": True},
        "pad_token": "<gone>",
        "bos_token": None,
    }
    folder = word_level(tmp_path, ["a"], added, **config)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<y>", "bos_token": "<z>"})
    )
    tokenizer = Tokenizer.load(folder)
    names = [
        None if i is None else tokenizer.token(i)
        for i in (tokenizer.eos_id, tokenizer.mask_id, tokenizer.bos_id, tokenizer.pad_id)
    ]
    assert names == ["<x>", "<y>", "<z>", None]
    assert Tokenizer.load(folder / "tokenizer.json").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("mask", ["<|mdm_mask|>", "[MASK]", "<mask>", "<|mask|>"])
@pytest.mark.parametrize("eos", ["<|endoftext|>", "</s>", "<|eot_id|>"])
def test_roles_from_well_known_names(tmp_path: Path, mask: str, eos: str):
    tokenizer = Tokenizer.load(word_level(tmp_path, ["a"], [mask, eos]))
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (
        2,
        3,
        None,
        None,
    )


@pytest.mark.parametrize("missing", ["mask", "EOS"])
def test_a_missing_role_is_refused_with_its_remedy(tmp_path: Path, missing: str):
    folder = word_level(tmp_path, ["a"], ["</s>" if missing == "mask" else "[MASK]"])
    with pytest.raises(UserError, match=f"no {missing}.*`--add-special-tokens`"):
        Tokenizer.load(folder)
    tokenizer = Tokenizer.load(folder, require_mask=False)
    assert -1 in (tokenizer.mask_id, tokenizer.eos_id)
    assert min(tokenizer.with_special_tokens().mask_id, tokenizer.with_special_tokens().eos_id) >= 0


def test_missing_special_tokens_follow_the_last_id_and_roles_are_kept(tmp_path: Path):
    folder = word_level(tmp_path, ["a", "b"], ["</s>", "<|eot_id|>"], eos_token="</s>")
    before = Tokenizer.load(folder, require_mask=False)
    after = before.with_special_tokens()
    assert (before.vocab_size, after.vocab_size) == (5, 10)
    assert [after.id_of(token) for token in SPECIAL_TOKENS] == [5, 6, 7, 8, 9, 4]
    assert (after.bos_id, after.eos_id, after.pad_id, after.mask_id) == (5, 3, 6, 7)
    assert after.encode("a b").tolist() == before.encode("a b").tolist()
    assert after.fingerprint != before.fingerprint
    assert after.with_special_tokens().fingerprint == after.fingerprint


def test_sentencepiece_special_tokens_live_beside_the_model(
    piece: Tokenizer, piece_model: Path, tmp_path: Path
):
    before = Tokenizer.load(piece_model, require_mask=False)
    assert [piece.id_of(token) for token in SPECIAL_TOKENS] == list(
        range(before.vocab_size, before.vocab_size + 6)
    )
    assert (piece.eos_id, piece.bos_id) == (before.eos_id, before.bos_id)
    assert (piece.pad_id, piece.mask_id) == (
        piece.id_of("<|endoftext|>"),
        piece.id_of("<|mdm_mask|>"),
    )
    piece.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == piece_model.read_bytes()
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        again = Tokenizer.load(path)
        assert again.fingerprint == piece.fingerprint
        assert (again.eos_id, again.pad_id, again.mask_id) == (
            piece.eos_id,
            piece.pad_id,
            piece.mask_id,
        )


def test_ids_with_holes_are_refused(tmp_path: Path):
    folder = word_level(tmp_path, ["a", "b"])
    path = folder / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"]["b"] = 700
    path.write_text(json.dumps(definition))
    tokenizer = Tokenizer.load(folder, require_mask=False)
    assert tokenizer.vocab_size == 701
    with pytest.raises(UserError, match="holes"):
        tokenizer.with_special_tokens()


# -- fingerprint -----------------------------------------------------------------------------------


def test_fingerprint_survives_saving_and_layout_of_the_file(
    bpe: Tokenizer, bpe_folder: Path, tmp_path: Path
):
    first = Tokenizer.load(bpe_folder)
    first.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3, sort_keys=True))
    assert Tokenizer.load(tmp_path).fingerprint == first.fingerprint == bpe.fingerprint


def test_fingerprint_follows_definition_and_roles(
    bpe: Tokenizer, piece: Tokenizer, bpe_folder: Path, tmp_path: Path
):
    bpe.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**config, "eos_token": "<|eot_id|>"})
    )
    others = [
        Tokenizer.load(tmp_path),
        train_byte_level_bpe(iter(TEXTS), 331),
        train_byte_level_bpe(iter(TEXTS[:1]), 330),
        piece,
    ]
    prints = [bpe.fingerprint, *(other.fingerprint for other in others)]
    assert len(set(prints)) == len(prints)


# -- refusals of files -----------------------------------------------------------------------------


def test_paths_that_are_no_tokenizer_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("nowhere", "no such tokenizer"),
        ("notes.txt", "not a tokenizer"),
        ("empty", "no tokenizer in this folder"),
    ):
        with pytest.raises(UserError, match=f"{path}: {message}"):
            Tokenizer.load(tmp_path / path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "not JSON"),
        ("tokenizer.json", b"\xff\xfe", "not JSON"),
        ("tokenizer.json", b"[]", "not a JSON object"),
        ("tokenizer.json", b"{}", "not a tokenizer.json"),
        ("tokenizer.model", b"", "not a SentencePiece model"),
        ("tokenizer.model", b"version https://git-lfs", "not a SentencePiece model"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: {message}"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("role", ["eos", "mask"])
def test_a_role_outside_the_vocabulary_is_refused(tmp_path: Path, role: str):
    folder = word_level(tmp_path, ["a"], ["</s>", "[MASK]"], **{f"{role}_token": "<gone>"})
    with pytest.raises(
        UserError, match=f"tokenizer_config.json: {role}_token '<gone>' is not in the vocabulary"
    ):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        ({"added_tokens": {"<|mdm_mask|>": 5}, "roles": {}}, "do not follow its own"),
        ({"roles": {}}, "added_tokens"),
        ({"added_tokens": {}, "roles": {"mask": "<gone>"}}, "mask '<gone>'"),
        ({"added_tokens": {}, "roles": {"king": "</s>"}}, "king '</s>'"),
        ([], "not a JSON object"),
    ],
)
def test_a_broken_sidecar_is_refused(piece: Tokenizer, tmp_path: Path, sidecar, message: str):
    piece.save(tmp_path)
    (tmp_path / "added_special_tokens.json").write_text(json.dumps(sidecar))
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)

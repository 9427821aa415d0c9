"""Plans and batches of a step against a plain walk through the documents."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llada.config import build_config
from llada.data.loader import Loader
from llada.data.manifest import TRAIN
from llada.data.pretrain import PretrainData
from llada.data.training_data import check_tokens
from llada.errors import UserError
from llada.noise import mask_uniforms, timesteps
from llada.objectives import TOKENS, Batch
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from llada.training.reporting.mixture_lines import weight_changes
from tests.preparation import prepare

LENGTH = 48
WORDS = ["alpha", "beta", "gamma", "delta", "<|mdm_mask|>", "\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of short documents in several small shards."""
    root = tmp_path_factory.mktemp("pretrain")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(400)]
    (root / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_byte_level_bpe(iter(texts), 300).save(root / "tokenizer")
    prepare(
        [root / "a.jsonl"],
        root / "tokenizer",
        root / "corpus",
        validation_fraction=0.1,
        shard_tokens=1500,
    )
    return root


def data(
    folder: Path, batch: int = 16, objective: dict[str, Any] | None = None, **settings: Any
) -> PretrainData:
    raw = {
        "objective": objective or {},
        "seed": 3,
        "run": {"dir": "unused"},
        "train": {"steps": 100},
        "batch": {"global": batch, "micro": 4},
        "model": {
            "num_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": 384,
        },
        "schedule": {"stages": [{"shape": "constant", "start": 1e-3}]},
        "data": {
            "sequence_length": LENGTH,
            "mixture": [{"path": str(folder / "corpus")}],
            **settings,
        },
    }
    return PretrainData(build_config(raw))


def windows_by_hand(folder: Path) -> list[tuple[list[int], set[int]]]:
    """Tokens of every full window and the places where documents start, from the text alone."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    reader = data(folder).corpora[0]
    manifest = reader.manifest
    assert len(manifest.of(TRAIN)) > 2
    import xxhash

    documents = []
    for line in (folder / "a.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        if xxhash.xxh3_64_intdigest(text.encode()) / 2**64 >= 0.1:
            documents.append([*tokenizer.encode(text).tolist(), tokenizer.eos_id])
    windows = []
    for entry in manifest.of(TRAIN):
        stream: list[int] = []
        starts = set()
        for document in documents[: entry.documents]:
            starts.add(len(stream))
            stream += document
        documents = documents[entry.documents :]
        for first in range(0, len(stream) - LENGTH + 1, LENGTH):
            windows.append(
                (
                    stream[first : first + LENGTH],
                    {s - first for s in starts if first < s < first + LENGTH},
                )
            )
    assert not documents
    return windows


def test_windows_and_documents(folder: Path) -> None:
    made, expected = data(folder), windows_by_hand(folder)
    reader = made.readers[TRAIN][0]
    assert reader.num_instances == len(expected)
    assert reader.dropped == made.corpora[0].manifest.totals(TRAIN)[1] - LENGTH * len(expected)
    for window, (tokens, starts) in enumerate(expected):
        assert reader.tokens(window).tolist() == tokens
        assert set(reader.document_starts(window).tolist()) == starts


@pytest.mark.parametrize("document_mask", [False, True])
def test_segments_are_the_union_of_documents_and_random_length(
    document_mask: bool, folder: Path
) -> None:
    made = data(folder, document_mask=document_mask, random_length_probability=0.5)
    expected = windows_by_hand(folder)
    cuts = 0
    for step in range(6):
        plan = made.plan(step)
        assert plan.samples.tolist() == list(range(16 * step, 16 * step + 16))
        for i in range(16):
            bounds = set(plan.bounds[i].tolist())
            documents = expected[plan.examples[i]][1] if document_mask else set()
            assert {0, LENGTH} | documents <= bounds and len(bounds - documents - {0, LENGTH}) <= 1
            cuts += len(bounds - documents - {0, LENGTH})
        assert made.normalizer(plan) == 16 * LENGTH == plan.tokens
        t = plan.groups.t
        assert len(np.unique(t)) == len(t) == len(plan.attended)
    assert 20 < cuts < 76


@pytest.mark.parametrize("mode", ["stratified", "iid"])
def test_t_is_drawn_as_the_config_says_by_each_segments_length(mode: str, folder: Path) -> None:
    made = data(
        folder, document_mask=True, random_length_probability=0.5, objective={"timesteps": mode}
    )
    for step in range(3):
        plan = made.plan(step)
        lengths = np.concatenate([np.diff(b) for b in plan.bounds])
        assert len(set(lengths.tolist())) > 5
        assert plan.groups.t.tolist() == timesteps(3, step, lengths, mode).tolist()


def test_masks_are_drawn_as_the_config_says(folder: Path) -> None:
    plan = data(folder).plan(0)
    for objective, rule in (
        ({"masking": "fixed_count"}, lambda t: LENGTH / (1 + int(t * LENGTH))),
        ({"masking": "bernoulli"}, lambda t: 1 / (0.999 * t + 0.001)),
        ({"masking": "bernoulli", "eps": 0.1}, lambda t: 1 / (0.9 * t + 0.1)),
    ):
        batch = data(folder, random_length_probability=0.0, objective=objective).batch(
            plan, range(16)
        )
        for row in range(16):
            terms = batch.terms[TOKENS]
            weights = terms.weights[terms.rows == row]
            (t,) = plan.groups_of(row).t
            np.testing.assert_allclose(weights, np.full(len(weights), rule(t)), rtol=1e-6)
            if objective["masking"] == "fixed_count":
                assert len(weights) == 1 + int(t * LENGTH)


def test_weights_that_differ_in_the_last_digit_are_other_data(folder: Path) -> None:
    near = [
        data(folder, mixture=[{"path": str(folder / "corpus"), "weight": w}]).fingerprint
        for w in (0.10005951, 0.10006049)
    ]
    assert near[0] != near[1]


def test_the_fingerprint_names_changes_of_weights_and_is_the_old_one_without(folder: Path) -> None:
    def fingerprint(**entry: Any) -> str:
        return data(folder, mixture=[{"path": str(folder / "corpus"), **entry}]).fingerprint

    content = data(folder).corpora[0].manifest.fingerprint(TRAIN)[:16]
    assert fingerprint() == f"{content}x1.0"
    assert fingerprint(weight=0.5, max_epochs=50.0).startswith(f"{content}x0.5<")
    changes = [[], [(900, 2.0)], [(900, 2.5)], [(2000, 2.0)], [(900, 2.0), (2000, 1.0)]]
    fingerprints = {
        fingerprint(weight_at=[{"tokens": tokens, "weight": weight} for tokens, weight in row])
        for row in changes
    }
    assert len(fingerprints) == len(changes)


def test_changes_of_weights_are_counted_in_tokens_and_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps({"text": "beta " * n}) + "\n" for n in range(1, 60))
    )
    prepare(
        [tmp_path / "b.jsonl"], folder / "tokenizer", tmp_path / "second", validation_fraction=0.0
    )
    first, second = str(folder / "corpus"), str(tmp_path / "second")
    later = {
        "path": second,
        "weight": 0.0,
        "weight_at": [{"tokens": 480_001, "weight": 3.0}, {"tokens": 10**9, "weight": 1.0}],
    }
    made = data(folder, mixture=[{"path": first}, later])
    assert made.mixture.changes == [
        2,
        2084,
    ]  # 480,001 tokens are more than one block of 10,000 x 48
    assert weight_changes(made) == [
        f"weights change in step 1,251, after 960,000 tokens: 25 % {first}, 75 % {second}",
        (
            f"weights change in step 1,302,501, after 1,000,320,000 tokens: 50 % {first}, 50 %"
            f" {second}"
        ),
    ]
    assert set(made.plan(1249).corpora.tolist()) == {0}
    assert abs(sum(made.plan(step).corpora.sum() for step in range(1250, 1310)) - 0.75 * 960) < 60
    assert weight_changes(data(folder)) == []


def test_an_epoch_reads_every_window_once(folder: Path) -> None:
    made = data(folder, batch=4)
    count = made.readers[TRAIN][0].num_instances
    read = [int(w) for step in range(-(-count // 4)) for w in made.plan(step).examples][:count]
    assert sorted(read) == list(range(count)) and read != sorted(read)


def predictions(batch: Batch) -> Iterator[tuple[int, int, float]]:
    """Row, column and weight of every predicted position."""
    terms = batch.terms[TOKENS]
    columns = (terms.rows.tolist(), terms.columns.tolist(), terms.weights.tolist())
    return zip(*columns, strict=True)


def test_the_same_noise_whatever_the_micro_batches(folder: Path) -> None:
    made = data(folder, document_mask=True)
    plan = made.plan(2)
    whole = made.batch(plan, range(16))
    for size in (1, 4, 8):
        parts = [made.batch(plan, range(i, i + size)) for i in range(0, 16, size)]
        assert [row for part in parts for row in part.inputs.tolist()] == whole.inputs.tolist()
        weights = {
            (first + row, column): weight
            for first, part in zip(range(0, 16, size), parts, strict=True)
            for row, column, weight in predictions(part)
        }
        assert weights == {(row, column): weight for row, column, weight in predictions(whole)}
        assert {part.normalizer for part in parts} == {whole.normalizer}


def test_ranks_of_a_step_see_different_noise(folder: Path) -> None:
    """Data-parallel ranks that seed alike would mask alike: here no two windows of a step share a
    mask or a t.
    """
    made = data(folder, random_length_probability=0.0)
    plan = made.plan(0)
    terms = made.batch(plan, range(16)).terms[TOKENS]
    masks = {tuple(terms.columns[terms.rows == r].tolist()) for r in range(16)}
    assert len(masks) == 16 and len(set(plan.groups.t.tolist())) == 16


def test_later_epochs_get_new_masks(folder: Path) -> None:
    made = data(folder, batch=4, random_length_probability=0.0)
    seen: dict[int, set[tuple[int, ...]]] = {}
    for step in range(90):
        plan = made.plan(step)
        terms = made.batch(plan, range(4)).terms[TOKENS]
        for r in range(4):
            seen.setdefault(int(plan.examples[r]), set()).add(
                tuple(terms.columns[terms.rows == r].tolist())
            )
    twice = [masks for masks in seen.values() if len(masks) > 1]
    assert len(twice) > len(seen) / 2


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_batches_against_a_walk_over_positions(masking: str, folder: Path) -> None:
    """Every mask, weight and segment from the draws of the noise, one position after the other."""
    made = data(
        folder,
        document_mask=True,
        random_length_probability=0.5,
        objective={"masking": masking, **({"eps": 0.05} if masking == "bernoulli" else {})},
    )
    windows = windows_by_hand(folder)
    plan = made.plan(3)
    rows: list[tuple[int, int, int, float, int]] = []
    segment = 0
    for row, (sample, item) in enumerate(
        zip(plan.samples.tolist(), plan.examples.tolist(), strict=True)
    ):
        draws = mask_uniforms(3, sample, LENGTH).tolist()
        for start, end in itertools.pairwise(plan.bounds[row].tolist()):
            t = float(plan.groups.t[segment])
            p, count = (1 - 0.05) * t + 0.05, min(1 + int(t * (end - start)), end - start)
            limit = sorted(draws[start:end])[count - 1]
            for position in range(start, end):
                if draws[position] < p if masking == "bernoulli" else draws[position] <= limit:
                    weight = 1 / p if masking == "bernoulli" else (end - start) / count
                    rows.append((position, row, windows[item][0][position], weight, segment))
            segment += 1
    batch = made.batch(plan, range(16))
    terms = batch.terms[TOKENS]
    columns = (terms.columns, terms.rows, terms.targets, terms.weights, terms.groups)
    expected = [(*key, np.float32(weight), segment) for *key, weight, segment in sorted(rows)]
    assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
    hidden = {(row, position) for position, row, *_ in rows}
    for row, item in enumerate(plan.examples.tolist()):
        clean = windows[item][0]
        assert batch.inputs[row].tolist() == [
            made.manifest.mask_id if (row, k) in hidden else clean[k] for k in range(LENGTH)
        ]


@pytest.mark.parametrize(
    ("token", "what"),
    [
        (-1, "an id past the vocabulary"),
        (10**6, "an id past the vocabulary"),
        (None, "the mask token"),
    ],
)
def test_ids_that_cannot_be_are_refused(token: int | None, what: str, folder: Path) -> None:
    corpus = data(folder).corpora[0]
    tokens = np.zeros(LENGTH, dtype=np.int64)
    tokens[5] = corpus.manifest.mask_id if token is None else token
    with pytest.raises(UserError, match=f"token 5 of window 3 is {what}, the shard is damaged"):
        check_tokens(corpus, tokens, "window 3")


def test_loader_gives_steps_in_order_and_hands_on_errors() -> None:
    made: list[int] = []

    def make(step: int) -> Any:
        made.append(step)
        if step == 7:
            raise ValueError("broken step")
        return f"plan {step}", [step]

    loader = Loader(make, 3, 9)
    steps: Iterator[Any] = iter(loader)
    assert [next(steps) for _ in range(4)] == [(k, f"plan {k}", [k]) for k in range(3, 7)]
    with pytest.raises(ValueError, match="broken step"):
        next(steps)
    loader.close()
    assert made == [3, 4, 5, 6, 7]


def test_loader_stops_early_and_stays_only_so_far_ahead() -> None:
    made: list[int] = []
    ready = threading.Event()

    def make(step: int) -> Any:
        made.append(step)
        if step == 2:
            ready.set()
        return f"plan {step}", [step]

    loader = Loader(make, 0, 1000, prefetch=2)
    assert ready.wait(5)
    loader.close()
    assert len(made) <= 8 and not any(
        thread.name == "loader" and thread.is_alive() for thread in threading.enumerate()
    )

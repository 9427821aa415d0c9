"""Validation: the same noise every time, draws that share none, and the sums and errors it claims
to be.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llada.config import build_config
from llada.data.manifest import VALIDATION
from llada.data.pretrain import PretrainData
from llada.data.training_data import short_names
from llada.engine.megatron import MegatronEngine
from llada.errors import UserError
from llada.evaluation import validation_files
from llada.evaluation.validation import Validator, unigram_entropy
from llada.objectives import TOKENS, Key, MaskedDiffusion
from tests.engine.support import OracleTrainer, canonical
from tests.preparation import prepare
from tests.workplace import CONFIG, Workplace


def made(
    workplace: Workplace, micro: int, windows: int = 64, **data: object
) -> tuple[PretrainData, MegatronEngine]:
    raw = {
        **CONFIG,
        "batch": {"global": 8, "micro": micro},
        "validation": {"every": 4, "windows": windows},
    }
    raw["data"] = {
        **CONFIG["data"],
        "mixture": [{"path": str(workplace.folder / "corpus")}],
        **data,
    }
    config = build_config(raw)
    return PretrainData(config), MegatronEngine(config)


@pytest.fixture
def parts(workplace: Workplace) -> Iterator[tuple[PretrainData, MegatronEngine]]:
    data, engine = made(workplace, 4)
    yield data, engine
    engine.close()


def test_equals_a_plain_computation_of_the_bound(
    parts: tuple[PretrainData, MegatronEngine],
) -> None:
    """Every draw alone through the oracle: mean over the segments of L/n times the summed loss, per
    token.
    """
    data, engine = parts
    validator = Validator(data, engine.parallel_rank)
    measured = validator(engine)
    line, plan = measured.line, validator.design(0).plan
    trainer = OracleTrainer(data.config, canonical(engine))
    purpose = f"validation/{data.corpora[0].manifest.fingerprint(VALIDATION)}"
    # the noise is the measure's, whatever the run's seed
    objective = MaskedDiffusion(data.manifest.mask_id, masking="fixed_count")
    key = Key(0, purpose)
    assert data.config.seed != 0
    total, deciles, documents = 0.0, {}, {}
    starts = np.cumsum([0, *data.corpora[0].shards(VALIDATION)[0].lengths])
    for i in range(len(plan.samples)):
        row = data.row(VALIDATION, plan, i)
        corrupted = objective.corrupt(row, key)
        masked = corrupted.terms[TOKENS].positions
        segment = np.repeat(np.arange(len(row.bounds) - 1), np.diff(row.bounds))
        with torch.no_grad():
            logits = trainer.oracle(
                torch.from_numpy(corrupted.inputs)[None], torch.from_numpy(segment)[None]
            )[0]
        each = torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(row.tokens), reduction="none"
        ).numpy()
        for k, (start, end) in enumerate(itertools.pairwise(row.bounds.tolist())):
            positions = masked[(masked >= start) & (masked < end)]
            size = end - start
            t = row.groups.t[k]
            assert len(positions) == 1 + math.floor(t * size)
            loss = size / len(positions) * each[positions].sum()
            total += loss
            # Of a document all parts in all windows that are read belong together.
            document = int(np.searchsorted(starts, plan.examples[i] * 64 + start, side="right"))
            own = documents.setdefault(document, [0.0, 0])
            own[0], own[1] = own[0] + loss, own[1] + size
            sums = deciles.setdefault(int(t * 10), [0.0, 0])
            sums[0], sums[1] = sums[0] + loss, sums[1] + size
    every = plan.tokens
    assert line["nelbo_per_token"] == pytest.approx(total / every, rel=1e-5)
    errors = [total / every - (total - loss) / (every - size) for loss, size in documents.values()]
    k = len(documents)
    assert k > 1 and (line["corpora"]["corpus"]["items"], line["corpora"]["corpus"]["unit"]) == (
        k,
        "documents",
    )
    expected = math.sqrt((k - 1) / k * sum(e**2 for e in errors))
    assert line["nelbo_per_token_se"] == pytest.approx(expected, rel=1e-3)
    assert line["nelbo_per_token_se_noise"] > 0
    low, high = line["nelbo_per_token_ci95"]
    assert (low + high) / 2 == pytest.approx(
        line["nelbo_per_token"]
    ) and high - low > 2 * 1.96 * line["nelbo_per_token_se"]
    for d, entry in enumerate(line["corpora"]["corpus"]["t_deciles"]):
        assert (entry is None) == (d not in deciles)
        if entry is not None:
            assert entry["nelbo_per_token"] == pytest.approx(
                deciles[d][0] / deciles[d][1], rel=1e-5
            )
    _, tokens, text_bytes = data.corpora[0].manifest.totals(VALIDATION)
    assert line["bits_per_byte"] == pytest.approx(
        line["nelbo_per_token"] / math.log(2) * tokens / text_bytes
    )


def test_the_same_noise_whatever_the_micro_batch_or_the_seed(workplace: Workplace) -> None:
    lines = []
    for micro in (1, 2, 8):
        data, engine = made(workplace, micro)
        try:
            lines.append(Validator(data, engine.parallel_rank)(engine).line["nelbo_per_token"])
        finally:
            engine.close()
    assert lines[1:] == [pytest.approx(lines[0], rel=1e-6)] * 2
    seen = []
    for seed in (1, 2):
        data = PretrainData(
            build_config(
                {
                    **CONFIG,
                    "seed": seed,
                    "data": {
                        **CONFIG["data"],
                        "mixture": [{"path": str(workplace.folder / "corpus")}],
                    },
                }
            )
        )
        validator = Validator(data, engine.parallel_rank)
        plan = validator.design(0).plan
        seen.append(
            (
                plan.groups.t.tolist(),
                [
                    batch.inputs.tolist()
                    for batch in validator._batches(plan, 0, np.arange(len(plan.samples)))
                ],
            )
        )
    assert seen[0] == seen[1]


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_every_text_is_read_at_evenly_spaced_t_from_its_own_offset_and_shares_no_noise(
    few: bool, document_mask: bool, parts: tuple[PretrainData, MegatronEngine], workplace: Workplace
) -> None:
    """With fewer windows than a quarter of validation.windows, all of them are read, at more values
    of t.
    """
    count = parts[0].readers[VALIDATION][0].num_instances
    windows = count * 13 // 4 * 4 if few else count // 2 // 4 * 4
    mixture = [{"path": str(workplace.folder / "corpus")}]
    raw = {**CONFIG, "validation": {"windows": windows}}
    config = build_config(
        {**raw, "data": {"sequence_length": 64, "document_mask": document_mask, "mixture": mixture}}
    )
    data = PretrainData(config)
    design = Validator(data, parts[1].parallel_rank).design(0)
    plan, each = design.plan, 12 if few else 4
    assert len(plan.samples) == (12 * count if few else windows)
    assert sorted(np.unique(plan.examples, return_counts=True)[1]) == [each] * (
        count if few else windows // 4
    )
    assert len(set(plan.samples.tolist())) == len(plan.samples), "every draw has masks of its own"
    assert sorted(design.groups.ravel().tolist()) == list(range(len(plan.groups))), (
        "every group is one draw"
    )
    sizes = plan.groups.sizes
    assert (sizes[design.groups] == sizes[design.groups[:, :1]]).all()
    offsets = []
    for text in range(design.text.max() + 1):
        t = np.sort(design.t[design.text == text].ravel())
        np.testing.assert_allclose(np.diff(t), 1 / each, atol=1e-12)
        offsets.append(t[0] * each)
    assert len({round(offset, 9) for offset in offsets}) == len(offsets), (
        "the offsets are independent draws"
    )
    assert np.std(offsets) == pytest.approx(math.sqrt(1 / 12), rel=0.35)
    if document_mask:
        assert len(design.items) < len(np.unique(design.text)), (
            "the parts of a document are one item"
        )
    else:
        assert design.items.tolist() == sorted(set(plan.examples.tolist()))


def test_the_file_of_a_validation_holds_the_losses_behind_its_line(
    parts: tuple[PretrainData, MegatronEngine], tmp_path: Path
) -> None:
    data, engine = parts
    measured = Validator(data, engine.parallel_rank)(engine)
    path = validation_files.write(tmp_path, 7, measured.corpora)
    assert path == tmp_path / "validation" / "step_00000007.npz" and path.stat().st_size < 20_000
    [back] = validation_files.read(tmp_path, 7)
    line = measured.line["corpora"]["corpus"]
    assert (back.name, back.measure.fingerprint) == ("corpus", line["measure"])
    assert (
        back.sample.estimate().mean == line["nelbo_per_token"] == measured.line["nelbo_per_token"]
    )
    with np.load(path, allow_pickle=False) as file:  # what a reader without this code finds
        assert file["0.item_loss"].sum() / file["0.item_length"].sum() == pytest.approx(
            line["nelbo_per_token"]
        )
        assert len(file["0.item"]) == line["items"]
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"PK" + bytes(100)):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"step_00000007.npz: (damaged|cannot be read)"):
            validation_files.read(tmp_path, 7)
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(content)
        for at in rng.integers(0, len(content), 3):
            broken[at] = rng.integers(256)
        path.write_bytes(bytes(broken))
        # A change that no checksum covers may go unseen, but nothing else is raised.
        with contextlib.suppress(UserError):
            assert len(validation_files.read(tmp_path, 7)) == 1


def test_names_of_corpora_are_short_and_distinct() -> None:
    assert short_names(["corpora/wiki", "/data/books/"]) == ["wiki", "books"]
    assert short_names(["a/en/corpus", "a/de/corpus", "b/code"]) == [
        "en/corpus",
        "de/corpus",
        "code",
    ]
    assert short_names(["x/en/corpus", "y/en/corpus", "x/en/corpus"]) == [
        "x/en/corpus",
        "y/en/corpus",
        "x/en/corpus.2",
    ]


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.array([1, 1, 0, 2])) == pytest.approx(1.5 * math.log(2))


def test_a_corpus_without_validation_documents_trains_without(workplace: Workplace) -> None:
    config = workplace.config(
        "without.yaml",
        run={"dir": "without", "threads": 2},
        train={"steps": 4},
        data={"sequence_length": 64, "mixture": [{"path": "other"}]},
    )
    out = workplace.run("pretrain", config).stdout
    assert "no held-out text fits: training without validation" in out
    assert not any("nelbo_per_token" in line for line in workplace.lines("without"))


def test_a_mixture_reports_each_corpus(workplace: Workplace) -> None:
    prepare(
        [made_up_texts(workplace)],
        workplace.folder / "tokenizer",
        workplace.folder / "second",
        validation_fraction=0.3,
    )
    mixture = [{"path": "corpus", "weight": 3.0}, {"path": "second", "weight": 1.0}]
    config = workplace.config(
        "mixed.yaml",
        run={"dir": "mixed", "threads": 2},
        train={"steps": 2},
        data={"sequence_length": 64, "mixture": mixture},
    )
    workplace.run("pretrain", config)
    line = next(line for line in workplace.lines("mixed") if "nelbo_per_token" in line)
    first, other = line["corpora"]["corpus"], line["corpora"]["second"]
    assert line["nelbo_per_token"] == pytest.approx(
        0.75 * first["nelbo_per_token"] + 0.25 * other["nelbo_per_token"]
    )
    assert line["nelbo_per_token_se"] == pytest.approx(
        math.hypot(0.75 * first["nelbo_per_token_se"], 0.25 * other["nelbo_per_token_se"])
    )


def made_up_texts(workplace: Workplace) -> Path:
    """Forty made-up documents as a JSONL file."""
    path = workplace.folder / "made.jsonl"
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "one", "two"]
    path.write_text(
        "".join(json.dumps({"text": " ".join(rng.choice(words, 200))}) + "\n" for _ in range(40))
    )
    return path

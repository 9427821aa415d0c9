"""Fine-tuning data against the published rules, applied by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llada.chat.format import ChatFormat, Message
from llada.config import build_config
from llada.data.manifest import TRAIN, VALIDATION
from llada.data.sft import SFTData
from llada.data.tasks import open_data
from llada.engine.base import ParallelRank
from llada.errors import UserError
from llada.evaluation.validation import Validator
from llada.noise import timesteps
from llada.objectives import TOKENS
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.preparation import prepare, prepare_sft

LENGTH = 40
WORDS = ["alpha", "beta", "gamma", "delta", "\n", "<|mdm_mask|>"]


def conversations() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def text(longest: int) -> str:
        return "x" + " ".join(rng.choice(WORDS, rng.integers(1, longest)))

    rows: list[dict[str, Any]] = [{"prompt": text(5), "response": text(6)} for _ in range(90)]
    for _ in range(20):
        turns = [
            ("user", text(3)),
            ("assistant", text(3)),
            ("user", text(3)),
            ("assistant", text(3)),
        ]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    rows.append({"prompt": "short", "response": "y" * 200})
    rows.append({"prompt": "z" * 200, "response": "short"})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sft")
    rows = conversations()
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_byte_level_bpe(iter(json.dumps(row) for row in rows[:-2] * 3), 330).save(
        root / "tokenizer"
    )
    prepare_sft(
        [root / "rows.jsonl"],
        root / "tokenizer",
        root / "corpus",
        validation_fraction=0.2,
        shard_tokens=900,
    )
    return root


def config(folder: Path, batch: int = 8, **sections: Any) -> Any:
    raw = {
        "task": "sft",
        "seed": 3,
        "run": {"dir": "unused"},
        "train": {"steps": 100},
        "batch": {"global": batch, "micro": 1},
        "model": {
            "num_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "vocab_size": 384,
        },
        "schedule": {"stages": [{"shape": "constant", "start": 1e-3}]},
        "data": {"sequence_length": LENGTH, "mixture": [{"path": str(folder / "corpus")}]},
        **sections,
    }
    return build_config(raw)


def made(folder: Path, batch: int = 8, **sections: Any) -> SFTData:
    data = open_data(config(folder, batch, **sections))
    assert isinstance(data, SFTData)
    return data


def examples(folder: Path) -> dict[tuple[int, ...], int]:
    """Every (prompt, response, EOS) of the files that fits a row -> the length of its prompt."""
    tokenizer = Tokenizer.load(folder / "tokenizer")
    chat = ChatFormat(tokenizer)
    prompt_lengths = {}
    for row in conversations():
        turns = row.get("messages") or [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["response"]},
        ]
        messages = [Message(turn["role"], turn["content"]) for turn in turns]
        for place in range(1, len(messages), 2):
            prompt = chat.prompt(messages[:place]).tolist()
            whole = (
                *prompt,
                *tokenizer.encode(messages[place].content.strip()).tolist(),
                tokenizer.eos_id,
            )
            if len(whole) <= LENGTH:
                prompt_lengths[whole] = len(prompt)
    return prompt_lengths


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_rows_are_prompt_response_padding_and_filler(group: int, folder: Path) -> None:
    data, known = made(folder, sft={"pad_group": group}), examples(folder)
    eos = data.manifest.eos_id
    totals: dict[int, int] = {}
    padded: dict[int, int] = {}
    for step in range(8):
        plan = data.plan(step)
        assert plan.samples.tolist() == list(range(8 * step, 8 * step + 8))
        assert data.normalizer(plan) == 8
        for i, sample in enumerate(plan.samples.tolist()):
            row = data.row(TRAIN, plan, i)
            reader = data.readers[TRAIN][0]
            total, prompt = reader.total(plan.examples[i]), reader.prompt_length(plan.examples[i])
            assert known[tuple(row.tokens[:total].tolist())] == prompt
            assert (row.tokens[total:] == eos).all()
            end = int(row.bounds[1])
            assert row.bounds.tolist() in ([0, end, LENGTH], [0, LENGTH])
            assert row.groups.spans.tolist() == [[prompt, end]]
            assert row.groups.scales.tolist() == [1 / (end - prompt)]
            totals[sample], padded[sample] = total, end
        assert plan.tokens == sum(padded[sample] for sample in plan.samples.tolist()), (
            "filler is in no count"
        )
    for sample in range(60):
        first = sample // group * group
        assert padded[sample] == max(totals[other] for other in range(first, first + group))


def test_autoregression_reads_bos_once_and_no_padding(folder: Path) -> None:
    data = made(folder, objective={"name": "autoregressive"})
    known = examples(folder)
    for step in range(3):
        plan = data.plan(step)
        for i in range(8):
            row = data.row(TRAIN, plan, i)
            total = data.readers[TRAIN][0].total(plan.examples[i])
            prompt = known[tuple(row.tokens[:total].tolist())]
            corrupted = data.objective.corrupt(row, data.key)
            terms = corrupted.terms[TOKENS]
            # A conversation begins with BOS and is read as it is: the state before predicts.
            assert corrupted.inputs[:total].tolist() == row.tokens[:total].tolist()
            assert terms.positions.tolist() == list(range(prompt - 1, total - 1))
            assert terms.targets.tolist() == row.tokens[prompt:total].tolist()
            assert terms.weights.tolist() == [1 / (total - prompt)] * (total - prompt)


def test_the_end_of_a_capped_mixture_cuts_its_last_group(folder: Path) -> None:
    mixture = [{"path": str(folder / "corpus"), "max_epochs": 1}]
    data = made(
        folder,
        batch=1,
        sft={"pad_group": 50},
        data={"sequence_length": LENGTH, "mixture": mixture},
        train={"steps": 1},
    )
    last = data.mixture.num_samples - 1
    ends = [int(data.plan(sample).bounds[0][1]) for sample in range(last + 1)]
    longest = [
        data.readers[TRAIN][0].total(data.plan(sample).examples[0]) for sample in range(last + 1)
    ]
    assert ends == [max(longest[s // 50 * 50 : s // 50 * 50 + 50]) for s in range(last + 1)]


@pytest.mark.parametrize("mode", ["stratified", "iid"])
def test_t_is_drawn_per_conversation(mode: str, folder: Path) -> None:
    data = made(folder, objective={"timesteps": mode})
    for step in range(3):
        plan = data.plan(step)
        assert plan.groups.t.tolist() == timesteps(3, step, np.ones(8), mode).tolist()


@pytest.mark.parametrize("masking", ["bernoulli", "fixed_count"])
def test_no_prompt_token_and_no_filler_is_ever_masked_weighted_or_changed(
    masking: str, folder: Path
) -> None:
    data = made(folder, objective={"masking": masking})
    masked_padding = 0
    for step in range(40):
        plan = data.plan(step)
        batch = data.batch(plan, range(8))
        for row in range(8):
            clean = data.row(TRAIN, plan, row)
            ((start, end),) = clean.groups.spans
            (t,) = clean.groups.t
            terms = batch.terms[TOKENS]
            inside = terms.rows == row
            columns = terms.columns[inside].numpy()
            assert ((start <= columns) & (columns < end)).all()
            changed = np.flatnonzero(batch.inputs[row].numpy() != clean.tokens)
            assert set(changed.tolist()) == set(columns.tolist())
            weights = terms.weights[inside]
            assert (weights > 0).all()
            masked_padding += int(
                (columns >= data.readers[TRAIN][0].total(plan.examples[row])).sum()
            )
            if masking == "fixed_count":
                size = int(end - start)
                count = 1 + int(t * size)
                np.testing.assert_allclose(weights, np.full(count, 1 / count), rtol=1e-6)
            else:
                p = 0.999 * t + 0.001
                expected = np.full(len(columns), 1 / p / (end - start))
                np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert masked_padding > 20, "padding is part of the response"


def test_every_reply_of_a_conversation_is_read_at_some_time(folder: Path) -> None:
    data = made(folder)
    reader = data.readers[TRAIN][0]
    assert len(reader.replies) > reader.num_instances
    read = {int(item) for step in range(200) for item in data.plan(step).examples}
    assert read == set(range(len(reader.replies)))


def test_validation_is_the_response_with_its_own_eos(folder: Path) -> None:
    data = made(folder)
    reader = data.readers[VALIDATION][0]
    draws = np.arange(16)
    plan = data.validation_plan(
        draws,
        0,
        draws % reader.num_instances,
        draws // reader.num_instances,
        lambda rows, texts: np.full(len(rows), 0.5),
    )
    for i in range(16):
        row = data.row(VALIDATION, plan, i)
        reply = int(plan.examples[i])
        assert row.groups.spans.tolist() == [[reader.prompt_length(reply), reader.total(reply)]]
        assert row.groups.scales == [1]
        assert row.tokens[reader.total(reply) - 1] == data.manifest.eos_id
    responses = reader.all_replies[:, 4] - reader.all_replies[:, 3]
    assert reader.tokens_per_byte() == responses.sum() / data.manifest.totals(VALIDATION)[2]


def test_validation_reads_every_reply_of_a_conversation_and_counts_the_conversation(
    folder: Path,
) -> None:
    data = made(folder, validation={"windows": 400})
    reader = data.readers[VALIDATION][0]
    assert reader.num_instances < 100 and len(reader.replies) > reader.num_instances
    design = Validator(data, ParallelRank(0, 1, 0, 1)).design(0)
    assert set(design.plan.examples.tolist()) == set(range(len(reader.replies)))
    assert design.measure.unit == "conversations" and len(design.items) == reader.num_instances
    replies = design.plan.examples[design.plan.rows[design.groups]]
    assert (replies == replies[:, :1]).all(), "a sweep reads one reply"
    assert (design.items[design.owner] == reader.replies[replies[:, 0], 0]).all()
    for text in range(design.text.max() + 1):
        assert len(set(replies[design.text == text].ravel().tolist())) == 1
    np.testing.assert_allclose(np.diff(design.t, axis=1), 0.25, atol=1e-12)
    offsets = {round(float(t), 9) for t in design.t[:, 0]}
    assert len(offsets) == len(design.t), "no two sweeps share their t"
    read = design.plan.groups.sizes[design.groups[:, 0]]
    assert read.tolist() == [
        reader.total(int(r)) - reader.prompt_length(int(r)) for r in replies[:, 0]
    ]


def test_what_does_not_fit_is_counted_and_listed(folder: Path) -> None:
    data = made(folder)
    lost = [row for split in (TRAIN, VALIDATION) for row in data.readers[split][0].too_long()]
    by_prompt = [row["prompt_tokens"] >= LENGTH for row in lost]
    assert (len(lost), sum(by_prompt)) == (2, 1)
    assert all(row["tokens"] > LENGTH for row in lost)
    summaries = " ".join(data.readers[split][0].summary() for split in (TRAIN, VALIDATION))
    assert "longer than data.sequence_length = 40 and not trained on" in summaries
    for split in (TRAIN, VALIDATION):
        reader = data.readers[split][0]
        of_lost = np.isin(
            reader.all_replies[:, 0], [row["conversation"] for row in reader.too_long()]
        ).sum()
        later = len(reader.all_replies) - len(reader.replies) - of_lost
        assert later > 0
        words = (
            "; replies of the others that are longer than 40 tokens with their prompt, and not"
            f" trained on: {later}"
        )
        assert reader.summary().endswith(words)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"data.sequence_length: 8 is too short: \d+ conversations \(\d+ by their prompt alone;"
            r" number"
        ),
    ):
        made(folder, data={"sequence_length": 8, "mixture": [{"path": str(folder / "corpus")}]})
    (tmp_path / "a.txt").write_text("alpha beta " * 50)
    prepare([tmp_path / "a.txt"], folder / "tokenizer", tmp_path / "text")
    with pytest.raises(
        UserError,
        match=r"was made by `llada data prepare` and can be trained on by `llada pretrain` only",
    ):
        made(
            folder, data={"sequence_length": LENGTH, "mixture": [{"path": str(tmp_path / "text")}]}
        )
    with pytest.raises(
        UserError,
        match=r"was made by `llada data prepare-sft` and can be trained on by `llada sft` only",
    ):
        open_data(config(folder, task="pretrain"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"data": {"sequence_length": 40, "mixture": [{"path": "x"}], "document_mask": True}},
            "data.document_mask: true is for pretraining",
        ),
        (
            {
                "data": {
                    "sequence_length": 40,
                    "mixture": [{"path": "x"}],
                    "random_length_probability": 0.1,
                }
            },
            "not cut, set 0",
        ),
        (
            {
                "schedule": {
                    "stages": [{"shape": "linear", "end": 1, "tokens": 9}, {"shape": "constant"}]
                }
            },
            "give the lengths as steps",
        ),
        (
            {"objective": {"name": "autoregressive"}, "sft": {"pad_group": 4}},
            "sft.pad_group: 4 has no effect with objective.name: autoregressive",
        ),
        ({"task": "pretrain", "sft": {"pad_group": 4}}, "sft.pad_group: 4 is for task: sft only"),
        ({"sft": {"pad_grup": 4}}, "sft.pad_grup: unknown setting .did you mean 'sft.pad_group'?"),
    ],
)
def test_settings_that_make_no_sense(sections: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(UserError, match=message):
        config(folder, **sections)


def test_a_reply_that_was_cut_is_not_padded(folder: Path, tmp_path: Path) -> None:
    """EOS after it would teach the model to end in the middle of a sentence."""
    limit = LENGTH - 12
    prepare_sft(
        [folder / "rows.jsonl"],
        folder / "tokenizer",
        tmp_path / "corpus",
        max_tokens=limit,
        truncate=True,
        validation_fraction=0.2,
    )
    mixture = [
        {"path": str(path)} for path in (tmp_path / "corpus", folder / "corpus")
    ]  # the other corpus has longer replies
    data = made(folder, sft={"pad_group": 8}, data={"sequence_length": LENGTH, "mixture": mixture})
    readers, eos = data.readers[TRAIN], data.manifest.eos_id
    seen = {True: 0, False: 0}
    for step in range(80):
        plan = data.plan(step)
        totals = [
            readers[source].total(int(item))
            for source, item in zip(plan.corpora, plan.examples, strict=True)
        ]
        for i in range(8):
            row = data.row(TRAIN, plan, i)
            ((start, end),) = row.groups.spans.tolist()
            longest = max(totals)
            if int(row.tokens[totals[i] - 1]) == eos:
                assert end == longest
            else:
                assert end == totals[i] == limit
                assert eos not in row.tokens[start:end]
                seen[end < longest] += 1
    assert min(seen.values()) > 5


def test_corpora_of_two_chat_templates_are_refused(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    prepare_sft(
        [folder / "rows.jsonl"],
        folder / "tokenizer",
        tmp_path / "other",
        chat_template=str(template),
        validation_fraction=0.2,
    )
    mixture = [{"path": str(path)} for path in (folder / "corpus", tmp_path / "other")]
    with pytest.raises(
        UserError,
        match=(
            r"data.mixture.1.path: .*/other was prepared with another chat template than .*/corpus"
        ),
    ):
        made(folder, data={"sequence_length": 300, "mixture": mixture})
    made(folder, data={"sequence_length": 300, "mixture": mixture[1:]})

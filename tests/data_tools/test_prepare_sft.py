"""Conversations on disk against plain recomputation, and every refusal."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.documents.conversation_records import ConversationFields
from data_tools.documents.conversations import ConversationSettings, ConversationType
from data_tools.readers.records import Origin
from data_tools.readers.report import Report
from llada.chat.format import TEMPLATE, ChatFormat, Message
from llada.chat.template import TemplateFormat
from llada.data.corpus import Corpus
from llada.data.manifest import Manifest
from llada.data.verify import verify_corpus
from llada.errors import UserError
from llada.tokenizer import Tokenizer, train_byte_level_bpe
from tests.data_tools.corpora import inspection
from tests.preparation import prepare_sft

PAIRS = [{"prompt": f"What is {i} + {i}?", "response": f"It is {2 * i}."} for i in range(120)]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "Count."},
            {"role": "user", "content": f"Start at {i}."},
            {"role": "assistant", "content": f"{i}"},
            {"role": "user", "content": "Go on."},
            {"role": "assistant", "content": f"{i + 1}, grüße 🙂"},
        ]
    }
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft") / "tokenizer"
    train_byte_level_bpe(
        iter([json.dumps(row, ensure_ascii=False) for row in PAIRS + TALKS]), 340
    ).save(folder)
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turns(row: dict[str, Any]) -> list[Message]:
    if "messages" in row:
        return [Message(m["role"], m["content"]) for m in row["messages"]]
    return [Message("user", row["prompt"]), Message("assistant", row["response"])]


def pairs_of(folder: Path, split: str) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) of every reply on disk, in order."""
    corpus = Corpus.open(folder)
    pairs = []
    for entry in corpus.manifest.of(split):
        flat = np.fromfile(folder / f"{entry.name}.bin", corpus.manifest.dtype).tolist()
        starts = np.concatenate([[0], np.cumsum(corpus.shard(entry).lengths)]).tolist()
        for document, history_end, turn_start, response_start, turn_end in np.fromfile(
            folder / f"{entry.name}.replies", "<i8"
        ).reshape(-1, 5):
            ids = flat[starts[document] : starts[document + 1]]
            pairs.append(
                (ids[:history_end] + ids[turn_start:response_start], ids[response_start:turn_end])
            )
    return pairs


@pytest.mark.parametrize("limit", [300, 2**28])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_every_reply_with_its_prompt(
    limit: int, fraction: float, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.job.worker.BATCH_BYTES", 700)
    source = write(tmp_path / "talks.jsonl", PAIRS + TALKS)
    folder = tmp_path / "corpus"
    manifest = prepare_sft(
        [source], tokenizer, folder, validation_fraction=fraction, shard_tokens=limit
    )
    assert verify_corpus(folder) == []
    assert (len(manifest.of("train")) > 3) == (limit == 300)
    encoder = Tokenizer.load(tokenizer)
    chat = ChatFormat(encoder)
    wanted = []
    for row in PAIRS + TALKS:
        messages = turns(row)
        for number in [i for i, message in enumerate(messages) if message.role == "assistant"]:
            response = [*encoder.encode(messages[number].content).tolist(), encoder.eos_id]
            wanted.append((chat.prompt(messages[:number]).tolist(), response))
    train, held_out = pairs_of(folder, "train"), pairs_of(folder, "validation")
    assert sorted(train + held_out) == sorted(wanted)
    assert train == [pair for pair in wanted if pair in train]  # in the order of the files
    assert bool(held_out) == (fraction > 0)
    replies = sum(
        len(m.content.encode())
        for row in PAIRS + TALKS
        for m in turns(row)
        if m.role == "assistant"
    )
    assert sum(manifest.totals(split)[2] for split in ("train", "validation")) == replies


def test_one_question_is_never_on_both_sides(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i % 30}", "response": f"answer {i}"} for i in range(300)]
    prepare_sft(
        [write(tmp_path / "rows.jsonl", rows)],
        tokenizer,
        tmp_path / "corpus",
        validation_fraction=0.3,
    )
    sides = [
        {tuple(prompt) for prompt, _ in pairs_of(tmp_path / "corpus", split)}
        for split in ("train", "validation")
    ]
    assert all(sides)
    assert len(sides[0]) + len(sides[1]) == 30


def test_the_kind_is_in_the_manifest_and_damage_is_found(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    prepare_sft([write(tmp_path / "rows.jsonl", PAIRS)], tokenizer, folder, validation_fraction=0.0)
    manifest = Manifest.load(folder)
    assert manifest.kind == "conversations"
    path = folder / "train-00000.replies"
    rows = np.fromfile(path, "<i8")
    rows[3] = 10**6
    rows.tofile(path)
    assert any("checksum" in problem for problem in verify_corpus(folder))
    assert any(
        "reply 0 does not lie inside" in problem for problem in verify_corpus(folder, hashes=False)
    )
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or altered"):
        Corpus.open(folder)


def message(role: Any, content: Any = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


BAD = [
    (
        {"prompt": "p", "response": " \n"},
        "the response (turn 2) is empty",
        "conversations with an empty response",
    ),
    (
        {"messages": [message("user"), message("asistant")]},
        "unknown role 'asistant' (did you mean 'assistant'?)",
        "an unknown role",
    ),
    (
        {"messages": TALKS[0]["messages"], **PAIRS[0]},
        "choose with --format",
        "more than one conversation",
    ),
    (
        {"messages": [message("assistant"), message("user")]},
        "the last turn is the user's",
        "without a reply",
    ),
    ({"messages": []}, "not a list of turns", "without turns"),
    (
        {"messages": [message("user"), {"role": "assistant"}]},
        "turn 2: field 'content' is missing",
        "with a bad turn",
    ),
    (
        {"messages": [message("user"), message("assistant", 3)]},
        "turn 2: field 'content' is not a string but int",
        "with a bad turn",
    ),
    (
        {"prompt": "p", "respons": "r"},
        "field 'response' is missing, there are: prompt, respons",
        "without the field",
    ),
    (["p", "r"], "a JSON list", "without the field"),
]


@pytest.mark.parametrize(("row", "problem", "reason"), BAD)
def test_a_bad_line_is_named_or_counted(
    row: Any, problem: str, reason: str, tokenizer: Path, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", [*PAIRS[:3], row])
    output = tmp_path / "out" / "corpus"
    with pytest.raises(UserError) as caught:
        prepare_sft([source], tokenizer, output)
    assert str(caught.value).startswith(f"{source}:4: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"], (
        "nothing half-written is left"
    )
    manifest = prepare_sft([source], tokenizer, output, skip_bad=True)
    [(counted, number)] = manifest.skipped.items()
    assert reason in counted
    assert number == 1


def test_only_json_lines_are_read(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("not a conversation")
    write(tmp_path / "in" / "rows.jsonl", PAIRS)
    manifest = prepare_sft([tmp_path / "in"], tokenizer, tmp_path / "corpus", validation_fraction=0)
    assert manifest.totals("train")[0] == len(PAIRS)
    with pytest.raises(
        UserError,
        match=(
            r"notes.txt: conversations are not read from text files; allowed extensions: .jsonl,"
            r" .json \(also with .gz or .zst\), .parquet, .arrow$"
        ),
    ):
        prepare_sft([tmp_path / "in" / "notes.txt"], tokenizer, tmp_path / "other")


def test_the_command(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["response"]} for row in PAIRS]
    words = [
        "prepare-sft",
        "--input",
        str(write(tmp_path / "rows.jsonl", rows)),
        "--tokenizer",
        str(tokenizer),
        "--output",
    ]
    words += [
        str(tmp_path / "corpus"),
        "--prompt-field",
        "q",
        "--response-field",
        "a",
        "--validation-fraction",
        "0",
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "train: 120 conversations with 120 replies" in result.output
    again = CliRunner().invoke(app, [*words, "--shard-tokens", "5"])
    assert isinstance(again.exception, UserError)
    assert "--force" in str(again.exception)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "corpus")])
    assert shown.exit_code == 0, shown.output
    assert "What is 0 + 0?" in shown.output


MARKED = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('a"
    " late system turn') }}{% endif %}<|start_header_id|>{{ m.role }}: {{ m.content | trim"
    " }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant: {%"
    " endif %}"
)


def with_template(tokenizer: Path, folder: Path, template: str = MARKED) -> Path:
    """The tokenizer with a chat template beside it."""
    loaded = Tokenizer.load(tokenizer)
    loaded.chat_template = template
    loaded.save(folder)
    return folder


def test_a_chat_template_of_the_tokenizer_or_of_a_file(tokenizer: Path, tmp_path: Path) -> None:
    own = with_template(tokenizer, tmp_path / "own")
    (tmp_path / "file.jinja").write_text(MARKED)
    source = write(tmp_path / "talks.jsonl", PAIRS[:20] + TALKS)
    first = prepare_sft(
        [source], own, tmp_path / "a", chat_template="tokenizer", validation_fraction=0
    )
    second = prepare_sft(
        [source],
        tokenizer,
        tmp_path / "b",
        chat_template=str(tmp_path / "file.jinja"),
        validation_fraction=0,
    )
    default = prepare_sft([source], own, tmp_path / "c", validation_fraction=0)
    assert first.fingerprint("train") == second.fingerprint("train") != default.fingerprint("train")
    assert verify_corpus(tmp_path / "a") == []
    encoder = Tokenizer.load(tmp_path / "b" / "tokenizer")
    assert (
        encoder.chat_template
        == Tokenizer.load(tmp_path / "a" / "tokenizer").chat_template
        == MARKED
    )
    assert Tokenizer.load(tmp_path / "c" / "tokenizer").chat_template == TEMPLATE
    assert {m.tokenizer_fingerprint for m in (first, second, default)} == {
        Tokenizer.load(tokenizer).fingerprint
    }
    chat = TemplateFormat(encoder, MARKED)
    wanted = []
    for row in PAIRS[:20] + TALKS:
        messages = turns(row)
        for number in [i for i, m in enumerate(messages) if m.role == "assistant"]:
            response = [*encoder.encode(messages[number].content).tolist(), encoder.eos_id]
            wanted.append((chat.prompt(messages[:number]).tolist(), response))
    assert pairs_of(tmp_path / "a", "train") == wanted
    assert pairs_of(tmp_path / "c", "train") != wanted


def test_a_conversation_that_the_template_refuses_is_a_bad_line(
    tokenizer: Path, tmp_path: Path
) -> None:
    own = with_template(tokenizer, tmp_path / "own")
    late = {"messages": [message("user"), message("system"), message("assistant")]}
    source = write(tmp_path / "talks.jsonl", [*PAIRS[:3], late])
    with pytest.raises(
        UserError,
        match=(
            r"talks.jsonl:4: the chat template refuses it: a late system turn; --skip-bad counts"
            r" such lines and leaves them out"
        ),
    ):
        prepare_sft([source], own, tmp_path / "corpus", chat_template="tokenizer")
    manifest = prepare_sft(
        [source], own, tmp_path / "corpus", chat_template="tokenizer", skip_bad=True
    )
    assert manifest.skipped == {"conversations that the chat template refuses": 1}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"chat_template": "tokenizer"}, "has no chat template (chat_template.jinja"),
        (
            {"chat_template": "nowhere.jinja"},
            "--chat-template: 'nowhere.jinja' is neither llada nor tokenizer nor a file",
        ),
        (
            {"chat_template": "tokeniser"},
            "--chat-template: 'tokeniser' (did you mean 'tokenizer'?) is neither",
        ),
        ({"chat_template": "empty.jinja"}, "the chat template leaves out turn 1"),
        ({"chat_template": "broken.jinja"}, "the chat template is not valid Jinja: line 1"),
        ({"chat_template": "binary.jinja"}, "binary.jinja is not UTF-8"),
        ({"max_tokens": 1}, "--max-tokens: 1 is less than 2"),
        ({"truncate": True}, "--truncate: needs --max-tokens"),
        ({"max_tokens": 3}, "--input: none of 120 documents is left (left out: 120 replies"),
    ],
)
def test_options_that_cannot_be_used(
    options: dict[str, Any],
    problem: str,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.jinja").write_text("{% if %}")
    (tmp_path / "empty.jinja").touch()
    (tmp_path / "binary.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError) as caught:
        prepare_sft(
            [write(tmp_path / "rows.jsonl", PAIRS)], tokenizer, tmp_path / "corpus", **options
        )
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("template", ["llada", "tokenizer"])
def test_replies_longer_than_max_tokens(
    template: str, truncate: bool, tokenizer: Path, tmp_path: Path
) -> None:
    own = with_template(tokenizer, tmp_path / "own")
    rng = np.random.default_rng(1)
    rows = [
        {"messages": [message("user", "u" * int(n)), message("assistant", "é" * int(m))]}
        for n, m in rng.integers(1, 60, (60, 2))
    ]
    rows += [
        {
            "messages": [
                *row["messages"],
                message("user", "v"),
                message("assistant", "w" * (i % 40 + 1)),
            ]
        }
        for i, row in enumerate(rows)
    ]
    source = write(tmp_path / "talks.jsonl", rows)
    whole = prepare_sft(
        [source], own, tmp_path / "whole", chat_template=template, validation_fraction=0
    )
    limit = 70
    manifest = prepare_sft(
        [source],
        own,
        tmp_path / "cut",
        chat_template=template,
        max_tokens=limit,
        truncate=truncate,
        validation_fraction=0,
    )
    assert verify_corpus(tmp_path / "cut") == []
    wanted, counts = [], {"prompt": 0, "long": 0}
    for prompt, response in pairs_of(tmp_path / "whole", "train"):
        if len(prompt) >= limit:
            counts["prompt"] += 1
        elif len(prompt) + len(response) <= limit:
            wanted.append((prompt, response))
        else:
            counts["long"] += 1
            if truncate:
                wanted.append((prompt, response[: limit - len(prompt)]))
    pairs = pairs_of(tmp_path / "cut", "train")
    assert pairs == wanted
    assert min(counts.values()) > 3, "the case is there"
    assert any(response[-1] != manifest.eos_id for _, response in pairs) == truncate
    reason = (
        "ends of replies longer than --max-tokens (--truncate)"
        if truncate
        else "replies that with their prompt are longer than --max-tokens"
    )
    assert manifest.skipped == {
        reason: counts["long"],
        "replies whose prompt alone takes --max-tokens": counts["prompt"],
    }
    decode = Tokenizer.load(tokenizer).decode
    kept = sum(
        len(decode([i for i in response if i != manifest.eos_id]).encode()) for _, response in pairs
    )
    assert manifest.totals("train")[2] == kept
    assert manifest.totals("train")[1] < whole.totals("train")[1], "what is left out takes no room"


def test_what_all_fits_is_not_touched(tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "talks.jsonl", PAIRS + TALKS)
    manifests = [
        prepare_sft([source], tokenizer, tmp_path / f"{limit}", max_tokens=limit, truncate=False)
        for limit in (None, 500)
    ]
    assert manifests[0].fingerprint("train") == manifests[1].fingerprint("train")
    assert manifests[1].skipped == {}


def test_lengths_are_told(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    rows = [
        *PAIRS,
        *TALKS,
        *({"prompt": "p" * n, "response": "r" * 3} for n in range(400, 600, 10)),
    ]
    prepare_sft([write(tmp_path / "talks.jsonl", rows)], tokenizer, folder, validation_fraction=0.2)
    lengths = np.array(
        [
            (len(p), len(r), len(p) + len(r))
            for split in ("train", "validation")
            for p, r in pairs_of(folder, split)
        ]
    )
    lines = inspection(folder).splitlines()
    start = lines.index(f"lengths in tokens of {len(lengths):,} replies:")
    for column, line in enumerate(lines[start + 2 : start + 5]):
        own = np.sort(lengths[:, column])
        name, mean, *others = line.split()
        assert name == ("prompt", "response", "both")[column]
        assert float(mean.replace(",", "")) == pytest.approx(own.mean(), abs=0.051)
        indices = [int(np.ceil(share * len(own))) - 1 for share in (0.5, 0.9, 0.99, 1)]
        assert [int(value.replace(",", "")) for value in others] == own[indices].tolist()
    share = 100 * (lengths[:, 2] <= 512).mean()
    assert 85 < share < 99
    assert f"512: {share:.1f} %, 1,024: 100.0 %" in lines[start + 5]
    assert lines[start + 5].endswith("8,192: 100.0 %")


def test_the_command_with_every_option(tokenizer: Path, tmp_path: Path) -> None:
    own = with_template(tokenizer, tmp_path / "own")
    rows: list[Any] = [
        {"talk": [{"from": "human", "value": f"q {i}"}, {"from": "gpt", "value": "a" * i}]}
        for i in range(1, 31)
    ]
    rows += [
        {
            "talk": [
                {"from": "human", "value": "q"},
                {"from": "human", "value": "r"},
                {"from": "gpt", "value": "a"},
            ],
            "sys": "Be kind.",
        }
    ]
    rows += [
        {
            "talk": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "more?"},
            ]
        },
        {"talk": 3},
    ]
    words = [
        "prepare-sft",
        "--input",
        str(write(tmp_path / "rows.jsonl", rows)),
        "--tokenizer",
        str(own),
        "--output",
    ]
    words += [
        str(tmp_path / "corpus"),
        "--validation-fraction",
        "0",
        "--format",
        "sharegpt",
        "--conversations-field",
        "talk",
    ]
    words += [
        "--system-field",
        "sys",
        "--chat-template",
        "tokenizer",
        "--max-tokens",
        "60",
        "--truncate",
        "--skip-bad",
    ]
    words += ["--drop-trailing", "--join-turns", "--context-field", "none"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    assert "train: 32 conversations with 32 replies" in result.output
    assert "left out: 1 ends of conversations without a reply (--drop-trailing)" in result.output
    assert "left out: 1 conversations without turns" in result.output
    options = Manifest.load(tmp_path / "corpus").options
    assert (
        options["form"],
        options["conversations"],
        options["max_tokens"],
        options["chat_template"],
    ) == (
        "sharegpt",
        "talk",
        60,
        "tokenizer",
    )
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "corpus"), "--samples", "32"])
    assert "system: Be kind.<|eot_id|><|start_header_id|>user: q" in shown.output


def test_parsing_and_encoding_in_another_process_are_the_same(tokenizer: Path) -> None:
    """Settings and tokenizer travel; what is made of them there gives the same tokens."""
    settings = ConversationSettings(ConversationFields(drop_trailing=True), MARKED, 60, True)
    records = [
        *PAIRS[:5],
        *TALKS[:5],
        {"messages": [message("user"), message("assistant"), message("user")]},
    ]
    results = []
    here = (ConversationType(settings), Tokenizer.load(tokenizer))
    for document_type, own_tokenizer in (here, pickle.loads(pickle.dumps(here))):
        encoder = document_type.open(own_tokenizer, "library")
        conversations = [
            encoder.parse(record, Origin("talks.jsonl", number))
            for number, record in enumerate(records)
        ]
        report = Report()
        encoded = encoder.encode(pickle.loads(pickle.dumps(conversations)), report)
        results.append(
            (
                encoded.flat_tokens.tolist(),
                encoded.lengths.tolist(),
                encoded.replies.tolist(),
                encoded.split_keys,
                report.listed,
            )
        )
    assert results[0] == results[1]
    [entry] = [entry for entry in report.listed if "--drop-trailing" in entry["reason"]]
    assert entry["line"] == 10
    assert entry["message"] == "the last 1 of 3 turns have no reply and are left out"

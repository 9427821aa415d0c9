"""Conversations on disk against plain recomputation, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from data_tools.cli import app
from data_tools.sft import prepare_sft
from llada.chat import ChatFormat, Message
from llada.data.corpus import Corpus, Manifest, problems
from llada.errors import UserError
from llada.tokenizer import Tokenizer, train_byte_level_bpe

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
    train_byte_level_bpe(iter([json.dumps(row, ensure_ascii=False) for row in PAIRS + TALKS]), 340).save(folder)
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
    found = []
    for entry in corpus.manifest.of(split):
        flat = np.fromfile(folder / f"{entry.name}.bin", corpus.manifest.dtype).tolist()
        starts = np.concatenate([[0], np.cumsum(corpus.shard(entry).lengths)]).tolist()
        for document, history_end, turn_start, response_start, turn_end in np.fromfile(folder / f"{entry.name}.replies", "<i8").reshape(
            -1, 5
        ):
            ids = flat[starts[document] : starts[document + 1]]
            found.append((ids[:history_end] + ids[turn_start:response_start], ids[response_start:turn_end]))
    return found


@pytest.mark.parametrize("limit", [300, 2**28])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_every_reply_with_its_prompt(limit: int, fraction: float, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.sft._BATCH_CHARACTERS", 700)
    source = write(tmp_path / "talks.jsonl", PAIRS + TALKS)
    folder = tmp_path / "corpus"
    manifest = prepare_sft([source], tokenizer, folder, validation_fraction=fraction, shard_tokens=limit)
    assert problems(folder) == []
    assert (len(manifest.of("train")) > 3) == (limit == 300)
    encoder = Tokenizer.load(tokenizer)
    chat = ChatFormat(encoder)
    wanted = []
    for row in PAIRS + TALKS:
        messages = turns(row)
        for place in [i for i, message in enumerate(messages) if message.role == "assistant"]:
            response = [*encoder.encode(messages[place].content).tolist(), encoder.eos_id]
            wanted.append((chat.prompt(messages[:place]).tolist(), response))
    train, held_out = pairs_of(folder, "train"), pairs_of(folder, "validation")
    assert sorted(train + held_out) == sorted(wanted)
    assert train == [pair for pair in wanted if pair in train]  # in the order of the files
    assert bool(held_out) == (fraction > 0)
    replies = sum(len(m.content.encode()) for row in PAIRS + TALKS for m in turns(row) if m.role == "assistant")
    assert sum(manifest.totals(split)[2] for split in ("train", "validation")) == replies


def test_one_question_is_never_on_both_sides(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i % 30}", "response": f"answer {i}"} for i in range(300)]
    prepare_sft([write(tmp_path / "rows.jsonl", rows)], tokenizer, tmp_path / "corpus", validation_fraction=0.3)
    sides = [{tuple(prompt) for prompt, _ in pairs_of(tmp_path / "corpus", split)} for split in ("train", "validation")]
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
    assert any("checksum" in problem for problem in problems(folder))
    assert any("reply 0 does not lie inside" in problem for problem in problems(folder, hashes=False))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or altered"):
        Corpus.open(folder)


def message(role: Any, content: Any = "text") -> dict[str, Any]:
    return {"role": role, "content": content}


BAD = [
    ({"prompt": "p", "response": " \n"}, "the response (turn 2) is empty", "conversations with an empty response"),
    ({"messages": [message("user"), message("asistant")]}, "unknown role 'asistant' (did you mean 'assistant'?)", "an unknown role"),
    ({"messages": [message("assistant"), message("user")]}, "the last turn is the user's", "without a reply"),
    ({"messages": []}, "not a list of turns", "without turns"),
    ({"messages": [message("user"), {"role": "assistant"}]}, "turn 2: field 'content' is missing", "with a bad turn"),
    ({"messages": [message("user"), message("assistant", 3)]}, "turn 2: field 'content' is not a string but int", "with a bad turn"),
    ({"prompt": "p", "respons": "r"}, "field 'response' is missing, there are: prompt, respons", "without the field"),
    (["p", "r"], "a JSON list", "without the field"),
]


@pytest.mark.parametrize(("row", "problem", "reason"), BAD)
def test_a_bad_line_is_named_or_counted(row: Any, problem: str, reason: str, tokenizer: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*PAIRS[:3], row])
    output = tmp_path / "out" / "corpus"
    with pytest.raises(UserError) as caught:
        prepare_sft([source], tokenizer, output)
    assert str(caught.value).startswith(f"{source}:4: ")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"], "nothing half-written is left"
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
    with pytest.raises(UserError, match=r"notes.txt is not JSON Lines"):
        prepare_sft([tmp_path / "in" / "notes.txt"], tokenizer, tmp_path / "other")


def test_the_command(tokenizer: Path, tmp_path: Path) -> None:
    rows = [{"q": row["prompt"], "a": row["response"]} for row in PAIRS]
    words = ["prepare-sft", "--input", str(write(tmp_path / "rows.jsonl", rows)), "--tokenizer", str(tokenizer), "--output"]
    words += [str(tmp_path / "corpus"), "--prompt-field", "q", "--response-field", "a", "--validation-fraction", "0"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "train: 120 conversations with 120 replies" in result.output
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, UserError)
    assert "--force" in str(again.exception)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "corpus")])
    assert shown.exit_code == 0, shown.output
    assert "What is 0 + 0?" in shown.output

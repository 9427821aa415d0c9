"""What the demo measured and what its models write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llada.checkpoint.format import committed
from llada.config import RunConfig
from llada.data.corpus import Corpus
from llada.data.sft import ReplyReader
from llada.errors import UserError
from llada.files import write_atomically
from llada.noise import mask_uniforms
from llada.sampling import SamplingOptions, generate, infill
from llada.sampling.diffusion import cut_at_end
from llada.sampling.loading import MaskPredictor, load
from llada.tokenizer import Tokenizer
from llada.training import metrics
from llada.training.estimates import with_error
from llada.training.validation import unigram_entropy

if TYPE_CHECKING:
    from llada.demo.stages import Stages

_PROMPT = "def __init__(self, "
_GAP = 8
_ANSWER = 48
"""Tokens of an answer, EOS and padding included."""


def report(pretrain: RunConfig, sft: RunConfig, root: Path, stages: Stages, answers: int) -> None:
    """Measure, let the models write, and print it; root/report.json holds the same.

    Args:
        pretrain, sft: the two runs.
        root: of the demo.
        stages: with the seconds of the other stages.
        answers: held-out questions to answer.
    """
    with stages.timed("report"):
        found = {
            **_measured(pretrain, root),
            **_written(pretrain, root),
            **_answered(sft, root, answers),
        }
    found["seconds"] = {stage: round(value, 1) for stage, value in stages.seconds.items()}
    found["paths"] = {
        "tokenizer": str(root / "tokenizer"),
        "corpus": str(root / "corpus"),
        "run": pretrain.run.dir,
        "checkpoint": str(committed(Path(pretrain.run.dir) / "checkpoints")[-1]),
        "curve": str(Path(pretrain.run.dir) / "loss.png"),
        "metrics": str(Path(pretrain.run.dir) / metrics.FILE),
        "sft_run": sft.run.dir,
        "hugging_face": str(root / "hf"),
    }
    write_atomically(root / "report.json", json.dumps(found, indent=1, ensure_ascii=False))
    _print(found, root)


def _validations(folder: str) -> list[dict[str, Any]]:
    found = [
        line for line in metrics.read(Path(folder) / metrics.FILE) if "nelbo_per_token" in line
    ]
    if not found:
        raise UserError(
            "--input: too little text for a validation window; the demo needs a few megabytes"
        )
    return found


def _measured(config: RunConfig, root: Path) -> dict[str, Any]:
    last = _validations(config.run.dir)[-1]
    entropy = unigram_entropy(_counts(Corpus.open(root / "corpus"), config.model.vocab_size))
    return {
        "nelbo_per_token": last["nelbo_per_token"],
        "nelbo_per_token_se": last["nelbo_per_token_se"],
        "nelbo_per_token_se_noise": last["nelbo_per_token_se_noise"],
        "unigram_entropy_per_token": entropy,
        "share_of_unigram_entropy": last["nelbo_per_token"] / entropy,
        "bits_per_byte": last["bits_per_byte"],
        "steps": last["step"],
    }


def _counts(corpus: Corpus, size: int) -> np.ndarray:
    """Occurrences of every id in the validation split."""
    counts = np.zeros(size, dtype=np.int64)
    for shard in corpus.shards("validation"):
        for start in range(0, shard.num_tokens, 1 << 22):
            counts += np.bincount(
                shard.tokens(start, min(start + (1 << 22), shard.num_tokens)), minlength=size
            )
    return counts


# -- what the pretrained model writes --------------------------------------------------------------


def _written(config: RunConfig, root: Path) -> dict[str, Any]:
    """A completion, gaps in held-out lines, and scattered masks, by the training checkpoint."""
    model = load(config.run.dir)
    tokenizer, length = model.tokenizer, config.data.sequence_length
    ids = torch.from_numpy(tokenizer.encode(_PROMPT))[None].to(model.device)
    room = (length - ids.shape[1]) // 8 * 8
    out = generate(
        model, ids, model.special_ids, SamplingOptions(room, room, 8, temperature=0.5, seed=1)
    )[0].tolist()
    gaps, scattered = [], []
    for tokens, (start, end) in _lines(Corpus.open(root / "corpus"), tokenizer, length, wanted=4):
        middle = (start + end - _GAP) // 2
        gaps.append(_fill(model, tokens, start, end, np.arange(middle, middle + _GAP)))
        chosen = start + np.flatnonzero(mask_uniforms(0, start, end - start, "demo") < 0.25)
        if len(chosen):
            scattered.append(_fill(model, tokens, start, end, chosen))
    completion = {"prompt": _PROMPT, "text": tokenizer.decode(cut_at_end(out, model.end_ids))}
    return {
        "completion": completion,
        "infilling": gaps[0] if gaps else None,
        "infillings": gaps,
        "fillings": scattered,
    }


def _fill(
    model: MaskPredictor, tokens: np.ndarray, start: int, end: int, chosen: np.ndarray
) -> dict[str, str]:
    """Hide the tokens at `chosen` in a window and let the model write them, the surest first; the
    line [start, end) as text.
    """
    masked = torch.from_numpy(tokens.copy())
    masked[chosen] = model.special_ids.mask_id
    filled = infill(
        model,
        masked[None].to(model.device),
        model.special_ids,
        SamplingOptions(len(chosen), len(chosen)),
    )[0].tolist()
    hidden = np.isin(np.arange(start, end), chosen)
    shown = "".join(
        "▁▁" if gap else model.tokenizer.decode([int(t)])
        for t, gap in zip(tokens[start:end], hidden, strict=True)
    )
    decode = model.tokenizer.decode
    return {
        "text": decode(tokens[start:end]).strip(),
        "masked": shown.strip(),
        "filled": decode(filled[start:end]).strip(),
    }


def _lines(
    corpus: Corpus, tokenizer: Tokenizer, length: int, wanted: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Validation windows and, in each, the token span of one line of text near the middle."""
    produced = 0
    for shard in corpus.shards("validation"):
        for start in range(
            0,
            shard.num_tokens - length,
            max(length, (shard.num_tokens // (8 * wanted)) // length * length),
        ):
            tokens = shard.tokens(start, start + length)
            breaks = [
                i
                for i in range(length // 4, 3 * length // 4)
                if "\n" in tokenizer.decode([int(tokens[i])])
            ]
            spans = [(a + 1, b) for a, b in itertools.pairwise(breaks) if 12 <= b - a <= 40]
            wordy = [(a, b) for a, b in spans if _is_wordy(tokenizer.decode(tokens[a:b]))]
            if wordy:
                yield tokens, wordy[0]
                produced += 1
            if produced == wanted:
                return


def _is_wordy(line: str) -> bool:
    """Whether a line is mostly letters: tables of numbers say little about what a model has
    learned.
    """
    text = line.replace(" ", "")
    return sum(character.isalpha() for character in text) > 0.75 * len(text)


# -- what the fine-tuned model answers -------------------------------------------------------------


def _answered(config: RunConfig, root: Path, wanted: int) -> dict[str, Any]:
    """The held-out response NELBO before and after, and answers of the exported folder to held-out
    questions.
    """
    lines = _validations(config.run.dir)
    model = load(root / "hf")
    reader = ReplyReader(Corpus.open(root / "talks"), "validation", config.data.sequence_length)
    rows = []
    ended = 0
    for reply in range(min(wanted, len(reader.rows))):
        tokens, prompt = reader.tokens(reply), reader.prompt_length(reply)
        length = min(_ANSWER, config.data.sequence_length - prompt)
        options = SamplingOptions(length, length)
        out = generate(
            model,
            torch.from_numpy(tokens[:prompt])[None].to(model.device),
            model.special_ids,
            options,
        )[0].tolist()
        ended += model.special_ids.eos_id in out
        texts = tokens[:prompt], tokens[prompt:], cut_at_end(out, model.end_ids)
        question, docstring, answer = (
            model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in texts
        )
        rows.append(
            {
                "question": question.removeprefix("user").removesuffix("assistant").strip(),
                "docstring": docstring,
                "answer": answer,
            }
        )
    return {
        "answer": rows[0] if rows else None,
        "answers": rows,
        "answers_ending_with_eos": {
            "count": ended,
            "of": len(rows),
            "share": ended / max(1, len(rows)),
        },
        "sft_nelbo_per_token": {
            "before": lines[0]["nelbo_per_token"],
            "after": lines[-1]["nelbo_per_token"],
        },
        "sft_steps": lines[-1]["step"],
    }


# -- on the console --------------------------------------------------------------------------------


def _print(found: dict[str, Any], root: Path) -> None:
    print("\n== report")
    for title, rows in (("a gap", found["infillings"]), ("scattered masks", found["fillings"])):
        for line in rows[:2]:
            print(
                f"{title}\n  text    {line['text']}\n  masked  {line['masked']}\n  filled "
                f" {line['filled']}\n"
            )
    print(
        "a completion of"
        f" {found['completion']['prompt']!r}\n{_indented(found['completion']['text'])}\n"
    )
    for row in found["answers"][:3]:
        print(
            f"a question  {row['question']}\n  docstring {row['docstring']}\n  answer   "
            f" {row['answer']}\n"
        )
    print(
        f"validation NELBO   {with_error(found, 'nelbo_per_token', 3)} nats/token"
        f" ({found['bits_per_byte']:.3f} bits/byte)"
    )
    print(
        f"unigram entropy    {found['unigram_entropy_per_token']:.3f} nats/token of the validation"
        f" text: the model needs {100 * found['share_of_unigram_entropy']:.1f} % of it"
    )
    nelbo, ended = found["sft_nelbo_per_token"], found["answers_ending_with_eos"]
    print(
        f"fine-tuning        held-out response NELBO {nelbo['before']:.3f} -> {nelbo['after']:.3f}"
        " nats/token"
    )
    print(f"answers            {ended['count']} of {ended['of']} held-out answers end with EOS")
    print(
        "seconds            "
        + ", ".join(f"{stage} {value:.0f}" for stage, value in found["seconds"].items())
    )
    for name, path in found["paths"].items():
        print(f"{name:18} {path}")
    print(f"{'report':18} {root / 'report.json'}", flush=True)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())

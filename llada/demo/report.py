"""What the demo measured, and what its models write."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from llada.checkpoint.names import committed_checkpoints
from llada.config import RunConfig
from llada.data.corpus import Corpus
from llada.data.sft import ReplyReader
from llada.errors import UserError
from llada.evaluation.estimates import with_error
from llada.evaluation.validation import unigram_entropy
from llada.files import write_atomically
from llada.noise import mask_uniforms
from llada.sampling import SamplingOptions, generate, infill
from llada.sampling.diffusion import cut_at_end
from llada.sampling.loading import MaskPredictor, load
from llada.tokenizer import Tokenizer
from llada.training.reporting import metrics

Report: TypeAlias = dict[str, Any]
"""root/report.json, or a part of it."""

_PROMPT = "def __init__(self, "
_GAP_TOKENS = 8
_ANSWER_TOKENS = 48
"""Of an answer, EOS and padding included."""
_NUM_LINES = 4
"""Held-out lines whose gaps the model fills."""
_LINE_TOKENS = range(12, 41)
"""Lengths of such lines, in tokens."""
_COUNTED_AT_ONCE = 1 << 22


def make_report(pretrain: RunConfig, sft: RunConfig, root: Path, num_answers: int) -> Report:
    """Collect the NELBO of both runs, and let their models write.

    Args:
        pretrain, sft: the two runs.
        root: folder of the demo.
        num_answers: number of held-out questions to answer.
    """
    return {
        **_measure_nelbo(pretrain, root),
        **_write_text(pretrain, root),
        **_answer_questions(sft, root, num_answers),
    }


def publish_report(
    content: Report, seconds: dict[str, float], pretrain: RunConfig, sft: RunConfig, root: Path
) -> None:
    """Complete the report with the seconds of each stage, write root/report.json, and print it."""
    content["seconds"] = {stage: round(value, 1) for stage, value in seconds.items()}
    run = Path(pretrain.run.dir)
    content["paths"] = {
        "tokenizer": str(root / "tokenizer"),
        "corpus": str(root / "corpus"),
        "run": pretrain.run.dir,
        "checkpoint": str(committed_checkpoints(run / "checkpoints")[-1]),
        "curve": str(run / "loss.png"),
        "metrics": str(run / metrics.FILE),
        "sft_run": sft.run.dir,
        "hugging_face": str(root / "hf"),
    }
    write_atomically(root / "report.json", json.dumps(content, indent=1, ensure_ascii=False))
    _print(content, root)


def _validation_lines(run: str) -> list[metrics.MetricsLine]:
    lines = [line for line in metrics.read(Path(run) / metrics.FILE) if "nelbo_per_token" in line]
    if not lines:
        raise UserError(
            "--input: too little text for a validation window; the demo needs a few megabytes"
        )
    return lines


def _measure_nelbo(config: RunConfig, root: Path) -> Report:
    """Return the last validation beside the loss of a model that ignores context."""
    last = _validation_lines(config.run.dir)[-1]
    counts = _count_tokens(Corpus.open(root / "corpus"), config.model.vocab_size)
    entropy = unigram_entropy(counts)
    return {
        "nelbo_per_token": last["nelbo_per_token"],
        "nelbo_per_token_se": last["nelbo_per_token_se"],
        "nelbo_per_token_se_noise": last["nelbo_per_token_se_noise"],
        "unigram_entropy_per_token": entropy,
        "share_of_unigram_entropy": last["nelbo_per_token"] / entropy,
        "bits_per_byte": last["bits_per_byte"],
        "steps": last["step"],
    }


def _count_tokens(corpus: Corpus, vocab_size: int) -> np.ndarray:
    """Return how often every id occurs in the validation split, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for shard in corpus.shards("validation"):
        for start in range(0, shard.num_tokens, _COUNTED_AT_ONCE):
            tokens = shard.tokens(start, min(start + _COUNTED_AT_ONCE, shard.num_tokens))
            counts += np.bincount(tokens, minlength=vocab_size)
    return counts


# -- what the pretrained model writes --------------------------------------------------------------


def _write_text(config: RunConfig, root: Path) -> Report:
    """Let the training checkpoint write a completion, and fill gaps in held-out lines.

    A gap is either one run of tokens or scattered over the line.
    """
    model = load(config.run.dir)
    tokenizer = model.tokenizer
    length = config.data.sequence_length
    prompt = torch.from_numpy(tokenizer.encode(_PROMPT))[None].to(model.device)
    # The sampler generates whole blocks of 8 tokens.
    room = (length - prompt.shape[1]) // 8 * 8
    options = SamplingOptions(room, room, 8, temperature=0.5, seed=1)
    out = generate(model, prompt, model.special_ids, options)[0].tolist()
    # The masks are keyed, so the same words are hidden in every demo.
    gaps = []
    scattered = []
    for tokens, (start, end) in _held_out_lines(Corpus.open(root / "corpus"), tokenizer, length):
        middle = (start + end - _GAP_TOKENS) // 2
        gap = np.arange(middle, middle + _GAP_TOKENS)
        gaps.append(_fill(model, tokens, (start, end), gap))
        chosen = start + np.flatnonzero(mask_uniforms(0, start, end - start, "demo") < 0.25)
        if len(chosen):
            scattered.append(_fill(model, tokens, (start, end), chosen))
    text = tokenizer.decode(cut_at_end(out, model.end_ids))
    return {
        "completion": {"prompt": _PROMPT, "text": text},
        "infilling": gaps[0] if gaps else None,
        "infillings": gaps,
        "fillings": scattered,
    }


def _fill(
    model: MaskPredictor, tokens: np.ndarray, span: tuple[int, int], chosen: np.ndarray
) -> dict[str, str]:
    """Hide some tokens of a window and let the model write them, those it is surest of first.

    Args:
        model: the model that writes.
        tokens: token ids of the window [L].
        span: start and end of a line in it, which is returned as text.
        chosen: positions of the hidden tokens.
    """
    masked = torch.from_numpy(tokens.copy())
    masked[chosen] = model.special_ids.mask_id
    # As many steps as tokens: one is committed in each.
    options = SamplingOptions(len(chosen), len(chosen))
    filled = infill(model, masked[None].to(model.device), model.special_ids, options)[0].tolist()
    decode = model.tokenizer.decode
    hidden = set(chosen.tolist())
    start, end = span
    shown = ""
    for position in range(start, end):
        shown += "▁▁" if position in hidden else decode([int(tokens[position])])
    return {
        "text": decode(tokens[start:end]).strip(),
        "masked": shown.strip(),
        "filled": decode(filled[start:end]).strip(),
    }


def _held_out_lines(
    corpus: Corpus, tokenizer: Tokenizer, length: int
) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """Yield validation windows with the token span of a line of text near each one's middle."""
    num_lines = 0  # yielded
    for shard in corpus.shards("validation"):
        # Windows spread over the shard, eight times as many as needed: most have no such line.
        stride = max(length, (shard.num_tokens // (8 * _NUM_LINES)) // length * length)
        for start in range(0, shard.num_tokens - length, stride):
            tokens = shard.tokens(start, start + length)
            span = _find_line(tokens, tokenizer)
            if span is not None:
                yield tokens, span
                num_lines += 1
            if num_lines == _NUM_LINES:
                return


def _find_line(tokens: np.ndarray, tokenizer: Tokenizer) -> tuple[int, int] | None:
    """Return the first line of words in the middle half of a window, without its line break."""
    length = len(tokens)
    breaks = [
        position
        for position in range(length // 4, 3 * length // 4)
        if "\n" in tokenizer.decode([int(tokens[position])])
    ]
    for before, after in itertools.pairwise(breaks):
        span = (before + 1, after)
        if after - before in _LINE_TOKENS and _is_wordy(tokenizer.decode(tokens[slice(*span)])):
            return span
    return None


def _is_wordy(line: str) -> bool:
    """Return whether a line is mostly letters.

    Tables of numbers say little about what a model has learned.
    """
    text = line.replace(" ", "")
    return sum(character.isalpha() for character in text) > 0.75 * len(text)


# -- what the fine-tuned model answers -------------------------------------------------------------


def _answer_questions(config: RunConfig, root: Path, num_answers: int) -> Report:
    """Let the exported folder answer held-out questions; add the NELBO before and after."""
    lines = _validation_lines(config.run.dir)
    model = load(root / "hf")
    length = config.data.sequence_length
    reader = ReplyReader(Corpus.open(root / "talks"), "validation", length)
    rows = []
    num_ended = 0
    for reply in range(min(num_answers, len(reader.replies))):
        tokens = reader.tokens(reply)
        prompt_length = reader.prompt_length(reply)
        prompt = tokens[:prompt_length]
        answer_length = min(_ANSWER_TOKENS, length - prompt_length)
        options = SamplingOptions(answer_length, answer_length)
        ids = torch.from_numpy(prompt)[None].to(model.device)
        out = generate(model, ids, model.special_ids, options)[0].tolist()
        # Only a model that has learned where answers end writes EOS.
        num_ended += model.special_ids.eos_id in out
        question = _decode(model, prompt)
        rows.append(
            {
                # Without the names of the roles, which the chat format puts around it.
                "question": question.removeprefix("user").removesuffix("assistant").strip(),
                "docstring": _decode(model, tokens[prompt_length:]),
                "answer": _decode(model, cut_at_end(out, model.end_ids)),
            }
        )
    return {
        "answer": rows[0] if rows else None,
        "answers": rows,
        "answers_ending_with_eos": {
            "count": num_ended,
            "of": len(rows),
            "share": num_ended / max(1, len(rows)),
        },
        "sft_nelbo_per_token": {
            "before": lines[0]["nelbo_per_token"],
            "after": lines[-1]["nelbo_per_token"],
        },
        "sft_steps": lines[-1]["step"],
    }


def _decode(model: MaskPredictor, ids: np.ndarray | list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


# -- on the console --------------------------------------------------------------------------------


def _print(content: Report, root: Path) -> None:
    print("\n== report")
    _print_texts(content)
    print(
        f"validation NELBO   {with_error(content, 'nelbo_per_token', 3)} nats/token"
        f" ({content['bits_per_byte']:.3f} bits/byte)"
    )
    print(
        f"unigram entropy    {content['unigram_entropy_per_token']:.3f} nats/token of the"
        " validation text: the model's NELBO is"
        f" {100 * content['share_of_unigram_entropy']:.1f} % of this"
    )
    nelbo = content["sft_nelbo_per_token"]
    print(
        f"fine-tuning        held-out response NELBO {nelbo['before']:.3f} -> {nelbo['after']:.3f}"
        " nats/token"
    )
    ended = content["answers_ending_with_eos"]
    print(f"answers            {ended['count']} of {ended['of']} held-out answers end with EOS")
    seconds = [f"{stage} {value:.0f}" for stage, value in content["seconds"].items()]
    print(f"seconds            {', '.join(seconds)}")
    for name, path in content["paths"].items():
        print(f"{name:18} {path}")
    print(f"{'report':18} {root / 'report.json'}", flush=True)


def _print_texts(content: Report) -> None:
    """Print some of what the models wrote."""
    for title, key in (("a gap", "infillings"), ("scattered masks", "fillings")):
        for texts in content[key][:2]:
            print(title)
            print(f"  text    {texts['text']}")
            print(f"  masked  {texts['masked']}")
            print(f"  filled  {texts['filled']}\n")
    completion = content["completion"]
    print(f"a completion of {completion['prompt']!r}\n{_indented(completion['text'])}\n")
    for row in content["answers"][:3]:
        print(f"a question  {row['question']}")
        print(f"  docstring {row['docstring']}")
        print(f"  answer    {row['answer']}\n")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())

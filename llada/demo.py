"""`llada demo`: real text to a trained model on this machine, through the same commands' code as a large run."""

from __future__ import annotations

import itertools
import json
import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llada.config import RunConfig, load_config
from llada.data.corpus import Corpus
from llada.errors import UserError
from llada.files import write_atomically
from llada.tokenizer import Tokenizer
from llada.training.checkpoint import committed
from llada.training.signals import StopRequest

_GPU_STEPS = 10_000
_SMOKE = ("train.steps=6", "validation.windows=16", "schedule.stages.0.steps=20", "logging.every=1")
_TOKENIZER_BYTES = 8_000_000
"""Text the tokenizer is trained on: enough for a vocabulary of a few thousand, a few seconds of work."""


def run_demo(stop: StopRequest, inputs: list[str] | None, config_path: str, folder: str, smoke: bool, fresh: bool) -> int:
    """Tokenizer, corpus, pretraining, report. Stages that are done are not done again.

    Args:
        stop: set by the stop signals.
        inputs: files and folders; None: the Python standard library on this machine.
        config_path: of the pretraining; its model.vocab_size is the tokenizer's size.
        folder: where everything goes.
        smoke: a few steps only.
        fresh: remove `folder` first.

    Returns:
        The exit code of the training: 0, or 75 when a signal stopped it.
    """
    from llada.training.loop import FINISHED, train

    root = Path(folder)
    if fresh:
        shutil.rmtree(root, ignore_errors=True)
    config = _config(config_path, root, smoke)
    root.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    sources, extensions = _sources(inputs)
    timed = _Stages(seconds)
    timed("tokenizer", root / "tokenizer", lambda target: _train_tokenizer(sources, extensions, config.model.vocab_size, target))
    timed("prepare", root / "corpus", lambda target: _prepare(sources, extensions, root / "tokenizer", target))
    started = time.perf_counter()
    print(f"== pretrain: {config.train.steps} steps -> {config.run.dir}", flush=True)
    code = train(config, stop)
    seconds["pretrain"] = time.perf_counter() - started
    if code == FINISHED:
        _report(config, root, seconds)
    return code


class _Stages:
    """Runs a stage unless its folder is there, and notes its seconds."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds

    def __call__(self, name: str, target: Path, work: Callable[[Path], None]) -> None:
        if target.exists():
            print(f"== {name}: {target} is there already", flush=True)
            self._seconds[name] = 0.0
            return
        print(f"== {name} -> {target}", flush=True)
        started = time.perf_counter()
        work(target)
        self._seconds[name] = time.perf_counter() - started


def _config(path: str, root: Path, smoke: bool) -> RunConfig:
    import torch

    if not Path(path).is_file():
        raise UserError(f"--config: no file '{path}'; run the demo from a checkout of the repository, or name a config")
    overrides = [f"run.dir={root / 'pretrain'}", f"data.mixture.0.path={root / 'corpus'}"]
    if smoke:
        overrides += _SMOKE
    elif torch.cuda.is_available():
        overrides += [f"train.steps={_GPU_STEPS}", "precision=bf16"]
    return load_config(path, overrides, task="pretrain")


def _sources(inputs: list[str] | None) -> tuple[list[str], list[str] | None]:
    """What to read and which file extensions count in folders."""
    if inputs:
        return inputs, None
    library = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    children = (child for child in sorted(library.iterdir()) if child.name not in skipped and not child.name.startswith("."))
    return [str(child) for child in children if child.is_dir() or child.suffix == ".py"], [".py"]


def _train_tokenizer(inputs: list[str], extensions: list[str] | None, size: int, target: Path) -> None:
    from data_tools.readers import sample_texts
    from llada.tokenizer import train_byte_level_bpe

    tokenizer = train_byte_level_bpe(sample_texts(inputs, extensions, _TOKENIZER_BYTES), size)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(target)
    print(f"{tokenizer.vocab_size} tokens", flush=True)


def _prepare(inputs: list[str], extensions: list[str] | None, tokenizer: Path, target: Path) -> None:
    from data_tools.prepare import prepare, summary

    print(summary(prepare(inputs, tokenizer, target, extensions=extensions, validation_fraction=0.02)), flush=True)


# -- the report --------------------------------------------------------------------------------------------------------


def _report(config: RunConfig, root: Path, seconds: dict[str, float]) -> None:
    from llada.training import metrics
    from llada.training.validation import unigram_entropy

    folder = Path(config.run.dir)
    corpus = Corpus.open(root / "corpus")
    measured = [line for line in metrics.read(folder / metrics.FILE) if "nelbo_per_token" in line]
    if not measured:
        raise UserError("--input: too little text for a validation window; the demo needs a few megabytes")
    last = measured[-1]
    entropy = unigram_entropy(_counts(corpus, config.model.vocab_size))
    fillings = _fill_lines(config, corpus)
    report: dict[str, Any] = {
        "nelbo_per_token": last["nelbo_per_token"],
        "nelbo_per_token_se": last["nelbo_per_token_se"],
        "unigram_entropy_per_token": entropy,
        "share_of_unigram_entropy": last["nelbo_per_token"] / entropy,
        "bits_per_byte": last["bits_per_byte"],
        "steps": last["step"],
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "fillings": fillings,
        "paths": {
            "tokenizer": str(root / "tokenizer"),
            "corpus": str(root / "corpus"),
            "run": str(folder),
            "checkpoint": str(committed(folder / "checkpoints")[-1]),
            "curve": str(folder / "loss.png"),
            "metrics": str(folder / metrics.FILE),
        },
    }
    write_atomically(root / "report.json", json.dumps(report, indent=1, ensure_ascii=False))
    _print_report(report, root)


def _print_report(report: dict[str, Any], root: Path) -> None:
    print("\n== report")
    for line in report["fillings"]:
        print(f"  text    {line['text']}\n  masked  {line['masked']}\n  filled  {line['filled']}\n")
    share = 100 * report["share_of_unigram_entropy"]
    print(
        f"validation NELBO   {report['nelbo_per_token']:.3f} ± {report['nelbo_per_token_se']:.3f} nats/token "
        f"({report['bits_per_byte']:.3f} bits/byte)"
    )
    print(
        f"unigram entropy    {report['unigram_entropy_per_token']:.3f} nats/token of the validation text: "
        f"the model needs {share:.1f} % of it"
    )
    print("seconds            " + ", ".join(f"{stage} {value:.0f}" for stage, value in report["seconds"].items()))
    for name, path in report["paths"].items():
        print(f"{name:18} {path}")
    print(f"{'report':18} {root / 'report.json'}", flush=True)


def _counts(corpus: Corpus, size: int) -> np.ndarray:
    """Occurrences of every id in the validation split."""
    counts = np.zeros(size, dtype=np.int64)
    for shard in corpus.shards("validation"):
        for start in range(0, shard.num_tokens, 1 << 22):
            counts += np.bincount(shard.tokens(start, min(start + (1 << 22), shard.num_tokens)), minlength=size)
    return counts


def _fill_lines(config: RunConfig, corpus: Corpus, wanted: int = 4) -> list[dict[str, str]]:
    """Mask a quarter of the tokens in the middle of validation windows and let the model name each from both sides, at once."""
    from llada.engine.megatron import MegatronEngine
    from llada.noise import mask_uniforms
    from llada.objectives.base import Window, collate
    from llada.objectives.masked import MaskedDiffusion

    tokenizer = Tokenizer.load(corpus.tokenizer_folder)
    engine = MegatronEngine(config)
    engine.load(committed(Path(config.run.dir) / "checkpoints")[-1] / "model", optimizer=False)
    found = []
    length = config.data.sequence_length
    for tokens, (start, end) in _lines(corpus, tokenizer, length, wanted):
        masked = tokens.copy()
        chosen = start + np.flatnonzero(mask_uniforms(0, start, end - start, "demo") < 0.25)
        masked[chosen] = corpus.manifest.mask_id
        window = Window(0, masked, np.array([0, length]), np.array([0.0]), 0)
        batch = collate([window], [MaskedDiffusion(0, corpus.manifest.mask_id).corrupt(window, masking="fixed_count")], float(length))
        logits = engine.logits(batch)[0]
        logits[:, [corpus.manifest.mask_id, *range(corpus.manifest.vocab_size, logits.shape[1])]] = -np.inf
        filled = tokens.copy()
        filled[chosen] = logits.argmax(-1).numpy()[chosen]
        shown = np.isin(np.arange(start, end), chosen)
        gaps = "".join("▁▁" if gap else tokenizer.decode([int(token)]) for token, gap in zip(tokens[start:end], shown, strict=True))
        found.append(
            {
                "text": tokenizer.decode(tokens[start:end]).strip(),
                "masked": gaps.strip(),
                "filled": tokenizer.decode(filled[start:end]).strip(),
            }
        )
    engine.close()
    return found


def _is_wordy(line: str) -> bool:
    """Whether a line is mostly letters: tables of numbers say little about what a model has learned."""
    text = line.replace(" ", "")
    return sum(character.isalpha() for character in text) > 0.75 * len(text)


def _lines(corpus: Corpus, tokenizer: Tokenizer, length: int, wanted: int):
    """Validation windows and, in each, the token span of one line of code near the middle."""
    produced = 0
    for shard in corpus.shards("validation"):
        for start in range(0, shard.num_tokens - length, max(length, (shard.num_tokens // (8 * wanted)) // length * length)):
            tokens = shard.tokens(start, start + length)
            breaks = [i for i in range(length // 4, 3 * length // 4) if "\n" in tokenizer.decode([int(tokens[i])])]
            spans = [(a + 1, b) for a, b in itertools.pairwise(breaks) if 12 <= b - a <= 40]
            wordy = [(a, b) for a, b in spans if _is_wordy(tokenizer.decode(tokens[a:b]))]
            if wordy:
                yield tokens, wordy[0]
                produced += 1
            if produced == wanted:
                return

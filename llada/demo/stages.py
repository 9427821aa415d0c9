"""The demo's stages: tokenizer, corpus, pretraining, pairs, fine-tuning, export, report. What is
done is not done again.
"""

from __future__ import annotations

import shutil
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

from llada.config import RunConfig, Task
from llada.errors import UserError
from llada.files import refuse_inside
from llada.training.configure import load_config
from llada.training.signals import StopRequest

_GPU_STEPS = {"pretrain": 10_000, "sft": 2_000}
_SMOKE = {
    "pretrain": [
        "train.steps=6",
        "validation.windows=16",
        "schedule.stages.0.steps=20",
        "logging.every=1",
    ],
    "sft": ["train.steps=4", "validation.windows=16", "logging.every=1"],
}
_MADE = ("tokenizer", "corpus", "pretrain", "pairs", "talks", "sft", "hf", "report")
"""What a demo's folder holds, without endings."""
_TOKENIZER_BYTES = 8_000_000
"""Text the tokenizer is trained on: enough for a vocabulary of a few thousand, a few seconds of
work.
"""


def run_demo(
    stop: StopRequest,
    inputs: list[str] | None,
    configs: tuple[str, str],
    folder: str,
    smoke: bool,
    fresh: bool,
) -> int:
    """Run every stage that is not done yet, then report.

    Args:
        stop: set by the stop signals.
        inputs: files and folders; None: the Python standard library on this machine.
        configs: of the pretraining, whose model.vocab_size is the tokenizer's size, and of the
            fine-tuning.
        folder: where everything goes.
        smoke: a few steps only.
        fresh: remove `folder` first, which must hold nothing but an earlier demo.

    Returns:
        The exit code: 0, or 75 when a signal stopped a training.

    Raises:
        UserError: a folder that lies inside what is read, or that `fresh` would take with files
            that no demo made; what the stages raise.
    """
    root = Path(folder)
    for source in inputs or []:
        refuse_inside(root, Path(source), "--dir")
    if fresh:
        _remove(root)
    pretrain = _config(
        "pretrain",
        configs[0],
        smoke,
        [f"run.dir={root / 'pretrain'}", f"data.mixture.0.path={root / 'corpus'}"],
    )
    talk = [
        f"run.dir={root / 'sft'}",
        f"data.mixture.0.path={root / 'talks'}",
        f"run.init_from={root / 'pretrain'}",
    ]
    sft = _config("sft", configs[1], smoke, talk)
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    sources, extensions = _sources(inputs)
    stages(
        "tokenizer",
        root / "tokenizer",
        lambda target: _train_tokenizer(sources, extensions, pretrain.model.vocab_size, target),
    )
    stages(
        "prepare",
        root / "corpus",
        lambda target: _prepare(sources, extensions, root / "tokenizer", target),
    )
    if code := stages.train("pretrain", pretrain, stop):
        return code
    stages(
        "prepare-sft",
        root / "talks",
        lambda target: _prepare_talks(root / "tokenizer", root / "pairs.jsonl", target),
    )
    if code := stages.train("sft", sft, stop):
        return code
    stages("export", root / "hf", lambda target: _export(root / "sft", target))
    from llada.demo.report import report

    report(pretrain, sft, root, stages, answers=4 if smoke else 50)
    return 0


def _remove(root: Path) -> None:
    """Remove an earlier demo. Raises UserError where something else would go with it."""
    if not root.is_dir():
        return
    # A demo's own names may have an ending, or be those of a stage that was cut off:
    # .corpus.partial-1234abcd.
    others = [
        path.name for path in root.iterdir() if path.name.lstrip(".").partition(".")[0] not in _MADE
    ]
    if others:
        raise UserError(
            f"--fresh: '{root}' holds '{min(others)}', which no demo makes, and would be removed"
            " with it; name another --dir"
        )
    shutil.rmtree(root)


class Stages:
    """Runs stages and notes the seconds of each.

    Attributes:
        seconds: by stage; 0 for what was there already.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, target: Path, work: Callable[[Path], None]) -> None:
        """Run a stage unless its target is there."""
        if target.exists():
            print(f"== {name}: {target} is there already", flush=True)
            self.seconds[name] = 0.0
            return
        print(f"== {name} -> {target}", flush=True)
        with self.timed(name):
            work(target)

    def train(self, name: str, config: RunConfig, stop: StopRequest) -> int:
        """Train, or go on; the training's exit code."""
        from llada.training.loop import train

        print(f"== {name}: {config.train.steps} steps -> {config.run.dir}", flush=True)
        with self.timed(name):
            return train(config, stop)

    def timed(self, name: str) -> _Timed:
        """A context whose duration is noted under `name`."""
        return _Timed(self.seconds, name)


class _Timed:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] = time.perf_counter() - self._started


def _config(task: Task, path: str, smoke: bool, overrides: list[str]) -> RunConfig:
    import torch

    if not Path(path).is_file():
        option = "--config" if task == "pretrain" else "--sft-config"
        raise UserError(
            f"{option}: no file '{path}'; run the demo from a checkout of the repository, or name a"
            " config"
        )
    if smoke:
        overrides = [*overrides, *_SMOKE[task]]
    elif torch.cuda.is_available():
        overrides = [*overrides, f"train.steps={_GPU_STEPS[task]}", "precision=bf16"]
    return load_config(path, overrides, task=task)


def library_sources(library: Path) -> list[Path]:
    """Folders and Python files of the standard library, without installed packages and second names
    of a file (Debian links some).
    """
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    children = [child for child in sorted(library.iterdir()) if not child.is_symlink()]
    children = [
        child for child in children if child.name not in skipped and not child.name.startswith(".")
    ]
    return [child for child in children if child.is_dir() or child.suffix == ".py"]


def _library() -> list[Path]:
    return library_sources(Path(sysconfig.get_paths()["stdlib"]))


def _sources(inputs: list[str] | None) -> tuple[list[str], list[str] | None]:
    """What to read and which file extensions count in folders."""
    return (inputs, None) if inputs else ([str(path) for path in _library()], [".py"])


def _train_tokenizer(
    inputs: list[str], extensions: list[str] | None, size: int, target: Path
) -> None:
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.reading import sample_texts
    from data_tools.readers.sources import parse_extensions
    from llada.tokenizer import train_byte_level_bpe

    options = ReadOptions(extensions=parse_extensions(extensions))
    tokenizer = train_byte_level_bpe(sample_texts(inputs, _TOKENIZER_BYTES, options), size)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(target)
    print(f"{tokenizer.vocab_size} tokens", flush=True)


def _prepare(
    inputs: list[str], extensions: list[str] | None, tokenizer: Path, target: Path
) -> None:
    from data_tools.documents.text import TextType
    from data_tools.job.build import prepare_corpus
    from data_tools.job.finish import summary
    from data_tools.job.options import CorpusOptions
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.sources import parse_extensions

    text = TextType(ReadOptions(extensions=parse_extensions(extensions)))
    options = CorpusOptions(validation_fraction=0.02)
    print(summary(prepare_corpus(inputs, tokenizer, target, text, options)), flush=True)


def _prepare_talks(tokenizer: Path, pairs: Path, target: Path) -> None:
    """Questions about the standard library, whatever the pretraining read."""
    from data_tools.documents.conversations import ConversationType
    from data_tools.job.build import prepare_corpus
    from data_tools.job.finish import summary
    from data_tools.job.options import CorpusOptions
    from llada.demo.pairs import write_pairs

    files = [
        file
        for path in _library()
        for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])
    ]
    files = [
        file for file in files if not {"test", "tests"} & set(file.parts)
    ]  # their docstrings explain tests
    print(f"{write_pairs(files, pairs):,} questions and answers in {pairs}", flush=True)
    options = CorpusOptions(validation_fraction=0.03)
    manifest = prepare_corpus([pairs], tokenizer, target, ConversationType(), options)
    print(summary(manifest), flush=True)


def _export(run: Path, target: Path) -> None:
    from llada.hf.convert import convert

    print(convert(str(run), str(target), verify=True, reference=None), flush=True)

"""The demo's stages: tokenizer, corpus, pretraining, pairs, fine-tuning, export, report.

A stage whose result exists is not run again, so an interrupted demo continues.
"""

from __future__ import annotations

import shutil
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from llada.config import RunConfig, Task
from llada.errors import UserError
from llada.outputs import refuse_inside
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
"""Overrides of a demo of a few steps."""
_OWN_NAMES = ("tokenizer", "corpus", "pretrain", "pairs", "talks", "sft", "hf", "report")
"""What a demo's folder contains, without endings."""
_TOKENIZER_BYTES = 8_000_000
"""Text that the tokenizer is trained on.

Enough for a vocabulary of a few thousand, and a few seconds of work.
"""


@dataclass(frozen=True)
class Sources:
    """The text that the demo reads.

    Attributes:
        inputs: files and folders.
        extensions: extensions of the files that are read in folders; None for all that can be read.
    """

    inputs: list[str]
    extensions: list[str] | None


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
        inputs: files and folders; None: the Python standard library of this machine.
        configs: of the pretraining, whose model.vocab_size is the tokenizer's size, and of the
            fine-tuning.
        folder: folder that everything is written to.
        smoke: a few steps only.
        fresh: remove `folder` first, which must contain nothing but an earlier demo.

    Returns:
        The exit code: 0, or 75 when a signal stopped a training.

    Raises:
        UserError: the folder lies inside what is read, or `fresh` would remove files that no demo
            wrote; what the stages raise.
    """
    root = Path(folder)
    # A second demo would read the first one's files.
    for source in inputs or []:
        refuse_inside(root, Path(source), "--dir")
    if fresh:
        _remove(root)

    # Both configs before any work: a mistake in the second shows at once.
    pretrain = _load_config(
        "pretrain",
        configs[0],
        smoke,
        [f"run.dir={root / 'pretrain'}", f"data.mixture.0.path={root / 'corpus'}"],
    )
    sft = _load_config(
        "sft",
        configs[1],
        smoke,
        [
            f"run.dir={root / 'sft'}",
            f"data.mixture.0.path={root / 'talks'}",
            f"run.init_from={root / 'pretrain'}",
        ],
    )
    root.mkdir(parents=True, exist_ok=True)
    stages = Stages()
    code = _run_stages(stages, stop, _sources(inputs), pretrain, sft, root)
    if code:
        return code

    from llada.demo.report import make_report, publish_report

    num_answers = 50
    if smoke:
        num_answers = 4
    with stages.timed("report"):
        report = make_report(pretrain, sft, root, num_answers)
    publish_report(report, stages.seconds, pretrain, sft, root)
    return 0


def _run_stages(
    stages: Stages,
    stop: StopRequest,
    sources: Sources,
    pretrain: RunConfig,
    sft: RunConfig,
    root: Path,
) -> int:
    """Run the stages up to the export; return 0, or the exit code of a training that stopped."""
    tokenizer = root / "tokenizer"
    stages(
        "tokenizer",
        tokenizer,
        lambda target: _train_tokenizer(sources, pretrain.model.vocab_size, target),
    )
    stages("prepare", root / "corpus", lambda target: _prepare_corpus(sources, tokenizer, target))
    code = stages.train("pretrain", pretrain, stop)
    if code:
        return code
    stages(
        "prepare-sft",
        root / "talks",
        lambda target: _prepare_conversations(tokenizer, root / "pairs.jsonl", target),
    )
    code = stages.train("sft", sft, stop)
    if code:
        return code
    stages("export", root / "hf", lambda target: _export(root / "sft", target))
    return 0


def _remove(root: Path) -> None:
    """Remove an earlier demo. Raises UserError if the folder contains something else too."""
    if not root.is_dir():
        return
    # Only what a demo wrote: --dir may name a folder by mistake.
    # A demo's own names may have an ending, or be those of a stage that was cut off:
    # .corpus.partial-1234abcd.
    others = [
        path.name
        for path in root.iterdir()
        if path.name.lstrip(".").partition(".")[0] not in _OWN_NAMES
    ]
    if others:
        raise UserError(
            f"--fresh: '{root}' contains '{min(others)}', which no demo makes, and would be removed"
            " with it; name another --dir"
        )
    shutil.rmtree(root)


class Stages:
    """Runs stages and measures the seconds of each.

    Attributes:
        seconds: by stage; 0 for a result that existed already.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, target: Path, work: Callable[[Path], None]) -> None:
        """Run a stage unless its target exists."""
        if target.exists():
            print(f"== {name}: {target} is there already", flush=True)
            self.seconds[name] = 0.0
            return
        print(f"== {name} -> {target}", flush=True)
        with self.timed(name):
            work(target)

    def train(self, name: str, config: RunConfig, stop: StopRequest) -> int:
        """Train, or continue, a run; return the training's exit code."""
        from llada.training.loop import train

        print(f"== {name}: {config.train.steps} steps -> {config.run.dir}", flush=True)
        with self.timed(name):
            return train(config, stop)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Record how long the block takes as the seconds of stage `name`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - started


def _load_config(task: Task, path: str, smoke: bool, overrides: list[str]) -> RunConfig:
    import torch

    if not Path(path).is_file():
        option = "--config" if task == "pretrain" else "--sft-config"
        raise UserError(
            f"{option}: no file '{path}'; run the demo from a checkout of the repository, or name a"
            " config"
        )
    if smoke:  # enough to run every stage, not to learn anything
        overrides = [*overrides, *_SMOKE[task]]
    elif torch.cuda.is_available():
        overrides = [*overrides, f"train.steps={_GPU_STEPS[task]}", "precision=bf16"]
    return load_config(path, overrides, task=task)


# -- what is read ----------------------------------------------------------------------------------


def library_sources(library: Path) -> list[Path]:
    """Return folders and Python files of the standard library.

    Installed packages are left out, and second names of a file (Debian links some).
    """
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    sources = []
    for child in sorted(library.iterdir()):
        if child.is_symlink() or child.name in skipped or child.name.startswith("."):
            continue
        if child.is_dir() or child.suffix == ".py":
            sources.append(child)
    return sources


def _library() -> list[Path]:
    return library_sources(Path(sysconfig.get_paths()["stdlib"]))


def _documented_files() -> list[Path]:
    """Return the Python files of the standard library, without tests.

    The docstrings of tests explain tests.
    """
    files: list[Path] = []
    for source in _library():
        if source.is_dir():
            files += sorted(source.rglob("*.py"))
        else:
            files.append(source)
    return [file for file in files if not {"test", "tests"} & set(file.parts)]


def _sources(inputs: list[str] | None) -> Sources:
    if inputs:
        return Sources(inputs, extensions=None)
    return Sources([str(path) for path in _library()], extensions=[".py"])


# -- stages ----------------------------------------------------------------------------------------


def _train_tokenizer(sources: Sources, size: int, target: Path) -> None:
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.reading import sample_texts
    from data_tools.readers.sources import parse_extensions
    from llada.tokenizer import train_byte_level_bpe

    options = ReadOptions(extensions=parse_extensions(sources.extensions))
    texts = sample_texts(sources.inputs, _TOKENIZER_BYTES, options)
    tokenizer = train_byte_level_bpe(texts, size)
    # Under its own name only once it is complete: a stage whose target exists is not run again.
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save(partial)
    partial.rename(target)
    print(f"{tokenizer.vocab_size} tokens", flush=True)


def _prepare_corpus(sources: Sources, tokenizer: Path, target: Path) -> None:
    from data_tools.documents.text import TextType
    from data_tools.job.build import prepare_corpus
    from data_tools.job.finish import summary
    from data_tools.job.options import CorpusOptions
    from data_tools.readers.options import ReadOptions
    from data_tools.readers.sources import parse_extensions

    text = TextType(ReadOptions(extensions=parse_extensions(sources.extensions)))
    options = CorpusOptions(validation_fraction=0.02)
    print(summary(prepare_corpus(sources.inputs, tokenizer, target, text, options)), flush=True)


def _prepare_conversations(tokenizer: Path, pairs: Path, target: Path) -> None:
    """Prepare questions about the standard library, whatever the pretraining read."""
    from data_tools.documents.conversations import ConversationType
    from data_tools.job.build import prepare_corpus
    from data_tools.job.finish import summary
    from data_tools.job.options import CorpusOptions
    from llada.demo.pairs import write_pairs

    count = write_pairs(_documented_files(), pairs)
    print(f"{count:,} questions and answers in {pairs}", flush=True)
    options = CorpusOptions(validation_fraction=0.03)
    manifest = prepare_corpus([pairs], tokenizer, target, ConversationType(), options)
    print(summary(manifest), flush=True)


def _export(run: Path, target: Path) -> None:
    from llada.hf.exporting import ExportOptions, export

    exported = export(str(run), str(target), True, None, ExportOptions())
    print(exported, flush=True)

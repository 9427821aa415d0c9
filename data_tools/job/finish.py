"""The end of a preparation: what the units left becomes a corpus."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import llada
from data_tools.job.output import Output
from data_tools.job.splits import append_shard
from data_tools.job.work_plan import WorkPlan
from data_tools.job.worker import PARTS, entry_path
from data_tools.readers.report import no_document, reasons_of
from llada.data.corpus import (
    CONVERSATIONS,
    FORMAT_VERSION,
    LEFT_OUT,
    SPLITS,
    TRAIN,
    VALIDATION,
    Manifest,
)
from llada.data.shard_files import size_of
from llada.data.shards import Shard, ShardEntry, SplitWriter, map_replies, shard_name, token_dtype
from llada.errors import RunError, UserError
from llada.files import write_atomically
from llada.tokenizer import Tokenizer


def finish(
    place: Output,
    plan: WorkPlan,
    tokenizer: Tokenizer,
    kind: str,
    shard_tokens: int,
    options: dict[str, Any],
) -> Manifest:
    """Put the held-out documents of all units together, write the manifest and give the folder its
    name. All units are done.

    Any number of tasks may do this at once: they write the same.

    Args:
        place: where.
        plan: of the preparation.
        tokenizer: of the corpus.
        kind: of the documents.
        shard_tokens: of a full shard.
        options: for the manifest.

    Raises:
        UserError: no document, in one of the named sources or in all.
    """
    folder = place.partial
    entries = [json.loads(entry_path(folder, unit).read_bytes()) for unit in range(len(plan.units))]
    skipped = Counter(plan.skipped)
    noted, encoders = Counter[str](), Counter[str]()
    for entry in entries:
        skipped.update(entry["skipped"])
        noted.update(entry["noted"])
        encoders[entry["encoder"]] += 1
    documents = _documents_of(plan, entries, skipped)
    shards = [ShardEntry(**shard) for entry in entries for shard in entry["shards"]]
    if not shards:
        raise UserError(
            f"--input: of {sum(documents):,} documents none is left{reasons_of(skipped)}"
        )
    training = _take_names(folder, [shard for shard in shards if shard.split == TRAIN])
    held_out = _put_together(
        folder,
        [shard for shard in shards if shard.split == VALIDATION],
        tokenizer,
        kind,
        shard_tokens,
    )
    listed = [*plan.listed, *(line for entry in entries for line in entry["listed"])]
    if listed:
        write_atomically(
            folder / LEFT_OUT,
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in listed),
        )
    manifest = new_manifest(
        tokenizer,
        kind=kind,
        options=options,
        sources=[
            {"path": source.path, "bytes": source.bytes, "documents": count}
            for source, count in zip(plan.sources, documents, strict=True)
            if count
        ],
        skipped=dict(sorted(skipped.items())),
        noted=dict(sorted(noted.items())),
        encoders=dict(sorted(encoders.items())),
        plan=plan.digest,
        shards=[*training, *held_out],
    )
    manifest.save(folder)
    return place.publish()


def new_manifest(tokenizer: Tokenizer, **content: Any) -> Manifest:
    """A manifest of this version of the tool; `content` is all but what the tokenizer says."""
    return Manifest(
        format_version=FORMAT_VERSION,
        tool_version=llada.__version__,
        dtype=token_dtype(tokenizer.rows).name,
        vocab_size=tokenizer.vocab_size,
        rows=tokenizer.rows,
        mask_id=tokenizer.mask_id,
        eos_id=tokenizer.eos_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        **content,
    )


def _documents_of(
    plan: WorkPlan, entries: list[dict[str, Any]], skipped: Counter[str]
) -> list[int]:
    """How many documents each source gave."""
    counts = [0] * len(plan.sources)
    reasons = [Counter[str]() for _ in plan.sources]
    for entry in entries:
        for source, count, left_out in entry["given"]:
            counts[source] += count
            reasons[source].update(left_out)
    for source, count, left_out in zip(plan.sources, counts, reasons, strict=True):
        if source.named and not count:
            raise no_document(source.path, left_out)
    if not any(counts):
        raise no_document(
            ", ".join(source.path for source in plan.sources[:3]) or "the inputs", skipped
        )
    return counts


def _take_names(folder: Path, parts: list[ShardEntry]) -> list[ShardEntry]:
    """The training shards of all units, numbered through. What an interrupted attempt has moved is
    in its place.
    """
    shards = [replace(part, name=shard_name(TRAIN, number)) for number, part in enumerate(parts)]
    for part, shard in zip(parts, shards, strict=True):
        for suffix in ("bin", "idx", "replies"):
            with suppress(FileNotFoundError):
                os.rename(
                    folder / PARTS / f"{part.name}.{suffix}", folder / f"{shard.name}.{suffix}"
                )
        sizes = [size_of(folder / f"{shard.name}.{suffix}") for suffix in ("bin", "idx")]
        written = [shard.bin_bytes, shard.idx_bytes]
        if sizes != written:
            raise RunError(
                f"{folder / shard.name}: {sizes} bytes, its unit wrote {written}; start over with"
                " --force"
            )
    return shards


def _put_together(
    folder: Path, parts: list[ShardEntry], tokenizer: Tokenizer, kind: str, limit: int
) -> list[ShardEntry]:
    """The held-out documents of all units: few of each, but windows do not cross shards, and tails
    are not read.
    """
    dtype = token_dtype(tokenizer.rows)
    with SplitWriter(folder, VALIDATION, dtype, limit) as writer:
        for part in parts:
            path = folder / PARTS / part.name
            replies = map_replies(Path(f"{path}.replies")) if kind == CONVERSATIONS else None
            append_shard(writer, Shard(path), part, replies)
        return writer.finish()


def summary(manifest: Manifest) -> str:
    """What was prepared, in a few lines."""
    lines = list(_splits(manifest))
    lines += [f"left out: {count:,} {reason}" for reason, count in manifest.skipped.items()]
    lines += [f"kept: {count:,} {reason}" for reason, count in manifest.noted.items()]
    return "\n".join(lines)


def _splits(manifest: Manifest) -> Iterator[str]:
    for split in SPLITS:
        documents, tokens, text_bytes = manifest.totals(split)
        if documents:
            yield f"{split}: {_totals(manifest, split, documents, tokens, text_bytes)}"
        else:
            consequence = (
                "nothing to train on"
                if split == TRAIN
                else "training on this corpus has no validation"
            )
            yield (
                f"{split}: no documents; {consequence} (--validation-fraction is"
                f" {manifest.options['validation_fraction']:g})"
            )


def _totals(manifest: Manifest, split: str, documents: int, tokens: int, text_bytes: int) -> str:
    shards = manifest.of(split)
    files = f"{len(shards)} shard{'s' if len(shards) > 1 else ''}"
    if manifest.kind == CONVERSATIONS:
        replies = sum(entry.replies for entry in shards)
        return (
            f"{documents:,} conversations with {replies:,} replies, {tokens:,} tokens,"
            f" {text_bytes:,} bytes of replies, {files}"
        )
    return (
        f"{documents:,} documents, {tokens:,} tokens, {text_bytes:,} bytes of text,"
        f" {text_bytes / tokens:.2f} bytes per token, {files}"
    )

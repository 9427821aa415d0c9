"""`llada data merge` and `split`: prepared corpora into other prepared corpora, document by
document, without tokenizing again.
"""

from __future__ import annotations

import bisect
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import llada
from data_tools.job.progress import progress_bar
from data_tools.job.splits import replies_of
from llada.data.corpus import CONVERSATIONS, CORPUS_FILES, SPLITS, Corpus, Manifest
from llada.data.shards import I64, Shard, ShardEntry, SplitWriter, damaged, token_dtype
from llada.errors import UserError
from llada.files import new_folder, refuse_inside
from llada.tokenizer import Tokenizer

SHARD_TOKENS = 2**28
"""Tokens with which a shard is full, unless said otherwise."""
_MERGED, _PART = "merged", "part_of"
"""Options of a manifest: what a corpus was merged from, and of which data it is which part."""


# -- merge -----------------------------------------------------------------------------------------


def merge(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    shard_tokens: int = SHARD_TOKENS,
    force: bool = False,
    progress: bool = False,
) -> Manifest:
    """Make one corpus of several: their documents in the order given, split by split, in new
    shards.

    Args:
        folders: of prepared corpora of one tokenizer and kind.
        output: folder to make.
        shard_tokens: a shard is closed by the document with which it has this many.
        force: replace a prepared corpus at `output`.
        progress: show a bar on stderr.

    Raises:
        UserError: fewer than two corpora, one that is damaged or of another tokenizer or kind, the
            same data twice; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    if len(folders) < 2:
        raise UserError("merge: give two folders or more")
    corpora = [Corpus.open(folder) for folder in folders]
    _check_mergeable(corpora)
    for corpus in corpora:
        refuse_inside(output, corpus.folder, "--output")
    manifests = [corpus.manifest for corpus in corpora]
    with new_folder(output, force, "a prepared corpus", CORPUS_FILES) as folder:
        sources = [_Source(corpus) for corpus in corpora]
        entries: list[ShardEntry] = []
        with progress_bar(
            progress,
            "merging",
            sum(entry.tokens for manifest in manifests for entry in manifest.shards),
        ) as done:
            for split in SPLITS:
                with SplitWriter(
                    folder, split, token_dtype(manifests[0].rows), shard_tokens
                ) as writer:
                    for source in sources:
                        for entry in source.corpus.manifest.of(split):
                            source.copy(entry, 0, entry.documents, writer, done)
                    entries += writer.finish()
        shutil.copytree(corpora[0].tokenizer_folder, folder / "tokenizer")
        merged = _merged_manifest(corpora, shard_tokens, entries)
        merged.save(folder)
    return merged


def _check_mergeable(corpora: list[Corpus]) -> None:
    first = corpora[0]
    seen: list[tuple[str, Path]] = []
    for corpus in corpora:
        for what, values in (
            (
                "tokenizers",
                (first.manifest.tokenizer_fingerprint, corpus.manifest.tokenizer_fingerprint),
            ),
            ("kinds", (first.manifest.kind, corpus.manifest.kind)),
        ):
            if values[0] != values[1]:
                raise UserError(
                    f"merge: {first.folder} and {corpus.folder} are of different {what}"
                    f" ({values[0]} and {values[1]}); only corpora of one tokenizer and kind can be"
                    " merged"
                )
        for own in _identities(corpus.manifest):
            for other, folder in seen:
                if _overlap(own, other):
                    raise UserError(
                        f"merge: {folder} and {corpus.folder} hold the same data; its documents"
                        " would be there twice"
                    )
        seen += [(own, corpus.folder) for own in _identities(corpus.manifest)]


def _merged_manifest(
    corpora: list[Corpus], shard_tokens: int, entries: list[ShardEntry]
) -> Manifest:
    manifests = [corpus.manifest for corpus in corpora]
    shared = {
        key: value
        for key, value in manifests[0].options.items()
        if all(m.options.get(key, ...) == value for m in manifests)
    }
    described = [
        {"path": str(c.folder), "data": _identities(c.manifest), "options": c.manifest.options}
        for c in corpora
    ]
    unique = {
        (s["path"], s["bytes"], s["documents"]): s
        for manifest in manifests
        for s in manifest.sources
    }  # parts name the same files
    counts: dict[str, Any] = {
        name: dict(
            sorted(
                sum(
                    (Counter(getattr(manifest, name)) for manifest in manifests), Counter[str]()
                ).items()
            )
        )
        for name in ("skipped", "noted", "encoders")
    }
    fractions = [manifest.options.get("validation_fraction", 0.0) for manifest in manifests]
    return replace(
        manifests[0],
        tool_version=llada.__version__,
        options={
            **shared,
            "validation_fraction": max(fractions),
            "shard_tokens": shard_tokens,
            _MERGED: described,
        },
        sources=list(unique.values()),
        shards=entries,
        plan="",
        **counts,
    )


def _identity(manifest: Manifest) -> str:
    """Of a corpus's documents; that of a part is its whole's, then `#`, the number of the part and
    how many there are.
    """
    return str(
        manifest.options.get(_PART)
        or "+".join(manifest.fingerprint(split)[:32] for split in SPLITS)
    )


def _identities(manifest: Manifest) -> list[str]:
    """Its own, and those of all it was merged from."""
    return [
        _identity(manifest),
        *(data for entry in manifest.options.get(_MERGED, []) for data in entry["data"]),
    ]


def _overlap(one: str, other: str) -> bool:
    """Whether two identities may have a document in common: a whole and its part, or parts of one
    whole cut in two ways.
    """
    for own, its in zip(one.split("#"), other.split("#"), strict=False):
        if own != its:
            return "/" in own and own.split("/")[1] != its.split("/")[1]
    return True


# -- split -----------------------------------------------------------------------------------------


def split(
    folder: str | Path,
    parts: int,
    output: str | Path,
    *,
    force: bool = False,
    progress: bool = False,
) -> list[Manifest]:
    """Cut a corpus into `parts` corpora of about equal tokens: output/part-00000, part-00001, ...

    Each split is cut into runs, so merging the parts in order gives the documents in their order.
    Shards are as large as the corpus's own.

    Args:
        folder: of the prepared corpus.
        parts: how many, at most its training documents.
        output: folder to make.
        force: replace parts at `output`.
        progress: show a bar on stderr.

    Raises:
        UserError: a damaged corpus, more parts than training documents; nothing is left behind.
        RunError: the output cannot be written; nothing is left behind.
    """
    corpus = Corpus.open(folder)
    manifest = corpus.manifest
    documents = manifest.totals("train")[0]
    if not 1 <= parts <= documents:
        raise UserError(
            f"--parts: {parts} is not in 1..{documents}, the training documents of {folder}"
        )
    refuse_inside(output, corpus.folder, "--output")
    names = [f"part-{number:05d}" for number in range(parts)]
    bounds = {name: _bounds(corpus, name, parts, at_least=int(name == "train")) for name in SPLITS}
    with new_folder(output, force, "a split corpus", (names[0], "part-*")) as whole:
        source, made = _Source(corpus), []
        with progress_bar(
            progress, "splitting", sum(entry.tokens for entry in manifest.shards)
        ) as done:
            for number, name in enumerate(names):
                (whole / name).mkdir()
                entries = []
                for kind, bound in bounds.items():
                    entries += _write_part(
                        source, kind, bound[number], bound[number + 1], whole / name, done
                    )
                shutil.copytree(corpus.tokenizer_folder, whole / name / "tokenizer")
                made.append(_part_manifest(manifest, number, parts, entries))
                made[-1].save(whole / name)
    return made


def _bounds(corpus: Corpus, split: str, parts: int, at_least: int) -> list[int]:
    """First document of every part, counted over the split's shards, and their number [parts + 1];
    a part begins where its tokens do.
    """
    entries, shards = corpus.manifest.of(split), corpus.shards(split)
    documents, tokens, _ = corpus.manifest.totals(split)
    first_document = np.cumsum([0, *(entry.documents for entry in entries)])
    first_token = np.cumsum([0, *(entry.tokens for entry in entries)])
    bounds = [0]
    for part in range(1, parts):
        target = part * tokens // parts
        i = int(np.searchsorted(first_token, target, side="right")) - 1
        found = documents
        if i < len(shards):
            found = int(first_document[i]) + bisect.bisect_left(
                shards[i].pointers, (target - int(first_token[i])) * shards[i].dtype.itemsize
            )
        bounds.append(min(max(found, bounds[-1] + at_least), documents - at_least * (parts - part)))
    return [*bounds, documents]


def _write_part(
    source: _Source, split: str, first: int, stop: int, folder: Path, done: Callable[[int], None]
) -> list[ShardEntry]:
    """Documents first..stop-1 of a split as shards in `folder`."""
    manifest, before = source.corpus.manifest, 0
    with SplitWriter(
        folder,
        split,
        token_dtype(manifest.rows),
        manifest.options.get("shard_tokens", SHARD_TOKENS),
    ) as writer:
        for entry in manifest.of(split):
            low, high = max(first - before, 0), min(stop - before, entry.documents)
            if low < high:
                source.copy(entry, low, high, writer, done)
            before += entry.documents
        return writer.finish()


def _part_manifest(whole: Manifest, number: int, parts: int, entries: list[ShardEntry]) -> Manifest:
    options = {key: value for key, value in whole.options.items() if key != _MERGED}
    return replace(
        whole,
        tool_version=llada.__version__,
        options={**options, _PART: f"{_identity(whole)}#{number}/{parts}"},
        # Once, so that merging the parts gives the counts of the whole.
        skipped=whole.skipped if number == 0 else {},
        noted=whole.noted if number == 0 else {},
        encoders=whole.encoders if number == 0 else {},
        plan="",
        shards=entries,
    )


# -- documents from one shard to another -----------------------------------------------------------


class _Source:
    """A corpus that documents are copied from. Every file is compared with its checksum before its
    first document is used.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._token_bytes = token_bytes(corpus.tokenizer())
        # the last one: shards are asked for in order
        self._opened: tuple[str, Shard, _TextBytes] | None = None

    def copy(
        self,
        entry: ShardEntry,
        first: int,
        stop: int,
        writer: SplitWriter,
        done: Callable[[int], None],
    ) -> None:
        """Append documents first..stop-1 of a shard. Raises UserError when the shard is damaged."""
        if self._opened is None or self._opened[0] != entry.name:
            shard = self._checked(entry)
            self._opened = (
                entry.name,
                shard,
                _TextBytes(self._token_bytes, shard, entry, self._replies(entry)),
            )
        _, shard, text_bytes = self._opened
        replies = self._replies(entry)
        for begin, flat, lengths in shard.runs(first, stop):
            own = None if replies is None else replies_of(replies, begin, begin + len(lengths))
            writer.append(flat, lengths, text_bytes.of(begin, flat, lengths, own), own)
            done(len(flat))

    def _checked(self, entry: ShardEntry) -> Shard:
        for file in self.corpus.files_of(entry):
            file.check_hash()
        return self.corpus.shard(entry)

    def _replies(self, entry: ShardEntry) -> I64 | None:
        return self.corpus.replies(entry) if self.corpus.manifest.kind == CONVERSATIONS else None


def token_bytes(tokenizer: Tokenizer) -> I64:
    """UTF-8 bytes of text that each id stands for [vocab_size]; 0 for special tokens. Exact for
    byte-level vocabularies.
    """
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for token_id in range(tokenizer.vocab_size):
        text = tokenizer.decode([token_id], skip_special_tokens=True)
        # Part of a character: the vocabulary spells it with one character a byte.
        sizes[token_id] = len(tokenizer.token(token_id)) if "\ufffd" in text else len(text.encode())
    return sizes


class _TextBytes:
    """Bytes of text of each document of a shard, of which the manifest says only the sum.

    Where the bytes of the tokens add up to that sum (byte-level tokenizers) they are exact. Else
    the sum is shared by tokens.
    """

    def __init__(self, sizes: I64, shard: Shard, entry: ShardEntry, replies: I64 | None) -> None:
        self._sizes, self._entry = sizes, entry
        self._start_of = lambda document: int(shard.pointers[document]) // shard.dtype.itemsize
        total = 0
        for first, flat, lengths in shard.runs():
            if flat.min() < 0 or flat.max() >= len(sizes):
                raise damaged(shard.bin_path, f"an id is not in 0..{len(sizes) - 1}")
            total += int(
                self._exact(
                    flat,
                    lengths,
                    None if replies is None else replies_of(replies, first, first + len(lengths)),
                ).sum()
            )
        self._is_exact = total == entry.text_bytes

    def of(self, first: int, flat: I64, lengths: I64, replies: I64 | None) -> I64:
        """Of the documents of a run that begins with document `first`."""
        if self._is_exact:
            return self._exact(flat, lengths, replies)
        ends = self._start_of(first) + np.cumsum(np.concatenate([[0], lengths]))
        shares: I64 = np.floor(ends / self._entry.tokens * self._entry.text_bytes).astype(np.int64)
        return shares[1:] - shares[:-1]

    def _exact(self, flat: I64, lengths: I64, replies: I64 | None) -> I64:
        before = np.concatenate([[0], np.cumsum(self._sizes[flat])])
        ends = np.cumsum(lengths)
        starts = ends - lengths
        if replies is None:
            return before[ends] - before[starts]
        owner, _, _, response_start, turn_end = replies.T
        sizes = np.zeros(len(lengths), dtype=np.int64)
        np.add.at(
            sizes, owner, before[starts[owner] + turn_end] - before[starts[owner] + response_start]
        )
        return sizes

"""`llada data tokenizer`: train one on a sample of the whole input; say what one is and how well it
fits a text.
"""

from __future__ import annotations

import heapq
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_tools.readers.options import ReadOptions
from data_tools.readers.reading import read_inputs, sample_texts
from data_tools.readers.report import Report
from data_tools.readers.sources import parse_extensions
from data_tools.tokenizers.encoders import choose_encoder
from data_tools.tokenizers.sentencepiece import ESCAPES, LOSSLESS, parse
from data_tools.tokenizers.sentencepiece import kind as kind_of_model
from llada.errors import UserError, did_you_mean
from llada.files import new_folder
from llada.tokenizer import SPECIAL_TOKENS, Tokenizer, train_byte_level_bpe

KINDS = ("byte-bpe", "unigram", "bpe")
SAMPLE_BYTES = 100_000_000
LARGEST_VOCABULARY = 10_000_000
"""Ids; the trainers set memory aside for every one."""
_PASSAGE_CHARACTERS = 4096
_MEASURED_BYTES = 1 << 20
_NAMES_SHOWN = 8
_THREADS = 8
"""Fixed, since the sums of unigram training depend on it: every machine makes the same model."""
_LARGE = 1 << 30
"""Bytes from which SentencePiece needs 64-bit positions."""
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_special_tokens.json",
)


@dataclass(frozen=True)
class Fit:
    """How a tokenizer cuts a text.

    Attributes:
        text_bytes, words, tokens: of the text; words are what stands between spaces and line ends,
        tokens count no EOS.
    """

    text_bytes: int
    words: int
    tokens: int

    def __str__(self) -> str:
        tokens = max(1, self.tokens)
        return (
            f"{self.text_bytes / tokens:.2f} bytes per token,"
            f" {self.tokens / max(1, self.text_bytes):.3f} tokens per byte,"
            f" {self.tokens / max(1, self.words):.2f} tokens per word on {self.text_bytes:,} bytes"
        )


@dataclass(frozen=True)
class TrainedTokenizer:
    """
    Attributes:
        tokenizer: as saved.
        fit: on up to a megabyte of the sample.
        text_bytes: UTF-8 bytes read.
        sample_bytes: of these, bytes trained on.
    """

    tokenizer: Tokenizer
    fit: Fit
    text_bytes: int
    sample_bytes: int


def train_tokenizer(
    inputs: Sequence[str | Path],
    vocab_size: int,
    output: str | Path,
    *,
    kind: str = "byte-bpe",
    sample_bytes: int = SAMPLE_BYTES,
    text_field: str = "text",
    extensions: Sequence[str] | None = None,
    skip_bad: bool = False,
    force: bool = False,
) -> TrainedTokenizer:
    """Train a tokenizer on a sample of the documents and save it as the folder `output`. The same
    documents give the same files.

    Args:
        inputs: files and folders.
        vocab_size: ids in all, LLaDA's six special tokens included, which take the last ones.
        output: folder to make.
        kind: one of KINDS; unigram and bpe are SentencePiece models.
        sample_bytes: train on no more text than this, chosen over all documents. Memory grows with
            it, not with the input.
        text_field, extensions, skip_bad: see ReadOptions.
        force: replace a tokenizer at `output`.

    Raises:
        UserError: anything wrong with inputs, options or output; nothing is left behind.
    """
    if kind not in KINDS:
        raise UserError(
            f"--kind: '{kind}' is none of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        )
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(
            f"--vocab-size: {vocab_size} is more than {LARGEST_VOCABULARY:,}, the most that is"
            " trained"
        )
    if sample_bytes < 1:
        raise UserError(f"--sample-bytes: {sample_bytes} is less than 1")
    options = ReadOptions(text_field, parse_extensions(extensions), skip_bad)
    with new_folder(output, force, "a tokenizer", _TOKENIZER_FILES) as folder:
        sample = sample_passages(read_inputs(inputs, options, Report()), sample_bytes)
        if kind == "byte-bpe":
            made = train_byte_level_bpe(iter(sample.passages), vocab_size)
        else:
            made = train_sentencepiece(sample.passages, vocab_size, kind)
        made.save(folder)
    every = max(1, sample.kept_bytes // _MEASURED_BYTES)
    return TrainedTokenizer(
        made, measure(made, sample.passages[::every]), sample.text_bytes, sample.kept_bytes
    )


def measure(tokenizer: Tokenizer, texts: Sequence[str]) -> Fit:
    """How the tokenizer cuts these texts."""
    text_bytes = sum(len(text.encode()) for text in texts)
    return Fit(
        text_bytes,
        sum(len(text.split()) for text in texts),
        len(tokenizer.encode_batch(list(texts))[0]),
    )


def describe(
    path: str | Path, inputs: Sequence[str | Path] = (), options: ReadOptions | None = None
) -> str:
    """What a tokenizer is, in a few lines; with inputs, also how it cuts a sample of them.

    Args:
        path: Hugging Face folder, tokenizer.json or SentencePiece model; one without mask or EOS
            too.
        inputs: files and folders.
        options: how to read them.

    Raises:
        UserError: no such tokenizer or input.
    """
    found = Tokenizer.load(path, require_mask=False)
    lines = [
        f"{path}: {found.vocab_size:,} ids, {found.rows:,} rows, fingerprint {found.fingerprint}",
        f"kind: {_kind(found)}",
    ]
    roles = found.special_tokens()
    for role in ("bos", "eos", "pad", "mask"):
        lines.append(
            f"{role:>4}: {roles[role][1]} {roles[role][0]}" if role in roles else f"{role:>4}: none"
        )
    further = _further_special_tokens(found)
    if further:
        more = f" and {len(further) - _NAMES_SHOWN:,} more" if len(further) > _NAMES_SHOWN else ""
        lines.append(
            "further special tokens:"
            f" {', '.join(f'{found.id_of(name)} {name}' for name in further[:_NAMES_SHOWN])}{more}"
        )
    missing = [name for name in SPECIAL_TOKENS if found.id_of(name) is None]
    if missing:
        lines.append(
            f"without {' '.join(missing)}; `llada data prepare --add-special-tokens` appends them"
        )
    texts = _sample(inputs, options or ReadOptions()) if inputs else []
    encoder, note = choose_encoder(found, texts)
    lines.append(f"encoder: {encoder.name}{f' ({note})' if note else ''}")
    if texts:
        lines.append(f"{measure(found, texts)}, a sample of the input")
    return "\n".join(lines)


def _sample(inputs: Sequence[str | Path], options: ReadOptions) -> list[str]:
    texts = [text[:_MEASURED_BYTES] for text in sample_texts(inputs, _MEASURED_BYTES, options)]
    if not texts:
        raise UserError(f"--input: no text in {', '.join(map(str, inputs))}")
    return texts


def _kind(tokenizer: Tokenizer) -> str:
    if isinstance(tokenizer.definition, bytes):
        return kind_of_model(tokenizer.definition)
    definition = json.loads(tokenizer.definition)
    model = definition["model"]
    splitter = definition.get("pre_tokenizer") or {}
    bytewise = any(
        step.get("type") == "ByteLevel" for step in splitter.get("pretokenizers") or [splitter]
    )
    name = f"{'byte-level ' if bytewise else ''}{model.get('type', 'BPE')}"
    return f"tokenizer.json, {name}{' with byte fallback' if model.get('byte_fallback') else ''}"


def _further_special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Those without a role, by id."""
    names = {name for name in SPECIAL_TOKENS if tokenizer.id_of(name) is not None}
    if isinstance(tokenizer.definition, str):
        names.update(
            entry["content"]
            for entry in json.loads(tokenizer.definition).get("added_tokens") or []
            if entry.get("special")
        )
    names -= {name for name, _ in tokenizer.special_tokens().values()}
    return sorted(names, key=lambda name: tokenizer.id_of(name) or 0)


# -- the sample ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """
    Attributes:
        passages: in the order of the input.
        text_bytes: UTF-8 bytes of all texts.
        kept_bytes: of the passages.
    """

    passages: list[str]
    text_bytes: int
    kept_bytes: int


def sample_passages(texts: Iterable[str], limit: int) -> Sample:
    """Passages from all over the texts, no more than `limit` bytes of them; all there are, if they
    are no more.

    Those are kept whose hash, keyed by their place in the input, is least: one pass, and memory for
    the sample alone. The same texts give the same sample.

    Raises:
        UserError: a limit with no room for a single passage.
    """
    heap: list[tuple[int, int, bytes]] = []  # (-hash, place, UTF-8), the greatest hash first
    below = 1 << 64  # every passage seen with a hash below it is in the heap
    text_bytes = kept = place = 0
    for text in texts:
        for passage in _passages(text):
            data = passage.encode()
            place += 1
            text_bytes += len(data)
            value = xxhash.xxh3_64_intdigest(data, seed=place)
            if value >= below:
                continue
            heapq.heappush(heap, (-value, place, data))
            kept += len(data)
            while kept > limit:
                greatest, _, dropped = heapq.heappop(heap)
                below, kept = -greatest, kept - len(dropped)
    if text_bytes and not heap:
        raise UserError(
            f"--sample-bytes: {limit} is too little for a passage of the text; give some thousands"
            " at least"
        )
    heap.sort(key=lambda entry: entry[1])
    return Sample([data.decode() for _, _, data in heap], text_bytes, kept)


def _passages(text: str) -> Iterator[str]:
    """A short text as it is; a long one cut at ends of lines, else before spaces, else anywhere."""
    start = 0
    while len(text) - start > _PASSAGE_CHARACTERS:
        limit = start + _PASSAGE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1
        if end <= start:
            end = text.rfind(" ", start, limit)
        if end <= start:
            end = limit
        yield text[start:end]
        start = end
    yield text[start:]


# -- SentencePiece ---------------------------------------------------------------------------------


def train_sentencepiece(passages: Sequence[str], vocab_size: int, kind: str) -> Tokenizer:
    """Train a SentencePiece model that gives every text back as it was, with LLaDA's special tokens
    after its last id.

    Spaces are kept, as many as there are and without one in front; digits stand alone; what has no
    piece of its own becomes UTF-8 bytes.

    Args:
        passages: text. It is trained on line by line.
        vocab_size: ids in all: a token for the unknown, 256 bytes, 6 special tokens, the rest
            pieces.
        kind: "unigram" or "bpe".

    Raises:
        UserError: a vocabulary that the text cannot fill, or that has no room for its characters.
    """
    from sentencepiece import SentencePieceTrainer

    size = vocab_size - len(SPECIAL_TOKENS)
    smallest = 1 + 256 + 1 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size: {vocab_size} is less than {smallest}, the unknown token, the bytes, the"
            " space and the special tokens"
        )
    model = io.BytesIO()
    with tempfile.TemporaryDirectory() as scratch:
        rules, inverse = Path(scratch, "rules.tsv"), Path(scratch, "inverse.tsv")
        rules.write_text(
            "".join(f"{_code_points(old)}\t{_code_points(new)}\n" for old, new in ESCAPES)
        )
        inverse.write_text(
            "".join(f"{_code_points(new)}\t{_code_points(old)}\n" for old, new in ESCAPES)
        )
        try:
            SentencePieceTrainer.train(
                sentence_iterator=_sentences(passages),
                model_writer=model,
                model_type=kind,
                vocab_size=size,
                normalization_rule_tsv=str(rules),
                denormalization_rule_tsv=str(inverse),
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                byte_fallback=True,
                required_chars="\u2581",  # the space: as bytes it would come back as this character
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=8 * _PASSAGE_CHARACTERS,
                train_extremely_large_corpus=sum(map(len, passages)) >= _LARGE,
                num_threads=_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            raise UserError(_training_error(vocab_size, str(error))) from None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tokenizer.model")
        path.write_bytes(_finished(model.getvalue()))
        made = Tokenizer.load(path, require_mask=False).with_special_tokens()
    made.name = "trained tokenizer"
    return made


def _sentences(passages: Iterable[str]) -> Iterator[str]:
    """Lines. SentencePiece reads a NUL as the end and leaves out lines with its own sign for the
    unknown.
    """
    for line in (
        line for text in passages for passage in _passages(text) for line in passage.split("\n")
    ):
        if line and not line.isspace():
            yield line.replace("\0", " ").replace("\u2585", " ")


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


def _finished(model: bytes) -> bytes:
    """Without the names of temporary files; the normalizer gets its own."""
    proto = parse(model)
    for spec in (proto.normalizer_spec, proto.denormalizer_spec):
        spec.name = LOSSLESS
        spec.ClearField("normalization_rule_tsv")
    return bytes(proto.SerializeToString(deterministic=True))


def _training_error(vocab_size: int, message: str) -> str:
    added = len(SPECIAL_TOKENS)
    most = re.search(r"Vocabulary size too high.*<= (\d+)", message, re.DOTALL)
    if most:
        return (
            f"vocab_size: {vocab_size} is more than the text can fill; at most"
            f" {int(most[1]) + added} with this sample"
        )
    least = re.search(r"smaller than required_chars. (\d+) vs (\d+)", message, re.DOTALL)
    if least:
        return (
            f"vocab_size: {vocab_size} has no room for the characters of the text; at least"
            f" {int(least[2]) + added} with this sample"
        )
    if "sentences_.empty()" in message:
        return "--input: no text to train on, only spaces and line ends"
    reason = " ".join(message.split())
    return f"vocab_size: {vocab_size}: SentencePiece cannot train on this text ({reason[-200:]})"

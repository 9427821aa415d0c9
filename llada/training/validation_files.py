"""RUN/validation/step_NNNNNNNN.npz: the losses behind a validation line, so that runs can be compared item by item.

One file a validation, without pickle. Of corpus c (numbered as in the line) it holds

    c.item, c.item_loss, c.item_length    number of each item in its split; its loss and tokens, summed over its draws [items]
    c.loss, c.length                      loss of each draw, t ascending [sweeps, 4]; tokens of its text [sweeps]
    c.owner, c.text                       item of each sweep (its row in c.item) and number of its text [sweeps]

and `corpora`, JSON in UTF-8: name, weight, tokens per byte and measure of each. Two losses may be compared draw by draw exactly if
their measures are equal: the same text, cut, t and masks.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llada.errors import RunError, UserError
from llada.files import sync_folder, write_atomically
from llada.training.estimates import I64, SWEEP, Sample

FOLDER = "validation"
_NAME = re.compile(r"^step_(\d{8})\.npz$")


@dataclass(frozen=True)
class Measure:
    """What decides a validation besides the model.

    Attributes:
        text: fingerprint of the split: its tokens, document boundaries and tokenizer.
        tokenizer: fingerprint of the tokenizer.
        unit: what an item is: windows, documents or conversations.
        sequence_length: data.sequence_length.
        document_mask: data.document_mask.
        windows: validation.windows.
        draws_per_item: times that each window or conversation is read.
        items: fingerprint of the items that are read, their lengths and their t.
        noise: how t and masks are drawn.
    """

    text: str
    tokenizer: str
    unit: str
    sequence_length: int
    document_mask: bool
    windows: int
    draws_per_item: int
    items: str
    noise: str = "fixed_count, sweeps of 4"

    @property
    def fingerprint(self) -> str:
        """Of all of it; 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """One corpus in one validation.

    Attributes:
        name: of the corpus in the run.
        weight: in means over corpora.
        tokens_per_byte: of the split.
        measure: what decided the numbers besides the model.
        items: number of each item in its split [k].
        sample: the losses.
    """

    name: str
    weight: float
    tokens_per_byte: float
    measure: Measure
    items: I64
    sample: Sample


def write(run: Path, step: int, corpora: Sequence[Measured]) -> Path:
    """Write the file of the validation after `step` steps, in place of one that is there. Raises RunError when that fails."""
    arrays: dict[str, np.ndarray] = {}
    for c, corpus in enumerate(corpora):
        loss, length = corpus.sample.by_item()
        sample = corpus.sample
        arrays |= {f"{c}.item": corpus.items, f"{c}.item_loss": loss, f"{c}.item_length": length.astype(np.int64)}
        arrays |= {f"{c}.loss": sample.loss, f"{c}.length": sample.length, f"{c}.owner": sample.item, f"{c}.text": sample.text}
    about = [{"name": m.name, "weight": m.weight, "tokens_per_byte": m.tokens_per_byte, "measure": asdict(m.measure)} for m in corpora]
    arrays["corpora"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stubs take the names for its own option
    path = run / FOLDER / f"step_{step:08d}.npz"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise RunError(f"validation after step {step}: {path} cannot be written ({error.strerror})") from None
    return path


def read(run: Path, step: int) -> list[Measured]:
    """The corpora of the validation after `step` steps. Raises UserError when the file cannot be one."""
    path = run / FOLDER / f"step_{step:08d}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(bytes(file["corpora"]).decode())
            return [_corpus(c, entry, file) for c, entry in enumerate(about)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); compare another step") from None


def _corpus(c: int, about: dict[str, Any], file: Any) -> Measured:
    loss, length, owner, text, items = (file[f"{c}.{name}"] for name in ("loss", "length", "owner", "text", "item"))
    sound = loss.dtype == np.float64 and loss.shape == (len(length), SWEEP) and len(owner) == len(text) == len(length) > 0
    if not sound or not np.array_equal(np.unique(owner), np.arange(len(items))):
        raise ValueError(f"corpus {c} has arrays that do not fit each other")
    about = {**about, "measure": Measure(**about["measure"])}
    return Measured(**about, items=items, sample=Sample(loss, length, owner, text))


def steps(run: Path) -> list[int]:
    """Steps after which there is a file, ascending."""
    folder = run / FOLDER
    return sorted(int(found[1]) for path in (folder.iterdir() if folder.is_dir() else ()) if (found := _NAME.match(path.name)))


def set_aside(run: Path, step: int, attempt: int) -> None:
    """Move the files of validations after `step` (all, if it is 0) to RUN/validation.attempt-N, as metrics.jsonl is cut."""
    later = [number for number in steps(run) if not step or number > step]
    if not later:
        return
    aside = run / f"{FOLDER}.attempt-{attempt}"
    aside.mkdir(exist_ok=True)
    for number in later:
        name = f"step_{number:08d}.npz"
        os.replace(run / FOLDER / name, aside / name)
    sync_folder(run / FOLDER)
    sync_folder(aside)

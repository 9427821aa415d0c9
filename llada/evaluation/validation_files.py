"""RUN/validation/step_NNNNNNNN.npz: the losses behind a validation line.

With them two runs can be compared draw by draw. Each validation writes one file, without pickle. Of
corpus c (numbered as in the line) it holds

    c.item         number of each item in its split [items]
    c.item_loss    loss of each item, summed over its draws [items]
    c.item_length  tokens of each item, summed over its draws [items]
    c.loss         loss of each draw, t ascending [sweeps, 4]
    c.length       tokens of the text of each sweep [sweeps]
    c.owner        item of each sweep: its row in c.item [sweeps]
    c.text         number of the text of each sweep [sweeps]

and `corpora`, JSON in UTF-8: name, weight, tokens per byte and measure of each corpus. Losses can
be compared exactly if their measures are equal: the same text, cut alike, the same t and masks.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from llada.arrays import I64
from llada.errors import RunError, UserError, one_line
from llada.evaluation.estimates import SWEEP, CorpusLosses
from llada.files import sync_folder, write_atomically

FOLDER = "validation"
_NAME = re.compile(r"^step_(\d{8})\.npz$")
_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    RuntimeError,
)
"""Errors that reading a damaged file ends with, by what is damaged in it."""
_Arrays: TypeAlias = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Measure:
    """Everything that decides a validation besides the model.

    Attributes:
        text: fingerprint of the split: its tokens, document boundaries and tokenizer.
        tokenizer: fingerprint of the tokenizer.
        unit: what an item is: windows, documents or conversations.
        sequence_length: data.sequence_length.
        document_mask: data.document_mask.
        windows: validation.windows.
        draws_per_item: how often each window or conversation is read.
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
        """Of all attributes; 16 hexadecimal digits."""
        content = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Measured:
    """One corpus in one validation.

    Attributes:
        name: the corpus's name in the run.
        weight: in means over corpora.
        tokens_per_byte: tokens per byte of the split's text.
        measure: what decided the numbers besides the model.
        items: number of each item in its split [k].
        sample: the losses.
        objective: whose loss it is, as `Objective.summary`; empty in files of versions that did not
            record it.
        is_exact: the losses are -log p; else an upper bound on it.
    """

    name: str
    weight: float
    tokens_per_byte: float
    measure: Measure
    items: I64
    sample: CorpusLosses
    objective: str = ""
    is_exact: bool = False

    @property
    def loss_name(self) -> str:
        """What the losses are, for people."""
        return name_of_loss(self.is_exact)


def name_of_loss(is_exact: bool) -> str:
    """Return what a validation measures, for people: -log p itself, or a bound on it."""
    return "-log p" if is_exact else "NELBO"


def write(run: Path, step: int, corpora: Sequence[Measured]) -> Path:
    """Write the file of the validation after `step` steps; an existing one is replaced.

    Raises:
        RunError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    descriptions = []
    for c, corpus in enumerate(corpora):
        sample = corpus.sample
        # The sums per item follow from the draws. They are for readers who want no more than these.
        item_loss, item_length = sample.by_item()
        arrays |= {
            f"{c}.item": corpus.items,
            f"{c}.item_loss": item_loss,
            f"{c}.item_length": item_length.astype(np.int64),
            f"{c}.loss": sample.loss,
            f"{c}.length": sample.length,
            f"{c}.owner": sample.item,
            f"{c}.text": sample.text,
        }
        descriptions.append(
            {
                "name": corpus.name,
                "weight": corpus.weight,
                "tokens_per_byte": corpus.tokens_per_byte,
                "measure": asdict(corpus.measure),
                "objective": corpus.objective,
                "is_exact": corpus.is_exact,
            }
        )
    # The bytes of the JSON: an array of objects would need pickle.
    arrays["corpora"] = np.frombuffer(json.dumps(descriptions).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # its stubs take the names for its own option
    path = run / FOLDER / f"step_{step:08d}.npz"
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        raise RunError(
            f"validation after step {step}: {path} cannot be written ({error.strerror})"
        ) from None
    return path


def read(run: Path, step: int) -> list[Measured]:
    """Read the corpora of the validation after `step` steps.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    path = run / FOLDER / f"step_{step:08d}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            descriptions = json.loads(bytes(arrays["corpora"]).decode())
            return [_corpus(c, values, arrays) for c, values in enumerate(descriptions)]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except _DAMAGES as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); compare another step") from None


def _corpus(c: int, description: dict[str, Any], arrays: _Arrays) -> Measured:
    """Return corpus `c` of a file. Raises ValueError if its arrays do not fit each other."""
    loss = arrays[f"{c}.loss"]
    length = arrays[f"{c}.length"]
    owner = arrays[f"{c}.owner"]
    text = arrays[f"{c}.text"]
    items = arrays[f"{c}.item"]
    # Every sweep belongs to an item, and every item has a sweep.
    fits = (
        loss.dtype == np.float64
        and loss.shape == (len(length), SWEEP)
        and len(owner) == len(text) == len(length) > 0
    )
    if not fits or not np.array_equal(np.unique(owner), np.arange(len(items))):
        raise ValueError(f"corpus {c} has arrays that do not fit each other")
    fields = {**description, "measure": Measure(**description["measure"])}
    return Measured(**fields, items=items, sample=CorpusLosses(loss, length, owner, text))


def steps(run: Path) -> list[int]:
    """Return the steps after which there is a file, ascending."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    matches = [_NAME.match(path.name) for path in folder.iterdir()]
    return sorted(int(match[1]) for match in matches if match)


def supersede(run: Path, step: int, attempt: int) -> None:
    """Move the files of validations after `step` to RUN/validation.attempt-N.

    This goes with the cut of metrics.jsonl. At step 0 all files are moved, since the validation
    before the first step is measured again.
    """
    later = [number for number in steps(run) if not step or number > step]
    if not later:
        return
    superseded = run / f"{FOLDER}.attempt-{attempt}"
    superseded.mkdir(exist_ok=True)
    for number in later:
        name = f"step_{number:08d}.npz"
        os.replace(run / FOLDER / name, superseded / name)
    sync_folder(run / FOLDER)
    sync_folder(superseded)

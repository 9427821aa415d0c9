"""Which data a corpus holds: recorded when corpora are merged or split, so that no document can be
merged in twice.

The identity of a corpus is made of the fingerprints of its splits. The identity of a part is that
of the whole, followed by `#`, the number of the part, `/` and the number of parts: "ab12+cd34#0/2".
A part of a part has two such endings.
"""

from __future__ import annotations

from llada.data.manifest import SPLITS, Manifest

MERGED = "merged"
"""Option of a manifest: the corpora that this one was merged from."""
PART_OF = "part_of"
"""Option of a manifest: the identity of this corpus, if it is a part of another one."""


def identity(manifest: Manifest) -> str:
    """Return the identity of a corpus."""
    part_of = manifest.options.get(PART_OF)
    if part_of:
        return str(part_of)
    return "+".join(manifest.fingerprint(split)[:32] for split in SPLITS)


def part_identity(whole: Manifest, number: int, num_parts: int) -> str:
    """Return the identity of part `number` of a corpus that is split into `num_parts`."""
    return f"{identity(whole)}#{number}/{num_parts}"


def identities(manifest: Manifest) -> list[str]:
    """Return the identity of a corpus and those of all corpora that it was merged from."""
    result = [identity(manifest)]
    for merged in manifest.options.get(MERGED, []):
        result += merged["data"]
    return result


def may_overlap(one: str, other: str) -> bool:
    """Return whether corpora with these identities may have a document in common.

    That is the case for a whole and its part ("x" and "x#0/2"), and for parts of one whole that was
    split in two ways ("x#0/2" and "x#1/3"). Different parts of one split ("x#0/2" and "x#1/2")
    have no document in common.
    """
    # Compare from the whole to the part of a part, as far as both go.
    for own, others in zip(one.split("#"), other.split("#"), strict=False):
        if own != others:
            # Different wholes, or parts "number/of": these overlap if the whole was cut otherwise.
            is_part = "/" in own
            return is_part and own.split("/")[1] != others.split("/")[1]
    return True

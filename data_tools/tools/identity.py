"""The identity of a corpus's data. Merging and splitting record it, so that no document can be
merged in twice.

The identity of a corpus is made of the fingerprints of its splits. The identity of a part is that
of the whole, followed by `#`, the number of the part, `/` and the number of parts: "ab12+cd34#0/2".
A part of a part has two such endings.
"""

from __future__ import annotations

from llada.data.manifest import SPLITS, Manifest

MERGED = "merged"
"""Option in a manifest that lists the corpora from which this one was merged."""
PART_OF = "part_of"
"""Option in a manifest that gives the identity of this corpus, if it is a part of another one."""


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
    """Return the identity of a corpus, and those of all corpora from which it was merged."""
    result = [identity(manifest)]
    for merged in manifest.options.get(MERGED, []):
        result += merged["data"]
    return result


def may_overlap(one: str, other: str) -> bool:
    """Return whether corpora with these identities may have a document in common.

    That is the case for a whole and its part ("x" and "x#0/2"), and for parts of a whole that was
    split in two ways ("x#0/2" and "x#1/3"). Different parts of one split ("x#0/2" and "x#1/2")
    have no document in common.
    """
    # Compare level by level: the wholes, then their parts, then the parts of these parts.
    for level, other_level in zip(one.split("#"), other.split("#"), strict=False):
        if level == other_level:
            continue
        if "/" not in level:  # different wholes
            return False
        num_parts = level.split("/")[1]
        other_num_parts = other_level.split("/")[1]
        return num_parts != other_num_parts
    return True

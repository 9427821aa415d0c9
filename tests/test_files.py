"""Sizes for people; what else llada.files does is tested with the checkpoints that it writes."""

from __future__ import annotations

from llada.formatting import readable_size


def test_readable_sizes() -> None:
    assert [readable_size(n) for n in (0, 999, 999_600, 12_345, 1.12e11, 4.9e13, 1e20)] == [
        "0 bytes",
        "999 bytes",
        "1 MB",
        "12.3 kB",
        "112 GB",
        "49 TB",
        "1e+05 PB",
    ]

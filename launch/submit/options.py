"""The options of `llada launch`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LaunchOptions:
    """Options of `llada launch CONFIG`; `llada launch run --help` describes them."""

    nodes: int = 1
    gpus_per_node: int | None = None
    dry_run: bool = False
    local: bool = False
    chain: int = 1
    then: str | None = None
    after: str | None = None
    allow_changed: bool = False
    rewind: int | None = None

"""The layouts of eight ranks that the distributed tests train."""

from __future__ import annotations

from typing import Any

# Four layers, where nothing else is stated (tests/engine/support.py): enough for four chunks of a
# pipeline. Layouts without one show the same with two.
TWO = {"num_layers": 2}
EIGHT = {"num_layers": 8}
FOUR_GROUPS = {"num_query_groups": 4}
TIED = {"tie_embeddings": True}
NO_GATHER = {"overlap_param_gather": False}
NO_OVERLAP = {"overlap_grad_reduce": False, **NO_GATHER}
# About one bucket per layer, and one for the head alone, as in a large model.
SMALL_BUCKETS = {"bucket_size": 5000}
ALL_ON = {
    "tensor": 2,
    "sequence": True,
    "pipeline": 2,
    "virtual_pipeline": 2,
    "recompute": "full",
    **SMALL_BUCKETS,
}

# Name -> (settings of the parallel section, settings of the model section)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "DP8": ({}, TWO),
    "DP8, small buckets": (SMALL_BUCKETS, {}),
    "DP8, no overlap": (NO_OVERLAP, TWO),
    "DP8, gradients alone overlap": (NO_GATHER, TWO),
    "DP8, full recompute": ({"recompute": "full"}, TWO),
    "TP2 x DP4": ({"tensor": 2}, TWO),
    "TP2+SP x DP4": ({"tensor": 2, "sequence": True}, TWO),
    "TP2+SP x DP4, selective recompute": (
        {"tensor": 2, "sequence": True, "recompute": "selective"},
        TWO,
    ),
    "TP4+SP x DP2": ({"tensor": 4, "sequence": True}, FOUR_GROUPS | TWO),
    "PP2 x DP4": ({"pipeline": 2}, TWO),
    "PP2 x DP4, uneven": ({"pipeline": 2, "layers_per_stage": [1, 3]}, {}),
    "PP2 x VP2 x DP4": ({"pipeline": 2, "virtual_pipeline": 2}, {}),
    "PP2 x VP2 x DP4, uneven": (
        {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [2, 1, 3, 2]},
        EIGHT,
    ),
    "PP4 x DP2": ({"pipeline": 4}, {}),
    "PP4 x VP2 x DP2": ({"pipeline": 4, "virtual_pipeline": 2}, EIGHT),
    "PP8": ({"pipeline": 8}, EIGHT),
    "CP2 x DP4": ({"context": 2}, TWO),
    "CP4 x DP2": ({"context": 4}, TWO),
    "CP2 x PP2 x DP2": ({"context": 2, "pipeline": 2}, TWO),
    "TP2 x PP2 x DP2, everything on": (ALL_ON, {}),
    "TP2 x CP2 x PP2": ({"tensor": 2, "context": 2, "pipeline": 2}, TWO),
    "TP2+SP x CP2 x PP2, full recompute": (
        {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2, "recompute": "full"},
        TWO,
    ),
    "TP2+SP x CP2 x DP2": ({"tensor": 2, "sequence": True, "context": 2}, TWO),
    "TP2 x CP2 x PP2 x VP2": (
        {"tensor": 2, "context": 2, "pipeline": 2, "virtual_pipeline": 2},
        {},
    ),
    "tied head, PP2 x DP4, small buckets": ({"pipeline": 2, **SMALL_BUCKETS}, TIED),
    "tied head, PP2 x VP2 x DP4": ({"pipeline": 2, "virtual_pipeline": 2}, TIED),
    "tied head, TP2+SP x PP2 x DP2": ({"tensor": 2, "sequence": True, "pipeline": 2}, TIED | TWO),
}

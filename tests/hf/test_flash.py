"""Flash attention in the exported model, with stand-ins for the kernels: what transformers hands
them gives the oracle's numbers.
"""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import pytest
import torch

from llada.hf import modeling_llada
from llada.hf.modeling_llada import LLaDAModelLM
from tests.hf.models import assert_near, made, section, tokens
from tests.model.oracle import Oracle


def flash_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **settings: Any
) -> torch.Tensor:
    """What the package computes for a batch without padding [b, s, heads, head_dim], by a plain
    softmax.
    """
    assert not settings.pop("causal")
    assert settings.pop("softmax_scale") is None
    assert not any(settings.values()), settings
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def flash_varlen_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The same for rows of several lengths one after the other, [tokens, heads, head_dim]."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == int(
        cu_seqlens_q.diff().max()
    )
    assert dropout_p == 0
    rows = (slice(a, b) for a, b in itertools.pairwise(cu_seqlens_q.tolist()))
    return torch.cat(
        [
            flash_kernel(
                q[None, row], k[None, row], v[None, row], causal=causal, softmax_scale=softmax_scale
            )[0]
            for row in rows
        ]
    )


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> LLaDAModelLM:
    """A model on transformers' flash attention, with only the kernels exchanged for those above."""
    name, hf = "flash_attention_2", made(num_query_groups=2)
    utils = sys.modules[modeling_llada._flash_attention_forward.__module__]
    kernels = (flash_kernel, flash_varlen_kernel, None, utils._pad_input, utils._unpad_input)
    monkeypatch.setattr(utils, "_lazy_imports", lambda *arguments, **settings: kernels)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    hf.config._attn_implementation = name
    return hf


@pytest.mark.parametrize(
    "padding", ["none", "left", "right", "both", "a row of it", "nothing else"]
)
def test_flash_attention_is_called_for_what_the_oracle_computes(
    padding: str, flash: LLaDAModelLM
) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    hidden = {
        "none": [],
        "left": [(0, slice(0, 4))],
        "right": [(1, slice(9, 12))],
        "a row of it": [(0, slice(0, 12))],
    }
    hidden |= {
        "both": [*hidden["left"], *hidden["right"]],
        "nothing else": [(slice(0, 2), slice(0, 12))],
    }
    for index in hidden[padding]:
        mask[index] = 0
    logits = flash(tokens(), attention_mask=mask).logits
    assert logits.isfinite().all()
    wanted = Oracle(section(num_query_groups=2), flash.state_dict())(tokens(), mask)
    assert_near(logits[mask.bool()], wanted[mask.bool()]) if mask.any() else assert_near(
        logits, wanted
    )
    logits.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in flash.parameters())


def test_flash_attention_takes_no_mask_of_pairs(flash: LLaDAModelLM) -> None:
    with pytest.raises(ValueError, match="flash attention takes no mask of pairs"):
        flash(tokens(), attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))

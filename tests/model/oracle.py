"""The numerical oracle: LLaDA's transformer in plain PyTorch.

It uses canonical weights and shares no code with the package's model.
"""

from __future__ import annotations

import math

import torch

from llada.config.sections import ModelSection

P = "model.transformer"


class Oracle(torch.nn.Module):
    """Computes logits from canonical weights, with attention as a plain masked softmax."""

    def __init__(self, model: ModelSection, canonical: dict[str, torch.Tensor]) -> None:
        super().__init__()
        # The first multi-threaded call of these may be imprecise; see llada.engine.cpu.
        for name in ("sin", "cos", "exp", "log"):
            getattr(torch.ones(1), name)()
        self.model = model
        self.w = {
            name: torch.nn.Parameter(value.detach().clone()) for name, value in canonical.items()
        }

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + self.model.norm_eps).rsqrt() * self.w[name]

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        d = x.shape[-1]
        angles = torch.arange(x.shape[2]).float()[:, None] * (
            1.0 / self.model.rope_theta ** (torch.arange(0, d, 2).float() / d)
        )
        cos, sin = torch.cat([angles.cos()] * 2, -1), torch.cat([angles.sin()] * 2, -1)
        swapped = torch.cat([-x[..., d // 2 :], x[..., : d // 2]], -1)
        return x * cos + swapped * sin

    def forward(
        self, inputs: torch.Tensor, segment: torch.Tensor, causal: bool = False
    ) -> torch.Tensor:
        """Compute logits [b, L, vocabulary] of ids [b, L].

        Args:
            inputs: Ids [b, L].
            segment: [b, L]; tokens attend to the tokens of their row with the same value.
            causal: Only to those up to themselves.
        """
        m, w = self.model, self.w
        b, n = inputs.shape
        same = segment[:, None, :, None] == segment[:, None, None, :]
        if causal:
            same = same & torch.ones(n, n, dtype=torch.bool).tril()
        x = w[f"{P}.wte.weight"][inputs]
        for i in range(m.num_layers):
            p = f"{P}.blocks.{i}"
            h = self.norm(x, f"{p}.attn_norm.weight")
            q, k, v = (
                (h @ w[f"{p}.{s}_proj.weight"].T).view(b, n, -1, m.head_dim).transpose(1, 2)
                for s in "qkv"
            )
            queries_per_key = m.num_attention_heads // m.kv_heads
            k = self.rope(k).repeat_interleave(queries_per_key, 1)
            v = v.repeat_interleave(queries_per_key, 1)
            scores = self.rope(q) @ k.transpose(-1, -2) / math.sqrt(m.head_dim)
            attention = scores.masked_fill(~same, -math.inf).softmax(-1)
            heads = (attention @ v).transpose(1, 2).reshape(b, n, -1)
            x = x + heads @ w[f"{p}.attn_out.weight"].T
            h = self.norm(x, f"{p}.ff_norm.weight")
            gate = h @ w[f"{p}.ff_proj.weight"].T
            up = h @ w[f"{p}.up_proj.weight"].T
            x = x + (gate * gate.sigmoid() * up) @ w[f"{p}.ff_out.weight"].T
        head = w[f"{P}.wte.weight"] if m.tie_embeddings else w[f"{P}.ff_out.weight"]
        return self.norm(x, f"{P}.ln_f.weight") @ head.T

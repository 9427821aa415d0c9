"""A training loop as one would write it first: what benchmarks/train_step.py compares with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llada.config import RunConfig
from llada.objectives import TOKENS, Batch


class PlainModel(torch.nn.Module):
    """A bidirectional Llama as one would write it first."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config = config.model
        d = self.config.hidden_size
        self.embedding = torch.nn.Embedding(self.config.vocab_size, d)
        self.layers = torch.nn.ModuleList(
            PlainLayer(d, self.config.num_attention_heads, self.config.ffn_hidden_size)
            for _ in range(self.config.num_layers)
        )
        self.norm = torch.nn.RMSNorm(d, self.config.norm_eps)
        self.head = torch.nn.Linear(d, self.config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                torch.nn.init.trunc_normal_(parameter, std=d**-0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map ids [b, s] to hidden states [b, s, d]; the caller applies the head."""
        head_dim = self.config.head_dim
        channels = torch.arange(0, head_dim, 2, device=tokens.device).float()
        frequencies = 1.0 / self.config.rope_theta ** (channels / head_dim)
        positions = torch.arange(tokens.shape[1], device=tokens.device).float()
        angles = torch.outer(positions, frequencies)
        cos = angles.cos().to(self.head.weight.dtype)
        sin = angles.sin().to(self.head.weight.dtype)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)


class PlainLayer(torch.nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = torch.nn.RMSNorm(width, 1e-5)
        self.norm2 = torch.nn.RMSNorm(width, 1e-5)
        self.qkv = torch.nn.Linear(width, 3 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)
        self.gate = torch.nn.Linear(width, ffn, bias=False)
        self.up = torch.nn.Linear(width, ffn, bias=False)
        self.down = torch.nn.Linear(ffn, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [b, heads, s, head_dim]
        a = F.scaled_dot_product_attention(self.rotate(q, cos, sin), self.rotate(k, cos, sin), v)
        x = x + self.out(a.transpose(1, 2).reshape(b, s, -1))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))

    @staticmethod
    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class PlainLoop:
    """Forward, weighted cross entropy, backward, clipping, AdamW.

    Args:
        config: The shape. In bf16 the loop keeps fp32 masters, moments and accumulated gradients,
            as the engine does.
        device: Where to compute.
        every_position: Compute the logits of every position; else those of the predicted ones.
    """

    def __init__(self, config: RunConfig, device: torch.device, every_position: bool) -> None:
        self.device = device
        self.every_position = every_position
        self.has_masters = config.precision == "bf16"
        dtype = torch.bfloat16 if self.has_masters else torch.float32
        self.model = PlainModel(config).to(device, dtype)
        self.parameters = list(self.model.parameters())
        self.masters = self.parameters
        if self.has_masters:
            self.masters = [
                torch.nn.Parameter(parameter.detach().float()) for parameter in self.parameters
            ]
            for master in self.masters:
                master.grad = torch.zeros_like(master)
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, batches: list[Batch]) -> float:
        """Train on the micro-batches of one step; return the loss."""
        # The gradients of masters are buffers that are added to.
        self.optimizer.zero_grad(set_to_none=not self.has_masters)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self.loss(batch) / batch.normalizer
            loss.backward()
            total += loss.detach()
            if self.has_masters:
                self._accumulate()
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        # Round the updated masters into the weights that compute.
        if self.has_masters:
            torch._foreach_copy_(
                [parameter.detach() for parameter in self.parameters],
                [master.detach() for master in self.masters],
            )
        return total.item()

    def _accumulate(self) -> None:
        """Add the gradients of a micro-batch to those in fp32."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad.add_(parameter.grad)
            parameter.grad = None

    def loss(self, batch: Batch) -> torch.Tensor:
        hidden = self.model(batch.inputs.to(self.device))
        terms = batch.terms[TOKENS]
        if self.every_position:
            # Positions that are not predicted have a weight of 0.
            predicted = (terms.rows, terms.columns)
            targets = batch.inputs.index_put(predicted, terms.targets).flatten()
            weights = torch.zeros(batch.inputs.shape).index_put(predicted, terms.weights).flatten()
            hidden = hidden.flatten(0, 1)
        else:
            targets = terms.targets
            weights = terms.weights
            hidden = hidden[terms.rows, terms.columns]
        logits = self.model.head(hidden).float()
        losses = F.cross_entropy(logits, targets.to(self.device), reduction="none")
        return (losses * weights.to(self.device)).sum()

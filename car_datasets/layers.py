"""The parts that an IQS model is put together from, each a function of tensors and of its own few settings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from car_datasets.configuration_iqs import IQSConfig


class LayerCombination(nn.Module):
    """The encoder's hidden states, each weighted, to one: `gamma * sum(weight * state)`."""

    def __init__(self, num_states: int, mix: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix, self.dropout = mix, dropout
        self.weight = nn.Parameter(torch.zeros(num_states))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, states: Sequence[Tensor]) -> Tensor:
        """`n + 1` tensors of one shape to one of that shape."""
        scores = self.weight
        if self.training and self.dropout:  # whole layers, as in COMET (and ELMo before it)
            dropped = torch.rand_like(scores) < self.dropout
            scores = scores.masked_fill(dropped & ~dropped.all(), -1e20)
        weights = (sparsemax(scores) if self.mix == "sparsemax" else scores.softmax(0)).to(states[0].dtype)
        mixed = weights[0] * states[0]
        for weight, state in zip(weights[1:], states[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, state)
        return self.gamma.to(mixed.dtype) * mixed


def normalise_text(hidden: Tensor, mask: Tensor) -> Tensor:
    """Zero mean and unit population variance over all real tokens and units of each text; no affine part."""
    real = mask.to(hidden.dtype).unsqueeze(-1)
    count = real.sum(dim=(1, 2), keepdim=True) * hidden.shape[-1]
    mean = (hidden * real).sum(dim=(1, 2), keepdim=True) / count
    variance = (((hidden - mean) * real) ** 2).sum(dim=(1, 2), keepdim=True) / count
    return (hidden - mean) / torch.sqrt(variance + 1e-12)


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of a vector onto the simplex (Martins and Astudillo 2016, algorithm 1): exact zeros."""
    ordered = scores.sort(descending=True).values
    cumulated = ordered.cumsum(0) - 1
    ranks = torch.arange(1, len(scores) + 1, device=scores.device, dtype=scores.dtype)
    support = int((ordered * ranks > cumulated).sum())
    return (scores - cumulated[support - 1] / support).clamp(min=0)


class SegmentHead(nn.Module):
    """Scores a text from [`segment_features`] and [`hashed_words`]: what its writer did well, less what is broken in it.

    Several small networks (`members`) and the words of the answer each vote on quality; one network votes on integrity,
    whether the answer is whole, in order and about its question, and takes up to `penalty` off where it is not. Scores
    lie between `-penalty` and 1.
    """

    def __init__(self, config: IQSConfig) -> None:
        super().__init__()
        width = self.width(config)
        self.members, self.word_bits, self.penalty = config.members, config.word_bits, config.penalty
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.words = nn.Parameter(torch.zeros(1 << config.word_bits))
        size = config.hidden_sizes[0]
        self.quality = nn.Linear(width, self.members * size)
        self.quality_out = nn.Parameter(torch.randn(self.members, size) / size**0.5)
        self.quality_bias = nn.Parameter(torch.zeros(self.members))
        self.integrity = nn.Sequential(
            nn.Linear(width, config.hidden_sizes[1]), nn.Tanh(), nn.Linear(config.hidden_sizes[1], 1)
        )

    @staticmethod
    def width(config: IQSConfig) -> int:
        """Columns of [`segment_features`] for this encoder."""
        encoder = config.encoder_config
        return int((3 * (encoder.num_hidden_layers + 1) + 1) * encoder.hidden_size + 2)

    def forward(self, features: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """Features (batch, width), numbers and weights (batch, words) to one score per member, (batch, members)."""
        quality, integrity = self.logits(features)
        words = (self.words[numbers] * weights).sum(dim=1, keepdim=True)
        return torch.sigmoid(quality + words) - self.penalty * torch.sigmoid(-integrity)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Quality without the words, (batch, members), and integrity, (batch, 1)."""
        scaled = ((features - self.mean) / self.scale).clamp(-6, 6)
        hidden = torch.tanh(self.quality(scaled)).view(len(features), self.members, -1)
        return (hidden * self.quality_out).sum(dim=-1) + self.quality_bias, self.integrity(scaled)


def feed_forward(config: IQSConfig, width: int) -> nn.Sequential:
    """The head: `len(hidden_sizes)` blocks of linear, activation and dropout, then one linear unit."""
    parts: list[nn.Module] = []
    for size in config.hidden_sizes:
        parts += [nn.Linear(width, size), getattr(nn, config.activation)(), nn.Dropout(config.dropout)]
        width = size
    parts.append(nn.Linear(width, 1))
    if config.final_activation is not None:
        parts.append(getattr(nn, config.final_activation)())
    return nn.Sequential(*parts)


def closeness(question: Tensor, answer: Tensor) -> Tensor:
    """The original's ranking score, `1 / (1 + distance)`, of vectors of shape `(batch, units)`; shape `(batch,)`.

    `pairwise_distance` adds 1e-6 to every difference, so equal texts do not give exactly 1, there as here.
    """
    return 1 / (1 + nn.functional.pairwise_distance(answer.float(), question.float()))

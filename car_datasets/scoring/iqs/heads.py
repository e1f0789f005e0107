"""The heads that judge by parts: soundness, worth, an expert's revision, the likeliest fault, and one score of these.

Does: read the shared encoder through a copy of its top layers (the fork), or compare its pooled states with those of
rated rows (the kernel); turn raw outputs into ratings, shares and a score from 0 to 1.
Does not: change the encoder, whose last state stays that of the embedder, or serve the other heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, scaled_dot_product_attention

from car_datasets.scoring.iqs.configuration_iqs import IQSConfig
from car_datasets.scoring.iqs.layers import SegmentHead
from car_datasets.utils import revisions

PARTS = ("expert", "soundness", "worth")  # columns of numbers, in the order of the head's output
# The faults of an answer, as the ratings name them; "none" is one of the classes.
FAULTS = (
    *("none", "wrong", "incomplete", "constraint", "offtopic"),
    *("unclear", "shallow", "garbled", "refusal", "unsafe"),
)
# What each member computes: three ratings, in the units of `UNITS`, and two logits: an expert has revised the answer; it
# is not broken. The logits of the faults follow.
OUTPUTS = ("soundness", "worth", "product", "expert", "intact")
UNITS = {"soundness": (7.0, 2.5), "worth": (3.0, 1.7), "product": (20.0, 13.0)}  # mean and scale
COMBINED = OUTPUTS[:4]  # what the score is a weighted sum of; `intact` gives the penalty
KNOTS = 201  # of the calibration
# Columns of the head's output after those of the members.
JUDGED = len(PARTS) + len(FAULTS)


class ForkLayer(nn.Module):
    """A layer of BERT's kind: attention and a feed-forward block, each added to its input and normalised.

    A module of its own, so that its weights have the same names in every version of transformers, and so that it reads
    padded states also where the encoder reads packed ones.
    """

    def __init__(self, encoder_config: Any, rate: float) -> None:
        super().__init__()
        units, inner = encoder_config.hidden_size, encoder_config.intermediate_size
        self.heads, self.rate = encoder_config.num_attention_heads, rate
        self.attend, self.project = nn.Linear(units, 3 * units), nn.Linear(units, units)
        self.widen, self.narrow = nn.Linear(units, inner), nn.Linear(inner, units)
        self.norms = nn.ModuleList(nn.LayerNorm(units, eps=encoder_config.layer_norm_eps) for _ in range(2))

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Return the next states, (batch, tokens, units); `mask` (batch, tokens) is True for real tokens."""
        batch, tokens, units = states.shape
        rate = self.rate if self.training else 0.0
        # (3, batch, heads, tokens, size)
        query, key, value = self.attend(states).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None], dropout_p=rate)
        mixed = self.project(seen.transpose(1, 2).reshape(batch, tokens, units))
        states = self.norms[0](states + dropout(mixed, rate))
        return self.norms[1](states + dropout(self.narrow(gelu(self.widen(states))), rate))

    def copy_from(self, layer: nn.Module) -> None:
        """Take the weights of a layer of transformers' `BertModel` or `RobertaModel`."""
        given = layer.state_dict()
        names = {
            "project": "attention.output.dense",
            "norms.0": "attention.output.LayerNorm",
            "widen": "intermediate.dense",
            "narrow": "output.dense",
            "norms.1": "output.LayerNorm",
        }
        state = {f"{own}.{kind}": given[f"{theirs}.{kind}"] for own, theirs in names.items() for kind in _KINDS}
        for kind in _KINDS:  # the three projections are one matrix, which is one product
            parts = [given[f"attention.self.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"attend.{kind}"] = torch.cat(parts)
        self.load_state_dict(state)


_KINDS = ("weight", "bias")


class Judge(nn.Module):
    """What all heads that judge by parts share: raw outputs become ratings and shares, and the parts become one score.

    The score is a weighted sum of the parts, minus a penalty for a broken answer, placed on the scale of a reference
    pool: .8 is a score that 80 % of the pool does not reach.
    """

    weights: Tensor
    knots: Tensor

    def __init__(self, config: IQSConfig) -> None:
        super().__init__()
        self.config, self.penalty = config, config.penalty
        # Weights of `COMBINED` in the score, and the quantiles of the unscaled score on the reference pool.
        self.register_buffer("weights", torch.tensor([0.0, 0.0, 1.0, 0.0]))
        self.register_buffer("knots", torch.linspace(-3, 3, KNOTS))

    def judge(self, outputs: Tensor) -> Tensor:
        """Return the columns of a model: the score by each member, then expert, soundness, worth and the faults.

        Args:
            outputs (`Tensor` of shape `(batch, members, outputs)`): of [`~PartsHead.forward`].

        Returns:
            `Tensor` of shape `(batch, members + JUDGED)`. The mean of the members is the score, from 0 to 1; `expert` is
            a probability, soundness and worth are ratings from 0 to 10, and the probabilities of the faults sum to 1.
        """
        mean = outputs.mean(dim=1)
        raw = self.unscaled(outputs)
        score, shares = self.placed(raw.mean(dim=1, keepdim=True)), self.placed(raw)
        # The mean of shares is not the share of the mean; members keep their distances to each other.
        members = score + shares - shares.mean(dim=1, keepdim=True)
        ratings = [
            (mean[:, i] * UNITS[name][1] + UNITS[name][0]).clamp(0, 10) for i, name in ((0, "soundness"), (1, "worth"))
        ]
        expert = mean[:, OUTPUTS.index("expert")].sigmoid()
        numbers = torch.stack([expert, *ratings], dim=1)
        return torch.cat([members, numbers, outputs[..., len(OUTPUTS) :].softmax(dim=2).mean(dim=1)], dim=1)

    def unscaled(self, outputs: Tensor) -> Tensor:
        """Return the weighted sum of the parts minus the penalty, (batch, members)."""
        broken = (-outputs[..., OUTPUTS.index("intact")]).sigmoid()
        return outputs[..., : len(COMBINED)] @ self.weights - self.penalty * broken

    def placed(self, raw: Tensor) -> Tensor:
        """Return the share of the reference pool below unscaled scores, of any shape: strictly increasing, in (0, 1)."""
        at = torch.searchsorted(self.knots, raw.contiguous()).clamp(1, KNOTS - 1)
        low, high = self.knots[at - 1], self.knots[at]
        inside = (at - 1 + (raw - low) / (high - low).clamp(min=1e-9)) / (KNOTS - 1)
        # One share of the first and of the last step is left to what lies beyond the pool, whose order is kept as well.
        edge, span = 1 / (KNOTS + 1), (self.knots[-1] - self.knots[0]) / 4
        inside = edge + (1 - 2 * edge) * inside.clamp(0, 1)
        below = edge * ((raw - self.knots[0]) / span).clamp(max=0).exp()
        above = 1 - edge * ((self.knots[-1] - raw) / span).clamp(max=0).exp()
        return torch.where(raw < self.knots[0], below, torch.where(raw > self.knots[-1], above, inside))


class PartsHead(Judge):
    """The head `"parts"`: a fork of the encoder, pooled features, and small networks that judge an answer by parts.

    Each member judges every part.
    """

    def __init__(self, config: IQSConfig) -> None:
        super().__init__(config)
        encoder = config.encoder_config
        self.members, self.size, self.rate = config.members, config.hidden_sizes[0], config.dropout
        self.lower = encoder.num_hidden_layers - config.fork_layers
        self.fork = nn.ModuleList(ForkLayer(encoder, config.fork_dropout) for _ in range(config.fork_layers))
        self.queries = nn.Parameter(torch.randn(config.queries, encoder.hidden_size) / encoder.hidden_size**0.5)
        width = self.width(config)
        self.norm = nn.LayerNorm(width)
        # The members' hidden layers are one matrix, so that all run in one product; each has its own output weights.
        self.inside = nn.Linear(width, self.members * self.size)
        columns = len(OUTPUTS) + len(FAULTS)
        self.out = nn.Parameter(torch.randn(self.members, self.size, columns) * (0.5 / self.size**0.5))
        self.out_bias = nn.Parameter(torch.zeros(self.members, columns))

    @staticmethod
    def width(config: IQSConfig) -> int:
        """Return the number of features: 3 pools of a state, of two states if there is a fork, and what relates them."""
        pools = (6 if config.fork_layers else 3) + 1 + config.queries
        return int(pools * config.encoder_config.hidden_size + 2)

    def forward(self, states: Tensor, mask: Tensor, answer_start: Tensor) -> Tensor:
        """Judge a batch by each member.

        Args:
            states (`Tensor` of shape `(batch, tokens, units)`): the encoder's state below the fork; without one, its
                last.
            mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
            answer_start (`Tensor` of shape `(batch,)`): position of the answer's first token.

        Returns:
            `Tensor` of shape `(batch, members, len(OUTPUTS) + len(FAULTS))`.
        """
        real = mask.bool()
        below = above = states
        for layer in self.fork:
            above = layer(above, real)
        features = self.norm(self.features(below.float(), above.float(), real, answer_start))
        if self.training:
            features = dropout(features, 0.1)
        hidden = gelu(self.inside(features).view(len(features), self.members, self.size))
        if self.training:
            hidden = dropout(hidden, self.rate)
        return torch.einsum("bmh,mho->bmo", hidden, self.out) + self.out_bias

    def features(self, below: Tensor, above: Tensor, real: Tensor, answer_start: Tensor) -> Tensor:
        """Return one vector per text, of shape `(batch, width)`, float32.

        For the state above the fork and the one below it: the mean over the question's tokens, the mean over the
        answer's and the standard deviation over the answer's; then the product of the first two means, an average per
        learned query, half of them over the answer and half over the text, and the logarithms of both lengths.
        """
        answer = real & (torch.arange(real.shape[1], device=real.device) >= answer_start.unsqueeze(1))
        both = torch.stack([real & ~answer, answer], dim=1).float()
        counts = both.sum(dim=2)
        weights = both / counts.clamp(min=1).unsqueeze(2)
        parts = []
        for state in (above, below) if len(self.fork) else (above,):
            question_mean, answer_mean = (weights @ state).unbind(1)
            square = (weights[:, 1:] @ state.square()).squeeze(1)
            # Clamped, as rounding can make it negative, and the square root's gradient is infinite at 0.
            parts += [question_mean, answer_mean, (square - answer_mean.square()).clamp(min=1e-4).sqrt()]
        parts.append(parts[0] * parts[1])
        if len(self.queries):
            seen = torch.where(
                torch.arange(len(self.queries), device=real.device)[:, None] < len(self.queries) // 2,
                answer.unsqueeze(1),
                real.unsqueeze(1),
            )
            attention = (self.queries @ above.transpose(1, 2)).masked_fill(~seen, -1e4).softmax(dim=2)
            parts.append((attention @ above).flatten(1))
        return torch.cat([*parts, counts.log1p()], dim=1)

    def columns(self, states: Tensor, mask: Tensor, answer_start: Tensor) -> Tensor:
        """Return the columns of [`judge`] for a batch, of the arguments of [`forward`]; states may be in half precision."""
        return self.judge(self(states.float(), mask, answer_start))


class KernelHead(Judge):
    """The head `"kernel"`: judge an answer by rows that are like it, whose ratings are known (kernel ridge regression).

    The pooled states of a text are projected to a few axes; the likeness to a kept row is `exp(-distance ** 2)`, and each
    output is a weighted sum of all likenesses. It holds the projected states of the kept rows, never their texts.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    kept: Tensor
    duals: Tensor
    bias: Tensor

    def __init__(self, config: IQSConfig) -> None:
        super().__init__(config)
        (axes, kept), width = config.hidden_sizes, SegmentHead.width(config)
        outputs = len(OUTPUTS) + len(FAULTS)
        # Buffers, as they are solved for, not learned by descent.
        for name, value in (
            ("mean", torch.zeros(width)),
            ("scale", torch.ones(width)),
            ("axes", torch.zeros(width, axes)),
            ("kept", torch.zeros(kept, axes)),
            ("duals", torch.zeros(kept, outputs)),
            ("bias", torch.zeros(outputs)),
        ):
            self.register_buffer(name, value)

    def projected(self, features: Tensor) -> Tensor:
        """Return features (texts, width) on the axes, (texts, axes)."""
        # In double precision: sums of thousands of likenesses would let the company of a text show in the fourth digit.
        scaled = ((features - self.mean) / self.scale).clamp(-6, 6).double()
        return scaled @ self.axes.double()

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs, `(texts, 1, len(OUTPUTS) + len(FAULTS))`, of [`segment_features`], `(texts, width)`."""
        found = (likeness(self.projected(features), self.kept.double()) @ self.duals.double()).float() + self.bias
        ratings, expert, intact, faults = found.split([len(UNITS), 1, 1, len(FAULTS)], dim=1)
        # The regression tells shares, which may leave 0 to 1 by a little; `judge` takes logits.
        expert, faults = expert.clamp(0.01, 0.99).logit(), faults.clamp(min=1e-3).log()
        return torch.cat([ratings, expert, intact, faults], dim=1).unsqueeze(1)

    def columns(self, features: Tensor) -> Tensor:
        """Return the columns of [`judge`] for [`segment_features`], `(texts, width)`."""
        return self.judge(self(features))


def likeness(one: Tensor, other: Tensor) -> Tensor:
    """Return `exp(-distance ** 2)` of all combinations of two sets of points, `(n, axes)` and `(m, axes)`."""
    squares = one.square().sum(dim=1, keepdim=True) + other.square().sum(dim=1)
    return torch.addmm(squares, one, other.T, alpha=-2).clamp(min=0).neg().exp()


def read_kernel(folder: Path, reader: IQSConfig) -> KernelHead:
    """Read the head of a model whose head is `"kernel"`, to judge from the features that another model's head reads.

    Args:
        folder (`Path`): the model.
        reader ([`IQSConfig`]): of the other model.

    Raises:
        ValueError: the two have not the same encoder, template and number of tokens, or not these heads.
    """
    with revisions.reading_model(folder):
        config = IQSConfig.from_pretrained(folder)
    if not judges_for(config, reader):
        raise ValueError(
            f"{folder} does not judge what a head {reader.head!r} reads: another encoder, or another head."
        )
    head = KernelHead(config)
    with revisions.reading_model(folder):
        state = load_file(folder / "model.safetensors")
    head.load_state_dict({name.removeprefix("head."): weight.float() for name, weight in state.items()})
    return head.eval()


def judges_for(config: IQSConfig, reader: IQSConfig) -> bool:
    """Return True if a head `"kernel"` of `config` can judge by the features that the head `"segments"` of `reader` reads."""
    shared = ("encoder_source", "max_tokens", "template")
    same = config.encoder_source is not None and all(getattr(config, n) == getattr(reader, n) for n in shared)
    return same and config.head == "kernel" and reader.head == "segments"

"""Parts of an IQS model: the combination of the encoder's layers, pooled features, the heads, and the ranking score.

Does: combine and normalise hidden states; pool question and answer separately; hash the words of the answer; compute
scores from vectors.
Does not: run an encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from car_datasets.scoring.iqs.configuration_iqs import IQSConfig

MARK = 2  # tokens of the mark before every answer, "response" and ":", which are the same for all answers


def segment_features(hidden_states: Sequence[Tensor], mask: Tensor, answer_start: Tensor) -> Tensor:
    """Pool the encoder's states into one vector per text.

    Args:
        hidden_states (`Sequence[Tensor]`): n + 1 states of shape (batch, tokens, units), the embedding output first.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
        answer_start (`Tensor` of shape `(batch,)`): position of the answer's first token.

    Returns:
        `Tensor` of shape `(batch, (3 * (n + 1) + 1) * units + 2)`, float32: for every state, the mean over the
        question's tokens, the mean over the answer's and the standard deviation over the answer's; the product of the
        two means of the last state, which tells if the answer is about the question; and the logarithms of both
        lengths.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    in_answer = (positions >= answer_start.unsqueeze(1)) & mask.bool()
    in_question = mask.bool() & ~in_answer
    counts = torch.stack([in_question.sum(1), in_answer.sum(1)], dim=1).float()
    weights = torch.stack([in_question, in_answer], dim=1).float() / counts.clamp(min=1).unsqueeze(-1)
    parts = []
    for states in hidden_states:
        states = states.float()
        # weights: (batch, 2, tokens), each row the mean over question or answer. An empty part has the mean 0.
        question, answer = (weights @ states).unbind(1)
        square = (weights[:, 1:] @ states.square()).squeeze(1)
        # E[x^2] - E[x]^2: clamped, as rounding can make it negative, and the square root's gradient is infinite at 0.
        parts += [question, answer, (square - answer.square()).clamp(min=1e-6).sqrt()]
    return torch.cat([*parts, parts[-3] * parts[-2], counts.log1p()], dim=1)


def hashed_words(input_ids: Tensor, mask: Tensor, answer_start: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Hash the answer's tokens and pairs of neighbouring tokens to numbers below `2 ** bits`, each counted once.

    Args:
        input_ids (`Tensor` of shape `(batch, tokens)`): padded token ids; the last real one is the separator.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
        answer_start (`Tensor` of shape `(batch,)`): position of the answer's first token.
        bits (`int`): of the hash.

    Returns:
        `(numbers, weights)`, both of shape `(batch, 2 * tokens - 1)`: the weight is 0 for padding and for repeated
        numbers, and equal for all others of a text, so that each row of weights has length 1.
    """
    ends = mask.sum(1, keepdim=True) - 1  # position of the separator, as padding is on the right
    positions = torch.arange(mask.shape[1], device=mask.device)
    word = (positions >= answer_start.unsqueeze(1) + MARK) & (positions < ends)
    # Knuth's multiplicative hash in 32 bits, of which the high ones are mixed best and are kept below. The constants
    # are as much a part of the trained model as its weights: they decide which weight a word has.
    low = (1 << 32) - 1
    single = (input_ids * 2654435761) & low
    second = ((input_ids[:, 1:] * 97 + 40503) * 2246822519) & low
    double = ((single[:, :-1] ^ second) * 3266489917) & low
    numbers = torch.cat([single, double], dim=1) >> (32 - bits)
    is_word = torch.cat([word, word[:, :-1] & word[:, 1:]], dim=1)
    # Sorted, repetitions are neighbours; what is not a word gets a number above all others and ends up last.
    numbers, _ = torch.where(is_word, numbers, 1 << bits).sort(dim=1)
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    weights = (first & (numbers < 1 << bits)).float()
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1).sqrt()
    return numbers.clamp(max=(1 << bits) - 1), weights


class SegmentHead(nn.Module):
    """The head of the default scorer: quality of the answer, minus a penalty if it is broken.

    It reads [`segment_features`] and [`hashed_words`]. Several small networks (`members`) each vote on quality,
    together with the words of the answer. One more network votes on integrity: is the answer complete, in order and
    about its question? If not, up to `penalty` is subtracted. Scores lie between `-penalty` and 1.
    """

    def __init__(self, config: IQSConfig) -> None:
        super().__init__()
        width = self.width(config)
        self.members, self.word_bits, self.penalty = config.members, config.word_bits, config.penalty
        # Mean and standard deviation of the features in the training data; saved with the weights.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.words = nn.Parameter(torch.zeros(1 << config.word_bits))
        size = config.hidden_sizes[0]
        self.quality = nn.Linear(width, self.members * size)
        # The members' hidden layers are one matrix, so that all run in one product; each has its own output weights.
        self.quality_out = nn.Parameter(torch.randn(self.members, size) / size**0.5)
        self.quality_bias = nn.Parameter(torch.zeros(self.members))
        self.integrity = nn.Sequential(
            nn.Linear(width, config.hidden_sizes[1]), nn.Tanh(), nn.Linear(config.hidden_sizes[1], 1)
        )

    @staticmethod
    def width(config: IQSConfig) -> int:
        """Return the number of columns of [`segment_features`] for this encoder."""
        encoder = config.encoder_config
        return int((3 * (encoder.num_hidden_layers + 1) + 1) * encoder.hidden_size + 2)

    def forward(self, features: Tensor, numbers: Tensor, weights: Tensor) -> Tensor:
        """Score a batch by each member.

        Args:
            features (`Tensor` of shape `(batch, width)`): from [`segment_features`].
            numbers (`Tensor` of shape `(batch, words)`): from [`hashed_words`].
            weights (`Tensor` of shape `(batch, words)`): likewise.

        Returns:
            `Tensor` of shape `(batch, members)`.
        """
        quality, integrity = self.logits(features)
        words = (self.words[numbers] * weights).sum(dim=1, keepdim=True)
        return torch.sigmoid(quality + words) - self.penalty * torch.sigmoid(-integrity)

    def logits(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return quality without the words, of shape `(batch, members)`, and integrity, of shape `(batch, 1)`."""
        scaled = ((features - self.mean) / self.scale).clamp(-6, 6)  # standard deviations; outliers would saturate tanh
        hidden = torch.tanh(self.quality(scaled)).view(len(features), self.members, -1)  # (batch, members, units)
        return (hidden * self.quality_out).sum(dim=-1) + self.quality_bias, self.integrity(scaled)


class LayerCombination(nn.Module):
    """A weighted sum of the encoder's hidden states: `gamma * sum(weight * state)`.

    Args:
        num_states (`int`): hidden states of the encoder, the embedding output included.
        mix (`str`): `"sparsemax"` or `"softmax"`, which makes the weights sum to 1.
        dropout (`float`): probability that a state is left out, in training only.
    """

    def __init__(self, num_states: int, mix: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.mix, self.dropout = mix, dropout
        self.weight = nn.Parameter(torch.zeros(num_states))
        self.gamma = nn.Parameter(torch.ones(1))

    def forward(self, states: Iterable[Tensor]) -> Tensor:
        """Combine tensors of one shape, read one at a time, into one of the same shape."""
        scores = self.weight
        if self.training and self.dropout:  # entire layers, as in COMET (and ELMo before it)
            # -1e20 is COMET's own value. If all layers are dropped, none is.
            dropped = torch.rand_like(scores) < self.dropout
            scores = scores.masked_fill(dropped & ~dropped.all(), -1e20)
        weights = sparsemax(scores) if self.mix == "sparsemax" else scores.softmax(0)
        # Accumulated: stacking the states would take as much memory once more.
        mixed: Tensor | None = None
        for weight, state in zip(weights, states, strict=True):
            weight = weight.to(state.dtype)
            mixed = weight * state if mixed is None else torch.addcmul(mixed, weight, state)
        assert mixed is not None  # an encoder has at least the embedding output
        return self.gamma.to(mixed.dtype) * mixed


def normalise_text(hidden: Tensor, mask: Tensor) -> Tensor:
    """Scale each text to zero mean and unit variance over its real tokens and all units, without an affine part.

    Args:
        hidden (`Tensor` of shape `(batch, tokens, units)`): one hidden state.
        mask (`Tensor` of shape `(batch, tokens)`): 1 for real tokens.
    """
    # Padding counts neither in the mean nor in the variance.
    real = mask.to(hidden.dtype).unsqueeze(-1)
    count = real.sum(dim=(1, 2), keepdim=True) * hidden.shape[-1]
    mean = (hidden * real).sum(dim=(1, 2), keepdim=True) / count
    variance = (((hidden - mean) * real) ** 2).sum(dim=(1, 2), keepdim=True) / count
    return (hidden - mean) / torch.sqrt(variance + 1e-12)


def sparsemax(scores: Tensor) -> Tensor:
    """Project a vector onto the probability simplex (Martins and Astudillo 2016, algorithm 1), with exact zeros."""
    # The support is the longest prefix of the sorted scores z with 1 + k * z_k > z_1 + ... + z_k.
    ordered = scores.sort(descending=True).values
    cumulated = ordered.cumsum(0) - 1
    ranks = torch.arange(1, len(scores) + 1, device=scores.device, dtype=scores.dtype)
    support = (ordered * ranks > cumulated).sum(dim=0, keepdim=True)  # a tensor, so that nobody waits for the device
    return (scores - cumulated.gather(0, support - 1) / support).clamp(min=0)


def feed_forward(config: IQSConfig) -> nn.Sequential:
    """Build the original's head: a block of linear, activation and dropout per hidden size, then one linear unit."""
    parts: list[nn.Module] = []
    width = config.encoder_config.hidden_size
    for size in config.hidden_sizes:
        parts += [nn.Linear(width, size), getattr(nn, config.activation)(), nn.Dropout(config.dropout)]
        width = size
    parts.append(nn.Linear(width, 1))
    if config.final_activation is not None:
        parts.append(getattr(nn, config.final_activation)())
    return nn.Sequential(*parts)


def closeness(question: Tensor, answer: Tensor) -> Tensor:
    """Return the original's ranking score, `1 / (1 + distance)`.

    Args:
        question (`Tensor` of shape `(batch, units)`): pooled vectors.
        answer (`Tensor` of shape `(batch, units)`): likewise.

    Returns:
        `Tensor` of shape `(batch,)`, in (0, 1).
    """
    # As in the original: pairwise_distance adds 1e-6 to every difference, so equal texts do not give exactly 1.
    return 1 / (1 + nn.functional.pairwise_distance(answer.float(), question.float()))

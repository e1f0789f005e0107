"""Rows as token ids, and several rows in one sequence without one reading another.

Does: render prompts and answers by the model's chat template and tokenise them once; lay rows end to end within a
number of tokens; register an attention with transformers in which each row attends to itself alone.
Does not: train, or choose rows.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ATTENTION = "car_datasets_causal_rows"  # the name of `attend_rows` in transformers
RENDERED_AT_ONCE = 512
IGNORED = -100  # the label of a token that is not learnt
TOLERANCE = 1e-3  # nats by which a packed row may differ from the same row alone, in float32


class TokenRow(NamedTuple):
    """A prompt and its answer as token ids.

    Args:
        ids (`np.ndarray` of int32, shape `(tokens,)`): the prompt, then the answer with the token that ends it.
        prompt (`int`): the number of tokens before the answer, at least 1.
    """

    ids: np.ndarray
    prompt: int

    @property
    def answer_tokens(self) -> int:
        """Return the number of tokens of the answer, which are learnt and measured."""
        return len(self.ids) - self.prompt


class Pack(NamedTuple):
    """Rows end to end in one sequence, with what a model needs to keep them apart.

    Args:
        rows (`Sequence[int]`): which rows, in order.
        inputs (`dict`): keyword arguments of the model: ids, positions and bounds of the rows.
        positions (`Tensor` of shape `(answer tokens,)`): where the model predicts a token of an answer.
        targets (`Tensor` of shape `(answer tokens,)`): the ids of these tokens.
        owners (`Tensor` of shape `(answer tokens,)`): the place in `rows` of the row of each.
    """

    rows: Sequence[int]
    inputs: dict[str, Any]
    positions: Tensor
    targets: Tensor
    owners: Tensor


def tokenise(rows: Sequence[Mapping[str, Any]], tokenizer: Any, limit: int) -> list[TokenRow]:
    """Return conversational rows as token ids, cut after `limit` tokens.

    Args:
        rows (`Sequence[Mapping]`): each with `prompt` and `completion`, lists of turns of `role` and `content`.
        tokenizer (`PreTrainedTokenizerBase`): with a chat template.
        limit (`int`): the most tokens of a row.

    Returns:
        `list[TokenRow]`: in order; a row whose prompt alone reaches the limit has no answer tokens.

    Raises:
        ValueError: the template does not take a row.
    """
    found: list[TokenRow] = []
    for first in range(0, len(rows), RENDERED_AT_ONCE):
        part = rows[first : first + RENDERED_AT_ONCE]
        prompts = _rendered([row["prompt"] for row in part], tokenizer, True)
        entire = _rendered([[*row["prompt"], *row["completion"]] for row in part], tokenizer, False)
        for before, ids in zip(prompts, entire, strict=True):
            shared = sum(
                1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, ids, strict=False))
            )
            start = max(shared, 1)
            # A template may write a line break after the end of an answer, which nobody generates.
            if tokenizer.eos_token_id in ids[start:]:
                ids = ids[: ids.index(tokenizer.eos_token_id, start) + 1]
            found.append(TokenRow(np.asarray(ids[:limit], np.int32), min(start, limit, len(ids))))
    return found


def prompt_ids(prompts: Sequence[Sequence[Mapping[str, str]]], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of prompts, up to where an answer begins."""
    return _rendered(prompts, tokenizer, True)


def _rendered(chats: Sequence[Any], tokenizer: Any, prompt: bool) -> list[list[int]]:
    try:
        texts = tokenizer.apply_chat_template(list(chats), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # jinja's own errors, and whatever a template raises
        roles = sorted({turn["role"] for chat in chats for turn in chat})
        raise ValueError(
            f"The model's chat template does not take these rows, with the roles {roles}: "
            f"{' '.join(str(error).split())[:200]}. Choose another model."
        ) from error
    # The template writes the special tokens itself.
    return list(tokenizer(texts, add_special_tokens=False)["input_ids"])


def fill_packs(lengths: Sequence[int], order: Sequence[int], tokens: int) -> list[list[int]]:
    """Divide rows in order into packs of about equal size, of at most about `tokens` tokens.

    Equal, as a small last batch would be a step of the same size on less evidence.
    """
    total = sum(lengths[row] for row in order)
    count = max(1, -(-total // tokens))
    packs: list[list[int]] = [[] for _ in range(count)]
    seen = 0
    for row in order:
        packs[min(seen * count // total, count - 1)].append(row)
        seen += lengths[row]
    return [pack for pack in packs if pack]


def by_length(lengths: Sequence[int], rows: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield packs of rows for measuring, long ones first so that a lack of memory shows at once."""
    pack: list[int] = []
    size = 0
    for row in sorted(rows, key=lambda row: -lengths[row]):
        if pack and size + lengths[row] > tokens:
            yield pack
            pack, size = [], 0
        pack.append(row)
        size += lengths[row]
    if pack:
        yield pack


def lay_end_to_end(rows: Sequence[TokenRow], chosen: Sequence[int], places: Sequence[int] | None, device: Any) -> Pack:
    """Return a pack of rows.

    Args:
        rows (`Sequence[TokenRow]`): all rows.
        chosen (`Sequence[int]`): those of this pack.
        places (`Sequence[int]`, *optional*): where each of all rows begins in a table of hidden states, whose places
            are then the ids that the model reads.
        device (`torch.device`): of the model.
    """
    lengths = [len(rows[row].ids) for row in chosen]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if places is None:
        ids = np.concatenate([rows[row].ids for row in chosen])
    else:
        ids = np.concatenate([np.arange(n) + places[row] for row, n in zip(chosen, lengths, strict=True)])
    positions, targets, owners = [], [], []
    for place, row in enumerate(chosen):
        answer = rows[row].ids[rows[row].prompt :]
        first = starts[place] + rows[row].prompt - 1
        positions.append(np.arange(first, first + len(answer)))
        targets.append(answer)
        owners.append(np.full(len(answer), place))
    bounds = torch.as_tensor(starts.astype(np.int32)).to(device)

    def moved(parts: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.concatenate(parts).astype(np.int64)).to(device)

    inputs = {
        "input_ids": torch.as_tensor(ids.astype(np.int64))[None].to(device),
        "position_ids": moved([np.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "use_cache": False,
    }
    return Pack(chosen, inputs, moved(positions), moved(targets), moved(owners))


def attend_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend to the earlier tokens of the same row only; transformers calls this in every layer.

    Args:
        module (`nn.Module`): the layer; not used.
        query (`Tensor` of shape `(1, heads, tokens, size)`): of all rows, end to end.
        key (`Tensor` of shape `(1, key heads, tokens, size)`): likewise.
        value (`Tensor` of shape `(1, key heads, tokens, size)`): likewise.
        attention_mask (`Tensor`, *optional*): not used, as there is no padding.
        scaling (`float`, *optional*): factor of the scores.
        kwargs: `cu_seq_lens_q` (`Tensor`) and `max_length_q` (`int`): bounds and longest row, by the names of
            transformers.

    Returns:
        `Tensor` of shape `(1, tokens, heads, size)`, and `None` instead of attention weights.

    Raises:
        ValueError: the rows are not packed, or the model attends in another way.
    """
    bounds: Tensor | None = kwargs.get("cu_seq_lens_q")
    other = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if bounds is None or other:
        raise ValueError(f"attention {ATTENTION!r} reads packed rows only, and knows no {', '.join(other)}.")
    groups = query.shape[1] // key.shape[1]
    if query.device.type == "cuda":
        half = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
        by_token = [part[0].transpose(0, 1).to(half) for part in (query, key, value)]  # (tokens, heads, size)
        by_token[1:] = [part.repeat_interleave(groups, dim=1) for part in by_token[1:]]
        longest = int(kwargs["max_length_q"])
        mixed = _varlen()(*by_token, bounds, bounds, longest, longest, **_options(scaling, query.shape[-1]))
        return mixed.unsqueeze(0).to(query.dtype), None
    parts = [
        nn.functional.scaled_dot_product_attention(
            *(part[:, :, start:end] for part in (query, key, value)),
            is_causal=True,
            scale=scaling,
            enable_gqa=groups > 1,
        )
        for start, end in itertools.pairwise(bounds.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None  # (1, heads, tokens, size) to (1, tokens, heads, size)


def _varlen() -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


@functools.lru_cache(maxsize=8)  # asked for in every layer of every step
def _options(scaling: float | None, size: int) -> dict[str, Any]:
    """Return the arguments by which torch's kernel looks back only, which changed from torch 2.10 to 2.11, and scales."""
    known = inspect.signature(_varlen()).parameters
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if scaling is None or "scale" in known:
        return {**causal, "scale": scaling} if "scale" in known else causal
    if abs(scaling * size**0.5 - 1) > 1e-6:
        raise ValueError(f"torch's kernel scales by 1 / sqrt({size}), and the model by {scaling}.")
    return causal


def keep_rows_apart(model: Any) -> str:
    """Give a model an attention that keeps packed rows apart, and return its name.

    That of this module is tried first, then torch's own with a mask that transformers makes from the positions. The
    first that gives packed rows the losses that they have alone is kept.

    Args:
        model (`PreTrainedModel`): a causal language model, on the CPU or on the GPU it will be trained on.

    Raises:
        ValueError: the model mixes packed rows with either.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend_rows)
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().num_embeddings
    draw = np.random.default_rng(0)
    rows = [TokenRow(draw.integers(0, vocabulary, n).astype(np.int32), 2) for n in (9, 14, 5)]
    model.set_attn_implementation("sdpa")
    alone = [_nats_of(model, lay_end_to_end(rows, [i], None, device), plain=True) for i in range(len(rows))]
    tolerance = TOLERANCE if device.type == "cpu" else 0.05  # torch's kernel computes in half precision
    names = [ATTENTION] if device.type != "cuda" or _can_use_kernel(model) else []
    for name in [*names, "sdpa"]:
        try:
            model.set_attn_implementation(name)
            together = _nats_of(model, lay_end_to_end(rows, [0, 1, 2], None, device))
        except (ValueError, RuntimeError, TypeError, ImportError):
            continue
        if torch.allclose(together, torch.cat(alone), atol=tolerance):
            return name
    raise ValueError(
        f"model: {type(model).__name__} does not keep rows in one sequence apart, so they cannot be packed. Choose "
        "another model, such as SmolLM2, Qwen3 or Llama."
    )


def _can_use_kernel(model: Any) -> bool:
    try:
        _varlen()
    except ImportError:  # torch < 2.10
        return False
    return torch.cuda.get_device_capability(next(model.parameters()).device) >= (8, 0)  # Ampere


def _nats_of(model: Any, pack: Pack, plain: bool = False) -> Tensor:
    """Return the nats of each row of a pack, per answer token; plainly, without anything that tells rows apart."""
    kept = ("input_ids", "use_cache") if plain else tuple(pack.inputs)
    return sum_nats(model, pack._replace(inputs={name: pack.inputs[name] for name in kept})) / pack.owners.bincount()


def sum_nats(model: Any, pack: Pack) -> Tensor:
    """Return the summed nats of the answer of each row of a pack, of shape `(rows,)`, in float64."""
    with torch.no_grad():
        logits = model(**pack.inputs, logits_to_keep=pack.positions).logits[0]
        nats = nn.functional.cross_entropy(logits.float(), pack.targets, reduction="none").double()
    return torch.zeros(len(pack.rows), dtype=torch.float64, device=nats.device).index_add_(0, pack.owners, nats)

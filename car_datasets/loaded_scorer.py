"""A scorer's weights, tokenizer and configuration in memory, once per process and device; never part of a callable."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from car_datasets import hub
from car_datasets.configuration_iqs import IQSConfig
from car_datasets.convert_comet import base_model, check_tokenizer, convert, load_tokenizer
from car_datasets.modeling_iqs import IQSModel
from car_datasets.openvino_encoder import OpenVINOEncoder


class LoadedScorer(NamedTuple):
    """The model in evaluation mode on its device, and the tokenizer that it was trained with."""

    model: IQSModel
    tokenizer: Any
    device: torch.device


@functools.lru_cache(maxsize=2)
def load_scorer(
    model_id: str,
    revision: str,
    tokenizer: str | None,
    tokenizer_pin: str | None,
    dtype: str,
    device: torch.device,
    engine: str | None = None,
    engine_pin: str | None = None,
) -> LoadedScorer:
    """Model and tokenizer, once per process and device; never part of a callable, so never hashed or pickled.

    Raises:
        ValueError: `engine` is given, and the device is not the CPU.
    """
    from transformers import AutoTokenizer

    if engine is not None and device.type != "cpu":
        raise ValueError(
            f"engine={engine!r} runs on the CPU only, and this process is to use {device}. Leave it out, or hide the GPU: set "
            "CUDA_VISIBLE_DEVICES to nothing."
        )

    folder = hub.model_folder(model_id, revision)
    model = IQSModel.from_pretrained(folder, tokenizer=tokenizer)
    model.encoder.to(getattr(torch, dtype))  # not the head: in half precision it gives many texts the same score
    if engine is not None:
        model.encoder = OpenVINOEncoder(engine)
    source, checkpoint = model.config.encoder_source, hub.find_checkpoint(folder)
    if checkpoint is not None:
        reader = load_tokenizer(base_model(checkpoint, tokenizer))
        check_tokenizer(reader, model.config)
    else:
        at = folder if source is None else hub.model_folder(source["model_id"], source["revision"])
        reader = AutoTokenizer.from_pretrained(at)
    return LoadedScorer(model.eval().to(device), reader, device)


@functools.lru_cache(maxsize=8)
def read_scorer_config(model_id: str, revision: str, tokenizer: str | None, tokenizer_pin: str | None) -> IQSConfig:
    """The configuration of a scorer, of the original's layout as well.

    Raises:
        ValueError: the folder holds another kind of model.
    """
    from transformers import AutoConfig

    folder = hub.model_folder(model_id, revision)
    if (checkpoint := hub.find_checkpoint(folder)) is not None:
        return IQSConfig(**convert(checkpoint, tokenizer).config)
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, IQSConfig):
        raise ValueError(
            f"model_id={model_id!r} is a {config.model_type!r} model, not an IQS model ({IQSConfig.model_type!r})."
        )
    return config

"""Convert the original's checkpoints (COMET on Lightning) to the configuration and weights of an `IQSModel`.

Does: read the pickle without running its code; rename the weights; derive the encoder's shape from them; load the base
model's tokenizer exactly as its file says.
Does not: find the checkpoint, import Lightning or COMET, or build a model.
"""

from __future__ import annotations

import functools
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from car_datasets.loading.templates import PAPER_TEMPLATE
from car_datasets.utils import digests, revisions

# The original's names for its two models and two encoder families, and ours.
CLASSES = {"instruction_metric": "regression", "instruction_ranking_metric": "ranking"}
ENCODERS = {"XLM-RoBERTa": "xlm-roberta", "BERT": "bert"}

# The hyper-parameters that are read.
_OPTIONS = (
    *("class_identifier", "encoder_model", "pretrained_model", "layer", "layer_transformation", "layer_norm", "pool"),
    *("dropout", "hidden_sizes", "activations", "final_activation"),
)

# Number of attention heads by width, for widths that leave no doubt: the base and large sizes of both families.
ATTENTION_HEADS = {768: 12, 1024: 16}

# Beginnings of the names of the weights in a checkpoint.
_ENCODER = "encoder.model."
_MIX = "layerwise_attention.scalar_parameters."
_GAMMA = "layerwise_attention.gamma"
_HEAD = "estimator.ff."

# Left out: a table of positions that old versions saved, a pooler that no score uses, two constants of layer dropout.
_UNUSED = (
    f"{_ENCODER}embeddings.position_ids",
    f"{_ENCODER}pooler.",
    "layerwise_attention.dropout_mask",
    "layerwise_attention.dropout_fill",
)

# `tokenizer.json` does not say which token has which role. By padding token, which differs between the two families.
_SPECIAL_TOKENS = {
    "<pad>": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
    "[PAD]": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"},
}


class Converted(NamedTuple):
    """A converted checkpoint.

    Args:
        config (`dict`): arguments of `IQSConfig`.
        state (`dict`): weights under the names of `IQSModel`. Most are views of the mapped file: copy what you keep.
        base_model (`str`): folder or Hub id of the base model, which has the tokenizer.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]
    base_model: str


def convert(checkpoint: Path, tokenizer: str | None = None) -> Converted:
    """Read a checkpoint of CaR: IQS (`instruction_metric`) or the ranking variant (`instruction_ranking_metric`).

    Args:
        checkpoint (`Path`): a `.ckpt` file.
        tokenizer (`str`, *optional*): folder or Hub id of the base model's tokenizer; a folder's `config.json` also
            tells the number of attention heads, which no weight does. Default: what [`base_model`] returns.

    Raises:
        ValueError: the file is not a checkpoint of CaR, has unknown options or weights, or does not determine the shape
            of its encoder.
    """
    options = _read_options(checkpoint)
    base = base_model(checkpoint, tokenizer)
    weights = _read_mapped(checkpoint)["state_dict"]
    state = {**_encoder_state(weights), **_mix_state(weights), **_head_state(weights)}
    unknown = sorted(set(weights) - set(_used_names(weights)))
    if unknown:
        raise ValueError(f"{checkpoint} holds weights that no model of CaR has: {unknown[:5]}.")
    return Converted(_config(options, state, base, checkpoint), state, base)


def base_model(checkpoint: Path, tokenizer: str | None = None) -> str:
    """Return the folder or Hub id that has the tokenizer of a checkpoint.

    Args:
        checkpoint (`Path`): a `.ckpt` file.
        tokenizer (`str`, *optional*): is returned if given. Default: the `pretrained_model` of the hyper-parameters: a
            folder of that name next to the checkpoint's folders if there is one, else a Hub id.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    if tokenizer is not None:
        return tokenizer
    name = str(_read_options(checkpoint).get("pretrained_model", ""))
    # Checkpoints lie in <root>/<variant>/checkpoints/, and a base model may lie next to any of these folders.
    for folder in list(checkpoint.resolve().parents)[:4]:
        if name and (folder / name / "tokenizer.json").is_file():
            return str(folder / name)
    return name


def load_tokenizer(base: str, token: str | None = None) -> Any:
    """Load the base model's tokenizer exactly as its `tokenizer.json` says, so that ids equal the original's.

    transformers 5 builds XLM-RoBERTa's normaliser and pre-tokeniser itself and ignores the file's, which gives other
    ids for files that older converters wrote. Reading the file as a plain fast tokenizer keeps the file's.

    Args:
        base (`str`): a folder or a Hub id that holds `tokenizer.json`.
        token (`str`, *optional*): for a private repository.

    Raises:
        ValueError: there is no `tokenizer.json`; the message says what to pass.
    """
    from transformers import PreTrainedTokenizerFast

    file = (
        Path(base) / "tokenizer.json"
        if base and Path(base).is_dir()
        else revisions.download_file(base, "tokenizer.json", token)
    )
    if file is None or not file.is_file():
        raise ValueError(
            f"The original's checkpoints bring no tokenizer, and tokenizer={base!r} holds no tokenizer.json. Pass the "
            "folder or Hub id of the base model's: tokenizer='FacebookAI/xlm-roberta-large' (--tokenizer)."
        )
    vocabulary = {entry["content"] for entry in json.loads(file.read_text(encoding="utf-8"))["added_tokens"]}
    names = _SPECIAL_TOKENS["<pad>" if "<pad>" in vocabulary else "[PAD]"]
    return PreTrainedTokenizerFast(tokenizer_file=str(file), **{k: v for k, v in names.items() if v in vocabulary})


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raise ValueError if the weights cannot have been trained with this tokenizer."""
    encoder = config.encoder_config
    if tokenizer.pad_token_id != encoder.pad_token_id or len(tokenizer) > encoder.vocab_size:
        raise ValueError(
            f"The tokenizer ({len(tokenizer)} tokens, padding is {tokenizer.pad_token_id}) is not the encoder's "
            f"({encoder.vocab_size} tokens, padding is {encoder.pad_token_id}). Name its own: tokenizer=... "
            "(--tokenizer)."
        )


def tokenizer_revision(base: str, token: str | None = None) -> str | None:
    """Resolve a tokenizer to an immutable revision.

    Args:
        base (`str`): a folder or a Hub id.
        token (`str`, *optional*): for a private repository.

    Returns:
        `str`: digests of the folder's files, or the Hub's commit SHA; `None` if the Hub does not tell.
    """
    if base and Path(base).is_dir():
        files = [Path(base) / name for name in ("tokenizer.json", "config.json")]
        return " ".join(digests.file_digest(file) for file in files if file.is_file())
    try:
        return revisions.pin_revision(base, None, token) if base else None
    except (
        ValueError,
        ConnectionError,
    ):  # the tokenizer may be in the cache anyway; if not, loading it raises the error
        return None


def read_checkpoint(path: Path, mapped: bool = False) -> dict[str, Any]:
    """Unpickle a checkpoint with `weights_only=True`, which builds tensors and plain containers and runs nothing else.

    Nothing is added to torch's own allow-list: Lightning saves `state_dict` and `hyper_parameters` as tensors, dicts,
    lists, strings and numbers. A file that asks for any other class, or for a function to be called, is refused.

    Args:
        path (`Path`): a `.ckpt` file.
        mapped (`bool`): map the weights into memory instead of reading them. They then take no memory until they are
            used, and must not be used after the file was overwritten.

    Raises:
        ValueError: the file is refused, or is not a Lightning checkpoint.
    """
    _refuse_packed(path)
    try:
        # torch maps its zip format only; the format before torch 1.6 is read into memory.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:  # raised by torch for any name that is not on its allow-list
        reason = str(error).strip().splitlines()[0]
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        asks = f" but asks for {wanted[1]}" if wanted else ""
        raise ValueError(
            f"{path} was refused: it is not a plain file of weights{asks} ({reason}). "
            "Do not load it another way unless you trust who made it."
        ) from error
    except Exception as error:  # a truncated or forged pickle can fail in any way; none of its code has been run
        raise ValueError(f"{path} is not a checkpoint that torch can read: {type(error).__name__}: {error}") from error
    for name in ("state_dict", "hyper_parameters"):
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, dict):
            raise ValueError(f"{path} is not a Lightning checkpoint: its {name} is {type(part).__name__}, not a dict.")
    odd = [n for n, w in content["state_dict"].items() if not (isinstance(n, str) and isinstance(w, Tensor))]
    if odd:
        raise ValueError(f"{path} is not a Lightning checkpoint: {odd[:5]} in its state_dict are not named tensors.")
    odd = [name for name, weight in content["state_dict"].items() if not _is_plain(weight)]
    if odd:
        raise ValueError(
            f"{path} holds weights that are sparse, complex, quantised or empty shells ({odd[:5]}), which no model of "
            "CaR has. Download the checkpoint again."
        )
    # A tensor may repeat one number a billion times without a byte in the file. Twice, as layers may share weights.
    size = sum(weight.numel() * weight.element_size() for weight in content["state_dict"].values())
    if size > 2 * path.stat().st_size:
        raise ValueError(f"{path} was refused: its weights would take {size:,} bytes, more than twice its size.")
    return dict(content)


def _is_plain(weight: Tensor) -> bool:
    """Return True for a dense tensor of real numbers, the only kind that can be copied into a model unchanged."""
    dense = weight.layout == torch.strided and not weight.is_nested and not weight.is_quantized
    return dense and weight.device.type == "cpu" and not weight.is_complex()


def _refuse_packed(path: Path) -> None:
    """Raise ValueError if a checkpoint in torch's zip format would be larger in memory than on the disk."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a checkpoint that torch can read: {error}.") from error
    if size > path.stat().st_size:
        raise ValueError(
            f"{path} was refused: it would unpack to {size:,} bytes, more than its size, and torch compresses nothing."
        )


def _read_options(checkpoint: Path) -> dict[str, Any]:
    """Return the hyper-parameters of a checkpoint; they win over those of the `hparams.yaml` of its folder."""
    content = _read_mapped(checkpoint)
    from_yaml = _flat(_read_hparams(checkpoint), checkpoint)
    options = {**from_yaml, **_flat(content["hyper_parameters"], checkpoint)}
    if from_yaml.get("class_identifier", options.get("class_identifier")) != options.get("class_identifier"):
        raise ValueError(
            f"{checkpoint} is a {options.get('class_identifier')!r}, its hparams.yaml says "
            f"{from_yaml['class_identifier']!r}; the original would go by the latter. Make them agree."
        )
    return options


def _flat(options: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """Return the options that a model is made from; raise ValueError for one that is no number, text or list of them.

    Lists in lists that are the same object take little room in a file, and any amount in a message.
    """
    found = {name: options[name] for name in _OPTIONS if name in options}
    for name, value in found.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        if len(parts) > 100 or not all(part is None or isinstance(part, (str, int, float)) for part in parts):
            kind = type(value).__name__
            raise ValueError(f"{path}: the hyper-parameter {name} is a {kind}, not a number, a text or a list of them.")
    return found


def _read_hparams(checkpoint: Path) -> dict[str, Any]:
    """Read `hparams.yaml` one folder up, where the original keeps it, or next to the checkpoint; empty if none."""
    for folder in (checkpoint.parent.parent, checkpoint.parent):
        if (folder / "hparams.yaml").is_file():
            try:
                content = yaml.safe_load((folder / "hparams.yaml").read_text(encoding="utf-8"))
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise ValueError(f"{folder / 'hparams.yaml'} is not plain YAML: {error}") from error
            return content if isinstance(content, dict) else {}
    return {}


def _read_mapped(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint, mapped; once per process, until the file changes."""
    state = checkpoint.stat()
    return _mapped_checkpoint(checkpoint.resolve(), (state.st_ino, state.st_size, state.st_mtime_ns))


@functools.lru_cache(maxsize=2)
def _mapped_checkpoint(path: Path, stamp: tuple[int, int, int]) -> dict[str, Any]:
    # Kept for the hyper-parameters and the shapes, which are asked for several times. 2.2 GB of weights cost nothing
    # here, as mapped pages are read when the model is loaded and can be dropped by the system afterwards.
    return read_checkpoint(path, mapped=True)


def _encoder_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = [n for n in weights if n.startswith(_ENCODER) and not n.startswith(_UNUSED)]
    return {"encoder." + n.removeprefix(_ENCODER): weights[n] for n in names}


def _mix_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    scalars = {int(n.removeprefix(_MIX)): w for n, w in weights.items() if n.startswith(_MIX)}
    if not scalars:  # the model reads a single layer
        return {}
    if sorted(scalars) != list(range(len(scalars))):
        raise ValueError(f"The checkpoint's layer mix has the weights {sorted(scalars)}; some are missing.")
    if _GAMMA not in weights:
        raise ValueError(f"The checkpoint's layer mix lacks the weight {_GAMMA!r}.")
    mix = torch.cat([scalars[i].reshape(-1) for i in range(len(scalars))])
    return {"layers.weight": mix, "layers.gamma": weights[_GAMMA]}


def _head_state(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"head." + n.removeprefix(_HEAD): w for n, w in weights.items() if n.startswith(_HEAD)}


def _used_names(weights: Mapping[str, Tensor]) -> list[str]:
    return [n for n in weights if n.startswith((_ENCODER, _MIX, _GAMMA, _HEAD, *_UNUSED))]


def _config(options: Mapping[str, Any], state: Mapping[str, Tensor], base: str, checkpoint: Path) -> dict[str, Any]:
    kind = _choice(options, "class_identifier", CLASSES, checkpoint)
    encoder = _encoder_config(options, state, base, checkpoint)

    def read(name: str, *types: type) -> Any:
        value = options.get(name)
        # In Python a bool is an int, so `True` would pass for a number.
        if name not in options or not isinstance(value, types) or isinstance(value, bool) != (types == (bool,)):
            wanted = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{checkpoint}: the hyper-parameter {name}={value!r} must be a {wanted}.")
        return value

    layer, pool = read("layer", str, int), read("pool", str)
    if layer != "mix" and not str(layer).isdecimal():
        raise ValueError(f"{checkpoint}: the hyper-parameter layer={layer!r} must be 'mix' or the number of a layer.")
    config: dict[str, Any] = {
        "encoder_config": encoder,
        "objective": kind,
        "layer": None if layer == "mix" else int(layer),
        "layer_mix": read("layer_transformation", str),
        "layer_norm": read("layer_norm", bool),
        "pooling": pool,
        "dropout": float(read("dropout", float, int)),
        # The original's limit: two positions for XLM-R's offset, taken off for BERT as well, and two special tokens.
        "max_tokens": encoder["max_position_embeddings"] - 4,
        "template": PAPER_TEMPLATE,
    }
    if pool == "default":  # the last layer's first token, whatever the mix
        config |= {"layer": encoder["num_hidden_layers"], "pooling": "cls"}
    if kind == "regression":
        sizes, final = read("hidden_sizes", list, tuple), options.get("final_activation")
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"{checkpoint}: the hyper-parameter hidden_sizes={sizes!r} must be a list of widths.")
        config |= {
            "hidden_sizes": list(sizes),
            # The original writes names through str.title(): "sigmoid" and "Tanh" work there, "ReLU" does not.
            "activation": read("activations", str).title(),
            "final_activation": str(final).title() if final else None,
        }
    return config


def _choice(options: Mapping[str, Any], name: str, known: Mapping[str, str], checkpoint: Path) -> str:
    if not isinstance(options.get(name), str) or options[name] not in known:
        raise ValueError(f"{checkpoint}: {name}={options.get(name)!r} is not one of {sorted(known)}.")
    return known[options[name]]


def _encoder_config(
    options: Mapping[str, Any], state: Mapping[str, Tensor], base: str, checkpoint: Path
) -> dict[str, Any]:
    """Derive the encoder's shape from its weights, and the rest from the base model's own configuration."""
    kind = _choice(options, "encoder_model", ENCODERS, checkpoint)
    try:
        vocabulary, width = state["encoder.embeddings.word_embeddings.weight"].shape
        positions = len(state["encoder.embeddings.position_embeddings.weight"])
        types = len(state["encoder.embeddings.token_type_embeddings.weight"])
        inner = len(state["encoder.encoder.layer.0.intermediate.dense.weight"])
    except KeyError as error:
        raise ValueError(f"{checkpoint} lacks the weight {error}.") from error
    layers = 1 + max(int(m[1]) for n in state if (m := re.match(r"encoder\.encoder\.layer\.(\d+)\.", n)))
    shape = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
    }
    known = _base_config(base, ask_hub=width not in ATTENTION_HEADS)
    heads = known.get("num_attention_heads", ATTENTION_HEADS.get(width))
    if heads is None:
        raise ValueError(
            f"{checkpoint}: the number of attention heads of an encoder of width {width} is not in the weights. Pass "
            f"the folder or Hub id of its base model ({options.get('pretrained_model')!r}), which holds config.json "
            "and the tokenizer: tokenizer=... (--tokenizer)."
        )
    # The vocabulary may differ: a tokenizer may have gained tokens after the base model's configuration was written.
    wrong = {n: (known[n], v) for n, v in shape.items() if n in known and known[n] != v and n != "vocab_size"}
    if wrong:
        raise ValueError(f"{base} is not the base model of {checkpoint}: (its value, the weights') differ in {wrong}.")
    rest = {
        "model_type": kind,
        "num_attention_heads": heads,
        "hidden_act": known.get("hidden_act", "gelu"),
        "layer_norm_eps": known.get("layer_norm_eps", 1e-5 if kind == "xlm-roberta" else 1e-12),
        "pad_token_id": known.get("pad_token_id", 1 if kind == "xlm-roberta" else 0),
    }
    return shape | rest


def _base_config(base: str, ask_hub: bool) -> dict[str, Any]:
    """Read the base model's configuration from its folder, or with `ask_hub` from the Hub; empty if there is none."""
    if base and Path(base).is_dir():
        path: Path | None = Path(base) / "config.json"
    else:
        path = revisions.download_file(base, "config.json") if ask_hub else None
    if path is None or not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}

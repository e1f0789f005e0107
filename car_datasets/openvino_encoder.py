"""A scorer's encoder in 8-bit integers on the CPU, by OpenVINO: the folder that it is kept in, and its stand-in in torch.

Does: say whose encoder a folder holds and pin it by digest; run it where `IQSModel` has its float32 encoder.
Does not: make such a folder (quantisation.py), or decide whether its scores are good enough (`compare_engines` there).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from car_datasets import digests

MODEL_FILE, WEIGHTS_FILE, RECORD_FILE = ENGINE_FILES = ("encoder.xml", "encoder.bin", "engine.json")

DAMAGED = "is damaged. Make the folder anew: `car-datasets quantise SOURCE --output FOLDER`."

# Texts are padded to a multiple of this. A sum over a remainder of a vector register is added up in another order, and float
# noise that tips the rounding of one integer moved scores by up to 0.05 with the length of the longest text in the batch.
LANES = 16


def import_openvino(*also: str) -> Any:
    """The module `openvino`. It and nncf report their use to their makers unless told not to; here they do not.

    Args:
        also (`str`): more modules that will be needed, such as `"nncf"`.

    Raises:
        ValueError: the extra is not installed.
    """
    missing = [name for name in ("openvino", *also) if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"engine: {' and '.join(missing)} cannot be imported. Install the extra: pip install 'car-datasets[openvino]'"
        )
    # Both fall back to a stub where this package is missing. With it, `import openvino` alone sends an event.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def pin_engine(engine: str, model_id: str, revision: str, dtype: str) -> str:
    """The digest of an engine's folder, `"sha256:..."`, once it is sure that it can run and belongs to these weights.

    Args:
        engine (`str`): a folder that [`~car_datasets.quantisation.quantise_encoder`] wrote.
        model_id, revision, dtype (`str`): the scorer's, pinned.

    Raises:
        ValueError: there is no such folder, its record is damaged, it was made for other weights, the extra is not
            installed, or another precision is asked for as well.
    """
    if dtype != "float32":
        raise ValueError(f"engine={engine!r} is int8; leave out dtype={dtype!r}.")
    folder = Path(engine).expanduser()
    missing = [name for name in ENGINE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"engine={engine!r} is no engine's folder: it has no {', '.join(missing)}. Make one with "
            "`car-datasets quantise SOURCE --output FOLDER`."
        )
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        made_for = record["revision"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"engine={engine!r}: {RECORD_FILE} {DAMAGED}") from error
    if made_for != revision:
        raise ValueError(
            f"engine={engine!r} was made for {record.get('model')} at revision {made_for}, not for {model_id} at "
            f"{revision}. Make one for it: `car-datasets quantise SOURCE --output FOLDER --scorer {model_id}`."
        )
    import_openvino()
    return digests.files_digest(folder, [folder / name for name in ENGINE_FILES])


@functools.lru_cache(maxsize=1)
def _core() -> Any:
    """The one `Core` of this process, for as long as it lives.

    Each sets the thread that makes it a stack for signal handlers (on CPUs with AVX-512 at least), and frees that stack with
    itself: let go in another thread, as Python's garbage collector may, it leaves the first thread with a stack that is no
    more, and the next signal with a Python handler, Ctrl-C too, is a segmentation fault (seen with OpenVINO 2026.4).
    """
    return import_openvino().Core()


class OpenVINOEncoder(nn.Module):
    """Stands where an encoder of transformers stood: the same arguments, and the hidden states of its int8 copy.

    Args:
        folder (`str`): an engine's, see [`pin_engine`].

    Raises:
        ValueError: its files are damaged.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # what is not int8; by itself OpenVINO takes bfloat16 where the CPU has it
            "PERFORMANCE_HINT": "LATENCY",  # all cores on one batch
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        path = Path(folder).expanduser() / MODEL_FILE
        try:
            self.compiled = _core().compile_model(str(path), "CPU", options)
        except RuntimeError as error:  # all that openvino raises for a file cut short or overwritten
            raise ValueError(f"engine={folder!r}: {MODEL_FILE} or {WEIGHTS_FILE} {DAMAGED}") from error

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Token ids and mask, int64 of shape `(batch, tokens)`, to `hidden_states`: n + 1 of `(batch, tokens, units)`."""
        tokens = input_ids.shape[1]
        more = (0, -tokens % LANES)
        inputs = [nn.functional.pad(tensor, more).numpy() for tensor in (input_ids, attention_mask)]
        states = tuple(torch.from_numpy(state)[:, :tokens] for state in self.compiled(inputs).values())
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)

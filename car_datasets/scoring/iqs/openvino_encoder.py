"""Run a scorer's encoder in 8-bit integers on the CPU, by OpenVINO.

Does: check and pin the folder of an engine; run the int8 encoder in `IQSModel` instead of the float32 one.
Does not: make such a folder, or decide if its scores are good enough.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from car_datasets.utils import digests
from car_datasets.utils.settings import refuse_missing_extra

MODEL_FILE, WEIGHTS_FILE, RECORD_FILE = ENGINE_FILES = ("encoder.xml", "encoder.bin", "engine.json")
QUANTISE = "car-datasets quantise SOURCE --output FOLDER"  # the command that makes the folder of an engine
DAMAGED = f"is damaged. Make the folder again: `{QUANTISE}`."

# Texts are padded to a multiple of this. The remainder of a vector register is summed in another order. That changes
# the rounding of single integers, which moved scores by up to 0.05 with the length of the longest text in the batch.
LANES = 16


def pin_engine(engine: str, model_id: str, revision: str, dtype: str) -> str:
    """Check that an engine can run and belongs to these weights, and return the digest of its folder.

    Args:
        engine (`str`): a folder that [`~car_datasets.training.quantise_encoder`] wrote.
        model_id (`str`): the scorer's model.
        revision (`str`): its immutable revision.
        dtype (`str`): the scorer's.

    Returns:
        `str`: `"sha256:..."`.

    Raises:
        ValueError: the folder does not exist or is damaged, it was made for other weights, the extra `openvino` is not
            installed, or `dtype` is not `"float32"`.
    """
    if dtype != "float32":
        raise ValueError(f"engine={engine!r} is int8; leave out dtype={dtype!r}.")
    folder = Path(engine).expanduser()
    missing = [name for name in ENGINE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"engine={engine!r} is not the folder of an engine: it has no {', '.join(missing)}. Make one with "
            f"`{QUANTISE}`."
        )
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        made_for = record["revision"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"engine={engine!r}: {RECORD_FILE} {DAMAGED}") from error
    if made_for != revision:
        raise ValueError(
            f"engine={engine!r} was made for {record.get('model')} at revision {made_for}, not for {model_id} at "
            f"{revision}. Make one for it: `{QUANTISE} --scorer {model_id}`."
        )
    import_openvino()  # an extra that is not installed should be an error here, not in a worker
    return digests.files_digest(folder, [folder / name for name in ENGINE_FILES])


class OpenVINOEncoder(nn.Module):
    """A replacement for an encoder of transformers: the same arguments, the hidden states of its int8 copy.

    Args:
        folder (`str`): of an engine, checked by [`pin_engine`].

    Raises:
        ValueError: its files are damaged.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # for all that is not int8; the default is bfloat16 if the CPU has it
            "PERFORMANCE_HINT": "LATENCY",  # all cores on one batch
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        path = Path(folder).expanduser() / MODEL_FILE
        try:
            self.compiled = _core().compile_model(str(path), "CPU", options)
        except RuntimeError as error:  # the only error of openvino for a truncated or overwritten file
            raise ValueError(f"engine={folder!r}: {MODEL_FILE} or {WEIGHTS_FILE} {DAMAGED}") from error

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Encode token ids and their mask, int64 of shape `(batch, tokens)`.

        Returns:
            `BaseModelOutput`: its `hidden_states` are n + 1 tensors of shape `(batch, tokens, units)`.
        """
        # Padding to a multiple of LANES: mask 0, so no text attends to it; it is cut off again below.
        tokens = input_ids.shape[1]
        more = (0, -tokens % LANES)
        inputs = [nn.functional.pad(tensor, more).numpy() for tensor in (input_ids, attention_mask)]
        states = tuple(torch.from_numpy(state)[:, :tokens] for state in self.compiled(inputs).values())
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=states)


@functools.lru_cache(maxsize=1)
def _core() -> Any:
    """Return the only `Core` of this process, which is never freed."""
    # A Core gives the thread that makes it a stack for signal handlers (on CPUs with AVX-512 at least), and frees that
    # stack when it is freed itself. If that happens in another thread, as by Python's garbage collector, the first
    # thread is left with a dangling stack, and its next signal with a Python handler, Ctrl-C too, is a segmentation
    # fault (OpenVINO 2026.4).
    return import_openvino().Core()


def import_openvino(*also: str) -> Any:
    """Import `openvino` without telemetry: by default it and nncf report their use to their makers.

    Args:
        also (`str`): more modules that will be needed, such as `"nncf"`.

    Raises:
        ValueError: the extra is not installed.
    """
    refuse_missing_extra("openvino", "The int8 encoder", {name: name for name in ("openvino", *also)})
    # Without this package both use a stub. With it, `import openvino` alone would send an event.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino

"""Benchmarks of a GPU run through on the CPU, with a model and texts so small that the figures mean nothing."""

from typing import Any

import pytest
import torch

from tests.benchmarks import gpu

TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
def test_every_section_of_the_gpu_benchmark_runs(
    sample_rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = sorted(sample_rows, key=lambda row: len(row["output"]))[:8]
    assert list(gpu.measure()) == []
    assert "not measured, there is no GPU here" in capsys.readouterr().err
    small = {"DEVICE": torch.device("cpu"), "LARGE": TINY, "TOKENS": 1_024, "SIZE": 64, "FEW": 8}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "rows", lambda: ("rows", few))
    monkeypatch.setattr(gpu, "texts", lambda: ("rows", [f"Instruction: a Response: {row['output']}" for row in few]))
    monkeypatch.setattr(gpu, "timed", lambda function, runs=2: (1.0, function()))
    monkeypatch.setattr(torch, "compile", lambda function: function)
    lines = list(gpu.measure())
    said = capsys.readouterr().err
    assert "Traceback" not in said, said
    assert {line.what.split(":")[0] for line in lines} == {section.__name__ for section in gpu.SECTIONS}
    assert said.count("kernels, eager:") == 1
    only = list(gpu.measure("matm"))
    assert {line.what.split(":")[0] for line in only} == {"matmul"}

"""Ranks to devices, on a machine without a GPU."""

import pytest
import torch

from car_datasets.parallel import device_for


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks what happens without a GPU")
def test_without_a_gpu_every_rank_is_the_cpu() -> None:
    assert device_for() == device_for(None)
    assert device_for(3).type == device_for().type


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ranks_wrap_around_the_gpus() -> None:
    assert device_for(torch.cuda.device_count()) == torch.device("cuda", 0)

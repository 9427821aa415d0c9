"""Which device a process computes on."""

from __future__ import annotations

import os

import pytest
import torch

from llada import device
from llada.errors import UserError


def test_cpu_hides_the_gpus_of_this_process_and_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LLADA_DEVICE", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device.hide_unwanted_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not device.gpu_available()


@pytest.mark.parametrize("wanted", ["", "cuda"])
@pytest.mark.parametrize("there", [True, False])
def test_a_gpu_is_used_where_there_is_one_and_on_request_insisted_on(
    wanted: str, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that has failed must not turn a run on a cluster into one on the CPU without
    a word.
    """
    monkeypatch.setenv("LLADA_DEVICE", wanted)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    device.hide_unwanted_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    if wanted and not there:
        with pytest.raises(UserError, match="LLADA_DEVICE: cuda needs a GPU"):
            device.gpu_available()
    else:
        assert device.gpu_available() == there


def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLADA_DEVICE", "gpu")
    with pytest.raises(UserError, match=r"LLADA_DEVICE: 'gpu' .* use cpu or cuda"):
        device.gpu_available()

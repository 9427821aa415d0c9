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


@pytest.mark.parametrize("choice", ["", "cuda"])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_gpu_is_used_if_there_is_one_and_required_on_request(
    choice: str, has_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed driver must not silently turn a run on a cluster into one on its CPUs."""
    monkeypatch.setenv("LLADA_DEVICE", choice)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    device.hide_unwanted_gpus()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    if choice and not has_gpu:
        with pytest.raises(UserError, match="LLADA_DEVICE: cuda needs a GPU"):
            device.gpu_available()
    else:
        assert device.gpu_available() == has_gpu


def test_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLADA_DEVICE", "gpu")
    with pytest.raises(UserError, match=r"LLADA_DEVICE: 'gpu' .* use cpu or cuda"):
        device.gpu_available()

"""A plugin of pytest: tests run with another device as torch's default one, and outcomes are written as they come.

Tensors that a test makes lie on the device. Random numbers from a generator of the CPU are drawn there first, so that
they are the same; arrays come back from the device by themselves.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class OnDevice(TorchFunctionMode):
    """What is made without a device is made on this one."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.Tensor.numpy, torch.Tensor.__array__):
            return function(args[0].cpu(), *args[1:], **kwargs)
        if function in _device_constructors() and kwargs.get("device") is None and "out" not in kwargs:
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != self.device.type:
                return function(*args, **kwargs).to(self.device)
            kwargs["device"] = self.device
        return function(*args, **kwargs)


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with OnDevice(os.environ["FIXPOINT_DEVICE"]):
        yield


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each test that was run, skipped or could not be set up."""
    if report.when == "call" or report.outcome != "passed":
        crash = getattr(report.longrepr, "reprcrash", None)
        line = {"test": report.nodeid, "outcome": report.outcome}
        line["error"] = crash.message.partition("\n")[0][:300] if crash else ""
        with open(os.environ["FIXPOINT_OUTCOMES"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

"""An accelerator of the simplest kind: the CPU, but treated like a device whose queue must never be waited for."""

import torch

from maskrcnn_benchmark.device import Device
from maskrcnn_benchmark.device.cpu import HostEvent


class ExampleDevice(Device):
    def event(self) -> HostEvent:
        return HostEvent()


def create(index: int | None) -> Device:
    return ExampleDevice(
        torch.device("cpu"),
        autocast_dtypes=(torch.bfloat16,),
        grad_scaler=False,
        fused_optimizer=True,
    )

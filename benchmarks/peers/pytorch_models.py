"""The benchmark's two models as PyTorch modules, their data as tensors, for every program that trains with PyTorch."""

import torch
from torch import nn
from torch.nn import functional
from workload import CLASSES, SIDE, Array, Workload, channels_first


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(SIDE * SIDE, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(x.flatten(1))


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
        self.dense, self.last = nn.Linear(9_216, 128), nn.Linear(128, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.second(functional.relu(self.first(x))))
        return self.last(functional.relu(self.dense(functional.max_pool2d(x, 2).flatten(1))))


def model_of(workload: Workload) -> nn.Module:
    """The module with the workload's initial weights."""
    module = Linear() if len(workload.weights) == 2 else Cnn()
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), channels_first(workload.weights), strict=True):
            parameter.copy_(torch.from_numpy(weight))
    return module


def images(x: Array) -> torch.Tensor:
    """[..., 28, 28, 1] as [..., 1, 28, 28]."""
    return torch.from_numpy(x).movedim(-1, -3).contiguous()


@torch.no_grad()
def accuracy(module: nn.Module, workload: Workload) -> float:
    predicted = module(images(workload.test_x)).argmax(1)
    return float((predicted == torch.from_numpy(workload.test_y)).double().mean())

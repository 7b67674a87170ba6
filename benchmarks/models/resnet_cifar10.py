"""ResNet-20 for CIFAR-10, 19 convolutions and a linear layer (He et al., arXiv 1512.03385, section 4.2).

    y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))        three blocks each of width 16, 32, 64

The shortcut is the identity, and where a block halves the image, option A of the paper: every second pixel,
with channels of zeros on both sides. Images in [0, 1] go through `normalise` first. .915 of 1,000 test
images come out right.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import Dim

from benchmarks.models import data

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

Run = Callable[[Tensor], Tensor]  # normalised images (batch, 3, 32, 32) -> logits (batch, 10)

DYNAMIC = {"images": {0: Dim("batch")}}


class Block(nn.Module):
    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.halves = fan_in != width  # then width = 2 fan_in
        stride = 2 if self.halves else 1
        self.conv1 = nn.Conv2d(fan_in, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if not self.halves:
            return x
        zeros = x.shape[1] // 2  # channels on either side
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, zeros, zeros))


class ResNet20(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 3, 32, 32)
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (batch, 64, 8, 8)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def model() -> ResNet20:
    net = ResNet20()
    net.load_state_dict(load_file(data.find("models/resnet_cifar10/resnet20.safetensors")), strict=True)
    return net.eval()


def normalise(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


@torch.no_grad()
def accuracy(run: Run, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Share of `images`, in [0, 1], given their label."""
    guesses = [run(normalise(batch)).argmax(1) for batch in torch.split(images, batch_size)]
    return float((torch.cat(guesses) == labels).float().mean())

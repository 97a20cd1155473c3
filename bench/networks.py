"""Networks in plain torch, written as the packages write them that need torchvision.

None is an nn.Sequential of a chain: norms, activations, dropout and shortcuts are called in
`forward`, in place where the package does so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear → norm → activation → dropout, called one by one from lists."""

    def __init__(
        self, sizes: list[int], norm: Callable[[int], nn.Module], p: float, out: int = 10
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleList(map(nn.Linear, sizes[:-1], sizes[1:]))
        self.norms = nn.ModuleList(map(norm, sizes[1:]))
        self.head = nn.Linear(sizes[-1], out)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
            x = F.dropout(x, self.p, self.training)
        return self.head(x)


class BasicBlock(nn.Module):
    """ResNet's block as torchvision has it: BatchNorm, in-place ReLU, shortcut."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-18 with (64, 128, 256, 512) channels and two blocks a stage."""

    def __init__(self, widths: tuple[int, ...], blocks: int, out: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        layers, channels = [], widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                layers.append(BasicBlock(channels, width, stride))
                channels = width
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layers(x).mean((2, 3)))


class Permute(nn.Module):
    """torchvision.ops.Permute."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class ConvNeXtBlock(nn.Module):
    """torchvision's CNBlock, without stochastic depth."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=1e-6),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.rand(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_scale * self.block(x) + x


class ConvNeXt(nn.Module):
    """Patches and blocks of one width."""

    def __init__(self, channels: int, blocks: int, patch: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, patch, patch)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


class MixerMLP(nn.Module):
    """timm's Mlp: the activation, both dropouts and the products called one by one."""

    def __init__(self, features: int, hidden: int, p: float) -> None:
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(features, hidden), nn.GELU(), nn.Dropout(p)
        self.fc2, self.drop2 = nn.Linear(hidden, features), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(x))


class MixerBlock(nn.Module):
    """timm's MixerBlock: over tokens in transposed memory, then over channels."""

    def __init__(self, tokens: int, channels: int, p: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mlp_tokens = MixerMLP(tokens, channels // 2, p)
        self.mlp_channels = MixerMLP(channels, 4 * channels, p)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class Mixer(nn.Module):
    """Patches, blocks, the mean of the normed tokens."""

    def __init__(self, size: int, channels: int, blocks: int, p: float, patch: int = 16) -> None:
        super().__init__()
        tokens = (size // patch) ** 2
        self.stem = nn.Conv2d(3, channels, patch, patch)
        self.blocks = nn.Sequential(*(MixerBlock(tokens, channels, p) for _ in range(blocks)))
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.norm(self.blocks(x)).mean(1)


class ConvNormAct(nn.Module):
    """MobileNetV3's conv → BatchNorm → in-place Hardswish, with the shortcut of its blocks."""

    def __init__(self, channels: int, out: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, stride, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3, momentum=0.01)
        self.act = nn.Hardswish(inplace=True)
        self.shortcut = channels == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn(self.conv(x)))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """A few of them, and MobileNetV3's classifier with its in-place dropout."""

    def __init__(self, width: int, p: float, out: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvNormAct(3, width, 2),
            ConvNormAct(width, width, groups=width),
            ConvNormAct(width, 2 * width, 2),
            ConvNormAct(2 * width, 2 * width, groups=2 * width),
        )
        self.fc1, self.act = nn.Linear(2 * width, 4 * width), nn.Hardswish(inplace=True)
        self.drop, self.fc2 = nn.Dropout(p, inplace=True), nn.Linear(4 * width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        return self.fc2(self.drop(self.act(self.fc1(x))))


class Part(nn.Module):
    """A few stages behind a product with a parameter, so that gradients reach them."""

    def __init__(self, features: int, *stages: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(x * self.scale)


class WrittenRMSNorm(nn.Module):
    """Llama's, written by hand."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)

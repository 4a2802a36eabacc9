"""The Inception-v3 network of the Frechet inception distance, whose weights the user brings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

NUM_FEATURES = 2048


@dataclass(frozen=True)
class _Conv:
    """A convolution of a block: its name, output channels, kernel and stride; padded to keep the size at stride 1."""

    name: str
    channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


_Route = tuple[_Conv | tuple[_Conv, ...], ...]  # convolutions in turn; a tuple within: side by side, concatenated


class _ConvNormReLU(nn.Module):
    def __init__(self, in_channels: int, channels: int, kernel: tuple[int, int], stride: int, *, padded: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Routes of convolutions and a pooled route side by side, their outputs concatenated in channels."""

    def __init__(self, in_channels: int, routes: tuple[_Route, ...], *, pool: str, pool_channels: int = 0) -> None:
        super().__init__()
        self.routes, self.pool = routes, pool
        self.out_channels = pool_channels or in_channels
        for route in routes:
            width = in_channels
            for stage in route:
                convs = stage if isinstance(stage, tuple) else (stage,)
                for conv in convs:
                    layer = _ConvNormReLU(width, conv.channels, conv.kernel, conv.stride, padded=conv.stride == 1)
                    self.add_module(conv.name, layer)
                width = sum(conv.channels for conv in convs)
            self.out_channels += width
        if pool_channels:
            self.branch_pool = _ConvNormReLU(in_channels, pool_channels, (1, 1), 1, padded=True)
        self._has_pool_conv = bool(pool_channels)

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for route in self.routes:
            y = x
            for stage in route:
                convs = stage if isinstance(stage, tuple) else (stage,)
                y = torch.cat([self.get_submodule(conv.name)(y) for conv in convs], dim=1)
            outputs.append(y)
        pooled = self._pooled(x)
        outputs.append(self.branch_pool(pooled) if self._has_pool_conv else pooled)
        return torch.cat(outputs, dim=1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "average":  # TensorFlow leaves the padding out of the mean
            return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self.pool == "max":
            return max_pool2d(x, 3, stride=1, padding=1)
        return max_pool2d(x, 3, stride=2)


def _block_5(in_channels: int, pool_channels: int) -> _Block:
    routes: tuple[_Route, ...] = (
        (_Conv("branch1x1", 64),),
        (_Conv("branch5x5_1", 48), _Conv("branch5x5_2", 64, (5, 5))),
        (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3))),
    )
    return _Block(in_channels, routes, pool="average", pool_channels=pool_channels)


def _block_6(width: int) -> _Block:
    routes: tuple[_Route, ...] = (
        (_Conv("branch1x1", 192),),
        (_Conv("branch7x7_1", width), _Conv("branch7x7_2", width, (1, 7)), _Conv("branch7x7_3", 192, (7, 1))),
        (
            _Conv("branch7x7dbl_1", width),
            _Conv("branch7x7dbl_2", width, (7, 1)),
            _Conv("branch7x7dbl_3", width, (1, 7)),
            _Conv("branch7x7dbl_4", width, (7, 1)),
            _Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
    )
    return _Block(768, routes, pool="average", pool_channels=192)


def _block_7(in_channels: int, pool: str) -> _Block:
    def crossed(name: str) -> tuple[_Conv, ...]:
        return _Conv(name + "a", 384, (1, 3)), _Conv(name + "b", 384, (3, 1))

    routes: tuple[_Route, ...] = (
        (_Conv("branch1x1", 320),),
        (_Conv("branch3x3_1", 384), crossed("branch3x3_2")),
        (_Conv("branch3x3dbl_1", 448), _Conv("branch3x3dbl_2", 384, (3, 3)), crossed("branch3x3dbl_3")),
    )
    return _Block(in_channels, routes, pool=pool, pool_channels=192)


def _halving_6() -> _Block:
    routes: tuple[_Route, ...] = (
        (_Conv("branch3x3", 384, (3, 3), 2),),
        (_Conv("branch3x3dbl_1", 64), _Conv("branch3x3dbl_2", 96, (3, 3)), _Conv("branch3x3dbl_3", 96, (3, 3), 2)),
    )
    return _Block(288, routes, pool="halve")


def _halving_7() -> _Block:
    routes: tuple[_Route, ...] = (
        (_Conv("branch3x3_1", 192), _Conv("branch3x3_2", 320, (3, 3), 2)),
        (
            _Conv("branch7x7x3_1", 192),
            _Conv("branch7x7x3_2", 192, (1, 7)),
            _Conv("branch7x7x3_3", 192, (7, 1)),
            _Conv("branch7x7x3_4", 192, (3, 3), 2),
        ),
    )
    return _Block(768, routes, pool="halve")


class InceptionV3(nn.Module):
    """Inception-v3 as the Frechet inception distance uses it: TensorFlow's graph of 2015-12-05.

    It differs from the network of classification libraries: padding is left out of average pools, the last block takes
    a maximum instead of an average, and there are 1008 classes. Parameters have the names of the usual PyTorch port.

    Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (CVPR 2016).
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNormReLU(3, 32, (3, 3), 2, padded=False)
        self.Conv2d_2a_3x3 = _ConvNormReLU(32, 32, (3, 3), 1, padded=False)
        self.Conv2d_2b_3x3 = _ConvNormReLU(32, 64, (3, 3), 1, padded=True)
        self.Conv2d_3b_1x1 = _ConvNormReLU(64, 80, (1, 1), 1, padded=False)
        self.Conv2d_4a_3x3 = _ConvNormReLU(80, 192, (3, 3), 1, padded=False)
        self.Mixed_5b = _block_5(192, 32)
        self.Mixed_5c = _block_5(256, 64)
        self.Mixed_5d = _block_5(288, 64)
        self.Mixed_6a = _halving_6()
        self.Mixed_6b = _block_6(128)
        self.Mixed_6c = _block_6(160)
        self.Mixed_6d = _block_6(160)
        self.Mixed_6e = _block_6(192)
        self.Mixed_7a = _halving_7()
        self.Mixed_7b = _block_7(1280, "average")
        self.Mixed_7c = _block_7(NUM_FEATURES, "max")
        self.fc = nn.Linear(NUM_FEATURES, 1008)  # not used for features; the weights files have it

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, 3, 299, 299)``, normalised, to features ``(N, 2048)``, before the classes."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            if name.startswith("Mixed_"):
                x = block(x)
        return x.mean(dim=(2, 3))

"""Networks of the kinds people prune, small in width and whole in structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    def __init__(self, before: int, width: int, after: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(
                nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet-50 with width 64 and depths (3, 4, 6, 3); ResNeXt with groups."""

    def __init__(self, width: int = 8, depths: tuple[int, ...] = (2, 2, 2), groups: int = 1, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1, self.relu, self.pool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        layers, before = [], width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(Bottleneck(before, inner, 4 * inner, stride, groups))
                before = 4 * inner
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.pool(self.relu(self.bn1(self.conv1(x)))))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        hidden = 3 * before
        self.skip = stride == 1 and before == after
        self.body = nn.Sequential(
            nn.Conv2d(before, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(),
            SqueezeExcite(hidden), nn.Conv2d(hidden, after, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


class MobileNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.blocks = nn.Sequential(Inverted(8, 8, 1), Inverted(8, 12, 2), Inverted(12, 12, 1), Inverted(12, 12, 1))
        self.head = nn.Sequential(
            nn.Conv2d(12, 24, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class DenseNet(nn.Module):
    def __init__(self, growth: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.ModuleList(self._layer(8 + growth * index, growth) for index in range(3))
        middle = 8 + 3 * growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(middle), nn.ReLU(), nn.Conv2d(middle, middle // 2, 1, bias=False), nn.AvgPool2d(2)
        )
        self.second = nn.ModuleList(self._layer(middle // 2 + growth * index, growth) for index in range(3))
        self.norm, self.head = nn.BatchNorm2d(middle // 2 + 3 * growth), nn.Linear(middle // 2 + 3 * growth, classes)

    @staticmethod
    def _layer(before: int, growth: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(before), nn.ReLU(), nn.Conv2d(before, 2 * growth, 1, bias=False), nn.BatchNorm2d(2 * growth),
            nn.ReLU(), nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.first:
            x = torch.cat([x, layer(x)], 1)
        features = [self.transition(x)]
        for layer in self.second:
            features.append(layer(torch.cat(features, 1)))
        return self.head(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class ShuffleUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        x = torch.cat([left, self.body(right)], 1)
        samples, channels, height, width = x.shape
        x = x.view(samples, 2, channels // 2, height, width).transpose(1, 2).contiguous()
        return x.view(samples, channels, height, width)


class ShuffleNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.units = nn.Sequential(ShuffleUnit(16), ShuffleUnit(16))
        self.last, self.head = nn.Conv2d(16, 32, 1), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.units(self.stem(x)))).mean((2, 3)))


class LayerNorm2d(nn.Module):
    """Normalise over the channels of an image, as ConvNeXt does, by a functional call."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias)
        return x.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width: int = 12, depth: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 4, stride=4), LayerNorm2d(width)
        self.deep = nn.ModuleList(nn.Conv2d(width, width, 7, padding=3, groups=width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.grow = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.shrink = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.gamma = nn.ParameterList(nn.Parameter(torch.ones(width)) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for deep, norm, grow, shrink, gamma in zip(
            self.deep, self.norms, self.grow, self.shrink, self.gamma, strict=True
        ):
            inner = norm(deep(x).permute(0, 2, 3, 1))
            x = x + (gamma * shrink(F.gelu(grow(inner)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class FusedAttention(nn.Module):
    """The attention of common libraries: head count and head size are attributes of their own."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.fused = heads, width // heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))


class LibraryViT(nn.Module):
    def __init__(self, width: int = 24, heads: int = 4, depth: int = 2, *, fused: bool, classes: int = 10) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.mixers = nn.ModuleList(FusedAttention(width, heads, fused=fused) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        for norm1, mixer, norm2, mlp in zip(self.norm1, self.mixers, self.norm2, self.mlps, strict=True):
            x = x + mixer(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x)[:, 0])


@dataclass
class GPTConfig:
    vocabulary: int = 30
    context: int = 12
    n_layer: int = 2
    n_head: int = 3
    n_embd: int = 24


class CausalAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head, self.n_embd = config.n_head, config.n_embd

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (one.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for one in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GPT(nn.Module):
    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        width = config.n_embd
        self.wte, self.wpe = nn.Embedding(config.vocabulary, width), nn.Embedding(config.context, width)
        self.attention = nn.ModuleList(CausalAttention(config) for _ in range(config.n_layer))
        self.norm1 = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(config.n_layer))
        self.norm2 = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(config.n_layer))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(config.n_layer)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.vocabulary, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.size(1)
        assert self.config.context >= T
        x = self.wte(tokens) + self.wpe(torch.arange(0, T, dtype=torch.long, device=tokens.device))
        for attention, mlp, norm1, norm2 in zip(self.attention, self.mlp, self.norm1, self.norm2, strict=True):
            x = x + attention(norm1(x))
            x = x + mlp(norm2(x))
        return self.head(self.norm(x))


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin()


class GroupedQueries(nn.Module):
    """Rotary attention with fewer key heads than query heads, as in Llama."""

    def __init__(self, width: int, heads: int, shared: int, head: int, *, fused: bool) -> None:
        super().__init__()
        self.heads, self.shared, self.head, self.fused = heads, shared, head, fused
        self.q, self.k, self.v = (nn.Linear(width, n * head, bias=False) for n in (heads, shared, shared))
        self.o = nn.Linear(heads * head, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = _rotate(self.q(x).view(B, T, self.heads, self.head).transpose(1, 2), angles)
        k = _rotate(self.k(x).view(B, T, self.shared, self.head).transpose(1, 2), angles)
        v = self.v(x).view(B, T, self.shared, self.head).transpose(1, 2)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            times = self.heads // self.shared
            k, v = (one[:, :, None].expand(B, self.shared, times, T, self.head).reshape(B, self.heads, T, self.head)
                    for one in (k, v))  # fmt: skip
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class Llama(nn.Module):
    def __init__(self, width: int = 16, *, fused: bool = True, vocabulary: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.register_buffer("angles", torch.outer(torch.arange(8.0), torch.rand(3).repeat(2)))
        self.norm1, self.norm2, self.norm = nn.RMSNorm(width), nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = GroupedQueries(width, 4, 2, 6, fused=fused)
        self.gate, self.up, self.down = nn.Linear(width, 40), nn.Linear(width, 40), nn.Linear(40, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x), self.angles[: x.shape[1]])
        inner = self.norm2(x)
        x = x + self.down(F.silu(self.gate(inner)) * self.up(inner))
        return self.head(self.norm(x))


class Translator(nn.Module):
    """torch's own encoder and decoder, keys and values of another width, and recurrent layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(5, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.squeeze = nn.GRU(14, 10)
        self.query = nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(12, 3, kdim=10, vdim=10, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(12, 2, 20, batch_first=True, dropout=0.0, activation="gelu")
        self.cell = nn.LSTMCell(12, 9)
        self.head = nn.Linear(9, 3)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, _ = self.squeeze(self.encoder(source)[0].transpose(0, 1))
        memory = memory.transpose(0, 1)
        x = self.query(target)
        y, _ = self.attention(x, memory, memory)
        x = self.decoder(x, x + y)
        state = None
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.head(state[0])


class Mixer(nn.Module):
    """MLP over tokens and over channels, einsum, weight norm, instance norm and a parametrised scale."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 12, 1))
        self.norm = nn.InstanceNorm1d(12, affine=True)
        self.act = nn.PReLU(12)
        self.tokens, self.channels = nn.Linear(6, 6), nn.Parameter(torch.randn(12, 20) / 4)
        self.back = nn.Parameter(torch.randn(20, 12) / 4)
        self.head = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x + self.tokens(x)
        x = x + torch.einsum("bct,cd,de->bet", x, self.channels, self.back)
        return self.head(x.amax(-1))


def images(count: int = 2, size: int = 32) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def tokens(length: int = 8) -> Tensor:
    return torch.randint(20, (2, length), generator=torch.Generator().manual_seed(0))


MODELS = {
    "resnet": (ResNet, images()),
    "resnext": (lambda: ResNet(groups=4), images()),
    "mobilenet": (MobileNet, images()),
    "densenet": (DenseNet, images(size=8)),
    "shufflenet": (ShuffleNet, images(size=8)),
    "convnext": (ConvNeXt, images()),
    "vit-by-hand": (lambda: LibraryViT(fused=False), images()),
    "vit-fused": (lambda: LibraryViT(fused=True), images()),
    "gpt": (GPT, tokens()),
    "llama": (Llama, tokens()),
    "llama-expanded": (lambda: Llama(fused=False), tokens()),
    "translator": (Translator, (torch.randn(2, 6, 5), torch.randn(2, 3, 4))),
    "mixer": (Mixer, torch.randn(2, 3, 6)),
}

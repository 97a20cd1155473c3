"""Third-party models with random weights, and hand-written ones; sizes as a small product has.

A builder takes the probability of the model's own dropout, and sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import networks


@dataclass
class Model:
    """A model, what it is called with, and what it should give."""

    module: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    targets: list[Tensor] = field(default_factory=list)

    def outputs(self, module: Callable[..., Any]) -> list[Tensor]:
        """What the module, or a compiled form of it, gives, flat."""
        return tensors(module(*self.args, **self.kwargs))

    def loss(self, outputs: list[Tensor]) -> Tensor:
        """The sum of the outputs' mean square errors."""
        self.targets = self.targets or [torch.randn_like(y) for y in outputs]
        pairs = zip(outputs, self.targets, strict=True)
        return torch.stack([(y - target).square().mean() for y, target in pairs]).sum()

    def to(self, dtype: torch.dtype) -> Model:
        def cast(value: Any) -> Any:
            floats = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floats else value

        return Model(self.module.to(dtype), *pytree.tree_map(cast, (self.args, self.kwargs)))


def tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors of what a model returns."""
    leaves = pytree.tree_leaves(output)
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def hugging_face() -> Any:
    """transformers, told that Hugging Face's package `kernels` is not here.

    From the root of a checkout it would find the folder of that name, which cannot be imported so.
    """
    import transformers
    from transformers.utils import import_utils

    sys.modules["kernels"] = None  # type: ignore[assignment]
    import_utils.is_kernels_available()  # it remembers the answer
    del sys.modules["kernels"]
    return transformers


def mlp(p: float, norm: str = "layer", rows: int = 2048, width: int = 512, depth: int = 3) -> Model:
    norms = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    module = networks.MLP([width // 2, *[width] * depth], norms[norm], p)
    return Model(module, (torch.randn(rows, width // 2),))


def pyg_mlp(p: float, rows: int = 4096, width: int = 256, depth: int = 4) -> Model:
    from torch_geometric.nn import MLP

    module = MLP(in_channels=width, hidden_channels=width, out_channels=16,
                 num_layers=depth, dropout=p, norm="batch_norm", act="relu")  # fmt: skip
    return Model(module, (torch.randn(rows, width),))


def graph_sage(p: float, nodes: int = 2048, width: int = 256, degree: int = 8) -> Model:
    from torch_geometric.nn import GraphSAGE

    module = GraphSAGE(width, width, 3, 16, dropout=p, norm="layer_norm", act="relu")
    edges = torch.randint(nodes, (2, degree * nodes))
    return Model(module, (torch.randn(nodes, width), edges))


def bert(
    p: float, hidden: int = 256, layers: int = 3, batch: int = 8, tokens: int = 128,
    head: bool = False,
) -> Model:  # fmt: skip
    hf = hugging_face()
    config = hf.BertConfig(
        vocab_size=1024, hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden,
        num_attention_heads=hidden // 32, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
    )  # fmt: skip
    kwargs = {"input_ids": torch.randint(1024, (batch, tokens))}
    return Model((hf.BertForMaskedLM if head else hf.BertModel)(config), kwargs=kwargs)


def vit(
    p: float, hidden: int = 256, layers: int = 3, batch: int = 8, image: int = 128, patch: int = 16
) -> Model:
    hf = hugging_face()
    config = hf.ViTConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden,
        num_attention_heads=hidden // 32, hidden_dropout_prob=p, attention_probs_dropout_prob=p,
        image_size=image, patch_size=patch,
    )  # fmt: skip
    return Model(hf.ViTModel(config), kwargs={"pixel_values": torch.randn(batch, 3, image, image)})


def llama(_: float, hidden: int = 256, layers: int = 3, batch: int = 4, tokens: int = 128) -> Model:
    hf = hugging_face()
    config = hf.LlamaConfig(
        vocab_size=1024, hidden_size=hidden, num_hidden_layers=layers,
        intermediate_size=8 * hidden // 3 // 32 * 32, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32, use_cache=False,
    )  # fmt: skip
    kwargs = {"input_ids": torch.randint(1024, (batch, tokens)), "use_cache": False}
    return Model(hf.LlamaModel(config), kwargs=kwargs)


def convnext(
    _: float, channels: int = 96, blocks: int = 3, batch: int = 4, image: int = 112
) -> Model:
    images = torch.randn(batch, 3, image, image)
    return Model(networks.ConvNeXt(channels, blocks), (images,))


def resnet(
    _: float,
    widths: tuple[int, ...] = (64, 128, 256, 512),
    blocks: int = 2,
    batch: int = 8,
    image: int = 64,
) -> Model:
    return Model(networks.ResNet(widths, blocks), (torch.randn(batch, 3, image, image),))


def mixer(
    p: float, channels: int = 256, blocks: int = 3, batch: int = 16, image: int = 128
) -> Model:
    module = networks.Mixer(image, channels, blocks, p)
    return Model(module, (torch.randn(batch, 3, image, image),))


def tabm(p: float, rows: int = 256, width: int = 256, k: int = 16, features: int = 32) -> Model:
    from tabm import TabM

    module = TabM.make(n_num_features=features, d_out=1, k=k, n_blocks=3, d_block=width, dropout=p)
    return Model(module, (torch.randn(rows, features),))


def transformer(
    p: float, hidden: int = 256, layers: int = 3, batch: int = 8, tokens: int = 128,
    norm_first: bool = False,
) -> Model:  # fmt: skip
    layer = nn.TransformerEncoderLayer(
        hidden, hidden // 32, 4 * hidden, p, "gelu", batch_first=True, norm_first=norm_first
    )
    module = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    return Model(module, (torch.randn(batch, tokens, hidden),))


# Stages by themselves, from their number of features.
PARTS: dict[str, Callable[[int, float], list[nn.Module]]] = {
    "layer": lambda n, p: [nn.LayerNorm(n)],
    "batch": lambda n, p: [nn.BatchNorm1d(n)],
    "written-rms": lambda n, p: [networks.WrittenRMSNorm(n)],
    "dropout": lambda n, p: [nn.Dropout(p)],
    "batch-relu": lambda n, p: [nn.BatchNorm1d(n), nn.ReLU()],
    "layer-gelu": lambda n, p: [nn.LayerNorm(n), nn.GELU()],
    "gelu-dropout": lambda n, p: [nn.GELU(), nn.Dropout(p)],
}
PART_SIZES = ((512, 512), (4096, 1024))


def part(p: float, stages: str, rows: int, features: int) -> Model:
    module = networks.Part(features, *PARTS[stages](features, p))
    return Model(module, (torch.randn(rows, features),))

"""Small models that call norms, activations and dropout in their own forward, with random weights.

Third-party ones from their configurations, without a network; hand-written copies of those whose
packages need torchvision. Those that the benchmark has too come from bench/zoo.py, smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

P = 0.1


def _zoo(name: str, **sizes: Any) -> Callable[[float], Any]:
    """A model of the benchmark."""

    def build(p: float) -> Any:
        from bench import zoo

        return getattr(zoo, name)(p, **sizes)

    return build


def _model(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from bench.zoo import Model

    return Model(module, args, kwargs)


def gpt2(p: float) -> Any:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        vocab_size=97, n_embd=64, n_layer=1, n_head=4, n_positions=32, use_cache=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p,
    )  # fmt: skip
    return _model(GPT2Model(config), input_ids=torch.randint(97, (3, 17)), use_cache=False)


def t5(p: float) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=97, d_model=64, d_ff=128, d_kv=16, num_layers=1, num_heads=4, dropout_rate=p,
        use_cache=False,
    )  # fmt: skip
    return _model(T5EncoderModel(config), input_ids=torch.randint(97, (3, 17)))


def hf_convnext(_: float) -> Any:
    from transformers import ConvNextConfig, ConvNextModel

    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)
    return _model(ConvNextModel(config), pixel_values=torch.randn(2, 3, 32, 32))


def x_transformer(kind: str, p: float) -> Any:
    import x_transformers

    options: dict[str, Any] = {"attn_dropout": p, "ff_dropout": p, "layer_dropout": 0.0}
    if kind == "Decoder":
        options |= {"use_rmsnorm": True, "ff_glu": True, "ff_swish": True, "rotary_pos_emb": True}
    module = getattr(x_transformers, kind)(dim=64, depth=1, heads=2, attn_dim_head=32, **options)
    return _model(module, torch.randn(3, 17, 64))


def policy(_: float) -> Any:
    """The networks of stable-baselines3's PPO: features, policy and value."""
    import numpy as np
    from gymnasium.spaces import Box
    from stable_baselines3.common.policies import ActorCriticPolicy

    spaces = (Box(-1, 1, (12,), np.float32), Box(-1, 1, (3,), np.float32))
    module = ActorCriticPolicy(*spaces, lambda _: 1e-3, net_arch=[64, 64])
    return _model(module.mlp_extractor, torch.randn(40, 12))


def create_mlp(_: float) -> Any:
    from stable_baselines3.common.torch_layers import create_mlp

    layers = create_mlp(12, 3, [64, 64], nn.Tanh, post_linear_modules=[nn.LayerNorm])
    return _model(nn.Sequential(*layers), torch.randn(40, 12))


def unet(p: float) -> Any:
    nets = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    module = nets.UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1, dropout=p)
    return _model(module, torch.randn(2, 1, 32, 32))


def mobilenet(p: float) -> Any:
    from bench.networks import MobileNet

    return _model(MobileNet(16, p), torch.randn(4, 3, 24, 24))


_TEXT = {"hidden": 64, "layers": 1, "batch": 3, "tokens": 17}
_IMAGES = {"batch": 3, "image": 32}
# Builders by name; each takes the probability of every dropout.
MODELS: dict[str, Callable[[float], Any]] = {
    "mlp layer": _zoo("mlp", rows=33, width=64),
    "mlp batch": _zoo("mlp", norm="batch", rows=33, width=64),
    "bert": _zoo("bert", **_TEXT, head=True),
    "vit": _zoo("vit", hidden=64, layers=1, patch=8, **_IMAGES),
    "llama": _zoo("llama", **_TEXT),
    "gpt2": gpt2,
    "t5": t5,
    "hf convnext": hf_convnext,
    "x_transformers encoder": partial(x_transformer, "Encoder"),
    "x_transformers decoder": partial(x_transformer, "Decoder"),
    "pyg mlp": _zoo("pyg_mlp", rows=33, width=32, depth=3),
    "graph sage": _zoo("graph_sage", nodes=40, width=32, degree=3),
    "sb3 policy": policy,
    "sb3 create_mlp": create_mlp,
    "tabm": _zoo("tabm", rows=9, width=64, k=4, features=8),
    "unet": unet,
    "transformer": _zoo("transformer", **_TEXT | {"layers": 2}),
    "transformer, norm first": _zoo("transformer", **_TEXT, norm_first=True),
    "resnet": _zoo("resnet", widths=(16, 32), blocks=1, **_IMAGES),
    "convnext": _zoo("convnext", channels=16, blocks=2, **_IMAGES),
    "mixer": _zoo("mixer", channels=32, blocks=2, **_IMAGES),
    "mobilenet": mobilenet,
}
# Those that have none, or whose builder ignores it.
WITHOUT_DROPOUT = ("llama", "hf convnext", "sb3 policy", "sb3 create_mlp", "resnet", "convnext")
# How many stages (Linear, norm, activation, dropout, residual) of each the pass takes in training,
# at least.
STAGES = {
    **{"mlp layer": 12, "mlp batch": 12, "bert": 14, "vit": 13, "llama": 5, "gpt2": 7, "t5": 14},
    **{"hf convnext": 4, "x_transformers encoder": 10, "x_transformers decoder": 4, "pyg mlp": 8},
    **{"graph sage": 4, "sb3 policy": 8, "sb3 create_mlp": 6, "tabm": 6, "unet": 12},
    **{"transformer": 20, "transformer, norm first": 9, "resnet": 10, "convnext": 4, "mixer": 20},
    **{"mobilenet": 13},
}

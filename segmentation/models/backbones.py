"""Backbones for dense heads: models of timm, cluster_zoo's among them, that give maps instead of classes.

A backbone maps images [B, C, H, W] to a list of maps. ``channels`` and ``strides`` say what they are, and both sides of
the image have to be multiples of ``divisor``.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import GroupNorm1, LayerNorm2d
from timm.models import checkpoint, is_model, list_models
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cluster_zoo.errors import nearest
from cluster_zoo.models.context_cluster import ContextCluster
from cluster_zoo.weights import check_fit, load_state_dict

__all__ = ['Pyramid', 'TokenGrids', 'create_backbone']

LEVELS = 4  # of a pyramid, strides 4, 8, 16, 32 unless dilated


class Pyramid(nn.Module):
    """The last four stages of a network, each through a norm of its own where the published systems have one.

    Args:
        model: A timm model with stages, without classifier.
        norm_layer: Makes the norm of a stage from its channels; None for none.
        divisor: What both sides of an image have to be a multiple of.
    """

    def __init__(
        self,
        model: nn.Module,
        norm_layer: type[nn.Module] | None = None,
        divisor: int = 1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.divisor = divisor
        info = model.feature_info[-LEVELS:]
        self.channels = [stage['num_chs'] for stage in info]
        self.strides = [stage['reduction'] for stage in info]
        model.prune_intermediate_layers(LEVELS, prune_norm=True, prune_head=True)  # what stays is used
        self.model = model
        self.norms = nn.ModuleList(norm_layer(c, **dd) if norm_layer else nn.Identity() for c in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> four maps [B, channels[i], H / strides[i], W / strides[i]], finest first."""
        features = self.model.forward_intermediates(x, indices=LEVELS, intermediates_only=True)
        return [norm(feature) for norm, feature in zip(self.norms, features)]


class PaddedSwinBlock(SwinTransformerBlock):
    """A Swin block that fills a map up to whole windows before it shifts it, as its authors and the dense systems do.

    timm shifts first. The results differ where a map is no multiple of its windows, as in most dense use.
    """

    def _attn(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        h, w = self.window_size
        return super()._attn(F.pad(x, (0, 0, 0, -W % w, 0, -H % h)))[:, :H, :W]


class TokenGrids(nn.Module):
    """The patch tokens of a vision transformer as grids, after an early block and after the last with its norm.

    Args:
        model: A vision transformer of timm that takes images of any size, without classifier.
        early: The early block, from 0; -1 is what the first block gets, the stem's output.

    Raises:
        ValueError: There is no such block.
    """

    def __init__(self, model: VisionTransformer, early: int):
        super().__init__()
        if not -1 <= early < len(model.blocks):
            raise ValueError(f'early is a block, 0 to {len(model.blocks) - 1}, or -1 for the stem; got {early}.')
        self.model = model
        self.early = early
        self.divisor = model.feature_info[-1]['reduction']
        self.channels = [model.embed_dim] * 2
        self.strides = [self.divisor] * 2

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> two grids [B, D, H / divisor, W / divisor]"""
        model = self.model
        x = model.patch_embed(x)
        h, w = x.shape[1:3]
        x = model.norm_pre(model._pos_embed(x))
        early = x
        for i, block in enumerate(model.blocks):
            x = checkpoint(block, x) if model.grad_checkpointing else block(x)
            if i == self.early:
                early = x
        tokens = (early, model.norm(x))
        prefix = model.num_prefix_tokens
        return [t[:, prefix:].transpose(1, 2).reshape(t.shape[0], -1, h, w) for t in tokens]


def create_backbone(
    name: str,
    tokens: bool = False,
    early: int | None = None,
    pretrained: bool | str | Path = False,
    device=None,
    dtype=None,
    **options: Any,
) -> Pyramid | TokenGrids:
    """A registered model as a backbone.

    Args:
        name: A model that timm knows.
        tokens: Whether the head wants the tokens of a vision transformer; else it wants a pyramid.
        early: See `TokenGrids`; None is the block after a third of them, or the stem of a hybrid.
        pretrained: True for the weights that timm finds under this name, or a classifier's checkpoint file.
        **options: For ``timm.create_model``.

    Raises:
        RuntimeError: timm knows no weights of this name, or cannot fetch them (OSError).
        ValueError: No such model, or one that does not give what the head wants; the message says which do.
        CheckpointError: The pretrained weights cannot be read or do not fit.
    """
    if ':' not in name and not is_model(name):  # 'hf-hub:...' and 'local-dir:...' are for timm to find
        raise ValueError(f'There is no model {name!r}{nearest(name.split(".")[0], list_models())}.')
    dd = {'device': device, 'dtype': dtype}
    needed = {}
    if family(name) == 'swin_transformer':
        # Shifted windows at every size, as in the published systems: at timm's fixed size the last stage has no shift.
        needed = dict(strict_img_size=False, always_partition=True)
    elif family(name) in ('vision_transformer', 'vision_transformer_hybrid', 'deit'):
        needed = dict(dynamic_img_size=True)
    try:
        model = timm.create_model(name, pretrained=pretrained is True, num_classes=0, **needed | options, **dd)
    except (AssertionError, TypeError) as error:  # of an unknown option, and what timm has against a value
        given = ', '.join(f'{key}={value}' for key, value in options.items()) or 'none'
        raise ValueError(f'{name} does not take these options, {given}: {error}'.removesuffix(': ')) from error
    if isinstance(model, VisionTransformer) != tokens or not hasattr(model, 'prune_intermediate_layers'):
        raise ValueError(_pairing(name, tokens))
    if not isinstance(pretrained, bool):
        _load_classifier(model, pretrained)
    if tokens:
        hybrid = hasattr(model.patch_embed, 'backbone')
        return TokenGrids(model, early if early is not None else (-1 if hybrid else len(model.blocks) // 3))
    if early is not None:
        raise ValueError('early is an option of region_proxy alone.')
    stages = model.feature_info[-LEVELS:]
    if len(stages) < LEVELS or stages[0]['reduction'] == stages[-1]['reduction']:
        raise ValueError(_pairing(name, tokens))
    if isinstance(model, ContextCluster):
        return Pyramid(model, GroupNorm1, **dd)
    if isinstance(model, SwinTransformer):
        for block in model.modules():
            if isinstance(block, SwinTransformerBlock):
                block.__class__ = PaddedSwinBlock  # the same parameters; timm's builder knows one class alone
        return Pyramid(model, LayerNorm2d, divisor=model.patch_embed.patch_size[0], **dd)
    if isinstance(model, ConvNeXt):
        return Pyramid(model, LayerNorm2d, divisor=32, **dd)
    return Pyramid(model, divisor=1 if isinstance(model, ResNet) else 32, **dd)


def family(name: str) -> str:
    """The module that defines a registered model, such as 'resnet'; '' for one that is not registered."""
    return timm.models.model_entrypoint(name).__module__.rpartition('.')[2] if is_model(name) else ''


def _pairing(name: str, tokens: bool) -> str:
    if tokens:
        return (
            f'region_proxy reads the tokens of a vision transformer, and {name} is none: take vit_*, deit_* or a '
            'hybrid such as vit_small_r26_s32_384, or one of the heads semantic_fpn, upernet, deeplabv3plus and fcn.'
        )
    return (
        f'This head reads a pyramid of four stages, which {name} does not give: take coc_*, fec_*, resnet*, swin_*, '
        'convnext_* or another model of timm with stages, or the head region_proxy for a vision transformer.'
    )


def _load_classifier(model: nn.Module, path: str | Path) -> None:
    """The checkpoint of a classifier into the same model without its head, which the file may have or not."""
    state_dict = load_state_dict(path)
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    # Of models whose head is more than a linear layer, as ConvNeXt's, only that layer is left out: the rest has to fit.
    classifiers = model.pretrained_cfg.get('classifier') or 'head'
    prefixes = tuple(f'{name}.' for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    state_dict = {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)

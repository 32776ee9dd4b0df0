"""Backbones of dense heads: timm models, those of cluster_zoo included, that return feature maps.

A backbone maps images [B, C, H, W] to a list of maps with ``channels`` channels each. Both sides of the image must be
multiples of ``divisor``.
"""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.layers import GroupNorm1, LayerNorm2d, to_2tuple
from timm.models import checkpoint, is_model, is_model_in_modules, list_models
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from cluster_zoo.errors import CheckpointError, OptionError, nearest, one_line
from cluster_zoo.models.context_cluster import ContextCluster
from cluster_zoo.weights import check_fit, load_state_dict

from .timm_internals import PaddedSwinBlock, embed_tokens

__all__ = ['Pyramid', 'TokenGrids', 'create_backbone', 'fixed_size_message']

LEVELS = 4  # maps of a pyramid, at strides 4, 8, 16 and 32 without dilation


class Pyramid(nn.Module):
    """The last four stages of a network, each followed by a norm.

    Args:
        model: A timm model with stages, without classifier.
        norm_layer: Norm of each stage.
        divisor: Both sides of an image must be multiples of this number.
        img_size: Height and width of the images, if the model has no other size.
    """

    def __init__(
        self,
        model: nn.Module,
        norm_layer: type[nn.Module] = nn.Identity,
        divisor: int = 1,
        img_size: tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.divisor = divisor
        self.img_size = img_size
        stages = model.feature_info[-LEVELS:]
        self.channels = [stage['num_chs'] for stage in stages]
        self.strides = [stage['reduction'] for stage in stages]
        model.prune_intermediate_layers(LEVELS, prune_norm=True, prune_head=True)  # removes unused parameters
        self.model = model
        self.norms = nn.ModuleList(norm_layer(c, device=device, dtype=dtype) for c in self.channels)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> four maps [B, channels[i], H / strides[i], W / strides[i]], finest first.

        Raises:
            OptionError: The model has a fixed size, and the image another one.
        """
        if self.img_size is not None and tuple(x.shape[-2:]) != self.img_size:
            raise OptionError(fixed_size_message(self.img_size))
        features = self.model.forward_intermediates(x, indices=LEVELS, intermediates_only=True)
        return [norm(feature) for norm, feature in zip(self.norms, features)]


def fixed_size_message(img_size: tuple[int, int]) -> str:
    """Returns what to do about a backbone of a fixed size (height, width)."""
    height, width = img_size
    crop = height if height == width else f'{height} {width}'
    return (
        f'This backbone takes images of up to {width} x {height} pixels only: train and test with windows of this size '
        f'(--crop {crop} --test-mode slide --test-crop {crop} --test-pad; in validate --mode, --crop and --pad), or '
        'choose another size (--model-kwargs img_size=N).'
    )


class TokenGrids(nn.Module):
    """The patch tokens of a vision transformer as grids: after an early block, and after the final norm.

    Args:
        model: A timm vision transformer with dynamic image size, without classifier.
        early: Index of the early block; -1 for the input of the first block.

    Raises:
        ValueError: The index is out of range.
    """

    def __init__(self, model: VisionTransformer, early: int):
        super().__init__()
        if not -1 <= early < len(model.blocks):
            raise ValueError(
                f'early (--early) must be a block, 0 to {len(model.blocks) - 1}, or -1 for the stem; got {early}.'
            )
        self.model = model
        self.early = early
        self.divisor = model.feature_info[-1]['reduction']
        self.strides = [self.divisor] * 2
        self.channels = [model.embed_dim] * 2

    def forward(self, x: Tensor) -> list[Tensor]:
        """[B, C, H, W] -> two grids [B, D, H / divisor, W / divisor]"""
        model = self.model
        x, size = embed_tokens(model, x)  # forward_intermediates does not return the input of the first block
        early = x
        for i, block in enumerate(model.blocks):
            x = checkpoint(block, x) if model.grad_checkpointing else block(x)
            if i == self.early:
                early = x
        return [t[:, model.num_prefix_tokens :].transpose(1, 2).unflatten(2, size) for t in (early, model.norm(x))]


def create_backbone(
    name: str,
    tokens: bool = False,
    early: int | None = None,
    pretrained: bool | str | Path = False,
    device=None,
    dtype=None,
    **options: Any,
) -> Pyramid | TokenGrids:
    """Creates a backbone from a registered model.

    Args:
        name: Name of a timm model.
        tokens: Whether the head reads the tokens of a vision transformer instead of a pyramid.
        early: See `TokenGrids`. The default is the block after the first third, and the stem of a hybrid.
        pretrained: True for timm's pretrained weights of this name, or the checkpoint file of a classifier.
        **options: Arguments of ``timm.create_model``.

    Raises:
        ValueError: The model is unknown, does not take an option, or does not fit the head.
        CheckpointError: There are no pretrained weights of this name, they cannot be downloaded, or the checkpoint file
            cannot be read or does not fit.
    """
    model = _create_model(name, pretrained is True, options | {'device': device, 'dtype': dtype})
    _check_head(name, model, tokens, early)
    if not isinstance(pretrained, bool):
        _load_classifier(model, pretrained)
    if tokens:
        default = -1 if hasattr(model.patch_embed, 'backbone') else len(model.blocks) // 3
        return TokenGrids(model, default if early is None else early)
    return _create_pyramid(name, model, options, device=device, dtype=dtype)


def _model_defaults(name: str) -> dict[str, Any]:
    """Returns the options with which a model accepts images of any size, if it has such options."""
    if is_model_in_modules(name, ['swin_transformer', 'swin_transformer_v2', 'swin_transformer_v2_cr']):
        # Shift windows at every size, as the published systems do: at a fixed size, timm does not in the last stage.
        return dict(strict_img_size=False, always_partition=True)
    if is_model_in_modules(name, ['vision_transformer', 'vision_transformer_hybrid', 'deit']):
        return dict(dynamic_img_size=True)
    return {}


def _create_model(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Creates a timm model without classifier. Raises the errors of `create_backbone`."""
    if ':' not in name and not is_model(name):  # timm resolves 'hf-hub:...' and 'local-dir:...' itself
        raise ValueError(f'There is no model {name!r}{nearest(name.split(".")[0], list_models())} (--backbone).')
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **_model_defaults(name) | options)
    except (AssertionError, TypeError) as error:  # how timm rejects an unknown option or a value
        given = (
            ', '.join(f'{key}={value}' for key, value in options.items() if key not in ('device', 'dtype')) or 'none'
        )
        reason = f': {error}' if str(error) else ''
        raise ValueError(f'{name} does not take these options (--model-kwargs), {given}{reason}') from error
    except CheckpointError:
        raise
    except Exception as error:  # of timm, or of a library for downloads
        if not pretrained:
            raise
        raise CheckpointError(
            f'The pretrained weights of {name} cannot be loaded: {one_line(error).partition(". ")[0]}. Use '
            'pretrained_backbone (--pretrained-backbone) with a file, or omit it.'
        ) from error


def _check_head(name: str, model: nn.Module, tokens: bool, early: int | None) -> None:
    """Raises ValueError if a model does not fit the head."""
    strides = [stage['reduction'] for stage in getattr(model, 'feature_info', [])[-LEVELS:]]
    has_stages = hasattr(model, 'prune_intermediate_layers') and len(strides) == LEVELS and strides[0] < strides[-1]
    if tokens and not isinstance(model, VisionTransformer):
        raise ValueError(
            f'region_proxy needs a vision transformer, and {name} is not one: use vit_*, deit_* or a hybrid such as '
            'vit_small_r26_s32_384, or another head (semantic_fpn, upernet, deeplabv3plus, fcn).'
        )
    if not tokens and not has_stages:
        raise ValueError(
            f'This head needs a backbone with four stages, which {name} does not have: use coc_*, fec_*, resnet*, '
            'swin_*, convnext_* or another timm model with stages, or the head region_proxy for a vision transformer.'
        )
    if early is not None and not tokens:
        raise ValueError('early (--early) is an option of the head region_proxy only.')


def _create_pyramid(name: str, model: nn.Module, options: dict[str, Any], **dd: Any) -> Pyramid:
    """Creates the pyramid of a model, with the norms and the image sizes of its architecture."""
    if isinstance(model, SwinTransformer):
        for stage in model.layers:
            stage.blocks = nn.Sequential(*map(PaddedSwinBlock, stage.blocks))
        return Pyramid(model, LayerNorm2d, divisor=model.patch_embed.patch_size[0], **dd)
    if isinstance(model, ContextCluster):
        return Pyramid(model, GroupNorm1, **dd)
    if isinstance(model, ConvNeXt):
        return Pyramid(model, LayerNorm2d, divisor=32, **dd)
    if isinstance(model, ResNet):
        return Pyramid(model, **dd)
    windows = [max(module.partition_size) for module in model.modules() if hasattr(module, 'partition_size')]
    if windows:  # of MaxViT: every stage is divided into windows of this size
        return Pyramid(model, divisor=32 * max(windows), **dd)
    if not _takes_any_size(name, model, options):
        sides = to_2tuple(options.get('img_size') or model.pretrained_cfg['input_size'][-2:])
        return Pyramid(model, divisor=sides[0] if sides[0] == sides[1] else 1, img_size=sides, **dd)
    return Pyramid(model, divisor=32, **dd)


def _takes_any_size(name: str, model: nn.Module, options: dict[str, Any]) -> bool:
    """Returns whether a model accepts images of another size than its own. Models that timm marks are tried."""
    if not model.pretrained_cfg.get('fixed_input_size') or _model_defaults(name):
        return True
    with torch.device('meta'):
        trial = timm.create_model(name, num_classes=0, **options).eval()
        try:
            trial.forward_intermediates(torch.empty(1, options.get('in_chans', 3), 96, 160), intermediates_only=True)
        except (AssertionError, RuntimeError):
            return False
    return True


def _load_classifier(model: nn.Module, path: str | Path) -> None:
    """Loads the checkpoint of a classifier into the same model without classifier."""
    state_dict = load_state_dict(path)
    if any(name.startswith(('backbone.model.', 'decode_head.')) for name in state_dict):
        raise CheckpointError(
            f"'{path}' is of a segmenter: pretrained_backbone (--pretrained-backbone) needs a classifier, and the "
            'weights of a whole segmenter are checkpoint_path (--checkpoint).'
        )
    filter_fn = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
    if filter_fn:
        state_dict = filter_fn(state_dict, model)
    # Only the classification layer is dropped. Other layers of a head, such as those of ConvNeXt, must fit.
    classifiers = model.pretrained_cfg.get('classifier') or 'head'
    prefixes = tuple(f'{name}.' for name in ([classifiers] if isinstance(classifiers, str) else classifiers))
    state_dict = {name: value for name, value in state_dict.items() if not name.startswith(prefixes)}
    check_fit(state_dict, model)
    model.load_state_dict(state_dict)

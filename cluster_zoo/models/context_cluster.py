"""Context Cluster (CoC): an image as a set of points that are grouped around centers.

Paper: 'Image as Set of Points', ICLR 2023, https://arxiv.org/abs/2303.01494

A stem turns patches into points. Four stages of blocks follow, in which a cluster mixer exchanges features between the
points of a region through a few centers. A strided convolution between stages reduces the number of points.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    LayerScale2d,
    Mlp,
    calculate_drop_path_rates,
    get_device_dtype,
    to_ntuple,
    trunc_normal_,
)
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor

from ..layers.channels_last import GroupNorm, PointMlp, add_scaled
from ..layers.cluster_mixer import ClusterMixer
from ..layers.point_stem import PointStem
from ..weights import conversion
from .builder import ASSETS, build_model, convert_in_place
from .timm_internals import feature_take_indices

_logger = logging.getLogger(__name__)

__all__ = ['ContextCluster']  # register_model adds the entry points


class ContextClusterBlock(nn.Module):
    """Two residual branches with layer scale: cluster mixer and MLP, each after a norm (section 3.2).

    Args:
        dim: Channels of the points.
        mixer: The cluster mixer.
        mlp_ratio: Hidden width of the MLP over ``dim``.
        drop_path: Probability of skipping each of the two branches.
        init_values: Initial layer scale.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        init_values: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = GroupNorm(dim, **dd)
        self.token_mixer = mixer
        self.ls1 = LayerScale2d(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = GroupNorm(dim, **dd)
        self.mlp = PointMlp(dim, int(dim * mlp_ratio), **dd)
        self.ls2 = LayerScale2d(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]"""
        x = add_scaled(x, self.drop_path1(self.token_mixer(self.norm1(x))), self.ls1.gamma)
        return add_scaled(x, self.drop_path2(self.mlp(self.norm2(x))), self.ls2.gamma)


class ContextClusterStage(nn.Module):
    """Reduction of the points (none in the first stage) and blocks at one resolution."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]):
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']"""
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)


class ContextCluster(nn.Module):
    """Context Cluster, 'Image as Set of Points', https://arxiv.org/abs/2303.01494

    Takes images [B, C, H, W] of any size from 32 pixels. Stage i returns [B, dims[i], ceil(H / s), ceil(W / s)] with
    strides s = 4, 8, 16, 32. A grid that its regions do not divide is padded inside the mixer, and padded points join
    no cluster. Exported with dynamic sizes, the model takes sizes that divide: multiples of 32 for most variants.

    Args:
        in_chans: Image channels.
        num_classes: Number of classes; 0 for pooled features.
        global_pool: Pooling of the head, '' for none.
        depths: Number of blocks of each stage.
        dims: Channels of each stage.
        mlp_ratios: Hidden width of the MLPs over the channels, for each stage.
        num_heads: Heads of the mixers, for each stage.
        head_dim: Channels of one head.
        proposals: Centers per axis of a region, one number for all stages or one for each.
        regions: Regions per axis, one number for all stages or one for each.
        weighted_mean: See `ClusterMixer`.
        output_stride: Stride of the last stage, 8 or 16 instead of 32: the last convolutions between stages then have
            stride one, and those after them are dilated. The weights are the same.
        downsample_layers: Layers between the stages that halve both sides, called with input and output channels; 3 x 3
            convolutions if None. With other layers ``output_stride`` cannot be chosen.
        init_values: Initial layer scale of the residual branches.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth, rising linearly over all blocks from 0 to this rate.

    Raises:
        ValueError: ``proposals`` or ``regions`` has the wrong length or is not positive; ``output_stride`` is not
            supported.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: tuple[int, ...] = (3, 4, 5, 2),
        dims: tuple[int, ...] = (32, 64, 196, 320),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        num_heads: tuple[int, ...] = (4, 4, 8, 8),
        head_dim: int = 24,
        proposals: int | tuple[int, ...] = 2,
        regions: int | tuple[int, ...] = (8, 4, 2, 1),
        weighted_mean: bool = True,
        output_stride: int | None = None,
        downsample_layers: Sequence[Callable[..., nn.Module]] | None = None,
        init_values: float = 1e-5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        proposals = one_each('proposals', proposals, len(depths))
        regions = one_each('regions', regions, len(depths))
        full_strides = [4 * 2**i for i in range(len(depths))]
        possible = full_strides[1:] if downsample_layers is None else full_strides[-1:]
        if output_stride is not None and output_stride not in possible:
            raise ValueError(f'output_stride of {type(self).__name__} is one of {possible}, got {output_stride}.')
        strides = [min(stride, output_stride or stride) for stride in full_strides]
        if downsample_layers is None:
            # Dilation keeps the receptive field in the image where the grid is denser than at full strides.
            dilations = [full // stride for full, stride in zip(full_strides, strides)]
            downsample_layers = [
                partial(nn.Conv2d, kernel_size=3, stride=after // before, padding=dilation, dilation=dilation)
                for (before, after), dilation in zip(pairwise(strides), dilations)
            ]
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)

        self.stem = PointStem(in_chans, dims[0], **dd)
        stages = []
        for i, depth in enumerate(depths):
            blocks = [
                ContextClusterBlock(
                    dims[i],
                    ClusterMixer(dims[i], num_heads[i], head_dim, proposals[i], regions[i], weighted_mean, **dd),
                    mlp_ratios[i],
                    drop_path_rates[i][j],
                    init_values,
                    **dd,
                )
                for j in range(depth)
            ]
            downsample = downsample_layers[i - 1](dims[i - 1], dims[i], **dd) if i > 0 else nn.Identity()
            stages.append(ContextClusterStage(downsample, blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=dim, reduction=stride, module=f'stages.{i}')
            for i, (dim, stride) in enumerate(zip(dims, strides))
        ]
        self.num_features = dims[-1]
        self.norm = GroupNorm(self.num_features, **dd)
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.head.num_features
        self.apply(_init_weights)
        self.register_load_state_dict_pre_hook(_convert_checkpoint)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides biases and other vectors."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        fine = [(r'^stages\.(\d+)\.downsample', (0,)), (r'^stages\.(\d+)\.blocks\.(\d+)', None), (r'^norm', (99999,))]
        return dict(stem=r'^stem', blocks=r'^stages\.(\d+)' if coarse else fine)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the activations of the blocks in the backward pass instead of storing them."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for ``num_classes`` (0 for none); ``global_pool`` None keeps the pooling, '' removes it."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        if isinstance(self.head.fc, nn.Linear) and not self.head.fc.weight.is_meta:
            _init_weights(self.head.fc)
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs and the final features.

        Args:
            x: Images [B, C, H, W].
            indices: The last n stages if an int, these stages if a sequence, all if None.
            norm: Normalize the output of the last stage; the other stages have no norm.
            stop_early: Stop after the last of ``indices``.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return only the stage outputs.

        Returns:
            The final features and the list of stage outputs, or only that list.
        """
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        last = len(self.stages) - 1
        if torch.jit.is_scripting() or not stop_early:  # a scripted Sequential cannot be sliced
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]

        x = self.stem(x)
        reached = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            reached = i
            if i in take_indices:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        if reached == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Removes the stages after the last of ``indices``; norm and head if asked or if a stage was removed."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        shortened = max_index < len(self.stages) - 1
        self.stages = self.stages[: max_index + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or shortened:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> normalized features of the last stage [B, D, ceil(H / 32), ceil(W / 32)]"""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, D, H, W] -> logits [B, num_classes], or the input of the classifier if ``pre_logits``."""
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def one_each(name: str, value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """``count`` positive integers from one or from that many; raises a `ValueError` with the name for other values."""
    values = to_ntuple(count)(value)
    if len(values) != count or any(not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f'{name} must be a positive integer or {count} of them, got {value!r}.')
    return tuple(values)


def _init_weights(module: nn.Module) -> None:
    layers = (module.fc1, module.fc2) if isinstance(module, Mlp) else (module,) * isinstance(module, nn.Linear)
    for layer in layers:
        trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Converts the authors' checkpoint, old or new, to this package's names; returns one of this package unchanged."""
    trained = conversion.context_cluster_args(state_dict)
    if trained and any(module.weighted_mean for module in model.modules() if isinstance(module, ClusterMixer)):
        _logger.warning(
            'These weights are from before June 2023 and were trained with weighted_mean=False. '
            'Create the model with weighted_mean=False to get their results.'
        )
    return conversion.context_cluster(state_dict)


def _convert_checkpoint(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of ``load_state_dict``: timm's ``checkpoint_path`` takes the authors' checkpoints."""
    if f'{prefix}patch_embed.proj.weight' in state_dict:
        convert_in_place(state_dict, prefix, model, checkpoint_filter_fn)


def create(
    model_cls: type[ContextCluster], variant: str, variant_args: dict[str, Any], pretrained: bool, **kwargs: Any
) -> ContextCluster:
    """Builds a registered model, see `build_model`."""
    out_indices = kwargs.pop('out_indices', (0, 1, 2, 3))
    return build_model(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, flatten_sequential=True),
        variant_args=variant_args,
        **kwargs,
    )


def _create_context_cluster(variant: str, pretrained: bool, **kwargs: Any) -> ContextCluster:
    return create(ContextCluster, variant, VARIANTS[variant], pretrained, **kwargs)


_TINY = dict(depths=(3, 4, 5, 2), dims=(32, 64, 196, 320), num_heads=(4, 4, 8, 8), head_dim=24)
_WIDE = dict(dims=(64, 128, 320, 512), head_dim=32)

# Table 1 of the paper and the authors' configurations. Defaults: MLP ratios 8 8 4 4, proposals 2, regions 8 4 2 1
VARIANTS: dict[str, dict[str, Any]] = {
    'coc_tiny': dict(_TINY),
    'coc_tiny2': dict(_TINY, proposals=(4, 2, 7, 4), regions=(7, 7, 1, 1)),
    'coc_tiny_plain': dict(_TINY, proposals=(4, 4, 2, 2), regions=1),
    'coc_small': dict(_WIDE, depths=(2, 2, 6, 2), num_heads=(4, 4, 8, 8)),
    'coc_medium': dict(_WIDE, depths=(4, 4, 12, 4), num_heads=(6, 6, 12, 12)),
    'coc_base_dim64': dict(_WIDE, depths=(6, 6, 24, 6), num_heads=(8, 8, 16, 16)),
    'coc_base_dim96': dict(depths=(4, 4, 12, 4), dims=(96, 192, 384, 768), num_heads=(8, 8, 16, 16), head_dim=32),
}


def cfg(**kwargs: Any) -> dict[str, Any]:
    """A pretrained configuration for ImageNet-1k at 224 px."""
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.9,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.proj',
        'classifier': 'head.fc',
        'paper_name': 'Image as Set of Points',
        'paper_ids': 'arXiv:2303.01494',
        **kwargs,
    }


# What is different for the weights that this project trained on CIFAR-10
CIFAR10: dict[str, Any] = dict(
    num_classes=10,
    input_size=(3, 64, 64),
    pool_size=(2, 2),
    crop_pct=1.0,
    license='apache-2.0',
    label_names=('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'),
)


def _released(drive_folder: str) -> dict[str, Any]:
    """The authors' ImageNet-1k weights at Google Drive, released in June 2023."""
    return cfg(
        url=f'https://drive.google.com/drive/folders/{drive_folder}',
        origin_url='https://github.com/ma-xu/Context-Cluster',
        license='apache-2.0',
    )


default_cfgs = generate_default_cfgs(
    {
        'coc_tiny.in1k': _released('155Lfofxr7vpdcUxL8ZvzlrNX4cUlhn3J'),
        'coc_tiny2.untrained': cfg(),
        # Trained by this project, see the README. A tag with available weights comes first. The default is starred: a
        # name without a tag means the classes and sizes of ImageNet.
        'coc_tiny_plain.cifar10': cfg(
            file=str(ASSETS / 'coc_tiny_plain.cifar10.safetensors'),
            **CIFAR10,
        ),
        'coc_tiny_plain.in1k*': _released('1HSZlO_XMkw6mM90Cqo3tVFxEUX8PvWCg'),
        'coc_small.in1k': _released('19zbCOS33We7HOjL575Di5wyuLbnDebdE'),
        'coc_medium.in1k': _released('1H3Fs3SVE0LFHuP6iP9nTg2_ZMrkfk9S8'),
        'coc_base_dim64.untrained': cfg(),
        'coc_base_dim96.untrained': cfg(),
    }
)


@register_model
def coc_tiny(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, tiny: 5.57 M parameters."""
    return _create_context_cluster('coc_tiny', pretrained, **kwargs)


@register_model
def coc_tiny2(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, tiny, with other regions and centers."""
    return _create_context_cluster('coc_tiny2', pretrained, **kwargs)


@register_model
def coc_tiny_plain(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, tiny, without region partition: the whole image is one set of points."""
    return _create_context_cluster('coc_tiny_plain', pretrained, **kwargs)


@register_model
def coc_small(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, small: 14.66 M parameters."""
    return _create_context_cluster('coc_small', pretrained, **kwargs)


@register_model
def coc_medium(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, medium: 29.29 M parameters."""
    return _create_context_cluster('coc_medium', pretrained, **kwargs)


@register_model
def coc_base_dim64(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, base, first width 64."""
    return _create_context_cluster('coc_base_dim64', pretrained, **kwargs)


@register_model
def coc_base_dim96(pretrained: bool = False, **kwargs: Any) -> ContextCluster:
    """Context Cluster, base, first width 96."""
    return _create_context_cluster('coc_base_dim96', pretrained, **kwargs)

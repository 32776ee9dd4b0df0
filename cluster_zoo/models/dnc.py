"""Deep nearest centroids (DNC): a class is a few points in feature space, and an image gets the class of the nearest.

Paper: 'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383

A model is a timm model whose last linear layer is replaced by a `NearestCentroidHead`, which has no class weights. The
registered models have the paper's backbones or this package's. `nearest_centroid` takes any other timm model.
"""

import functools
import sys
from typing import Any

import timm
import torch.nn as nn
from timm.models import generate_default_cfgs, model_entrypoint, register_model
from torch import Tensor

from ..layers.centroid_learning import CentroidLearning
from ..layers.nearest_centroid import NearestCentroidHead
from ..weights import conversion, load_checkpoint
from . import resnet_cifar
from .builder import build_model, convert_in_place
from .context_cluster import cfg
from .timm_internals import change_class

# register_model adds the entry points
__all__ = ['CentroidLearning', 'NearestCentroidHead', 'NearestCentroidMixin', 'nearest_centroid']


class NearestCentroidMixin(nn.Module):
    """Mixin for a timm model class that ends in a `NearestCentroidHead`, also after `reset_classifier`.

    Attributes:
        backbone_class: The timm class.
        classifier_name: Name of the head among the submodules, such as ``'fc'`` or ``'head.fc'``.
        sub_centroids: Number of sub-centroids of each class.
        common_start: Initial closeness of the sub-centroids of a class, see `NearestCentroidHead`.
    """

    backbone_class: type[nn.Module]
    classifier_name: str
    sub_centroids: int
    common_start: float

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, **kwargs: Any) -> None:
        """Replaces the head by a new centroid head or by none.

        Args:
            num_classes: Number of classes of the new head; 0 for features.
            global_pool: Pooling before the head, '' for none; None keeps the pooling.
            **kwargs: Other arguments of the backbone's ``reset_classifier``.
        """
        super().reset_classifier(num_classes, global_pool=global_pool, **kwargs)
        if num_classes > 0:
            self._replace_linear()

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] to unit vectors [B, D], which are compared with the centroids."""
        return self._centroid_head().embed(self.forward_head(self.forward_features(x), pre_logits=True))

    def learn(self, target: Tensor) -> None:
        """Updates the centroids with the last batch at the end of a training step, see `NearestCentroidHead.learn`."""
        self._centroid_head().learn(target)

    def _centroid_head(self) -> NearestCentroidHead:
        head = self.get_classifier()
        if not isinstance(head, NearestCentroidHead):
            raise ValueError('The model has no centroids because num_classes=0: call reset_classifier(num_classes).')
        return head

    def _replace_linear(self) -> None:
        """Replaces the linear layer that the backbone's code has created by a centroid head."""
        linear = dict(self.named_modules()).get(self.classifier_name)
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f'The centroid head replaces one linear layer, but {self.backbone_class.__name__} ends in '
                f"{type(linear).__name__} ('{self.classifier_name}'): keep the global pooling or choose another model."
            )
        head = NearestCentroidHead(
            linear.in_features,
            linear.out_features,
            self.sub_centroids,
            common_start=self.common_start,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        self.set_submodule(self.classifier_name, head.train(linear.training))

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class is created at run time, so pickle and copy cannot import it by name and create it again.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_instance, (self.backbone_class,), *state


@functools.cache
def _nearest_centroid_class(backbone: type[nn.Module]) -> type[nn.Module]:
    """Subclass of a timm model class with `NearestCentroidMixin`."""
    namespace = dict(
        __module__=__name__,
        __doc__=f'{backbone.__name__} with a nearest-centroid head.',
        backbone_class=backbone,
    )
    return type(f'NearestCentroid{backbone.__name__}', (NearestCentroidMixin, backbone), namespace)


def _new_instance(backbone: type[nn.Module]) -> nn.Module:
    cls = _nearest_centroid_class(backbone)
    return cls.__new__(cls)


def _convert(model: nn.Module, sub_centroids: int = 4, common_start: float = 2.0) -> nn.Module:
    """Replaces the last linear layer of a timm classifier by a centroid head, in place."""
    name = model.pretrained_cfg.get('classifier')
    if not isinstance(name, str) or not hasattr(model, 'reset_classifier'):
        found = f'several classifiers ({", ".join(name)})' if isinstance(name, tuple | list) else 'no classifier'
        raise ValueError(
            f'The centroid head replaces one linear layer, but {type(model).__name__} has {found}: choose another.'
        )
    change_class(model, _nearest_centroid_class(type(model)))
    model.register_load_state_dict_pre_hook(_convert_checkpoint)
    model.classifier_name = name
    model.sub_centroids, model.common_start = sub_centroids, common_start
    if model.num_classes > 0:
        model._replace_linear()
    return model


def _convert_checkpoint(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook of ``load_state_dict``: timm's ``checkpoint_path`` takes the authors' checkpoints."""
    if any(conversion.is_nearest_centroid_head(name.removeprefix(prefix)) for name in state_dict):
        convert_in_place(state_dict, prefix, model, checkpoint_filter_fn)


def nearest_centroid(
    model_name: str,
    num_classes: int | None = None,
    sub_centroids: int = 4,
    common_start: float = 2.0,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Creates any timm classifier with a nearest-centroid head instead of its last linear layer.

    Everything else is unchanged: features, pooling, gradient checkpointing, parameter groups.

    Example:
        >>> model = nearest_centroid('convnext_tiny', num_classes=10)

    Args:
        model_name: A model name of timm or of this package, with or without a tag.
        num_classes: Number of classes; that of the backbone's configuration if None, 0 for features.
        sub_centroids: Number of sub-centroids of each class.
        common_start: Initial closeness of the sub-centroids of a class, see `NearestCentroidHead`.
        pretrained: Load the backbone's pretrained weights. The centroids are always new.
        **kwargs: Arguments of ``timm.create_model``. A ``checkpoint_path`` is loaded after the head is replaced.

    Returns:
        An instance of the backbone's class and of `NearestCentroidMixin`.

    Raises:
        ValueError: The model does not end in exactly one linear layer, or already has a centroid head.
        CheckpointError: ``checkpoint_path`` does not fit.
    """
    if kwargs.get('features_only'):
        raise ValueError(
            'features_only removes the classifier and its centroids: '
            f"use timm.create_model('{model_name}', features_only=True)."
        )
    checkpoint_path = kwargs.pop('checkpoint_path', None)
    model = timm.create_model(model_name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    if isinstance(model, NearestCentroidMixin):
        raise ValueError(f"'{model_name}' already has a nearest-centroid head: use timm.create_model('{model_name}').")
    model = _convert(model, sub_centroids, common_start)
    # timm reads here which parameters depend on the number of classes.
    model.pretrained_cfg = model.default_cfg = dict(
        model.pretrained_cfg, classifier=f'{model.classifier_name}.mask_norm'
    )
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)
    return model


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: NearestCentroidMixin) -> dict[str, Tensor]:
    """Converts the authors' checkpoint to the model's names; returns one of this package unchanged.

    The names distinguish head and backbone. The backbone's part is converted by the backbone's own filter. A linear
    head stays in the state dict, under names that the model does not have.
    """
    backbone, head = conversion.nearest_centroid(state_dict, model.classifier_name)
    filter_fn = getattr(sys.modules[model.backbone_class.__module__], 'checkpoint_filter_fn', None)
    return {**(filter_fn(backbone, model) if filter_fn else backbone), **head}


def _adapt_classes(state_dict: dict[str, Tensor], model: NearestCentroidMixin) -> dict[str, Tensor]:
    """`checkpoint_filter_fn` for pretrained weights, which may have another number of classes.

    timm then removes the classifier's ``weight`` and ``bias``, which are those of ``mask_norm``. The centroids of other
    classes cannot be used either, so the model keeps its initial ones.
    """
    state_dict = checkpoint_filter_fn(state_dict, model)
    prefix = f'{model.classifier_name}.'
    if model.num_classes == 0:
        return {name: value for name, value in state_dict.items() if not name.startswith(prefix)}
    centroids, expected = state_dict.get(f'{prefix}prototypes'), model.pretrained_cfg['num_classes']
    found = expected if centroids is None or expected < 0 else len(centroids)  # negative: the head is not loaded
    if found != model.num_classes:
        state_dict[f'{prefix}prototypes'] = model.get_classifier().prototypes
        for name in NearestCentroidHead.optional_entries:  # training images of the other classes
            state_dict.pop(f'{prefix}{name}', None)
    return state_dict


_RESNET_LEVELS = dict(out_indices=(0, 1, 2, 3, 4))
_MOBILENET_LEVELS = dict(out_indices=(0, 1, 2, 3, 4), flatten_sequential=True)
_STAGES = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)

# timm's name of the backbone, and the `feature_cfg` of `features_only`
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    'dnc_resnet18_cifar': ('resnet18_cifar', _RESNET_LEVELS),
    'dnc_resnet18': ('resnet18', _RESNET_LEVELS),
    'dnc_resnet50': ('resnet50', _RESNET_LEVELS),
    'dnc_resnet101': ('resnet101', _RESNET_LEVELS),
    'dnc_mobilenetv2_100': ('mobilenetv2_100', _MOBILENET_LEVELS),
    'dnc_swin_tiny': ('swin_tiny_patch4_window7_224', _STAGES),
    'dnc_swin_small': ('swin_small_patch4_window7_224', _STAGES),
    'dnc_swin_base': ('swin_base_patch4_window7_224', _STAGES),
    'dnc_coc_tiny': ('coc_tiny', _STAGES),
    'dnc_coc_small': ('coc_small', _STAGES),
    'dnc_coc_medium': ('coc_medium', _STAGES),
    'dnc_fec_small': ('fec_small', _STAGES),
    'dnc_fec_base': ('fec_base', _STAGES),
    'dnc_fec_large': ('fec_large', _STAGES),
}


def _build(backbone: str, sub_centroids: int = 4, common_start: float = 2.0, **kwargs: Any) -> nn.Module:
    return _convert(model_entrypoint(backbone)(**kwargs), sub_centroids, common_start)


def _create_dnc(variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    backbone, feature_cfg = VARIANTS[variant]
    if kwargs.get('features_only'):
        kwargs['num_classes'] = 0  # no head that a checkpoint would have to fit
    return build_model(
        functools.partial(_build, backbone),
        variant,
        pretrained,
        pretrained_filter_fn=_adapt_classes,
        feature_cfg=dict(feature_cfg),  # timm changes it in place
        **kwargs,
    )


_PAPER = dict(paper_name='Visual Recognition with Deep Nearest Centroids', paper_ids='arXiv:2209.07383')


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return cfg(**{'crop_pct': 0.875, **_PAPER, **kwargs})


# The authors' folder at Google Drive, linked from https://github.com/ChengHan111/DNC
_RELEASE = dict(
    url='https://drive.google.com/drive/folders/1zCT10t09mXw-8iLqDvkmxR46lOD5dsv4',
    origin_url='https://github.com/ChengHan111/DNC',
    license='mit',
)
_resnet_cfg = functools.partial(_cfg, first_conv='conv1', classifier='fc.mask_norm', interpolation='bilinear')
_swin_cfg = functools.partial(
    _cfg, first_conv='patch_embed.proj', classifier='head.fc.mask_norm', crop_pct=0.9, fixed_input_size=True
)
_cluster_cfg = functools.partial(_cfg, first_conv='stem.proj', classifier='head.fc.mask_norm', crop_pct=0.9)

default_cfgs = generate_default_cfgs(
    {
        'dnc_resnet18_cifar.cifar10': resnet_cifar.cfg(classifier='fc.mask_norm', **_RELEASE, **_PAPER),
        'dnc_resnet18.in1k': _resnet_cfg(**_RELEASE),
        'dnc_resnet50.in1k': _resnet_cfg(**_RELEASE),
        'dnc_resnet101.in1k': _resnet_cfg(**_RELEASE),
        'dnc_mobilenetv2_100.in1k': _cfg(first_conv='conv_stem', classifier='classifier.mask_norm', **_RELEASE),
        'dnc_swin_tiny.in1k': _swin_cfg(**_RELEASE),
        'dnc_swin_small.in1k': _swin_cfg(**_RELEASE),
        'dnc_swin_base.in1k': _swin_cfg(**_RELEASE),
        'dnc_coc_tiny.untrained': _cluster_cfg(),
        'dnc_coc_small.untrained': _cluster_cfg(),
        'dnc_coc_medium.untrained': _cluster_cfg(),
        'dnc_fec_small.untrained': _cluster_cfg(),
        'dnc_fec_base.untrained': _cluster_cfg(),
        'dnc_fec_large.untrained': _cluster_cfg(),
    }
)


@register_model
def dnc_resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on ResNet-18 in its form for CIFAR."""
    return _create_dnc('dnc_resnet18_cifar', pretrained, **kwargs)


@register_model
def dnc_resnet18(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on ResNet-18."""
    return _create_dnc('dnc_resnet18', pretrained, **kwargs)


@register_model
def dnc_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on ResNet-50."""
    return _create_dnc('dnc_resnet50', pretrained, **kwargs)


@register_model
def dnc_resnet101(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on ResNet-101."""
    return _create_dnc('dnc_resnet101', pretrained, **kwargs)


@register_model
def dnc_mobilenetv2_100(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on MobileNetV2 of width 1.0."""
    return _create_dnc('dnc_mobilenetv2_100', pretrained, **kwargs)


@register_model
def dnc_swin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on Swin-T, patch 4, window 7; for other sizes than 224 pass ``img_size``."""
    return _create_dnc('dnc_swin_tiny', pretrained, **kwargs)


@register_model
def dnc_swin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on Swin-S, patch 4, window 7; for other sizes than 224 pass ``img_size``."""
    return _create_dnc('dnc_swin_small', pretrained, **kwargs)


@register_model
def dnc_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on Swin-B, patch 4, window 7; for other sizes than 224 pass ``img_size``."""
    return _create_dnc('dnc_swin_base', pretrained, **kwargs)


@register_model
def dnc_coc_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on Context Cluster, tiny."""
    return _create_dnc('dnc_coc_tiny', pretrained, **kwargs)


@register_model
def dnc_coc_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on Context Cluster, small."""
    return _create_dnc('dnc_coc_small', pretrained, **kwargs)


@register_model
def dnc_coc_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on Context Cluster, medium."""
    return _create_dnc('dnc_coc_medium', pretrained, **kwargs)


@register_model
def dnc_fec_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on FEC, small."""
    return _create_dnc('dnc_fec_small', pretrained, **kwargs)


@register_model
def dnc_fec_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on FEC, base."""
    return _create_dnc('dnc_fec_base', pretrained, **kwargs)


@register_model
def dnc_fec_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Nearest centroids on FEC, large."""
    return _create_dnc('dnc_fec_large', pretrained, **kwargs)

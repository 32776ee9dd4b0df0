"""Training recipes of the papers: the defaults of ``train.py``, by name.

A recipe maps destinations of flags to values, where these differ from timm's defaults. Options that depend on the
machine, such as mixed precision (``--amp``), are not part of a recipe.
"""

from __future__ import annotations

from typing import Any

# Context Cluster and FEC were trained alike. The learning rate is for 8 processes of 128 images.
_CLUSTER = dict(
    opt='adamw',
    lr=1e-3,
    weight_decay=0.05,
    epochs=300,
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-6,
    cooldown_epochs=10,
    decay_epochs=100.0,
    aa='rand-m9-mstd0.5-inc1',
    mixup=0.8,
    cutmix=1.0,
    reprob=0.25,
    smoothing=0.1,
    drop_path=0.1,
    seed=42,
    log_interval=200,
    checkpoint_hist=4,
    workers=8,
)

RECIPES: dict[str, dict[str, Any]] = {
    'timm': {},
    'coc': _CLUSTER,
    'fec': _CLUSTER,
    # DNC on ImageNet: ResNets with SGD and steps, Swin with its own recipe
    'dnc_resnet': dict(
        opt='sgd',
        lr_base=0.1,
        lr_base_size=256,
        momentum=0.9,
        weight_decay=1e-4,
        epochs=100,
        sched='multistep',
        decay_milestones=[30, 60, 90],
        warmup_epochs=0,
        smoothing=0.0,
        batch_size=256,
        centroid_every=1000,
        common_start=0.0,
    ),
    'dnc_swin': dict(
        opt='adamw',
        lr_base=1e-3,
        lr_base_size=1024,
        lr_base_scale='linear',
        weight_decay=0.05,
        clip_grad=5.0,
        epochs=300,
        warmup_epochs=20,
        warmup_lr=1e-6,
        min_lr=1e-5,
        aa='rand-m9-mstd0.5-inc1',
        mixup=0.8,
        cutmix=1.0,
        reprob=0.25,
        smoothing=0.1,
        common_start=0.0,
        centroid_every=500,  # for Swin-T; published are 400 for S and 300 for B
    ),
    # DNC on CIFAR-10: 32 px, random crops after padding by 4, flips
    'dnc_cifar': dict(
        opt='sgd',
        lr_base=0.1,
        lr_base_size=128,
        momentum=0.9,
        weight_decay=1e-4,
        epochs=200,
        sched='multistep',
        decay_milestones=[100, 150],
        warmup_epochs=0,
        smoothing=0.0,
        batch_size=128,
        img_size=32,
        train_crop_mode='pad',
        color_jitter=0.0,
        centroid_every=1000,
        common_start=0.0,
    ),
}

# Options of the recipes for the learning of centroids. This package's defaults for them measure better.
PUBLISHED_CENTROIDS = ('centroid_every', 'common_start')

# The first match is used, so longer prefixes come first.
_BY_PREFIX = (
    ('dnc_coc', 'coc'),
    ('dnc_fec', 'fec'),
    ('dnc_swin', 'dnc_swin'),
    ('dnc_resnet18_cifar', 'dnc_cifar'),
    ('resnet18_cifar', 'dnc_cifar'),  # the linear baseline of dnc_resnet18_cifar
    ('dnc_', 'dnc_resnet'),
    ('coc_', 'coc'),
    ('fec_', 'fec'),
)


def recipe_for(model_name: str) -> str:
    """Returns the name of the recipe that a model was published with.

    Args:
        model_name: A timm model name, with or without a pretrained tag (``coc_tiny``, ``coc_tiny.cifar10``).

    Returns:
        A key of `RECIPES`; ``'timm'`` for models of other packages.
    """
    return next((recipe for prefix, recipe in _BY_PREFIX if model_name.startswith(prefix)), 'timm')

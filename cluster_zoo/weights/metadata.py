"""Metadata of the pretrained weights: pinned files, dataset, accuracy, citation and class names.

timm's pretrained configurations, in the files of the models, contain what is needed to build a model and the address of
its weights; this module adds the rest. Accuracy that the authors published is separate from accuracy measured with this
package.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import timm

__all__ = ['PINS', 'Release', 'is_ours', 'label_names', 'package_models', 'package_tags', 'release']

# Google Drive id and SHA-256 of the file for a name, of a classifier or a segmenter. Empty so far:
# `cluster-zoo fetch NAME --pin` prints the line to add.
PINS: dict[str, tuple[str, str]] = {}


@dataclass(frozen=True)
class Release:
    """Metadata of pretrained weights.

    Attributes:
        data: Training dataset; None if unknown.
        published_top1: Top-1 accuracy on ImageNet-1k in % that the authors published.
        measured: Results measured with this package, each with its images, command, machine and date.
        citation: BibTeX entry of the paper.
    """

    data: str | None = None
    published_top1: float | None = None
    measured: tuple[dict[str, Any], ...] = ()
    citation: str | None = None


_MEASURED_CIFAR10 = dict(
    top1=83.70,
    images="CIFAR-10's 10,000 test images, enlarged to 64 px",
    command='python validate.py --data-dir DATA --split val --model coc_tiny_plain.cifar10',
    machine='two cores of an AMD EPYC virtual machine, torch 2.15',
    date='2026-11-20',
)

_MEASURED_FEC_CIFAR10 = dict(
    top1=84.01,
    images="CIFAR-10's 10,000 test images, enlarged to 64 px",
    command='python validate.py --data-dir DATA --split val --model fec_small.cifar10',
    machine='two cores of an AMD EPYC virtual machine, torch 2.14',
    date='2026-11-28',
)

# The accuracy of FEC is from a later paper of the same authors, which quotes it.
_RELEASES = {
    'coc_tiny.in1k': Release('ImageNet-1k', 73.2),
    'coc_tiny_plain.in1k': Release('ImageNet-1k', 73.8),
    'coc_tiny_plain.cifar10': Release('CIFAR-10', measured=(_MEASURED_CIFAR10,)),
    'coc_small.in1k': Release('ImageNet-1k', 78.1),
    'coc_medium.in1k': Release('ImageNet-1k', 81.2),
    'fec_small.cifar10': Release('CIFAR-10', measured=(_MEASURED_FEC_CIFAR10,)),
    'fec_small.in1k': Release('ImageNet-1k', 72.7),
    'fec_base.in1k': Release('ImageNet-1k', 78.1),
    'fec_large.in1k': Release('ImageNet-1k', 81.2),
    'dnc_resnet18_cifar.cifar10': Release('CIFAR-10'),
}

_CITATIONS = {
    'coc': """@inproceedings{ma2023image,
  title     = {Image as Set of Points},
  author    = {Ma, Xu and Zhou, Yuqian and Wang, Huan and Qin, Can and Sun, Bin and Liu, Chang and Fu, Yun},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}""",
    'fec': """@inproceedings{chen2024neural,
  title     = {Neural Clustering based Visual Representation Learning},
  author    = {Chen, Guikun and Li, Xia and Yang, Yi and Wang, Wenguan},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}""",
    'dnc': """@inproceedings{wang2023visual,
  title     = {Visual Recognition with Deep Nearest Centroids},
  author    = {Wang, Wenguan and Han, Cheng and Zhou, Tianfei and Liu, Dongfang},
  booktitle = {International Conference on Learning Representations},
  year      = {2023}
}""",
}


def release(name: str) -> Release:
    """Returns the metadata of a name such as ``'coc_small.in1k'``; only the citation for an unknown tag."""
    known = _RELEASES.get(name) or Release('ImageNet-1k' if name.endswith('.in1k') else None)
    return replace(known, citation=_CITATIONS.get(name.split('_')[0]))


def is_ours(name: str) -> bool:
    """Whether a registered model, given with or without a tag, is defined by this package."""
    name = name.partition('.')[0]
    return timm.is_model(name) and timm.models.model_entrypoint(name).__module__.startswith('cluster_zoo.')


def package_models() -> list[str]:
    """Returns the names of this package's architectures, in timm's order."""
    return [name for name in timm.list_models() if is_ours(name)]


def package_tags() -> list[str]:
    """Returns the names with tags of this package's pretrained configurations, in timm's order."""
    return [name for name in timm.list_models(include_tags=True) if is_ours(name)]


def label_names(pretrained_cfg: dict[str, Any]) -> list[str] | None:
    """Returns the class names of a pretrained configuration by index; None if unknown or not one for each class."""
    names = pretrained_cfg.get('label_names')
    if names:
        names = names.values() if isinstance(names, dict) else names
        described = pretrained_cfg.get('label_descriptions') or {}
        found = [str(described.get(name, name)) for name in names]
    elif 'in1k' in str(pretrained_cfg.get('tag')).split('_'):
        found = list(_imagenet_labels())
    else:
        return None
    return found if len(found) == pretrained_cfg.get('num_classes') else None


@cache
def _imagenet_labels() -> tuple[str, ...]:
    info = timm.data.ImageNetInfo('imagenet-1k')
    return tuple(info.label_name_to_description(name) for name in info.label_names())

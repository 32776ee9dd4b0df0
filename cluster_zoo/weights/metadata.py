"""What is known of the weights behind each name: pinned files, data, accuracy, citation, names of the classes.

timm's pretrained configurations, in the models' files, have what is needed to run a model and where its authors
published it. This table has the rest. Accuracy that the authors published is apart from accuracy measured with this
package.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
from timm.models import get_pretrained_cfg

__all__ = ['PINS', 'Release', 'full_name', 'is_ours', 'label_names', 'package_models', 'package_tags', 'release']

# Of a name, the file on Google Drive and the SHA-256 of its content, for weights of classifiers and of segmenters.
# Nobody with access has pinned one yet: `cluster-zoo fetch NAME --pin` prints the line to add.
PINS: dict[str, tuple[str, str]] = {}

BUNDLED_SHA256 = '515657266a06e0696010d99c595fbe87908e37281341dcf14452453886b07115'


@dataclass(frozen=True)
class Release:
    """What is known of a name.

    Attributes:
        data: What the weights were trained on; None if that is not known.
        published_top1: Top-1 accuracy on ImageNet-1k in %, as the authors state it.
        measured: Figures of this package, each with what it was measured on and how.
        citation: BibTeX of the paper.
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

# Data, published top-1 and measured figures. FEC's are as a later paper of the same group quotes them.
_RELEASES: dict[str, tuple[str, float | None, tuple[dict[str, Any], ...]]] = {
    'coc_tiny.in1k': ('ImageNet-1k', 73.2, ()),
    'coc_tiny_plain.in1k': ('ImageNet-1k', 73.8, ()),
    'coc_tiny_plain.cifar10': ('CIFAR-10', None, (_MEASURED_CIFAR10,)),
    'coc_small.in1k': ('ImageNet-1k', 78.1, ()),
    'coc_medium.in1k': ('ImageNet-1k', 81.2, ()),
    'fec_small.in1k': ('ImageNet-1k', 72.7, ()),
    'fec_base.in1k': ('ImageNet-1k', 78.1, ()),
    'fec_large.in1k': ('ImageNet-1k', 81.2, ()),
    'dnc_resnet18_cifar.cifar10': ('CIFAR-10', None, ()),
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
    """What is known of a name, such as ``'coc_small.in1k'``; the paper alone for any other tag of an architecture."""
    data, top1, measured = _RELEASES.get(name, ('ImageNet-1k' if name.endswith('.in1k') else None, None, ()))
    return Release(data, top1, measured, _CITATIONS.get(name.split('_')[0]))


def is_ours(name: str) -> bool:
    """Whether a registered model, named with or without a tag, is defined by this package."""
    architecture = name.partition('.')[0]
    return timm.is_model(architecture) and timm.models.model_entrypoint(architecture).__module__.startswith(
        'cluster_zoo.'
    )


def package_models() -> list[str]:
    """Names of this package's architectures, in timm's order."""
    return [name for name in timm.list_models() if is_ours(name)]


def package_tags() -> list[str]:
    """Names with tags of every pretrained configuration of this package's architectures, in timm's order."""
    return [name for name in timm.list_models(include_tags=True) if is_ours(name)]


def full_name(name: str) -> str:
    """A registered name with the tag that timm takes where there is none."""
    return name if '.' in name else f'{name}.{get_pretrained_cfg(name).tag}'


def label_names(pretrained_cfg: dict[str, Any]) -> list[str] | None:
    """What the classes are called, by their index."""
    names, num_classes = pretrained_cfg.get('label_names'), pretrained_cfg.get('num_classes')
    if isinstance(names, dict):
        names = list(names.values())
    if names:
        described = pretrained_cfg.get('label_descriptions') or {}
        found = [str(described.get(name, name)) for name in names]
    elif 'in1k' in str(pretrained_cfg.get('tag')).split('_'):
        found = list(_imagenet_labels())
    else:
        return None
    return found if len(found) == num_classes else None


@cache
def _imagenet_labels() -> tuple[str, ...]:
    info = timm.data.ImageNetInfo('imagenet-1k')
    return tuple(info.label_name_to_description(name) for name in info.label_names())

"""What is known of the weights behind each name: data, accuracy, citation, the names of the classes.

timm's pretrained configurations hold what is needed to run a model. Here is the rest, with accuracy that the authors
published kept apart from accuracy that was measured with this package.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import timm

__all__ = [
    'CITATIONS',
    'Facts',
    'Measured',
    'facts',
    'is_ours',
    'is_published',
    'label_names',
    'our_models',
    'our_tags',
]


@dataclass(frozen=True)
class Measured:
    """A figure of this package.

    Attributes:
        value: Top-1 accuracy in %.
        images: What it was measured on.
        command: How to repeat it.
        machine: Where it was measured.
        date: When, as YYYY-MM-DD.
    """

    value: float
    images: str
    command: str
    machine: str
    date: str


@dataclass(frozen=True)
class Facts:
    """What is known of a tag.

    Attributes:
        data: What it was trained on; None if that is not known.
        published_top1: Top-1 accuracy on ImageNet-1k in %, as the authors state it; None if they state none here.
        measured: Figures of this package.
        citation: BibTeX of the paper; None for an architecture of no paper.
        sha256: Of the weights file, where it is part of the package.
    """

    data: str | None = None
    published_top1: float | None = None
    measured: tuple[Measured, ...] = ()
    citation: str | None = None
    sha256: str | None = None


# By the paper that describes an architecture.
CITATIONS = {
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

IMAGENET = 'ImageNet-1k'

_FACTS = {
    'coc_tiny.in1k': dict(data=IMAGENET, published_top1=73.2),
    'coc_tiny_plain.in1k': dict(data=IMAGENET, published_top1=73.8),
    'coc_small.in1k': dict(data=IMAGENET, published_top1=78.1),
    'coc_medium.in1k': dict(data=IMAGENET, published_top1=81.2),
    'fec_small.in1k': dict(data=IMAGENET),
    'fec_base.in1k': dict(data=IMAGENET),
    'fec_large.in1k': dict(data=IMAGENET),
    'coc_tiny_plain.cifar10': dict(
        data='CIFAR-10',
        measured=(
            Measured(
                value=83.70,
                images="CIFAR-10's 10,000 test images, enlarged to 64 px",
                command='python validate.py --data-dir DATA --split val --model coc_tiny_plain.cifar10',
                machine='two cores of an AMD EPYC virtual machine, torch 2.15',
                date='2026-11-20',
            ),
        ),
        sha256='515657266a06e0696010d99c595fbe87908e37281341dcf14452453886b07115',
    ),
}


def facts(name: str) -> Facts:
    """What is known of the weights that a name stands for.

    Args:
        name: A model with its tag, such as ``'coc_small.in1k'``. Of a tag that is not the package's own, only the
            architecture's paper is known.
    """
    return Facts(citation=CITATIONS.get(name.split('_')[0]), **_FACTS.get(name, {}))


def is_published(name: str) -> bool:
    """Whether a tag is one of this package's, with weights of the authors or of its own."""
    return name in _FACTS


def is_ours(name: str) -> bool:
    """Whether a registered model, named with or without a tag, is defined by this package."""
    architecture = name.partition('.')[0]
    return timm.is_model(architecture) and timm.models.model_entrypoint(architecture).__module__.startswith(
        f'{__package__}.'
    )


def our_models() -> list[str]:
    """Names of this package's architectures, in timm's order."""
    return [name for name in timm.list_models() if is_ours(name)]


def our_tags() -> list[str]:
    """Names with tags of every pretrained configuration of this package's architectures, in timm's order."""
    return [name for name in timm.list_models(include_tags=True) if is_ours(name)]


def label_names(pretrained_cfg: dict[str, Any]) -> list[str] | None:
    """What the classes are called, by their index.

    Args:
        pretrained_cfg: A model's ``pretrained_cfg``. Its ``label_names`` and ``label_descriptions`` are what counts;
            where there are none, ``in1k`` in the tag stands for ImageNet-1k's classes in their usual order.

    Returns:
        A name for each class, or None if there are none or not as many as classes.
    """
    names, num_classes = pretrained_cfg.get('label_names'), pretrained_cfg.get('num_classes')
    if isinstance(names, dict):
        names = list(names.values())
    if isinstance(names, list | tuple) and names:
        described = pretrained_cfg.get('label_descriptions') or {}
        found = [str(described.get(name, name)) for name in names]
    elif not names and 'in1k' in str(pretrained_cfg.get('tag')).split('_'):
        found = list(_imagenet_labels())
    else:
        return None
    return found if len(found) == num_classes else None


@cache
def _imagenet_labels() -> tuple[str, ...]:
    info = timm.data.ImageNetInfo('imagenet-1k')
    return tuple(info.label_name_to_description(name) for name in info.label_names())

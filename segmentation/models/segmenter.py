"""One model for all dense systems: a backbone, a head, and in training perhaps an auxiliary head.

A head is a decoder with a classifier, or RegionProxy. `create_segmenter` puts them together by name.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor

from cluster_zoo.errors import CheckpointError, nearest
from cluster_zoo.layers.grids import pad_to_multiple
from cluster_zoo.weights import load_checkpoint
from cluster_zoo.weights.cache import WEIGHTS, sha256, verified_weights
from cluster_zoo.weights.configs import CONFIG
from cluster_zoo.weights.download import fetch

from . import conversion
from .backbones import Pyramid, TokenGrids, create_backbone, family
from .classifiers import CLASSIFIERS, PlainClassifier
from .configs import CONFIGS
from .decoders import FCN, DeepLabV3Plus, SemanticFPN, UPerNet, resize
from .region_proxy import RegionProxy

__all__ = ['HEADS', 'DenseHead', 'Segmenter', 'create_segmenter', 'fetch_segmenter']

DECODERS = {'semantic_fpn': SemanticFPN, 'upernet': UPerNet, 'deeplabv3plus': DeepLabV3Plus, 'fcn': FCN}
HEADS = (*DECODERS, 'region_proxy')


class DenseHead(nn.Module):
    """Decoder, dropout of whole channels, classifier.

    Args:
        decoder: Maps the levels to features, see `decoders`.
        classifier: Maps features to logits, see `classifiers`.
        dropout: Probability of dropping a channel of the features.
    """

    def __init__(self, decoder: nn.Module, classifier: nn.Module, dropout: float = 0.1):
        super().__init__()
        self.decoder = decoder
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """Levels -> what the classifier gives, at the decoder's size."""
        return self.classifier(self.dropout(self.decoder(features)))


class Segmenter(nn.Module):
    """Classifies every pixel.

    Args:
        backbone: Maps images to levels, see `backbones`.
        head: Maps levels to a dictionary with ``logits`` of any size.
        num_classes: Classes K.
        auxiliary: A second head, for its loss in training alone.
    """

    def __init__(
        self,
        backbone: Pyramid | TokenGrids,
        head: nn.Module,
        num_classes: int,
        auxiliary: nn.Module | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.head = head
        self.auxiliary = auxiliary

    def forward(self, x: Tensor, all_outputs: bool = False) -> Tensor | dict[str, Tensor]:
        """Images to logits.

        Args:
            x: Images [B, C, H, W] of any size; inside, zeros at the bottom and at the right fill them up where the
                backbone needs a multiple.
            all_outputs: Return what losses need too.

        Returns:
            Logits [B, K, H, W]; or a dictionary of ``logits``, ``auxiliary`` [B, K, H, W] where there is such a head,
            and what the classifier gives beside its logits, at the decoder's size (``guidance`` [B, K, h, w]).
        """
        size = x.shape[-2:]
        x = pad_to_multiple(x, self.backbone.divisor)
        features = self.backbone(x)
        outputs = self.head(features)
        outputs['logits'] = _at_image(outputs['logits'], x.shape[-2:], size)
        if not all_outputs:
            return outputs['logits']
        if self.auxiliary is not None:
            outputs['auxiliary'] = _at_image(self.auxiliary(features)['logits'], x.shape[-2:], size)
        return outputs

    def labels_at(self, labels: Tensor, size: tuple[int, int], ignore_index: int = 255) -> Tensor:
        """Labels for outputs of another size, the nearest ones.

        Args:
            labels: Integer [B, H, W], of the image's size.
            size: Sides of the outputs (h, w).
            ignore_index: Label of what the image was filled up with.

        Returns:
            Labels [B, h, w].
        """
        H, W = labels.shape[-2:]
        divisor = self.backbone.divisor
        labels = F.pad(labels, (0, -W % divisor, 0, -H % divisor), value=ignore_index)
        return F.interpolate(labels.unsqueeze(1).float(), size=size, mode='nearest').squeeze(1).to(labels.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates: the backbone's, then all the rest."""
        groups = self.backbone.model.group_matcher(coarse=coarse)
        moved = {name: _inside(pattern) for name, pattern in groups.items()}
        return moved | dict(dense=r'^(?:backbone\.norms|head|auxiliary)\.')

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay leaves alone, beside biases and other vectors."""
        model = self.backbone.model
        return {f'backbone.model.{name}' for name in getattr(model, 'no_weight_decay', set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping what they computed."""
        self.backbone.model.set_grad_checkpointing(enable)


def _at_image(logits: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    return resize(logits, padded)[..., : size[0], : size[1]]


def _inside(pattern: str | list[tuple[str, Any]]) -> str | list[tuple[str, Any]]:
    """A pattern for the names of a module, as one for the same names inside the segmenter's backbone."""
    if isinstance(pattern, str):
        return rf'^backbone\.model\.(?:{pattern.replace("^", "")})'
    return [(_inside(one), order) for one, order in pattern]


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Segmenter) -> dict[str, Tensor]:
    """A published checkpoint under this package's names; one of ours as it is."""
    return conversion.segmenter(state_dict, model)


def create_segmenter(
    head: str,
    backbone: str | None = None,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    pretrained_backbone: bool | str | Path = False,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Segmenter:
    """Builds a segmenter by names.

    Args:
        head: 'semantic_fpn', 'upernet', 'deeplabv3plus', 'fcn' or 'region_proxy'; or the name of a published system,
            see `list_segmenters`, which settles all that follows unless it is given.
        backbone: Name of a registered model: coc_*, fec_*, timm's ResNets, Swin, ConvNeXt and others with stages; a
            vision transformer or a hybrid for region_proxy.
        num_classes: Classes K.
        pretrained: Load the authors' weights of a published system, which are downloaded at the first use.
        pretrained_backbone: True for the weights that timm finds for the backbone, or a classifier's checkpoint file.
        checkpoint_path: Weights of the whole segmenter: this package's or the authors'.
        cache_dir: Folder of the cache of released weights, in place of its own.
        **options: ``classifier`` 'plain', 'cond' or 'dnc', ``channels``, ``dropout``, ``auxiliary``, for a decoder;
            ``sub_centroids`` and ``common_start`` for 'dnc'; ``early`` for region_proxy; what the decoder has beside
            these, as ``pyramid_channels``; and any other for the backbone, as ``proposals``, ``drop_path_rate``,
            ``img_size`` or ``output_stride``.

    Raises:
        ValueError: A name is unknown, an option is wrong, or backbone and head do not fit; the message says what does.
        CheckpointError: Weights cannot be read or do not fit.

    Example:
        >>> model = create_segmenter('semantic_fpn', 'coc_small', 150, classifier='cond', proposals=5)
        >>> model(torch.randn(1, 3, 512, 683)).shape
        torch.Size([1, 150, 512, 683])
    """
    if pretrained:
        if head not in CONFIGS:
            raise ValueError(f'There are no weights for {head!r}: pretrained is for the systems of list_segmenters().')
        checkpoint_path = verified_weights(fetch_segmenter(head, root=cache_dir))
    if head in CONFIGS:
        config = CONFIGS[head]
        head, backbone = config.head, backbone or config.backbone
        num_classes = config.num_classes if num_classes is None else num_classes
        options = {**config.options, **options}
    if head not in HEADS:
        raise ValueError(
            f'There is no head {head!r}{nearest(head, [*HEADS, *CONFIGS])}: heads are {", ".join(HEADS)}, and '
            'list_segmenters() names published systems.'
        )
    if backbone is None or num_classes is None:
        raise ValueError(f'The head {head} needs a backbone and num_classes.')
    if num_classes < 1:
        raise ValueError(f'A segmenter needs num_classes of at least 1, got {num_classes}.')
    build = _region_proxy if head == 'region_proxy' else partial(_decoder, head)
    model = build(backbone, num_classes, pretrained=pretrained_backbone, **options)
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path)
    return model


def fetch_segmenter(name: str, member: str | None = None, force: bool = False, root: str | Path | None = None) -> Path:
    """The authors' weights of a published system, from the cache or downloaded into it.

    Args:
        name: See `list_segmenters`.
        member, force, root: See `cluster_zoo.weights.download.fetch`.

    Returns:
        A folder with ``model.safetensors`` under this package's names.

    Raises:
        CheckpointError: The authors have published none, or the download fails or is refused.
    """
    url = CONFIGS[name].source
    if url is None:
        raise CheckpointError(f'The authors of {name} have published no weights.')
    return fetch(name, url, partial(_install, name), member, force, root)


def _install(name: str, path: Path, folder: Path, source: dict[str, str]) -> None:
    """Fill a folder of the cache with a published system, from the authors' file."""
    save_model(create_segmenter(name, checkpoint_path=path), folder / WEIGHTS)
    config = dict(segmenter=name, sha256=sha256(folder / WEIGHTS), source=source)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _region_proxy(
    backbone: str,
    num_classes: int,
    early: int | None = None,
    classifier: str = 'plain',
    auxiliary: bool = False,
    device=None,
    dtype=None,
    **options: Any,
) -> Segmenter:
    if classifier != 'plain' or auxiliary:
        raise ValueError('region_proxy has a classifier of its own, and no auxiliary head.')
    dd = {'device': device, 'dtype': dtype}
    tokens = create_backbone(backbone, tokens=True, early=early, **options, **dd)
    return Segmenter(tokens, RegionProxy(tokens.channels, num_classes, **dd), num_classes)


def _decoder(
    head: str,
    backbone: str,
    num_classes: int,
    classifier: str = 'plain',
    channels: int | None = None,
    dropout: float = 0.1,
    auxiliary: bool = False,
    sub_centroids: int | None = None,
    common_start: float | None = None,
    device=None,
    dtype=None,
    **options: Any,
) -> Segmenter:
    dd = {'device': device, 'dtype': dtype}
    if classifier not in CLASSIFIERS:
        raise ValueError(
            f'There is no classifier {classifier!r}{nearest(classifier, CLASSIFIERS)}: {list(CLASSIFIERS)}.'
        )
    of_centroids = _given(sub_centroids=sub_centroids, common_start=common_start)
    if of_centroids and classifier != 'dnc':
        raise ValueError(f"{', '.join(of_centroids)}: only the classifier 'dnc' has centroids.")
    if channels is not None and channels < 1:
        raise ValueError(f'A decoder needs channels of at least 1, got {channels}.')
    decoder_cls = DECODERS[head]
    of_decoder = _given(channels=channels) | {name: options.pop(name) for name in _own(decoder_cls) & set(options)}
    if head in ('deeplabv3plus', 'fcn') and family(backbone) == 'resnet':
        options.setdefault('output_stride', 8)  # as published; the other decoders want all strides
    levels = create_backbone(backbone, **options, **dd)
    decoder = decoder_cls(levels.channels, **of_decoder, **dd)
    second, read = None, set(decoder.levels)
    if auxiliary:
        narrow = FCN(levels.channels, channels=256, num_convs=1, concat_input=False, level=2, **dd)
        second = DenseHead(narrow, PlainClassifier(narrow.channels, num_classes, **dd), dropout)
        read |= set(narrow.levels)
    for i in set(range(len(levels.norms))) - read:
        levels.norms[i] = nn.Identity()  # a parameter that no gradient reaches would stop distributed training
    last = CLASSIFIERS[classifier](decoder.channels, num_classes, **of_centroids, **dd)
    return Segmenter(levels, DenseHead(decoder, last, dropout), num_classes, second)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _own(decoder_cls: Callable[..., nn.Module]) -> set[str]:
    """Options that a decoder has beside those that all have."""
    names = decoder_cls.__init__.__annotations__
    return set(names) - {'in_channels', 'channels', 'return'}

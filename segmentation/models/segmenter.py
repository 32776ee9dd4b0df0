"""Segmentation model: a backbone, a head, and optionally an auxiliary head for training.

A head is a decoder with a classifier, or RegionProxy. `create_segmenter` builds models by name.
"""

import inspect
import math
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from cluster_zoo.errors import CheckpointError, OptionError, nearest, quoted
from cluster_zoo.layers.grids import pad_to_multiple
from cluster_zoo.weights import load_state_dict, load_weights
from cluster_zoo.weights.archives import is_archive, unpack_checkpoint
from cluster_zoo.weights.cache import verified_weights
from cluster_zoo.weights.configs import CONFIG, check_size, load_config
from cluster_zoo.weights.importing import find_weights

from .backbones import Pyramid, TokenGrids, create_backbone
from .classifiers import CLASSIFIERS, PlainClassifier
from .conversion import convert_segmenter
from .decoders import FCN, DeepLabV3Plus, SemanticFPN, UPerNet, resize
from .folders import BUNDLED, describe, open_folder, write_folder
from .published_systems import CONFIGS
from .region_proxy import RegionProxy

__all__ = ['HEADS', 'DenseHead', 'Segmenter', 'check_is_segmenter', 'create_segmenter', 'fetch_segmenter']
__all__ += ['install_segmenter']

DECODERS = {'semantic_fpn': SemanticFPN, 'upernet': UPerNet, 'deeplabv3plus': DeepLabV3Plus, 'fcn': FCN}
HEADS = (*DECODERS, 'region_proxy')


class DenseHead(nn.Module):
    """Decoder, channel dropout, classifier.

    Args:
        decoder: Maps the backbone's feature maps to one map, see `decoders`.
        classifier: Maps features to logits, see `classifiers`.
        dropout: Probability of dropping a channel.
    """

    def __init__(self, decoder: nn.Module, classifier: nn.Module, dropout: float = 0.1):
        super().__init__()
        self.decoder = decoder
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        """Feature maps -> the classifier's outputs, at the decoder's output size"""
        return self.classifier(self.dropout(self.decoder(features)))


class Segmenter(nn.Module):
    """Classifies every pixel of an image.

    Args:
        backbone: Maps images to feature maps, see `backbones`.
        head: Maps feature maps to a dictionary with ``logits`` of any size.
        num_classes: Number of classes K.
        auxiliary: A second head, whose loss is used in training only.

    Attributes:
        config: Content of ``config.json`` in a model folder, see `folders.describe`; empty if `create_segmenter` did
            not build the model.
    """

    def __init__(
        self, backbone: Pyramid | TokenGrids, head: nn.Module, num_classes: int, auxiliary: nn.Module | None = None
    ):
        super().__init__()
        self.num_classes = num_classes
        self.backbone = backbone
        self.head = head
        self.auxiliary = auxiliary
        self.config: dict[str, Any] = {}

    @property
    def in_chans(self) -> int:
        """Number of image channels."""
        return self.pretrained_cfg['input_size'][0]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Images and classes of the model, with timm's keys, for export and `timm.data`."""
        config = self.config
        name = config.get('segmenter') or '_'.join(config[key] for key in ('head', 'backbone') if key in config)
        images = dict(input_size=(3, 512, 512), architecture=name, crop_pct=1.0, crop_mode='squash')
        kept = {key: config[key] for key in ('num_classes', 'label_names', 'label_colors', 'test') if key in config}
        return images | config.get('pretrained_cfg', {}) | kept

    @property
    def export_formats(self) -> tuple[str, ...]:
        """Formats of `cluster_zoo.export`. TorchScript cannot have a result that is a tensor or a dictionary."""
        # torch.export restricts the tokens of RegionProxy to batches of at least two, which ONNX does not
        return ('onnx',) if isinstance(self.head, RegionProxy) else ('onnx', 'pt2')

    @property
    def export_multiple(self) -> int | None:
        """Number that divides both sides of the images of an exported file: no feature map is padded or cropped.

        None for Swin, whose windows torch.export traces for one size only.
        """
        if isinstance(self.backbone.model, SwinTransformer):
            return None
        return math.lcm(self.backbone.divisor, *self.backbone.strides)

    def forward(self, x: Tensor, all_outputs: bool = False) -> Tensor | dict[str, Tensor]:
        """Computes the logits of each pixel.

        Args:
            x: Images [B, C, H, W] of any size. They are padded with zeros at the bottom and at the right to a multiple
                of the backbone's divisor.
            all_outputs: Whether to return all outputs that have a loss.

        Returns:
            Logits [B, K, H, W]. With ``all_outputs`` a dictionary of ``logits``, ``auxiliary`` [B, K, H, W] of the
            auxiliary head, and the classifier's other outputs at the decoder's output size (``guidance`` [B, K, h, w]).
        """
        H, W = x.shape[-2:]
        x = pad_to_multiple(x, self.backbone.divisor)
        features = self.backbone(x)
        outputs = self.head(features)
        if all_outputs and self.auxiliary is not None:
            outputs['auxiliary'] = self.auxiliary(features)['logits']
        for name in ('logits', 'auxiliary'):
            if name in outputs:
                outputs[name] = resize(outputs[name], x.shape[-2:])[..., :H, :W]
        return outputs if all_outputs else outputs['logits']

    def labels_at(self, labels: Tensor, size: tuple[int, int], ignore_index: int = 255) -> Tensor:
        """Resizes labels to the size of a feature map, by nearest neighbor.

        Args:
            labels: Integer labels [B, H, W] of images.
            size: Size (h, w) of the feature map, which may cover the padding of the images.
            ignore_index: Label of the padding.

        Returns:
            Labels [B, h, w].
        """
        H, W = labels.shape[-2:]
        divisor = self.backbone.divisor
        labels = F.pad(labels, (0, -W % divisor, 0, -H % divisor), value=ignore_index)
        return F.interpolate(labels.unsqueeze(1).float(), size=size, mode='nearest').squeeze(1).to(labels.dtype)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the patterns of layer-wise learning rates: those of the backbone, then one for everything else."""
        groups = self.backbone.model.group_matcher(coarse=coarse)
        groups = {name: _add_backbone_prefix(pattern) for name, pattern in groups.items()}
        return groups | dict(dense=r'^(?:backbone\.norms|head|auxiliary)\.')

    def no_weight_decay(self) -> set[str]:
        """Returns the backbone's parameters that have no weight decay."""
        model = self.backbone.model
        return {f'backbone.model.{name}' for name in getattr(model, 'no_weight_decay', set)()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.model.set_grad_checkpointing(enable)


def _add_backbone_prefix(pattern: str | list[tuple[str, Any]]) -> str | list[tuple[str, Any]]:
    """Adapts a pattern of parameter names of a timm model to the names of the model in a segmenter."""
    if isinstance(pattern, str):
        return rf'^backbone\.model\.(?:{pattern.replace("^", "")})'
    return [(_add_backbone_prefix(one), order) for one, order in pattern]


checkpoint_filter_fn = convert_segmenter  # timm's name, by which `load_checkpoint` finds the conversion


def create_segmenter(
    head: str,
    backbone: str | None = None,
    num_classes: int | None = None,
    *,
    pretrained: bool | None = None,
    pretrained_backbone: bool | str | Path = False,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    **options: Any,
) -> Segmenter:
    """Creates a segmentation model.

    Args:
        head: 'semantic_fpn', 'upernet', 'deeplabv3plus', 'fcn' or 'region_proxy'; or the name of a published system,
            see `list_segmenters`, which sets the defaults of all following arguments; or a model folder,
            'local-dir:FOLDER' or 'hf-hub:ORG/NAME', see `folders.save_pretrained`; or the bundled model
            'semantic_fpn_coc_tiny.camvid'.
        backbone: Name of a registered model: coc_*, fec_*, timm's ResNets, Swin, ConvNeXt and others with stages; a
            vision transformer or a hybrid for region_proxy.
        num_classes: Number of classes K.
        pretrained: Load the authors' weights of a published system, which are downloaded at the first use (default:
            False), or the weights of a model folder (default: True).
        pretrained_backbone: True for timm's pretrained weights of the backbone, or the checkpoint file of a classifier.
        checkpoint_path: Checkpoint of a whole segmentation model, of this package or of the authors.
        cache_dir: Folder of the download cache.
        **options: Options of a decoder head are ``classifier`` 'plain', 'cond' or 'dnc', ``channels``, ``dropout``,
            ``auxiliary``, and the decoder's own, such as ``pyramid_channels``; of the classifier 'dnc'
            ``sub_centroids`` and ``common_start``; of region_proxy ``early``. All others are passed to the backbone,
            such as ``proposals``, ``drop_path_rate``, ``img_size`` or ``output_stride``.

    Raises:
        ValueError: A name is unknown, an option is invalid, or the backbone does not fit the head.
        CheckpointError: Weights cannot be downloaded or read, or do not fit.

    Example:
        >>> model = create_segmenter('semantic_fpn', 'coc_small', 150, classifier='cond', proposals=5)
        >>> model(torch.randn(1, 3, 512, 683)).shape
        torch.Size([1, 150, 512, 683])
    """
    given = dict(backbone=backbone, num_classes=num_classes) | options
    if ':' in head or head in BUNDLED:
        return _open_segmenter(head, given, pretrained is not False, cache_dir, pretrained_backbone or checkpoint_path)
    if head not in (*HEADS, *CONFIGS):
        raise ValueError(
            f'There is no head {head!r}{nearest(head, [*HEADS, *CONFIGS])}: choose (--head) from {", ".join(HEADS)}, '
            'or a published system of list_segmenters() (--segmenter).'
        )
    if pretrained:
        if head not in CONFIGS:
            raise ValueError(
                f'There are no weights of a whole segmenter for {head!r}: name a published system of '
                'list_segmenters(), or use pretrained_backbone=True for those of the backbone.'
            )
        checkpoint_path = verified_weights(fetch_segmenter(head, root=cache_dir))
    segmenter = head if head in CONFIGS else None
    if segmenter:
        config = CONFIGS[head]
        head, backbone = config.head, backbone or config.backbone
        num_classes = config.num_classes if num_classes is None else num_classes
        options = {**config.options, **options}
    model = _build(head, backbone, num_classes, pretrained_backbone, options)
    model.config = describe(head, backbone, num_classes, options, segmenter)
    if checkpoint_path:
        state_dict = load_state_dict(checkpoint_path)
        check_is_segmenter(state_dict, checkpoint_path)
        load_weights(model, state_dict)
    return model


def _build(
    head: str,
    backbone: str | None,
    num_classes: int | None,
    pretrained_backbone: bool | str | Path,
    options: dict[str, Any],
) -> Segmenter:
    """Builds a model of a head, not of a published system."""
    if backbone is None or num_classes is None:
        raise ValueError(f'The head {head} needs a backbone (--backbone) and num_classes (--num-classes).')
    if num_classes < 1:
        raise ValueError(f'num_classes (--num-classes) must be at least 1, got {num_classes}.')
    create = _create_region_proxy if head == 'region_proxy' else partial(_create_decoder_segmenter, head)
    return create(backbone, num_classes, pretrained=pretrained_backbone, **options)


def _open_segmenter(
    name: str, given: dict[str, Any], pretrained: bool, cache_dir: str | Path | None, other_weights: Any
) -> Segmenter:
    """Builds the model of a model folder, which is untrusted, see `create_segmenter`."""
    if given['backbone'] or other_weights:
        raise OptionError(
            f'{name} has a backbone and weights: backbone, pretrained_backbone and checkpoint_path are '
            'options of a head or a published system.'
        )
    folder, config = open_folder(name, cache_dir)
    arguments = {key: config[key] for key in ('head', 'backbone', 'num_classes')} | config['model_args']
    arguments |= {key: value for key, value in given.items() if value is not None}
    state_dict = load_state_dict(verified_weights(folder)) if pretrained else None
    build = partial(create_segmenter, **arguments)
    if config['head'] not in HEADS:
        raise CheckpointError(f'{name} was refused: there is no head {quoted(config["head"])}.')
    check_size(build, state_dict, name)
    model = build()
    kept = ['segmenter', 'pretrained_cfg', 'test']
    if model.num_classes == config['num_classes']:
        kept += ['label_names', 'label_colors']
    model.config |= {key: config[key] for key in kept if key in config}
    if state_dict is not None:
        load_weights(model, state_dict)
    return model


def check_is_segmenter(state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Raises `CheckpointError` if weights, of the file ``path``, are not those of a segmenter."""
    if not any(name.startswith('backbone.') for name in state_dict):  # in the authors' names, too
        raise CheckpointError(
            f"'{path}' has the weights of a classifier, not of a segmenter. A training can start from them: "
            'pretrained_backbone (--pretrained-backbone FILE).'
        )


def _create_region_proxy(
    backbone: str,
    num_classes: int,
    early: int | None = None,
    classifier: str = 'plain',
    auxiliary: bool = False,
    device=None,
    dtype=None,
    **options: Any,
) -> Segmenter:
    unused = ['classifier'] * (classifier != 'plain') + ['auxiliary'] * auxiliary
    unused += _pop_given(options, ['channels', 'dropout', 'sub_centroids', 'common_start'])
    if unused:
        flags = ', '.join(f'--{name.replace("_", "-")}' for name in unused)
        raise ValueError(f'region_proxy has no decoder and no auxiliary head, but its own classifier: omit {flags}.')
    dd = {'device': device, 'dtype': dtype}
    tokens = create_backbone(backbone, tokens=True, early=early, **options, **dd)
    return Segmenter(tokens, RegionProxy(tokens.channels, num_classes, **dd), num_classes)


def _create_decoder_segmenter(
    head: str,
    backbone: str,
    num_classes: int,
    classifier: str = 'plain',
    dropout: float = 0.1,
    auxiliary: bool = False,
    device=None,
    dtype=None,
    **options: Any,
) -> Segmenter:
    dd = {'device': device, 'dtype': dtype}
    if classifier not in CLASSIFIERS:
        raise ValueError(
            f'There is no classifier {classifier!r}{nearest(classifier, CLASSIFIERS)}: choose (--classifier) from '
            f'{", ".join(CLASSIFIERS)}.'
        )
    centroid_options = _pop_given(options, ['sub_centroids', 'common_start'])
    if centroid_options and classifier != 'dnc':
        flags = ', '.join(f'--{name.replace("_", "-")}' for name in centroid_options)
        raise ValueError(f'{flags}: only the classifier dnc has centroids (--classifier dnc).')
    if centroid_options.get('sub_centroids', 1) < 1:
        raise ValueError(
            f'sub_centroids (--sub-centroids) must be at least 1, got {centroid_options["sub_centroids"]}.'
        )
    if not 0 <= dropout <= 1:
        raise ValueError(f'dropout (--dropout) must be 0 to 1, got {dropout}.')
    decoder_cls = DECODERS[head]
    _, *parameters = inspect.signature(decoder_cls).parameters  # the first is in_channels
    decoder_options = _pop_given(options, parameters)
    if decoder_options.get('channels', 1) < 1:
        raise ValueError(f'channels (--channels) must be at least 1, got {decoder_options["channels"]}.')
    if head in ('deeplabv3plus', 'fcn') and is_model_in_modules(backbone, ['resnet']):
        options.setdefault('output_stride', 8)  # of the published systems; other decoders need all strides

    levels = create_backbone(backbone, **options, **dd)
    decoder = decoder_cls(levels.channels, **decoder_options, **dd)
    used_levels = {*decoder.levels}
    auxiliary_head = None
    if auxiliary:
        fcn = FCN(levels.channels, channels=256, num_convs=1, concat_input=False, level=2, **dd)
        auxiliary_head = DenseHead(fcn, PlainClassifier(fcn.channels, num_classes, **dd), dropout)
        used_levels |= {*fcn.levels}
    for i in {*range(len(levels.norms))} - used_levels:
        levels.norms[i] = nn.Identity()  # a parameter without gradient would stop distributed training
    decoder_head = DenseHead(
        decoder, CLASSIFIERS[classifier](decoder.channels, num_classes, **centroid_options, **dd), dropout
    )
    return Segmenter(levels, decoder_head, num_classes, auxiliary_head)


def _pop_given(options: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Moves the named options that are present to a new dictionary, without those that are None."""
    found = {name: options.pop(name) for name in names if name in options}
    return {name: value for name, value in found.items() if value is not None}


def fetch_segmenter(name: str, member: str | None = None, force: bool = False, root: str | Path | None = None) -> Path:
    """Returns the weights of a published system: from the cache, the Hub or the authors, as for classifiers.

    Args:
        name: See `list_segmenters`.
        member, force, root: See `cluster_zoo.weights.importing.find_weights`.

    Returns:
        The model folder, see `folders`.

    Raises:
        CheckpointError: There are no weights, the download fails or is refused, or the folder is of another model.
    """
    folder = find_weights(name, CONFIGS[name].source, root, member, force, install_segmenter)
    config = load_config(folder)
    # The weights of another system can fit: those with 4 and with 25 centers have equal shapes
    if not isinstance(config, dict) or config.get('segmenter') != name:
        raise CheckpointError(f"'{folder / CONFIG}' was refused: it does not describe {name}.")
    return folder


def install_segmenter(name: str, path: Path, folder: Path, source: dict[str, str]) -> None:
    """Converts an authors' checkpoint of a published system, or an archive of it, to a folder of the cache."""
    with tempfile.TemporaryDirectory() as scratch:
        file = unpack_checkpoint(path, Path(scratch)) if path.is_file() and is_archive(path) else path
        model = create_segmenter(name, checkpoint_path=file)
    write_folder(model, folder, model.config, name, source)

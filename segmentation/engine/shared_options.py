"""Command-line options that ``segmentation/train.py`` and ``validate.py`` share.

Options that are not given (None) are set from the published system of ``--segmenter`` or from a checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from operator import gt
from typing import Any

from timm.layers import to_2tuple

from cluster_zoo.errors import OptionError
from cluster_zoo.training.parser import ParseKwargs

from ..models.published_systems import SegmenterConfig, segmenter_config
from .inference import MODES

MODEL_OPTIONS = (
    'segmenter',
    'head',
    'backbone',
    'classifier',
    'channels',
    'dropout',
    'auxiliary',
    'sub_centroids',
    'common_start',
    'early',
    'model_kwargs',
    'num_classes',
)
DATA_OPTIONS = ('dataset', 'remap', 'mean', 'std')
TEST_OPTIONS = ('test_mode', 'test_crop', 'test_stride', 'test_pad', 'test_scale', 'test_multiple')


def add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of the model."""
    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--segmenter', metavar='NAME', help='published system; it has the defaults of all other options')
    add('--head', metavar='NAME', help='semantic_fpn, upernet, deeplabv3plus, fcn or region_proxy')
    add('--backbone', metavar='NAME', help='a registered model, such as coc_tiny or resnet18')
    add('--classifier', metavar='NAME', help='plain, cond (conditional) or dnc (nearest centroids) (default: plain)')
    add('--channels', type=int, metavar='N', help='width of the decoder')
    add('--dropout', type=float, metavar='P', help='probability of dropping a channel before the classifier')
    add('--auxiliary', action=argparse.BooleanOptionalAction, help='an auxiliary head, for training')
    add('--sub-centroids', type=int, metavar='K', help='sub-centroids per class, with --classifier dnc')
    add('--common-start', type=float, metavar='F', help='similarity of initial sub-centroids of a class, published: 0')
    add('--early', type=int, metavar='I', help='layer for the affinities of region_proxy (0: the first)')
    add('--num-classes', type=int, metavar='K', help="number of classes (default: the dataset's)")
    add('--model-kwargs', nargs='*', action=ParseKwargs, metavar='K=V', help='arguments of decoder and backbone')
    return group


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of the dataset and the normalization."""
    group = parser.add_argument_group('dataset')
    add = group.add_argument
    add('data', nargs='?', metavar='DATA', help='folder of the dataset, or a .tar of it')
    add(
        '-d',
        '--dataset',
        metavar='NAME',
        help='folder, camvid, ade20k, cityscapes, pascal_context_59, pascal_voc, coco_stuff or loveda (default: '
        'that of the model, else folder)',
    )
    add(
        '--remap',
        nargs='+',
        action=ParseKwargs,
        metavar='LABEL=CLASS',
        help='classes of the labels of a folder, for example 0=255 1=0 2=1; 255 is ignored',
    )
    add('--mean', type=float, nargs=3, metavar='M', help="normalization mean, 0..1 scale (default: ImageNet's)")
    add('--std', type=float, nargs=3, metavar='S', help="normalization standard deviation (default: ImageNet's)")
    return group


def add_test_options(
    parser: argparse.ArgumentParser, prefix: str = 'test-', crop: str = 'crop'
) -> argparse._ArgumentGroup:
    """Adds the options of the test. Their names start with ``prefix``, their destinations with ``test_``.

    ``crop`` is the name of the option for the size of the windows.
    """
    group = parser.add_argument_group('test')

    def add(name: str, **kwargs: Any) -> None:
        group.add_argument(f'--{prefix}{crop if name == "crop" else name}', dest=f'test_{name}', **kwargs)

    add('mode', choices=MODES, help='whole images or sliding windows (default: whole)')
    add('crop', type=int, nargs='+', metavar='N', help='size of the windows: side, or height and width')
    add('stride', type=int, nargs='+', metavar='N', help='stride of the windows (default: their size)')
    add('pad', action=argparse.BooleanOptionalAction, help='pad images to the window (default: shrink the window)')
    add('scale', type=int, nargs=2, metavar='N', help='fit images into long and short side (default: no resize)')
    add('multiple', type=int, metavar='N', help='resize again, to sides rounded up to a multiple of N')
    return group


def fill(args: argparse.Namespace, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Sets the named options that are None to their values, if there are any."""
    for name in names:
        if getattr(args, name, None) is None and values.get(name) is not None:
            setattr(args, name, values[name])


def add_average_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of the views of an image that predictions are averaged over."""
    add = group.add_argument
    add('--scales', type=float, nargs='+', default=[1.0], metavar='F', help='average over these scales (default: 1)')
    add('--flip', action='store_true', help='horizontal-flip test-time augmentation')


def complete(args: argparse.Namespace, saved: Mapping[str, Any], missing: str) -> None:
    """Sets options that are not given: from a checkpoint, unless another model is named, or the published system.

    Args:
        args: The options.
        saved: Options of the training, from the checkpoint.
        missing: Message of the error if neither names a model.

    Raises:
        OptionError: No model is named, or there is no published system of the name.
    """
    if not (args.segmenter or args.head or saved.get('segmenter') or saved.get('head')):
        raise OptionError(missing)
    if not (args.segmenter or args.head):
        fill(args, saved, (*MODEL_OPTIONS, *TEST_OPTIONS))
    fill(args, saved, DATA_OPTIONS)
    if args.segmenter:
        fill(args, config_options(segmenter_config(args.segmenter)), ('dataset', *TEST_OPTIONS))
    args.dataset = args.dataset or 'folder'


def config_options(config: SegmenterConfig) -> dict[str, Any]:
    """Returns the shared options of a published system."""
    slides = config.test_mode == 'slide'
    return dict(
        dataset=config.dataset,
        num_classes=config.num_classes,
        test_mode=config.test_mode,
        test_crop=[config.crop] if slides else None,
        test_stride=[config.test_stride] if slides else None,
        test_pad=config.test_pad,
        test_scale=list(config.scale),
        test_multiple=config.test_multiple,
    )


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `create_segmenter` apart from weights. ``args.num_classes`` must be set.

    Raises:
        OptionError: Head or backbone is missing, or there is no published system of that name.
    """
    if args.segmenter:
        segmenter_config(args.segmenter)
    if not args.segmenter and not (args.head and args.backbone):
        raise OptionError('no model given: name a published system (--segmenter), or --head and --backbone')
    if args.segmenter and args.head:
        raise OptionError(f'--head {args.head} and --segmenter {args.segmenter} exclude each other')
    names = ('classifier', 'channels', 'dropout', 'auxiliary', 'sub_centroids', 'common_start', 'early')
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = dict(head=args.segmenter or args.head, backbone=args.backbone, num_classes=args.num_classes)
    return options | given | (args.model_kwargs or {})


def label_remap(args: argparse.Namespace) -> dict[int, int] | None:
    """Returns the class of each label (``--remap``) for `create_dataset`; None without the option.

    Raises:
        OptionError: A label or a class is not a number.
    """
    if args.remap is None:
        return None
    try:
        return {int(label): int(number) for label, number in args.remap.items()}
    except (TypeError, ValueError):
        raise OptionError(f'--remap {args.remap}: expected LABEL=CLASS, both numbers') from None


def test_protocol(args: argparse.Namespace, prefix: str = 'test-', crop: str = 'crop') -> dict[str, Any]:
    """Returns the arguments of `predict`, apart from ``flip``, from the shared test options.

    Args:
        args: The options.
        prefix, crop: See `add_test_options`.

    Raises:
        OptionError: A value is invalid, or options of windows are given without mode slide.
    """
    protocol = dict(mode=args.test_mode or 'whole', pad=bool(args.test_pad))
    given = {name: getattr(args, f'test_{name}') for name in ('crop', 'stride', 'scale', 'multiple')}
    flags = {name: f'--{prefix}{crop if name == "crop" else name}' for name in ('crop', 'stride', 'pad')}
    if protocol['mode'] == 'whole':
        for name, flag in flags.items():
            if f'test_{name}' in args.given:
                raise OptionError(f'{flag} needs --{prefix}mode slide: it is an option of sliding windows')
    elif given['crop'] is None:
        raise OptionError(f'--{prefix}mode slide needs {flags["crop"]}, the size of the windows')
    for name in ('crop', 'stride'):
        sides = given[name] or [1]
        if len(sides) > 2 or min(sides) < 1:
            shown = ' '.join(map(str, sides))
            raise OptionError(f'{flags[name]} {shown}: expected one number, or height and width, of at least 1')
        if given[name] is not None:
            protocol[name] = sides[0] if len(sides) == 1 else tuple(sides)
    sides, steps = (to_2tuple(protocol.get(name, 0)) for name in ('crop', 'stride'))
    if protocol['mode'] == 'slide' and any(map(gt, steps, sides)):
        stride, side = (f'{flags[name]} {" ".join(map(str, given[name]))}' for name in ('stride', 'crop'))
        raise OptionError(f'{stride} is above {side}: windows must cover all pixels')
    if min(given['scale'] or [1]) < 1:
        raise OptionError(f'--{prefix}scale must be at least 1')
    if given['multiple'] is not None and given['multiple'] < 1:
        raise OptionError(f'--{prefix}multiple must be at least 1')
    return protocol

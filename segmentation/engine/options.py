"""Command-line options of dense models, in groups that ``train.py`` and ``validate.py`` share.

What is left unset (None) comes from the published system that ``--segmenter`` names, or from a checkpoint's run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cluster_zoo.errors import OptionError
from cluster_zoo.training.options import ParseKwargs

from ..models.configs import SegmenterConfig, segmenter_config
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
    """What the model is made of."""
    group = parser.add_argument_group('model')
    add = group.add_argument
    add('--segmenter', metavar='NAME', help='published system, from which everything comes that is not given here')
    add('--head', metavar='NAME', help='semantic_fpn, upernet, deeplabv3plus, fcn or region_proxy')
    add('--backbone', metavar='NAME', help='a registered model, such as coc_tiny or resnet18')
    add('--classifier', metavar='NAME', help='plain, cond (conditional) or dnc (nearest centroids) (default: plain)')
    add('--channels', type=int, metavar='N', help='width of the decoder')
    add('--dropout', type=float, metavar='P', help='probability of dropping a channel before the classifier')
    add('--auxiliary', action=argparse.BooleanOptionalAction, help='an auxiliary head, for training')
    add('--sub-centroids', type=int, metavar='K', help='of each class, with --classifier dnc')
    add('--common-start', type=float, metavar='F', help='how close those of a class start: 0 apart, as published')
    add('--early', type=int, metavar='I', help='layer that region_proxy takes its affinities from (0: the first)')
    add('--num-classes', type=int, metavar='K', help="number of classes (default: the dataset's)")
    add('--model-kwargs', nargs='*', action=ParseKwargs, metavar='K=V', help='further options of decoder and backbone')
    return group


def add_data_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Where images and labels come from, and how images are normalised."""
    group = parser.add_argument_group('dataset')
    add = group.add_argument
    add('data', nargs='?', metavar='DATA', help='folder of the dataset, or a .tar of it')
    add('-d', '--dataset', metavar='NAME', help='folder, camvid, ade20k, cityscapes or pascal_context_59')
    add(
        '--remap',
        nargs='+',
        action=ParseKwargs,
        metavar='LABEL=CLASS',
        help='what the labels of a folder stand for, such as 0=255 1=0 2=1; 255 is ignored',
    )
    add('--mean', type=float, nargs=3, metavar='M', help="normalisation mean, 0..1 scale (default: ImageNet's)")
    add('--std', type=float, nargs=3, metavar='S', help="normalisation standard deviation (default: ImageNet's)")
    return group


def add_test_options(parser: argparse.ArgumentParser, prefix: str = 'test-') -> argparse._ArgumentGroup:
    """How the model is tested. The options begin with `prefix`, their destinations with ``test_`` always."""
    group = parser.add_argument_group('test')

    def add(name: str, **kwargs: Any) -> None:
        group.add_argument(f'--{prefix}{name}', dest=f'test_{name}', **kwargs)

    add('mode', choices=MODES, help='the whole image at once, or windows that slide over it (default: whole)')
    add('crop', type=int, nargs='+', metavar='N', help='side of the windows, or height and width')
    add('stride', type=int, nargs='+', metavar='N', help='from one window to the next (default: their size)')
    add(
        'pad',
        action=argparse.BooleanOptionalAction,
        help='pad images that are smaller than a window; else, windows are as small as they (default)',
    )
    add('scale', type=int, nargs=2, metavar='N', help='resize images into long and short side (default: as they are)')
    add('multiple', type=int, metavar='N', help='round the sides of images up to a multiple')
    return group


def add_runtime_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How and where the model runs."""
    group = parser.add_argument_group('runtime')
    add = group.add_argument
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes, 0: none (default: 4)')
    add('--device', help='device to run on (default: the accelerator that is there, else cpu)')
    add('--amp', action='store_true', help='automatic mixed precision')
    add(
        '--amp-dtype',
        metavar='DTYPE',
        choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: float16, bfloat16 on a CPU)',
    )
    add('--channels-last', action='store_true', help='channels-last memory layout')
    return group


def fill(args: argparse.Namespace, values: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Sets those of the named options that are unset and have a value."""
    for name in names:
        if getattr(args, name, None) is None and values.get(name) is not None:
            setattr(args, name, values[name])


def config_options(config: SegmenterConfig) -> dict[str, Any]:
    """What a published system says about the shared options."""
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
    """Arguments of `create_segmenter`, without its weights. ``args.num_classes`` has to be set.

    Raises:
        OptionError: There is no head, no backbone, or no published system of that name.
    """
    if args.segmenter:
        segmenter_config(args.segmenter)
    if not args.segmenter and not (args.head and args.backbone):
        raise OptionError('no model given: name a published system (--segmenter), or --head and --backbone')
    if args.segmenter and args.head:
        raise OptionError(f'--head {args.head}: --segmenter {args.segmenter} has one already; leave one of them out')
    names = ('classifier', 'channels', 'dropout', 'auxiliary', 'sub_centroids', 'common_start', 'early')
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    options = dict(head=args.segmenter or args.head, backbone=args.backbone, num_classes=args.num_classes)
    return options | given | (args.model_kwargs or {})


def label_remap(args: argparse.Namespace) -> dict[int, int] | None:
    """The class of each label as `create_dataset` takes them, None without ``--remap``.

    Raises:
        OptionError: A label or a class is no number.
    """
    if args.remap is None:
        return None
    try:
        return {int(label): int(number) for label, number in args.remap.items()}
    except (TypeError, ValueError):
        raise OptionError(f'--remap {args.remap}: expected LABEL=CLASS, both numbers') from None


def test_protocol(args: argparse.Namespace) -> dict[str, Any]:
    """Options of `predict`, apart from flip, by the shared test options.

    Raises:
        OptionError: A window has more than two sides, or windows were asked for and whole images too.
    """
    protocol = dict(mode=args.test_mode or 'whole', pad=bool(args.test_pad))
    if protocol['mode'] == 'whole' and {'test_crop', 'test_stride', 'test_pad'} & set(args.given):
        raise OptionError('crop, stride and padding of the test are those of its windows: add mode slide')
    for name in ('crop', 'stride'):
        if (sides := getattr(args, f'test_{name}')) is not None:
            if len(sides) > 2:
                raise OptionError(f'{name} {sides} of the test: expected one number, or height and width')
            protocol[name] = sides[0] if len(sides) == 1 else tuple(sides)
    return protocol

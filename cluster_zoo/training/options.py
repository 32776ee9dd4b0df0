"""Command-line options of ``train.py`` and ``validate.py``, with timm's names and meaning."""

from __future__ import annotations

import argparse

from .parser import ParseKwargs, Parser

__all__ = [
    'LEFT_OUT',
    'add_dataset_options',
    'add_device_options',
    'add_input_options',
    'add_runtime_options',
    'validate_parser',
]

LEFT_OUT = (
    "Options of timm's scripts that are not supported: the NaFlex loader (--naflex-*), which needs models that take "
    'patches, and Weights & Biases logging (--log-wandb, --wandb-*); summary.csv has the same values.'
)


def add_dataset_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of the dataset."""
    group = parser.add_argument_group('dataset')
    add = group.add_argument
    add('data', nargs='?', metavar='DIR', help='folder or tar of images (positional, the same as --data-dir)')
    add('--data-dir', '--data_dir', metavar='DIR', help='folder or tar of images, or root of the dataset')
    add(
        '-d',
        '--dataset',
        default='',
        metavar='NAME',
        help='dataset type + name: empty for folders and tars, torch/..., '
        'hfds/..., hfids/..., wds/..., or cluster_zoo/cifar10_sample (bundled, no directory needed)',
    )
    add('--dataset-download', action='store_true', help='download torch/ and tfds/ datasets that support it')
    add('--class-map', default='', metavar='FILE', help='file that maps class names to indices')
    add('--input-img-mode', metavar='MODE', help='PIL mode of the images (default: RGB, or L for 1 channel)')
    add('--input-key', help='key of the image in a dataset of records')
    add('--target-key', help='key of the label in a dataset of records')
    add('--dataset-trust-remote-code', action='store_true', help="let Hugging Face datasets run the dataset's own code")
    add('--strict', action='store_true', help='fail on an unreadable image (default: skip and count it)')
    return group


def add_input_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of the model's input. The model's ``pretrained_cfg`` has the defaults."""
    group = parser.add_argument_group('input')
    add = group.add_argument
    add('--img-size', type=int, metavar='N', help='image side in pixels')
    add('--in-chans', type=int, metavar='N', help='image channels')
    add('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width (overrides the two above)')
    add('--crop-pct', type=float, metavar='N', help='validation crop over resized image')
    add('--mean', type=float, nargs='+', metavar='M', help='normalization mean, 0..1 scale')
    add('--std', type=float, nargs='+', metavar='S', help='normalization standard deviation')
    add('--interpolation', default='', metavar='NAME', help='resize interpolation of validation')
    return group


def add_device_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of device, precision and data loading that all scripts have."""
    group = parser.add_argument_group('runtime')
    add = group.add_argument
    add('-j', '--workers', type=int, default=4, metavar='N', help='data loading processes, 0: none (default: 4)')
    add('--device', help='device (default: the accelerator of this machine, else cpu)')
    add('--amp', '--native-amp', '--apex-amp', action='store_true', help='automatic mixed precision')
    add(
        '--amp-dtype',
        metavar='DTYPE',
        choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: float16, bfloat16 on a CPU)',
    )
    add('--channels-last', action='store_true', help='channels-last memory layout')
    return group


def add_runtime_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of device, precision, compilation and data loading."""
    group = add_device_options(parser)
    add = group.add_argument
    add('--pin-mem', action='store_true', help='pin memory for faster transfer to the device')
    add('--no-prefetcher', action='store_true', help="do not use timm's prefetcher (never used on a CPU)")
    add(
        '--model-dtype',
        metavar='DTYPE',
        choices=('float32', 'float16', 'bfloat16'),
        help='precision of weights and activations when not using --amp (default: float32)',
    )
    add('--fuser', default='', help="TorchScript fuser: 'te', 'old' or 'nvfuser'")
    add('--fast-norm', action='store_true', help='norm layers in low precision under --amp')
    add('--torchscript', action='store_true', help='torch.jit.script the whole model')
    add('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    add('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    add('--model-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='K=V', help='further model arguments')
    add('--device-modules', nargs='+', metavar='MODULE', help='Python modules to import for a device backend')
    return group


def validate_parser(prog: str = 'validate.py') -> Parser:
    """Returns the parser of ``validate.py``."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s [DIR] [options]',
        description='Measure top-1 and top-5 accuracy and speed of one or several image classifiers.',
        epilog=LEFT_OUT,
    )
    group = add_dataset_options(parser)
    group.add_argument('--split', default='validation', metavar='NAME', help='split to validate on')
    group.add_argument('--num-samples', type=int, metavar='N', help='length of an iterable split')
    group.add_argument('--real-labels', default='', metavar='FILE', help='JSON of the reassessed ImageNet labels')
    group.add_argument('--valid-labels', default='', metavar='FILE', help='class indices of the dataset, one per line')
    add = parser.add_argument_group('model').add_argument
    add(
        '-m',
        '--model',
        default='dpn92',
        metavar='NAMES',
        help='model, several with commas between them, a pattern such as '
        "'coc_*' (those with pretrained weights), 'all', or a file of names",
    )
    add('--pretrained', action='store_true', help='use pretrained weights (always without --checkpoint)')
    add('--checkpoint', default='', metavar='FILE', help='checkpoint file, or folder of checkpoint files')
    add('--use-ema', action='store_true', help='use the averaged weights of the checkpoint')
    add('--num-classes', type=int, metavar='N', help="number of classes (default: the model's)")
    add('--gp', metavar='POOL', help='global pooling: fast, avg, max, avgmax, avgmaxc')
    add('--sub-centroids', type=int, metavar='K', help='sub-centroids per class of a dnc_* model (default: 4)')
    add('--test-pool', action='store_true', help="timm's test-time pooling for larger images")
    add('--reparam', action='store_true', help='fuse reparameterizable branches')
    group = add_input_options(parser)
    group.add_argument('--use-train-size', action='store_true', help='ignore the test image size of the model')
    group.add_argument('--crop-mode', metavar='MODE', help='validation crop: center, squash or border')
    group.add_argument('--crop-border-pixels', type=int, metavar='N', help='pixels that --crop-mode border removes')
    group.add_argument('--tf-preprocessing', action='store_true', help="TensorFlow's preprocessing (needs TensorFlow)")
    group = add_runtime_options(parser)
    add = group.add_argument
    add('-b', '--batch-size', type=int, default=256, metavar='N', help='batch size (default: 256)')
    add('--num-gpu', type=int, default=1, metavar='N', help='number of GPUs (DataParallel)')
    add('--aot-autograd', action='store_true', help='AOT autograd with memory-efficient fusion')
    add('--legacy-jit', dest='fuser', action='store_const', const='old', help='the same as --fuser old')
    add('--seed', type=int, default=42, metavar='N', help='random seed')
    add('--retry', action='store_true', help='retry with a smaller batch size when out of memory')
    add = parser.add_argument_group('results').add_argument
    add('--log-freq', type=int, default=10, metavar='N', help='batches between log lines')
    add('--metrics-avg', choices=['micro', 'macro', 'weighted'], help='add precision, recall and F1, averaged')
    add('--results-file', default='', metavar='FILE', help='write the results to this file, sorted by top-1')
    add('--results-format', default='', choices=('', 'csv', 'json'), help='default: by file name, else csv')
    return parser

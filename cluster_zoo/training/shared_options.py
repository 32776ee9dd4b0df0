"""Command-line options that ``train.py`` and ``validate.py`` share, with timm's names and meaning."""

from __future__ import annotations

import argparse

from .parser import ParseKwargs

__all__ = [
    'LEFT_OUT',
    'add_dataset_options',
    'add_device_options',
    'add_input_options',
    'add_logger_options',
    'add_process_options',
    'add_runtime_options',
]

LEFT_OUT = (
    "Options of timm's scripts that are not supported: the NaFlex loader (--naflex-*), which needs models that take "
    'patches.'
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
    add(
        '--multi-label',
        nargs='+',
        metavar='FILE',
        help='images with several labels: CSV files with the columns file (relative to DIR) and labels (with ; between '
        'them); DIR needs no class folders',
    )
    add(
        '--val-fraction',
        type=float,
        metavar='F',
        help='hold out this fraction of the training images of each class for validation, chosen by --seed',
    )
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
    add(
        '-j',
        '--workers',
        type=int,
        default=4,
        metavar='N',
        help='data loading processes, 0: none (default: 4; on CUDA the processors per process, up to 32)',
    )
    add('--device', help='device (default: the accelerator of this machine, else cpu)')
    add('--amp', '--native-amp', '--apex-amp', action='store_true', help='automatic mixed precision')
    add(
        '--amp-dtype',
        metavar='DTYPE',
        choices=('float16', 'bfloat16'),
        help='lower precision of --amp (default: bfloat16; float16 on a GPU that does not compute in bfloat16)',
    )
    add(
        '--channels-last',
        action=argparse.BooleanOptionalAction,
        help='channels-last memory layout (default on CUDA: on)',
    )
    return group


def add_process_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of several processes."""
    add = group.add_argument
    add('--local_rank', '--local-rank', type=int, default=0, metavar='N', help='set by torch.distributed.launch')
    add(
        '--dist-timeout',
        type=float,
        metavar='SECONDS',
        help="end the run if a process does not answer in this time (default: PyTorch's, 10 minutes on CUDA, else 30)",
    )


def add_runtime_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options of device, precision, compilation and data loading."""
    group = add_device_options(parser)
    add = group.add_argument
    add(
        '--pin-mem',
        action=argparse.BooleanOptionalAction,
        help='pin memory for faster transfer to the device (default on CUDA: on)',
    )
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


def add_logger_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the loggers that get the rows of ``summary.csv``."""
    add = parser.add_argument_group('logging').add_argument
    add('--log-tensorboard', action='store_true', help='write TensorBoard events to the run folder')
    add('--log-wandb', action='store_true', help='log to Weights & Biases')
    add('--log-trackio', action='store_true', help='log to Trackio')
    add('--wandb-project', metavar='NAME', help='project of --log-wandb and --log-trackio')
    add('--wandb-tags', nargs='+', default=[], metavar='TAG', help='tags of the run of --log-wandb')
    add('--wandb-resume-id', default='', metavar='ID', help='continue this run (default: the one of the run folder)')

"""Measure accuracy and speed of image classifiers: ``validate.py`` and ``cluster-zoo validate``.

Read this file from the bottom up: `main` (one result per model), `measure` (builds a model and its loader), `run`
(batches). A checkpoint of ``train.py`` contains the options of its model, images and classes; flags have priority.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm import utils
from timm.data import RealLabelsImagenet, create_loader, resolve_input_data_config
from timm.layers import apply_test_time_pool
from timm.models import is_model, list_models
from timm.task import ClassificationEvaluator, MultiLabelClassificationEvaluator
from tqdm import tqdm

from ..datasets import (
    ImageDataset,
    check_dataset,
    class_names,
    create_dataset,
    find_split,
    hold_out,
    unreadable_images,
)
from ..errors import DataError, OptionError, UserError, print_error
from ..weights import extract_state_dict, load_weights, weights_in_use
from .divergence import finite_metrics
from .loaders import data_root, dataset_options, drop_invalid, loader_options
from .model import check_model_name, create_from_options
from .parser import Parser
from .runtime import (
    build_precision,
    check_output_file,
    model_dtype,
    option_errors,
    set_device_defaults,
    set_up_runtime,
)
from .saved_options import complete_options
from .shared_options import LEFT_OUT, add_dataset_options, add_input_options, add_runtime_options

__all__ = ['main', 'validate_parser']

_logger = logging.getLogger(__name__)

# Weights with other classes than those of ImageNet-1k; `--model all` leaves them out.
_OTHER_CLASSES = ['*in21k', '*in22k', '*in12k', '*dino*', '*fcmae', '*seer', '*.cifar10']


_COMMON = (
    *('data', 'dataset', 'split', 'model', 'checkpoint', 'use_ema', 'num_classes', 'img_size', 'crop_pct'),
    *('batch_size', 'amp', 'device', 'workers', 'results_file'),
)


def validate_parser(prog: str = 'validate.py') -> Parser:
    """Returns the parser of ``validate.py``."""
    parser = Parser(
        prog=prog,
        usage='%(prog)s [DIR] [options]',
        description='Measure top-1 and top-5 accuracy and speed of one or several image classifiers.',
        epilog=LEFT_OUT,
        common=_COMMON,
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
        metavar='NAMES',
        help='model, several with commas between them, a pattern such as '
        "'coc_*' (those with pretrained weights), 'all', or a file of names (default: that of --checkpoint)",
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


@dataclass
class Setup:
    """A model and how its batches are processed."""

    model: torch.nn.Module
    loader: Any
    autocast: Callable[[], AbstractContextManager]
    dtype: torch.dtype
    valid_labels: list[int] | None = None
    real_labels: RealLabelsImagenet | None = None


def select(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Returns the models of ``--model``, each with its checkpoint ('' for pretrained weights)."""
    folder = Path(args.checkpoint)
    if args.checkpoint and folder.is_dir():
        found = [path for kind in ('*.pth.tar', '*.pth', '*.safetensors') for path in folder.glob(kind)]
        if not found:
            raise OptionError(f'--checkpoint {folder}: the folder has no .pth.tar, .pth or .safetensors files')
        return [(args.model or '', str(path)) for path in sorted(found, key=lambda path: utils.natural_key(str(path)))]
    if not (args.model or args.checkpoint):
        raise OptionError('no model given: name one with --model, or a file with --checkpoint')
    names = []
    for name in (args.model or '').split(','):
        name = name.strip()
        if not args.model:
            names.append('')
        elif name == 'all':
            names += list_models(pretrained=True, exclude_filters=_OTHER_CLASSES)
        elif any(character in name for character in '*?['):
            found = list_models(name, pretrained=not args.checkpoint)
            if not found:
                raise OptionError(f'--model {name}: no matching model has pretrained weights; give a --checkpoint')
            names += found
        elif not is_model(name) and Path(name).is_file():
            names += Path(name).read_text().split()
        else:
            check_model_name(name)
            names.append(name)
    return [(name, args.checkpoint) for name in names]


def build_model(args: argparse.Namespace, checkpoint: Any) -> torch.nn.Module:
    """Builds the model with its weights, on the CPU. Without a checkpoint it gets pretrained weights, as in timm."""
    check_model_name(args.model)
    model = create_from_options(args, pretrained=args.pretrained or not args.checkpoint)
    if args.checkpoint:
        load_weights(model, extract_state_dict(checkpoint, args.checkpoint, args.use_ema))
        _logger.info(f'{args.checkpoint}: {args.model}, weights: {weights_in_use(checkpoint, args.use_ema)}')
    return utils.reparameterize_model(model) if args.reparam else model


def build_dataset(args: argparse.Namespace, data_config: dict[str, Any]) -> Any:
    """Opens the split, or the images that ``--val-fraction`` holds out of it, and numbers its classes as the model."""
    options = dataset_options(args, data_config['input_size'][0])
    options |= dict(split=args.split, num_samples=args.num_samples, load_bytes=args.tf_preprocessing)
    if args.real_labels:  # these belong to the images by their order
        options['strict'] = True
    dataset = create_dataset(replace_unreadable=args.tf_preprocessing, **options)
    names, labels = class_names(dataset), args.label_names
    if labels and list(names.values()) != labels and isinstance(dataset, ImageDataset) and names:
        if unknown := sorted(set(names.values()) - set(labels)):
            raise DataError(
                f'The checkpoint has no class {unknown[0]!r}, which {dataset.reader.root} has: it knows '
                f'{", ".join(labels[:5])}{", ..." if len(labels) > 5 else ""}. Number the classes with --class-map.'
            )
        options['class_map'] = {name: index for index, name in enumerate(labels)}
        dataset = create_dataset(replace_unreadable=args.tf_preprocessing, **options)
    return hold_out(dataset, args.val_fraction, args.seed, args.held_out)[1] if args.val_fraction else dataset


def compile_model(model: torch.nn.Module, args: argparse.Namespace) -> torch.nn.Module:
    """Applies ``--torchscript``, ``--torchcompile``, ``--aot-autograd`` and ``--num-gpu``."""
    if args.torchscript:
        with option_errors('--torchscript', AttributeError, TypeError):
            model = torch.jit.script(model)
    elif args.torchcompile:
        torch.compiler.reset()  # the limit of recompilations counts those of earlier models too
        with option_errors(f'--torchcompile {args.torchcompile}'):
            model = torch.compile(model, backend=args.torchcompile, mode=args.torchcompile_mode)
    elif args.aot_autograd:
        from functorch.compile import memory_efficient_fusion

        model = memory_efficient_fusion(model)
    if args.num_gpu > 1:
        if args.num_gpu > torch.cuda.device_count():
            raise OptionError(f'--num-gpu {args.num_gpu}: this machine has {torch.cuda.device_count()}')
        model = torch.nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    return model


def read_labels(args: argparse.Namespace, dataset: Any) -> tuple[list[int] | None, RealLabelsImagenet | None]:
    """Reads the files of ``--valid-labels`` and ``--real-labels``."""
    valid = real = None
    if args.valid_labels:
        with option_errors(f'--valid-labels {args.valid_labels}'):
            valid = [int(line) for line in Path(args.valid_labels).read_text().split()]
    if args.real_labels:
        with option_errors(f'--real-labels {args.real_labels} does not fit this dataset', KeyError):
            top = (1, min(5, args.num_classes))
            real = RealLabelsImagenet(dataset.filenames(basename=True), real_json=args.real_labels, topk=top)
    return valid, real


@torch.inference_mode()
def run(args: argparse.Namespace, setup: Setup, input_size: tuple[int, ...]) -> dict[str, float]:
    """Evaluates the model on the split.

    Returns:
        Accuracies in percent, the number of images, and images per second including loading and decoding.
    """
    layout = dict(memory_format=torch.channels_last) if args.channels_last else {}
    if args.device != 'cpu' or args.torchscript or args.torchcompile or args.aot_autograd:
        # The first batch selects kernels or compiles; the measured time does not include it.
        images = torch.zeros((args.batch_size, *input_size), device=args.device, dtype=setup.dtype).to(**layout)
        with setup.autocast():
            setup.model(images)
    dataset = setup.loader.dataset
    evaluator = (MultiLabelClassificationEvaluator if args.multi_label else ClassificationEvaluator)(args.device)
    confusion = None
    start = time.monotonic()
    bar = tqdm(setup.loader, desc=args.model, leave=False, disable=not sys.stderr.isatty())
    for batch, (images, target) in enumerate(bar):
        images = images.to(args.device, setup.dtype, non_blocking=True, **layout)
        target = target.to(args.device, non_blocking=True)
        with setup.autocast():
            output = setup.model(images)
        if setup.valid_labels is not None:
            output = output[:, setup.valid_labels]
        if setup.real_labels is not None:
            setup.real_labels.add_result(output)
        output, target = drop_invalid(output, target, dataset)
        evaluator.update(output, target)
        if args.metrics_avg:
            classes = output.shape[1]
            pairs = torch.bincount(target * classes + output.argmax(1), minlength=classes**2)
            confusion = pairs if confusion is None else confusion + pairs
        if batch % args.log_freq == 0 or batch + 1 == len(setup.loader):
            speed = evaluator.num_samples / (time.monotonic() - start)
            line = f'{_percent(evaluator.summary())}  {speed:.1f} img/s'.lstrip()
            if bar.disable:
                _logger.info(f'{args.model} [{batch + 1:>4d}/{len(setup.loader)}]  {line}')
            else:
                bar.set_postfix_str(line, refresh=False)
    result = finite_metrics(evaluator.compute())
    if math.isnan(result['loss']):
        _logger.warning(f'{args.model}: some outputs are not finite, so the metrics are NaN')
    del result['loss']
    if setup.real_labels is not None:
        top1, *_, top5 = [*setup.real_labels.get_accuracy().values()] * 2
        result = dict(top1=top1, top5=top5)
    if confusion is not None:
        result |= averages(confusion.view(classes, classes), args.metrics_avg)
    count = evaluator.num_samples
    return result | dict(images=count, img_per_sec=count / (time.monotonic() - start))


def _percent(figures: dict[str, float]) -> str:
    """Returns the main metrics as text."""
    names = dict(top1='top-1', top5='top-5', map='mAP')
    return '  '.join(f'{names[name]} {value:.2f} %' for name, value in figures.items() if name in names)


def averages(confusion: torch.Tensor, how: str) -> dict[str, float]:
    """Returns precision, recall and F1 in percent, averaged over the classes that occur.

    Args:
        confusion: Counts [true class, predicted class].
        how: 'micro' (over images), 'macro' (over classes) or 'weighted' (over classes, weighted by images).
    """
    hits, images, guesses = confusion.diag().double(), confusion.sum(1).double(), confusion.sum(0).double()
    if how == 'micro':
        hits, images, guesses = (x.sum()[None] for x in (hits, images, guesses))
    occurs = images + guesses > 0
    hits, images, guesses = hits[occurs], images[occurs], guesses[occurs]
    weight = images / images.sum() if how == 'weighted' else torch.full_like(images, 1 / len(images))
    # The score of a class without images or predictions is 0.
    precision, recall = hits / guesses.clamp(min=1), hits / images.clamp(min=1)
    f1 = 2 * hits / (images + guesses)
    named = dict(precision=precision, recall=recall, f1_score=f1)
    return {f'{how}_{name}': 100 * float((values * weight).sum()) for name, values in named.items()}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Builds a model and its loader and evaluates it. Sets options that depend on the model."""
    utils.random_seed(args.seed)
    checkpoint = complete_options(args)
    autocast, _ = build_precision(args)
    dtype = model_dtype(args)
    model = build_model(args, checkpoint)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with option_errors('image size'):
        data_config = resolve_input_data_config(model, vars(args), use_test_size=not args.use_train_size)
    test_time_pool = False
    if args.test_pool:
        model, test_time_pool = apply_test_time_pool(model, data_config)
    model = model.to(device=args.device, dtype=dtype).eval()
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)

    dataset = build_dataset(args, data_config)
    valid_labels, real_labels = read_labels(args, dataset)
    check_dataset(dataset, args.num_classes if valid_labels is None else len(valid_labels))
    crop_pct = 1.0 if test_time_pool else data_config['crop_pct']
    with option_errors('validation data', KeyError):
        loader = create_loader(
            dataset,
            batch_size=args.batch_size,
            interpolation=data_config['interpolation'],
            crop_pct=crop_pct,
            crop_mode=data_config['crop_mode'],
            crop_border_pixels=args.crop_border_pixels,
            tf_preprocessing=args.tf_preprocessing,
            **loader_options(args, data_config),
        )
    setup = Setup(compile_model(model, args), loader, autocast, dtype, valid_labels, real_labels)
    result = run(args, setup, data_config['input_size'])
    if skipped := unreadable_images(dataset):
        more = ', ...' if len(skipped) > 3 else ''
        _logger.warning(f'{len(skipped)} unreadable images are left out: {", ".join(skipped[:3])}{more}')
    accuracy = {}
    for name in ('top1', 'top5') if 'top1' in result else ('map',):
        value = result.pop(name)
        accuracy |= {name: round(value, 4)} | ({f'{name}_err': round(100 - value, 4)} if name != 'map' else {})
    return dict(
        model=args.model,
        **accuracy,
        param_count=round(parameters / 1e6, 2),
        img_size=data_config['input_size'][-1],
        crop_pct=crop_pct,
        interpolation=data_config['interpolation'],
        images=result.pop('images'),
        unreadable=len(skipped),
        **{name: round(value, 4) for name, value in result.items()},
        **(dict(checkpoint=args.checkpoint) if args.checkpoint else {}),
    )


def measure_retrying(args: argparse.Namespace) -> dict[str, Any]:
    """Calls `measure` with smaller batches until they fit into memory."""
    while True:
        try:
            return measure(args)
        except (torch.OutOfMemoryError, MemoryError) as error:
            batch_size = utils.decay_batch_step(args.batch_size)
            if not batch_size:
                raise OptionError(f'--model {args.model}: out of memory with a single image') from error
            _logger.warning(f'Out of memory with batches of {args.batch_size}; trying {batch_size}.')
            args.batch_size = batch_size
            if args.device.startswith('cuda'):
                torch.cuda.empty_cache()


def write_results(path: str, results: list[dict[str, Any]], kind: str) -> None:
    """Writes one entry per model as a JSON list or a CSV table."""
    with open(path, 'w', newline='') as file:
        if kind == 'json':
            json.dump(results, file, indent=4)
        else:
            columns = list(dict.fromkeys(name for result in results for name in result))
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(results)


def main(argv: Sequence[str] | None = None, prog: str = 'validate.py') -> int:
    """Runs the script.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.
        prog: Name of the program in messages.

    Returns:
        The exit status: 0, or 2 if no model could be evaluated because of an error of the user.
    """
    logging.basicConfig(format='%(message)s')
    _logger.setLevel(logging.INFO)
    results = []
    try:
        args = validate_parser(prog).resolve(argv)
        models = select(args)
        if not (args.dataset or args.checkpoint):  # a checkpoint may name the split
            find_split(data_root(args), args.split)
        if args.results_file:
            check_output_file('--results-file', args.results_file)
        set_up_runtime(args)
        set_device_defaults(args)
        for name, checkpoint in models:
            # A copy, because `measure` sets options
            options = argparse.Namespace(**{**vars(args), 'model': name, 'checkpoint': checkpoint})
            try:
                results.append((measure_retrying if args.retry or len(models) > 1 else measure)(options))
            except UserError as error:
                if len(models) == 1:
                    raise
                print_error(error, name or checkpoint)
                continue
            result, kind = results[-1], 'held-out images' if options.val_fraction else 'images'
            print(
                f'{result["model"]}: {_percent(result)}  {result["images"]} {kind}  '
                f'{result["param_count"]:.2f} M parameters  {result["img_per_sec"]:.1f} images/s',
                flush=True,
            )
    except UserError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    results.sort(key=lambda result: result['map' if 'map' in result else 'top1'], reverse=True)
    if args.results_file:
        kind = args.results_format or ('json' if args.results_file.endswith('.json') else 'csv')
        write_results(args.results_file, results, kind)
    print(f'--result\n{json.dumps(results if len(models) > 1 else results[0], indent=4)}')
    return 0 if results else 2

"""``cluster-zoo demo``: classifies the bundled images with the bundled weights."""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..datasets import check_dataset, class_names, create_dataset
from ..explain import cluster_map, draw_clusters
from ..predict import classify, load_classifier
from .arguments import DEMO_MODEL, add_device
from .parser import COMMANDS, Commands

DEMO_DATASET = 'cluster_zoo/cifar10_sample'

_PANEL = 128  # side of one image in the figure, pixels
_MARGIN = 8


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    demo = commands.add_parser(
        'demo',
        help=COMMANDS['demo'].help,
        description=f'Classify 1,000 test images of CIFAR-10 with {DEMO_MODEL}, both part of the package, and draw '
        'the clusters of ten images.',
        epilog='examples:\n  cluster-zoo demo\n  cluster-zoo demo --output clusters.png --device cpu\n',
    )
    demo.add_argument(
        '--output', metavar='FILE', type=_image_path, default='demo.png', help='image to write (default: %(default)s)'
    )
    add_device(demo)
    demo.set_defaults(run=_demo)


def _image_path(name: str) -> Path:
    path = Path(name)
    folder = path.absolute().parent
    if path.suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f'{name} has no extension of an image format: use .png')
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f'the folder {folder} does not exist')
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f'{path.absolute()} cannot be written: choose another file')
    return path


def _demo(args: argparse.Namespace) -> None:
    model = load_classifier(DEMO_MODEL, args.device)
    dataset = create_dataset(DEMO_DATASET)
    check_dataset(dataset, model.num_classes, 'test')
    names = class_names(dataset)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f'{DEMO_MODEL}: {parameters / 1e6:.2f} M parameters, on {args.device}', flush=True)

    start = time.perf_counter()
    images, targets = zip(*dataset)
    predictions = [result.classes[0] for result in classify(model, images, top=1, batch_size=100)]
    seconds = time.perf_counter() - start
    top1 = 100 * sum(best.index == target for best, target in zip(predictions, targets)) / len(targets)
    print(f"top-1 {top1:.1f} % of {len(dataset)} of CIFAR-10's test images, {len(dataset) / seconds:.0f} images/s\n")

    shown = [targets.index(label) for label in names]  # the first image of each class
    captions = [names[predictions[index].index] for index in shown]
    print(f'{"image":22} {"label":12} {"prediction":12} probability')
    for index, predicted in zip(shown, captions):
        percent = 100 * predictions[index].probability
        print(f'{dataset.filename(index):22} {names[targets[index]]:12} {predicted:12} {percent:9.1f} %')

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    inputs = torch.stack([transform(images[index]) for index in shown]).to(args.device)
    _draw(model, inputs, captions).save(args.output)
    print(f'\nclusters of these images: {args.output}')


def _draw(model: nn.Module, images: Tensor, captions: Sequence[str]) -> Image.Image:
    """Draws a column for each image: its caption, the model's input, and its clusters in the first three stages."""
    mean, std = (torch.tensor(model.pretrained_cfg[key], device=images.device) for key in ('mean', 'std'))
    pixels = (images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1).cpu()
    inputs = [to_pil_image(image) for image in pixels]
    rows = [inputs]
    for stage in range(3):
        rows.append([draw_clusters(*pair) for pair in zip(inputs, cluster_map(model, images, stage))])

    step = _PANEL + _MARGIN
    font = ImageFont.load_default(16)
    sheet = Image.new('RGB', (_MARGIN + step * len(images), 32 + step * len(rows)), 'white')
    for column, caption in enumerate(captions):
        ImageDraw.Draw(sheet).text((_MARGIN + step * column, 6), caption, 'black', font)
        for row, panels in enumerate(rows):
            panel = panels[column].resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
            sheet.paste(panel, (_MARGIN + step * column, 32 + step * row))
    return sheet

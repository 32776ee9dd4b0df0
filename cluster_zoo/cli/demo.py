"""``cluster-zoo demo``: the bundled images, classified with the bundled weights."""

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..data import check_dataset, class_names, create_dataset
from ..explain import cluster_map, draw_clusters
from ..predict import classify, load_classifier
from .parser import DEMO_MODEL, Commands, add_device

DEMO_DATASET = 'cluster_zoo/cifar10_sample'

_PANEL = 128  # side of one image in the demo's picture, pixels
_MARGIN = 8


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    demo = commands.add_parser(
        'demo',
        help='classify the bundled images with the bundled weights',
        description=f'Classify 1,000 test images of CIFAR-10 with {DEMO_MODEL}, both part of the package, and draw '
        'which points of an image were clustered together.',
        epilog='examples:\n  cluster-zoo demo\n  cluster-zoo demo --output clusters.png --device cpu\n',
    )
    demo.add_argument(
        '--output', metavar='FILE', type=_picture, default='demo.png', help='picture to write (default: %(default)s)'
    )
    add_device(demo)
    demo.set_defaults(run=_demo)


def _picture(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() not in Image.registered_extensions():
        raise argparse.ArgumentTypeError(f'{name} names no picture format; let it end in .png')
    folder = path.absolute().parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {folder}')
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f'nothing can be written into {folder}: {error.strerror}') from error
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(f'{name} can not be written to')
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
    found = [result.classes[0] for result in classify(model, images, top=1, batch_size=100)]
    seconds = time.perf_counter() - start
    top1 = 100 * sum(best.index == target for best, target in zip(found, targets)) / len(targets)
    print(f"top-1 {top1:.1f} % of {len(dataset)} of CIFAR-10's test images, {len(dataset) / seconds:.0f} images/s\n")

    # The first image of each class
    shown = [targets.index(index) for index in names]
    print(f'{"image":22} {"is":12} {"taken for":12} probability')
    for index in shown:
        is_name, taken_for = names[targets[index]], names[found[index].index]
        print(f'{dataset.filename(index):22} {is_name:12} {taken_for:12} {100 * found[index].probability:9.1f} %')

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    inputs = torch.stack([transform(images[index]) for index in shown]).to(args.device)
    draw(model, inputs, [names[found[index].index] for index in shown]).save(args.output)
    print(f'\nclusters of these images: {args.output}')


def draw(model: nn.Module, images: Tensor, captions: Sequence[str]) -> Image.Image:
    """A column for each image: the image as the model saw it, then its clusters in the last block of three stages.

    Args:
        model: A Context Cluster or FEC model.
        images: Normalised images [B, C, H, W].
        captions: What to write above each column.
    """
    mean, std = (torch.tensor(model.pretrained_cfg[key], device=images.device) for key in ('mean', 'std'))
    pixels = (images * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1).cpu()
    photographs = [to_pil_image(image) for image in pixels]
    rows = [photographs]
    for stage in range(3):
        clusters = cluster_map(model, images, stage)
        rows.append([draw_clusters(image, joined) for image, joined in zip(photographs, clusters)])

    step = _PANEL + _MARGIN
    font = ImageFont.load_default(16)
    sheet = Image.new('RGB', (_MARGIN + step * len(images), 32 + step * len(rows)), 'white')
    for column, caption in enumerate(captions):
        ImageDraw.Draw(sheet).text((_MARGIN + step * column, 6), caption, 'black', font)
        for row, pictures in enumerate(rows):
            panel = pictures[column].resize((_PANEL, _PANEL), Image.Resampling.NEAREST)
            sheet.paste(panel, (_MARGIN + step * column, 32 + step * row))
    return sheet

#!/usr/bin/env python3
"""Evaluates segments and contributions of `cluster_zoo.explain`, and other methods on the same images.

    python benchmarks/explain.py segments DATA [--images 50] [--sizes 320 448]
    python benchmarks/explain.py curves [DATA] [--images 200] [--sizes 64 128]

Needs scikit-image (segments) or grad-cam (curves).

segments: DATA has camvid.tar and nuclei.tar, or these folders. The ground truth is the class mask of the test images of
CamVid, whose label 11 is ignored, and one region per nucleus and the background for the validation images of nuclei.
With each number of segments k, `segments` of two models, SLIC of scikit-image and a regular grid are compared. A model
cannot find more segments than its last stage has points: 10 x 10 at 320 x 320 px.

- segments: the number found; parts: the number of connected regions (4 neighbors), which is larger if segments have
  several parts. SLIC and the grid have connected segments. More parts have more boundaries, which raises the recall.
- near: percentage of all pixels with a boundary pixel of the segments in the 5 x 5 pixels around them, which is the
  recall that boundaries at random places would have.
- recall: the same percentage of the boundary pixels of the ground truth. A boundary pixel has another label than its
  right or lower neighbor. Ignored pixels have no boundary.
- error: under-segmentation error, corrected (Neubert and Protzel, 'Superpixel Benchmark and Comparison', 2012): the
  sum over all pairs of a region and a segment of min(pixels of the segment in the region, pixels outside), in percent
  of all pixels, 0 .. 100.
- accuracy: achievable segmentation accuracy, percentage of pixels that are right if each segment gets its most frequent
  region.

curves: areas under the deletion and insertion curves (Petsiuk et al., 'RISE', 2018) of the predicted class's
probability, 0 .. 1. Pixels are replaced by the mean color of the image (deletion), or those of a blurred image by those
of the image (insertion), the most important ones first. DATA is a folder with val, a .tar of images with one folder per
class, or by default the bundled sample of CIFAR-10. A good explanation has a small area of deletion and a large area of
insertion. Pixels of equal importance have a random order. `random points` is a random map with the resolution of the
last stage. It is the control for contributions and Grad-CAM, because scattered pixels (`random pixels`) destroy the
image sooner than coarse regions. Grad-CAM at `norm` is the same as contributions without their negative values. Values
are means over images ± their standard error, and the differences are those of the same image.

Times are medians of one image each, on which the methods take turns. They include the forward pass of the model.
"""

import argparse
import json
import math
import statistics
import sys
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, to_pil_image
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import device_name, machine, positive, print_table  # noqa: E402

from cluster_zoo.datasets import create_dataset  # noqa: E402
from cluster_zoo.explain import cluster_maps, contributions, segments  # noqa: E402
from cluster_zoo.weights import load_checkpoint, load_state_dict  # noqa: E402
from cluster_zoo.weights.loading import load_model  # noqa: E402
from segmentation.data.datasets import create_dataset as create_segmentation_dataset  # noqa: E402

COC, FEC = 'coc_tiny_plain.cifar10', 'fec_small.cifar10'
COUNTS = (10, 25, 50, 100)
MEASURES = dict(segments=1, parts=1, near=1, recall=1, error=1, accuracy=1, ms=0)  # columns and their digits
Truth = tuple[Image.Image, np.ndarray]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest='command', required=True)
    command = commands.add_parser('segments', help='segments of images with masks')
    add = command.add_argument
    add('data', type=Path, help='folder with camvid.tar and nuclei.tar')
    add('--datasets', nargs='+', choices=tuple(DATASETS), default=list(DATASETS))
    add('--fec', default=FEC, metavar='NAME', help='FEC model, or a checkpoint of fec_small (default: %(default)s)')
    add('--untrained', action='store_true', help='fec_small with random weights in place of --fec')
    add('--counts', type=positive, nargs='+', default=list(COUNTS), metavar='K', help='numbers of segments')
    add(
        '--sizes',
        type=positive,
        nargs='+',
        default=[320],
        metavar='PX',
        help='shorter sides of the input of the models',
    )
    _add_shared(command)
    command.set_defaults(run=compare_segments)
    command = commands.add_parser('curves', help='deletion and insertion curves')
    add = command.add_argument
    add('data', type=Path, nargs='?', help='images with one folder per class (default: the bundled CIFAR-10 sample)')
    add('--model', default=COC, help='Context Cluster or FEC model (default: %(default)s)')
    add('--steps', type=positive, default=32, help='steps of a curve (default: %(default)s)')
    add(
        '--sizes',
        type=positive,
        nargs='+',
        default=[None],
        metavar='PX',
        help="sides of the input (default: the model's)",
    )
    _add_shared(command)
    command.set_defaults(run=compare_curves)
    return parser.parse_args()


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--images', type=positive, metavar='N', help='use only N images of each dataset, evenly spaced')
    add('--device', default='cpu')
    add('--json', type=Path, help='also write the results to this file')


def main() -> None:
    args = parse()
    host = machine(args.device)
    print(f'`{" ".join(["python", "benchmarks/explain.py", *sys.argv[1:]])}`')
    print(f'{device_name(host)}, torch {torch.__version__}, {date.today()}\n')
    figures = args.run(args)
    if args.json:
        args.json.write_text(json.dumps(dict(machine=host, date=str(date.today()), figures=figures), indent=2) + '\n')


def timed(function: Callable, *args: Any) -> tuple[Any, float]:
    """Returns the result of a function and its milliseconds. The results are on the CPU, so a GPU has finished."""
    start = time.perf_counter()
    result = function(*args)
    return result, 1000 * (time.perf_counter() - start)


def selected(count: int, most: int | None) -> list[int]:
    """Returns evenly spaced indices, `most` of them or all."""
    return np.linspace(0, count - 1, min(most or count, count)).round().astype(int).tolist()


# Segments


def read_camvid(data: Path, most: int | None) -> Iterator[Truth]:
    """Yields the test images of CamVid and their classes [H, W], -1 for ignored pixels."""
    dataset = create_segmentation_dataset('camvid', _archive(data, 'camvid'), 'test')
    for index in selected(len(dataset), most):
        image, mask = dataset[index]
        yield to_pil_image(image), np.where(mask == dataset.ignore_index, -1, mask)


def read_nuclei(data: Path, most: int | None) -> Iterator[Truth]:
    """Yields the validation images of nuclei and their regions [H, W], 0 for the background."""
    path = _archive(data, 'nuclei')
    archive = tarfile.open(path) if path.is_file() else None  # noqa: SIM115  closed with the process

    def open_file(name: str):
        return archive.extractfile(f'nuclei/{name}') if archive else (path / name).open('rb')

    content = json.load(open_file('annotations/instances_val.json'))
    masks = defaultdict(list)
    for annotation in content['annotations']:
        masks[annotation['image_id']].append(annotation['segmentation'])
    for index in selected(len(content['images']), most):
        entry = content['images'][index]
        regions = np.zeros((entry['height'], entry['width']), int)
        for number, mask in enumerate(masks[entry['id']], 1):
            regions[decode_mask(**mask)] = number
        yield Image.open(open_file(f'val/{entry["file_name"]}')).convert('RGB'), regions


DATASETS = dict(camvid=read_camvid, nuclei=read_nuclei)


def _archive(data: Path, name: str) -> Path:
    found = next((path for path in (data / f'{name}.tar', data / name) if path.exists()), None)
    return found or sys.exit(f'error: no {name}.tar in {data}')


def decode_mask(size: list[int], counts: str) -> np.ndarray:
    """Decodes a compressed mask of COCO: lengths of runs of 0 and 1, column by column, as differences in base 32."""
    runs, value, shift = [], 0, 0
    for character in counts.encode():
        digit = character - 48
        value |= (digit & 31) << shift
        shift += 5
        if digit & 32:  # more digits follow
            continue
        value -= (digit >> 4 & 1) << shift  # the sign
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size[::-1]).T


def boundaries(labels: np.ndarray) -> np.ndarray:
    """Marks the pixels with another label than their right or lower neighbor. Negative labels have no boundary."""
    found = np.zeros(labels.shape, bool)
    known = labels >= 0
    found[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & known[:, :-1] & known[:, 1:]
    found[:-1] |= (labels[:-1] != labels[1:]) & known[:-1] & known[1:]
    return found


def measure(labels: np.ndarray, truth: np.ndarray, tolerance: int = 2) -> dict[str, float]:
    """Compares segments with the ground truth, see the description of this file.

    Args:
        labels: Segments, integers [H, W] from 0.
        truth: Regions, integers [H, W], negative for ignored pixels.
        tolerance: Distance of boundaries in rows and columns.

    Returns:
        Pixels near a boundary of the segments, boundary recall, under-segmentation error and achievable accuracy in
        percent. The recall is NaN if the ground truth has no boundary.
    """
    edges = boundaries(truth)
    near = ndimage.maximum_filter(boundaries(labels), 2 * tolerance + 1, mode='constant')
    known = truth >= 0
    regions = truth[known]
    shape = labels.max() + 1, regions.max() + 1
    overlaps = np.bincount(labels[known] * shape[1] + regions, minlength=math.prod(shape)).reshape(shape)
    outside = overlaps.sum(1, keepdims=True) - overlaps
    return dict(
        near=100 * near.mean(),
        recall=100 * near[edges].mean() if edges.any() else math.nan,
        error=100 * np.minimum(overlaps, outside).sum() / len(regions),
        accuracy=100 * overlaps.max(1).sum() / len(regions),
    )


def count_segments(labels: np.ndarray) -> dict[str, int]:
    """Returns the numbers of segments and of connected parts."""
    from skimage.measure import label

    return dict(segments=len(np.unique(labels)), parts=int(label(labels, background=-1, connectivity=1).max()))


def grid(image: Image.Image, k: int) -> np.ndarray:
    """Returns a grid of about k cells that are as square as possible."""
    rows = min(k, max(1, round(math.sqrt(k * image.height / image.width))))
    columns = max(1, round(k / rows))
    y, x = np.arange(image.height) * rows // image.height, np.arange(image.width) * columns // image.width
    return y[:, None] * columns + x


def slic(image: Image.Image, k: int, **options: Any) -> np.ndarray:
    from skimage.segmentation import slic

    return slic(np.asarray(image), k, start_label=0, **options)


def load_fec(args: argparse.Namespace) -> tuple[str, nn.Module]:
    """Returns the name and the FEC model. A checkpoint is one of fec_small, trained as the bundled weights."""
    if not (args.untrained or Path(args.fec).is_file()):
        return args.fec, load_model(args.fec)
    torch.manual_seed(0)
    if args.untrained:
        name, model = 'fec_small, untrained', timm.create_model('fec_small')
    else:
        name, classes = f'fec_small, {Path(args.fec).name}', len(load_state_dict(args.fec)['head.fc.bias'])
        model = timm.create_model('fec_small', num_classes=classes)
        load_checkpoint(model, args.fec)
    reference = timm.get_pretrained_cfg(COC).to_dict()
    inputs = {key: reference[key] for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')}
    model.pretrained_cfg = {**model.pretrained_cfg, **inputs}
    return name, model


def compare_segments(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a table for each dataset and returns the means."""
    models, methods = {}, {}
    for name, model in (load_fec(args), (COC, load_model(COC))):
        model.to(args.device).eval()
        for size in args.sizes:
            models[f'{name}, {size} px'] = partial(cluster_maps, model, size=size)
            methods[f'{name}, {size} px'] = lambda maps, k, model=model: segments(model, maps, k).labels
    methods |= {'SLIC, compactness 10': partial(slic, compactness=10), 'SLIC, slic_zero': partial(slic, slic_zero=True)}
    methods['grid'] = grid
    results = {}
    for dataset in args.datasets:
        values = {(k, name): defaultdict(list) for k in args.counts for name in methods}
        samples = list(DATASETS[dataset](args.data, args.images))
        for image, truth in tqdm(samples, desc=dataset, leave=False, disable=None):
            maps = {name: timed(function, image) for name, function in models.items()}
            for (k, name), found in values.items():
                source, ms_of_source = maps.get(name, (image, 0.0))
                labels, ms = timed(methods[name], source, k)
                for key, value in (
                    measure(labels, truth) | count_segments(labels) | dict(ms=ms + ms_of_source)
                ).items():
                    found[key].append(value)
        print(f'{dataset}, {len(samples)} images\n')
        rows = [['', 'k', 'segments', 'parts', 'near, %', 'recall, %', 'error, %', 'accuracy, %', 'ms']]
        results[dataset] = []
        for (k, name), found in values.items():
            means = {key: statistics.median(x) if key == 'ms' else float(np.nanmean(x)) for key, x in found.items()}
            results[dataset].append(dict(method=name, k=k, images=len(samples)) | means)
            rows.append([name, str(k), *(f'{means[key]:.{digits}f}' for key, digits in MEASURES.items())])
        print_table(rows)
        print(flush=True)
    return results


# Deletion and insertion


def ranks(importance: Tensor, seed: int) -> Tensor:
    """Returns the position of each pixel [H, W] in descending order of importance. Equal ones have a random order."""
    shuffled = torch.randperm(importance.numel(), generator=torch.Generator().manual_seed(seed))
    order = shuffled[importance.flatten()[shuffled].argsort(descending=True, stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).view(importance.shape)


@torch.inference_mode()
def curve(model: nn.Module, start: Tensor, end: Tensor, rank: Tensor, class_index: int, steps: int) -> np.ndarray:
    """Returns the probability [steps + 1] of a class while pixels of one image [C, H, W] replace those of another."""
    limits = torch.linspace(0, rank.numel(), steps + 1).round().to(rank)
    replaced = (rank < limits.view(-1, 1, 1)).unsqueeze(1).to(start.device)
    return model(torch.where(replaced, end, start)).float().softmax(-1)[:, class_index].cpu().numpy()


def area(values: np.ndarray) -> float:
    """Returns the area under a curve from 0 to 1 by the trapezoidal rule."""
    return float((values[:-1] + values[1:]).mean() / 2)


def upsample(points: np.ndarray | Tensor, size: torch.Size) -> Tensor:
    points = torch.as_tensor(points, dtype=torch.float32)
    return F.interpolate(points[None, None], size, mode='bilinear')[0, 0]


def importances(model: nn.Module) -> dict[str, Callable[[Tensor, int], Tensor]]:
    """Returns functions of an input [C, H, W] and a class to the importance of its pixels [H, W]."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    generator = torch.Generator().manual_seed(0)

    def contribution(image: Tensor, index: int) -> Tensor:
        return upsample(contributions(model, image, class_index=index).points, image.shape[1:])

    def grad_cam(layer: nn.Module, image: Tensor, index: int) -> Tensor:
        with GradCAM(model, [layer]) as cam:  # removes its hooks at the end
            return torch.from_numpy(cam(image.unsqueeze(0), [ClassifierOutputTarget(index)])[0])

    def random_points(image: Tensor, index: int) -> Tensor:
        stride = model.feature_info[-1]['reduction']
        points = torch.rand([-(-side // stride) for side in image.shape[1:]], generator=generator)
        return upsample(points, image.shape[1:])

    def center_first(image: Tensor, index: int) -> Tensor:
        y, x = (torch.arange(side) - (side - 1) / 2 for side in image.shape[1:])
        return -(y.square().unsqueeze(1) + x.square())

    layers = {'Grad-CAM, `norm`': model.norm, 'Grad-CAM, `stages[-1]`': model.stages[-1]}
    return {
        'contributions': contribution,
        **{name: partial(grad_cam, layer) for name, layer in layers.items()},
        'center first': center_first,
        'random points': random_points,
        'random pixels': lambda image, index: torch.rand(image.shape[1:], generator=generator),
    }


def compare_curves(args: argparse.Namespace) -> dict[str, Any]:
    """Prints a table for each size and returns the means."""
    model = load_model(args.model).to(args.device).eval()
    methods, results = importances(model), {}
    for size in args.sizes:
        config = resolve_model_data_config(model)
        config['input_size'] = (3, size, size) if size else config['input_size']
        size = config['input_size'][-1]
        name = '' if args.data else 'cluster_zoo/cifar10_sample'
        dataset = create_dataset(name, args.data, 'val')
        dataset.transform = create_transform(**config)
        areas, times, full = defaultdict(lambda: defaultdict(list)), defaultdict(list), defaultdict(list)
        for index in tqdm(selected(len(dataset), args.images), desc=f'{size} px', leave=False, disable=None):
            image, label = dataset[index]
            image = image.to(args.device)
            mean = image.mean((1, 2), keepdim=True).expand_as(image)
            blurred = gaussian_blur(image, 11, 5.0)
            with torch.inference_mode():
                probabilities = model(torch.stack([image, mean, blurred])).softmax(-1).cpu()
            predicted = int(probabilities[0].argmax())
            full['accuracy'].append(float(predicted == label))
            for key, probability in zip(('image', 'mean color', 'blurred'), probabilities[:, predicted]):
                full[key].append(float(probability))
            for name, function in methods.items():
                importance, ms = timed(function, image, predicted)
                times[name].append(ms)
                rank = ranks(importance, index)
                for key, start, end in (('deletion', image, mean), ('insertion', blurred, image)):
                    areas[name][key].append(area(curve(model, start, end, rank, predicted, args.steps)))
        means = {key: statistics.mean(values) for key, values in full.items()}
        print(
            f'`{args.model}`, {size} px, {len(full["image"])} images, {args.steps} steps; accuracy '
            f'{100 * means["accuracy"]:.1f} %; mean probability of the predicted class: image {means["image"]:.3f}, '
            f'mean color {means["mean color"]:.3f}, blurred image {means["blurred"]:.3f}\n'
        )
        baseline = areas['contributions']
        rows = [['order', 'deletion, lower is better', 'insertion, higher is better']]
        rows[0] += ['deletion - that of contributions', 'insertion - that of contributions', 'ms']
        results[size] = dict(full=means, areas={})
        for name, found in areas.items():
            found |= {f'{key} difference': np.subtract(found[key], baseline[key]) for key in list(found)}
            summary = {key: (float(np.mean(x)), _standard_error(x)) for key, x in found.items()}
            summary['ms'] = statistics.median(times[name])
            results[size]['areas'][name] = summary
            cells = [f'{summary[key][0]:.4f} ± {summary[key][1]:.4f}' for key in found]
            cells[2:] = ['', ''] if found is baseline else cells[2:]
            rows.append([name, *cells, f'{summary["ms"]:.1f}'])
        print_table(rows)
        print(flush=True)
    return results


def _standard_error(values: list[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


if __name__ == '__main__':
    main()

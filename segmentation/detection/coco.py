"""Images with annotated objects in COCO's format, read from a folder or directly from a tar.

A dataset has the folders ``annotations``, with ``instances_SPLIT.json`` for each split, and ``SPLIT`` with its images.
`create_dataset` checks the annotations and says what is wrong before training starts; `CocoDataset.check` decodes all
images.
"""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib import import_module
from posixpath import join
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from tqdm.contrib.concurrent import thread_map

from cluster_zoo.errors import DataError, OptionError, nearest, one_line, quoted

from ..data.files import Archive, Folder, open_files, read_image
from .conventions import resized

__all__ = ['CocoDataset', 'RandomCrop', 'coco_backend', 'create_dataset', 'eval_transform', 'train_transform']

_logger = logging.getLogger(__name__)

_LISTED = 3  # number of annotations that a line lists
_TOLERANCE = 1.0  # pixels that a box may reach out of its image without a remark


def coco_backend() -> tuple[str, ModuleType]:
    """Returns the installed library for COCO, its name for torchmetrics and its functions on run-length encodings.

    Raises:
        OptionError: None is installed.
    """
    for name, module in (('faster_coco_eval', 'faster_coco_eval.core.mask'), ('pycocotools', 'pycocotools.mask')):
        try:
            logging.getLogger(name).setLevel(logging.WARNING)  # faster_coco_eval logs its own table of results
            return name, import_module(module)
        except ModuleNotFoundError:
            continue
    raise OptionError("Detection needs faster-coco-eval or pycocotools: pip install 'cluster_zoo[detection]'")


class _Object(NamedTuple):
    label: int  # 1 to K
    box: tuple[float, float, float, float]  # x1, y1, x2, y2
    area: float  # pixels
    crowd: bool
    segmentation: Any  # polygons or run-length encoding; None without masks


class _Image(NamedTuple):
    file: str
    height: int
    width: int
    id: int
    objects: list[_Object]


class CocoDataset(Dataset):
    """Images with objects, see `create_dataset`.

    Attributes:
        classes: Names of the K classes; label i has the name ``classes[i - 1]``.
        transform: Applied to (image, target) if not None.
    """

    def __init__(
        self, files: Folder | Archive, images: list[_Image], classes: list[str], masks: bool, transform: Callable | None
    ) -> None:
        self.files = files
        self.images = images
        self.classes = classes
        self.masks = masks
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Returns the path of an image in the dataset's folder or archive."""
        return self.images[index].file

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Reads an image with its objects.

        Returns:
            The image, uint8 [3, H, W], and the target, a dictionary of ``boxes`` float32 [N, 4] (x1, y1, x2, y2 in
            pixels), ``labels`` int64 [N], 1 to K, ``masks`` uint8 [N, H, W], ``area`` float32 [N], ``iscrowd`` int64
            [N] and ``image_id``; or the output of the transform. Image, boxes and masks are torchvision's tv_tensors.

        Raises:
            DataError: The image cannot be decoded or has another size than in the annotations.
        """
        image, record = self._read(index), self.images[index]
        size, objects = (record.height, record.width), record.objects
        target: dict[str, Any] = {'image_id': record.id}
        if self.masks:
            masks = [self._mask(found.segmentation, size) for found in objects]
            kept = [i for i, mask in enumerate(masks) if mask.any()]  # a polygon between the centers of pixels has none
            objects = [objects[i] for i in kept]
            stacked = np.stack([masks[i] for i in kept]) if kept else np.zeros((0, *size), np.uint8)
            target['masks'] = tv_tensors.Mask(torch.from_numpy(stacked))
        boxes = torch.tensor([found.box for found in objects], dtype=torch.float32).reshape(-1, 4)
        target['boxes'] = tv_tensors.BoundingBoxes(boxes, format='XYXY', canvas_size=size)
        target['labels'] = torch.tensor([found.label for found in objects], dtype=torch.int64)
        target['area'] = torch.tensor([found.area for found in objects], dtype=torch.float32)
        target['iscrowd'] = torch.tensor([found.crowd for found in objects], dtype=torch.int64)
        return (image, target) if self.transform is None else self.transform(image, target)

    def check(self, workers: int = 1) -> None:
        """Decodes every image.

        Args:
            workers: Number of threads.

        Raises:
            DataError: An image is invalid, see `__getitem__`; the message lists the first ones.
        """

        def read(index: int) -> str | None:
            try:
                self._read(index)
            except DataError as error:
                return str(error)

        faults = thread_map(read, range(len(self)), max_workers=workers, desc='Checking the images', disable=None)
        if faults := list(filter(None, faults)):
            raise DataError(
                f'{len(faults)} of {len(self)} images cannot be used: {_listed(faults, "; ")}. Repair or remove them'
            )

    def _read(self, index: int) -> tv_tensors.Image:
        record = self.images[index]
        image = F.to_image(read_image(self.files, record.file))
        if tuple(image.shape[1:]) != (record.height, record.width):
            raise DataError(
                f'{self.files.root / record.file} is {image.shape[2]} x {image.shape[1]} pixels, in the annotations '
                f'{record.width} x {record.height}'
            )
        return image

    def _mask(self, segmentation: Any, size: tuple[int, int]) -> np.ndarray:
        _, rle = coco_backend()  # no attribute, as a module cannot be pickled
        if isinstance(segmentation, list):
            segmentation = rle.merge(rle.frPyObjects(segmentation, *size))
        elif isinstance(segmentation['counts'], list):
            segmentation = rle.frPyObjects(segmentation, *size)
        return rle.decode(segmentation)


class RandomCrop:
    """Cuts a random square that has the given side after the detector's resize, with the objects in it.

    The square is cut before the resize, which is cheaper. A detector whose ``transform.crop`` is ``side`` resizes it.

    Args:
        side: Side of the square in pixels of the resized image. It is the whole short side of images that are smaller.
        min_size: Short sides that images are resized to; one of them is drawn for each image.
        max_size: Limit of the long side.
    """

    def __init__(self, side: int, min_size: Sequence[int], max_size: int) -> None:
        self.side = side
        self.min_size = tuple(min_size)
        self.max_size = max_size
        self.drop_outside = v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_per_object)

    def __call__(self, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Crops the image, tv_tensors.Image [3, H, W], and its target, see `CocoDataset`."""
        H, W = image.shape[-2:]
        short = self.min_size[int(torch.randint(len(self.min_size), ()))]
        side = min(H, W, round(self.side * H / resized((H, W), short, self.max_size)[0]))
        top, left = (int(torch.randint(length - side + 1, ())) for length in (H, W))

        def crop(x: Any) -> Any:
            return F.crop(x, top, left, side, side) if isinstance(x, tv_tensors.TVTensor) else x

        return self.drop_outside(crop(image), {name: crop(value) for name, value in target.items()})


def _per_object(sample: tuple[Tensor, dict[str, Any]]) -> tuple[Tensor, ...]:
    """Returns what a target has for each object beside its boxes and masks. Workers that are not forked pickle this."""
    return tuple(sample[1][name] for name in ('labels', 'area', 'iscrowd'))


def train_transform(flip: float = 0.5, crop: RandomCrop | None = None) -> Callable:
    """Returns the transform of training images: a crop, a horizontal flip, then float32 images, 0 to 1."""
    return v2.Compose([*([crop] if crop else []), v2.RandomHorizontalFlip(flip), eval_transform()])


def eval_transform() -> Callable:
    """Returns the transform of validation images to float32, 0 to 1. Detectors resize and normalize the images."""
    types = {tv_tensors.Image: torch.float32, 'others': None}
    return v2.Compose([v2.ToDtype(types, scale=True), v2.ToPureTensor()])


def create_dataset(
    root: str, split: str, transform: Callable | None = None, masks: bool = True, crowd: bool = False
) -> CocoDataset:
    """Opens a split of a dataset in COCO's format.

    Annotations that no detector can learn are left out, and boxes are cut at the borders of the image; one warning for
    each kind has their number.

    Args:
        root: Folder of the dataset, or an uncompressed tar of it.
        split: Name of the split, such as ``'train2017'``.
        transform: See `CocoDataset`.
        masks: Whether the targets have masks.
        crowd: Whether the targets have the annotations of crowds, which are for the evaluation only.

    Raises:
        DataError: The dataset or the split does not exist, or the annotations are not usable: a line for each kind of
            problem.
    """
    files = open_files(root)
    inside = files.folders('')
    top = inside[0] if len(inside) == 1 and not files.exists('annotations') else ''
    path = join(top, 'annotations', f'instances_{split}.json')
    folder = join(top, 'annotations')
    known = [file for file in files.below(folder) if file.endswith('.json')] if files.exists(folder) else []
    if path not in known:
        splits = [file.rpartition('instances_')[2].removesuffix('.json') for file in known if 'instances_' in file]
        found = f'found {_listed(splits)}{nearest(split, splits)}' if splits else 'found none'
        raise DataError(f'{root} has no split {split!r}: expected {path} and the images in {join(top, split)}, {found}')
    reader = _Reader(files, path, join(top, split), masks, crowd)
    return CocoDataset(files, reader.images, reader.classes, masks, transform)


class _Reader:
    """Reads and checks a file of annotations."""

    def __init__(self, files: Folder | Archive, path: str, folder: str, masks: bool, crowd: bool) -> None:
        self.path, self.masks, self.crowd = files.root / path, masks, crowd
        self.rle = coco_backend()[1] if masks else None
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.notes: dict[str, list[str]] = defaultdict(list)
        content = self._content(files.read(path))
        categories = sorted(content['categories'], key=lambda category: category['id'])
        self.classes = [str(category['name']) for category in categories]
        self.labels = {category['id']: label for label, category in enumerate(categories, start=1)}
        if not categories or len({*self.classes}) < len(categories) or len(self.labels) < len(categories):
            raise DataError(f'{self.path}: the categories must have distinct ids and names, at least one')
        self.by_id: dict[int, _Image] = {}
        existing = set(files.below(folder)) if files.exists(folder) else set()
        for record in content['images']:
            self._add_image(record, folder, existing)
        for annotation in content['annotations']:
            self._add_annotation(annotation)
        self.images = list(self.by_id.values())
        self._report()

    def _content(self, data: bytes) -> dict[str, list[dict[str, Any]]]:
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DataError(f'{self.path} is not a JSON file: {one_line(error)}') from error
        required = dict(images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'))
        required['annotations'] = ('id', 'image_id', 'category_id', 'bbox', *(['segmentation'] if self.masks else []))
        for name, keys in required.items():
            entries = content.get(name) if isinstance(content, dict) else None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise DataError(f'{self.path} is not in the format of COCO: it has no list {name!r}')
            for entry in entries:
                if missing := [key for key in keys if not _is_valid(key, entry.get(key))]:
                    hint = ' (detectors of boxes alone need none)' if 'segmentation' in missing else ''
                    raise DataError(
                        f'{self.path}: an entry of {name!r} has no valid {" and ".join(missing)}{hint}: {quoted(entry)}'
                    )
        if not content['images']:
            raise DataError(f'{self.path} has no images')
        return content

    def _add_image(self, record: dict[str, Any], folder: str, existing: set[str]) -> None:
        file = join(folder, record['file_name'])
        if record['id'] in self.by_id:
            self.faults['images have the id of another one'].append(f'{record["id"]} of {file}')
        if file not in existing:
            self.faults['image files are missing'].append(file)
        self.by_id[record['id']] = _Image(file, int(record['height']), int(record['width']), record['id'], [])

    def _add_annotation(self, annotation: dict[str, Any]) -> None:
        image = self.by_id.get(annotation['image_id'])
        where = f'annotation {annotation["id"]} of {image.file if image else "image " + str(annotation["image_id"])}'
        if image is None:
            self.faults['annotations are of an image that is not listed'].append(where)
            return
        if annotation['category_id'] not in self.labels:
            self.faults['annotations have an unknown category'].append(f'{where}: {annotation["category_id"]}')
            return
        x, y, width, height = annotation['bbox']
        x1, x2 = (min(max(value, 0), image.width) for value in (x, x + width))
        y1, y2 = (min(max(value, 0), image.height) for value in (y, y + height))
        crowd, segmentation = bool(annotation.get('iscrowd', 0)), annotation.get('segmentation') if self.masks else None
        if width <= 0 or height <= 0:
            self.notes['boxes have no area and are left out'].append(where)
        elif x1 >= x2 or y1 >= y2:
            self.notes['boxes are outside of their image and are left out'].append(where)
        elif crowd and not self.crowd:
            self.notes['annotations of crowds are left out of the training'].append(where)
        elif self.masks and (problem := _mask_problem(segmentation, image, self.rle)):
            (self.faults if 'size' in problem else self.notes)[problem].append(where)
        else:
            if max(-x, -y, x + width - image.width, y + height - image.height) > _TOLERANCE:
                self.notes['boxes reach out of their image and are cut'].append(where)
            area = annotation.get('area')
            area = area if _is_number(area) and area > 0 else (x2 - x1) * (y2 - y1)
            label = self.labels[annotation['category_id']]
            image.objects.append(_Object(label, (x1, y1, x2, y2), area, crowd, segmentation))

    def _report(self) -> None:
        for what, where in self.notes.items():
            _logger.warning(f'{self.path}: {len(where)} {what}: {_listed(where)}')
        if self.faults:
            lines = (f'{len(where)} {what}: {_listed(where)}' for what, where in self.faults.items())
            raise DataError('\n'.join([f'{self.path} cannot be used:', *lines]))
        if not any(image.objects for image in self.images):
            raise DataError(f'{self.path} has no usable annotations')


def _is_valid(key: str, value: Any) -> bool:
    """Whether the value of a required key has the right type."""
    if key == 'bbox':
        return isinstance(value, list) and len(value) == 4 and all(map(_is_number, value))
    if key in ('file_name', 'name'):
        return isinstance(value, str) and value != ''
    if key == 'segmentation':
        return isinstance(value, (list, dict))
    return isinstance(value, int) and (key not in ('width', 'height') or value > 0)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mask_problem(segmentation: Any, image: _Image, rle: ModuleType) -> str:
    """Returns what is wrong with a mask; '' if nothing is."""
    if isinstance(segmentation, list):
        valid = all(
            isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation
        )
        return '' if segmentation and valid else 'masks are empty and are left out'
    if segmentation.get('size') != [image.height, image.width]:
        return 'masks do not have the size of their image'
    counts = segmentation.get('counts')
    if isinstance(counts, list):
        if not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != image.height * image.width:
            return 'masks do not have the size of their image'
        empty = not any(counts[1::2])
    else:
        empty = not isinstance(counts, str) or rle.area(segmentation) == 0
    return 'masks are empty and are left out' if empty else ''


def _listed(items: list[str], separator: str = ', ') -> str:
    return separator.join(map(one_line, items[:_LISTED])) + (', ...' if len(items) > _LISTED else '')

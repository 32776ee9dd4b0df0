"""Features of the images of a dataset, as a nearest-centroid model compares them with its centroids."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.utils import unwrap_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from .errors import DataError
from .layers.nearest_centroid import centroid_head

_logger = logging.getLogger(__name__)


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    return create_transform(**resolve_model_data_config(unwrap_model(model)))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the time being; afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def record_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list to whose end each forward pass adds what reaches a module."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


class IndexedImages(Dataset):
    """A dataset of PIL images, read as: index, input of the model, class; or None for an image that is not readable.

    The transform is applied here, so that the pictures themselves can be had too and the dataset need not be changed.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Tensor]):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
            raise ValueError('The images of a streamed dataset have no numbers: take a folder or an archive of images.')
        if len(dataset) == 0:
            raise ValueError('The dataset has no images.')
        self.dataset = copy.copy(dataset)
        if hasattr(dataset, 'transform'):
            self.dataset.transform = None
        if hasattr(dataset, 'strict'):
            self.dataset.strict = True  # an image that took the place of another would go by a wrong name
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int] | None:
        try:
            picture, target = self.dataset[index][:2]
        except DataError as error:
            _logger.warning('Skipped: %s', error)
            return None
        if not isinstance(picture, Image.Image):
            raise ValueError(
                f'Item {index} of the dataset is a {type(picture).__name__}, expected a PIL image: '
                'leave the transform of the dataset out.'
            )
        return index, self.transform(picture), int(target)

    def name(self, index: int) -> str:
        """Name of the image's file, or its number."""
        filename = getattr(self.dataset, 'filename', None)
        return str((filename and filename(index)) or index)

    def thumbnail(self, index: int, side: int) -> Tensor:
        """uint8 [3, T, T]; black for index -1."""
        if index < 0:
            return torch.zeros(3, side, side, dtype=torch.uint8)
        picture = self.dataset[index][0].convert('RGB')
        return pil_to_tensor(ImageOps.fit(picture, (side, side), Image.Resampling.LANCZOS))


def check_pooled(features: Tensor) -> None:
    """Raise ValueError unless there is one feature an image, [B, D]."""
    if features.ndim != 2:
        raise ValueError(f'The head gets features {list(features.shape)}, expected one an image: keep the pooling.')


def _readable(batch: list[tuple | None]) -> list[Tensor] | None:
    batch = [item for item in batch if item is not None]
    return default_collate(batch) if batch else None


def iterate_features(
    model: nn.Module,
    images: IndexedImages,
    loading: dict[str, int],
    only: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of numbers [B], features before the head's norm [B, D], and classes [B], in order.

    Args:
        model: A model with a nearest-centroid head, in evaluation mode.
        images: The dataset.
        loading: Arguments of ``DataLoader``.
        only: Numbers of the images to read; all if None.
        num_classes: Classes that the images may have; any from 0 on if None.

    Raises:
        ValueError: An image is of another class, none is readable, or features are NaN or infinite.
    """
    head = centroid_head(model)
    model, found = unwrap_model(model), 0  # a compiled graph may not know of the hook
    with record_inputs(head) as seen:
        for batch in tqdm(DataLoader(images, sampler=only, collate_fn=_readable, **loading), disable=None):
            if batch is None:
                continue
            index, inputs, target = batch
            wrong = (target < 0) | (target >= num_classes if num_classes else False)
            if wrong.any():
                have = f'the classes of the model are 0 to {num_classes - 1}' if num_classes else 'they start from 0'
                raise ValueError(f'The dataset has an image of class {target[wrong][0].item()}, but {have}.')
            model(inputs.to(head.prototypes))
            features = seen.pop()
            check_pooled(features)
            if not features.isfinite().all():
                raise ValueError(f'The model gives NaN or infinite features, among images {index[0]} to {index[-1]}.')
            yield index, features, target
            found += len(index)
    if not found:
        raise ValueError('The dataset has no readable images.')

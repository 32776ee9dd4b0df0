"""Features of the images of a dataset, read at the input of a nearest-centroid head."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import unwrap_model
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from tqdm import tqdm

from .errors import DataError
from .layers.nearest_centroid import centroid_head

_logger = logging.getLogger(__name__)


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """Returns timm's evaluation transform of a model."""
    return create_transform(**resolve_model_data_config(unwrap_model(model)))


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode and restores the mode of each module afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def record_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Records the first input of each call of a module in a list."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


class IndexedImages(Dataset):
    """Adds its index to each sample of a dataset of PIL images, and applies a transform.

    A sample is (index, input [C, H, W], label), or None if the image is not readable. The given dataset stays
    unchanged, and its own transform is not used.
    """

    def __init__(self, dataset: Dataset, transform: Callable[[Image.Image], Tensor]):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, '__len__'):
            raise ValueError('The images of a streamed dataset have no index: use a folder or an archive of images.')
        if len(dataset) == 0:
            raise ValueError('The dataset has no images.')
        self.dataset = copy.copy(dataset)
        if hasattr(dataset, 'transform'):
            self.dataset.transform = None
        if hasattr(dataset, 'strict'):
            self.dataset.strict = True  # otherwise the next image replaces an unreadable one under the wrong index
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Tensor, int] | None:
        try:
            image, target = self.dataset[index][:2]
        except DataError as error:
            _logger.warning('Skipped: %s', error)
            return None
        if not isinstance(image, Image.Image):
            raise ValueError(
                f'Item {index} of the dataset is a {type(image).__name__}, expected a PIL image: '
                'remove the transform of the dataset.'
            )
        return index, self.transform(image), int(target)

    def name(self, index: int) -> str:
        """Returns the file name of an image, or its index if the dataset has no file names."""
        filename = getattr(self.dataset, 'filename', None)
        return str((filename and filename(index)) or index)


def check_pooled(features: Tensor) -> None:
    """Raises ValueError unless there is one feature per image, [B, D]."""
    if features.ndim != 2:
        raise ValueError(
            f'The head gets features of shape {list(features.shape)}, expected one per image: keep the pooling.'
        )


def _collate_readable(batch: list[tuple | None]) -> list[Tensor] | None:
    batch = [item for item in batch if item is not None]
    return default_collate(batch) if batch else None


def iterate_features(
    model: nn.Module,
    images: IndexedImages,
    loader_kwargs: dict[str, Any],
    indices: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields indices [B], inputs of the nearest-centroid head [B, D] and labels [B] of each batch, in order.

    Args:
        model: A model in evaluation mode.
        images: The images.
        loader_kwargs: Arguments of ``DataLoader``.
        indices: Indices of the images to read, all by default.
        num_classes: Upper bound of the labels, no upper bound by default.

    Raises:
        ValueError: A label is out of range, no image is readable, or features are NaN or infinite.
    """
    head = centroid_head(model)
    model = unwrap_model(model)  # a compiled graph may skip the hook
    found = False
    with record_inputs(head) as recorded:
        for batch in tqdm(
            DataLoader(images, sampler=indices, collate_fn=_collate_readable, **loader_kwargs), disable=None
        ):
            if batch is None:
                continue
            index, inputs, target = batch
            wrong = (target < 0) | (target >= num_classes if num_classes else False)
            if wrong.any():
                expected = (
                    f'the classes of the model are 0 to {num_classes - 1}' if num_classes else 'labels start at 0'
                )
                raise ValueError(f'The dataset has an image of class {target[wrong][0].item()}, but {expected}.')
            model(inputs.to(head.prototypes))
            features = recorded.pop()
            check_pooled(features)
            if not features.isfinite().all():
                raise ValueError(f'The model gives NaN or infinite features for images {index[0]} to {index[-1]}.')
            yield index, features, target
            found = True
    if not found:
        raise ValueError('The dataset has no readable images.')

"""Explanations by nearest centroids: the training images that the centroids represent, and the nearest ones.

Paper: 'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3

After training, `anchor` replaces each sub-centroid by the feature of a training image. Then `explain` shows
which training images an image is most similar to, and these similarities determine the prediction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.utils import unwrap_model
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from ..features import IndexedImages, check_pooled, eval_mode, eval_transform, iterate_features, record_inputs
from ..layers.anchors import MAX_SIDE, AnchoredImage
from ..layers.nearest_centroid import NearestCentroidHead, centroid_head

__all__ = ['Anchoring', 'Explanation', 'Neighbour', 'anchor', 'explain']


@dataclass(frozen=True, eq=False)
class Anchoring:
    """Result of replacing centroids by training images.

    Attributes:
        accuracy_before: Top-1 accuracy with the learned centroids, 0 .. 1.
        accuracy_after: Top-1 accuracy with the training images as centroids, 0 .. 1.
        measured_on: Images that the accuracy is measured on: ``'validation'`` or ``'training'``.
        index: Index of each sub-centroid's image in the training dataset, int64 [K, k]; -1 for no image.
        similarity: Cosine similarity of each learned centroid and its image, [K, k], -1 .. 1; NaN for no image.
    """

    accuracy_before: float
    accuracy_after: float
    measured_on: str
    index: Tensor
    similarity: Tensor

    def __str__(self) -> str:
        found = self.index >= 0
        return (
            f'{int(found.sum())} of {found.numel()} sub-centroids replaced by training images, mean similarity '
            f'{self.similarity[found].mean():.3f}; top-1 on the {self.measured_on} images: '
            f'{100 * self.accuracy_before:.2f} % before, {100 * self.accuracy_after:.2f} % after'
        )


def anchor(
    model: nn.Module,
    dataset: Dataset,
    val_dataset: Dataset | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    thumbnail: int = 48,
    transform: Callable[[Image.Image], Tensor] | None = None,
) -> Anchoring:
    """Replaces each sub-centroid by the feature of its nearest training image of the class (section 3).

    The sub-centroids of a class get different images: the most similar pair of sub-centroid and image first, then the
    most similar pair of the remaining ones. A class with fewer images than sub-centroids uses images repeatedly, and a
    class without images keeps its centroids. The head records the images, and the record is saved with the model.

    Args:
        model: A trained model that ends in a `NearestCentroidHead`, which may be compiled or wrapped. It is modified in
            place.
        dataset: Training images, a map-style dataset of PIL images and labels. Its own ``transform`` is not used, and
            unreadable images are skipped.
        val_dataset: Images to measure the accuracy on, the training images by default.
        batch_size: Images per batch.
        num_workers: Worker processes that read images; 0 reads them in this process.
        thumbnail: Height and width of the recorded thumbnails, 1 .. 256 pixels.
        transform: From a PIL image to the model's input [C, H, W]; timm's evaluation transform of the model by default.
            Needed if the model was trained at another size than that of its configuration.

    Returns:
        Accuracy before and after, and the similarity of images and centroids.

    Raises:
        ValueError: The model has no centroid head, the dataset is empty or iterable-style, a label is out of range, or
            features are NaN or infinite. The model stays unchanged, as after any other error.
    """
    head = centroid_head(model)
    if not 1 <= thumbnail <= MAX_SIDE:
        raise ValueError(f'A thumbnail has 1 to {MAX_SIDE} pixels per side, got {thumbnail}.')
    images = IndexedImages(dataset, transform or eval_transform(model))
    val_images = images if val_dataset is None else IndexedImages(val_dataset, images.transform)
    loader_kwargs = dict(batch_size=batch_size, num_workers=num_workers)

    with eval_mode(model), torch.no_grad():
        index, similarity = _assign_images(*_nearest_images(model, head, images, loader_kwargs))
        prototypes = head.prototypes.clone()
        used = index[index >= 0].unique().tolist()
        for batch, features, _ in iterate_features(model, images, loader_kwargs, used):
            for i, feature in zip(batch, head.embed(features).to(prototypes)):
                prototypes[(index == i).to(prototypes.device)] = feature
        before, after = _accuracies(model, head, prototypes, val_images, loader_kwargs)

    names, thumbnails = [], []
    for i in index.flatten().tolist():
        names.append(images.name(i) if i >= 0 else '')
        image = images.dataset[i][0].convert('RGB') if i >= 0 else Image.new('RGB', (1, 1))
        thumbnails.append(pil_to_tensor(ImageOps.fit(image, (thumbnail, thumbnail), Image.Resampling.LANCZOS)))
    head.prototypes.copy_(prototypes)
    head.record_anchors(index, names, torch.stack(thumbnails).unflatten(0, index.shape))
    return Anchoring(before, after, 'training' if val_dataset is None else 'validation', index, similarity)


def _nearest_images(
    model: nn.Module, head: NearestCentroidHead, images: IndexedImages, loader_kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Finds the k nearest images of the class for each sub-centroid.

    k candidates are enough for different images, because the other sub-centroids of the class use at most k - 1.

    Returns:
        Similarity [K, k, k] in descending order, -inf for missing images, and index, int64 [K, k, k], -1 for these.
    """
    K, k = head.num_classes, head.sub_centroids
    similarity, index = torch.full((K, k, k), -torch.inf), torch.full((K, k, k), -1)
    for batch, features, target in iterate_features(model, images, loader_kwargs, num_classes=K):
        batch_similarity = head.similarity(features).float().cpu()  # [B, K, k]
        for c in target.unique().tolist():
            members = target == c
            candidates = torch.cat([similarity[c], batch_similarity[members, c].T], -1)  # [k, k + members]
            candidate_index = torch.cat([index[c], batch[members].expand(k, -1)], -1)
            order = candidates.argsort(dim=-1, descending=True, stable=True)[:, :k]
            similarity[c], index[c] = candidates.gather(-1, order), candidate_index.gather(-1, order)
    return similarity, index


def _assign_images(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses one of the candidates [K, k, k] for each sub-centroid, different ones in a class if there are enough.

    Returns:
        Index, int64 [K, k], -1 for no image, and similarity [K, k], NaN for no image.
    """
    # The nearest image is used where no unused one is left.
    chosen, achieved = index[..., 0].clone(), similarity[..., 0].clone()
    for c, remaining in enumerate(similarity.clone()):  # [k, k]
        for _ in range(len(remaining)):
            sub_centroid, candidate = divmod(int(remaining.argmax()), len(remaining))
            if remaining[sub_centroid, candidate] == -torch.inf:
                break
            chosen[c, sub_centroid] = index[c, sub_centroid, candidate]
            achieved[c, sub_centroid] = similarity[c, sub_centroid, candidate]
            remaining[sub_centroid] = -torch.inf
            remaining[index[c] == chosen[c, sub_centroid]] = -torch.inf
    return chosen, achieved.masked_fill(chosen < 0, torch.nan)


def _accuracies(
    model: nn.Module,
    head: NearestCentroidHead,
    prototypes: Tensor,
    images: IndexedImages,
    loader_kwargs: dict[str, Any],
) -> tuple[float, float]:
    """Computes the top-1 accuracy with the head's own centroids and with the given ones."""
    correct, count = torch.zeros(2, dtype=torch.int64), 0
    for _, features, target in iterate_features(model, images, loader_kwargs, num_classes=head.num_classes):
        logits = head(features), torch.func.functional_call(head, dict(prototypes=prototypes), (features,))
        correct += (torch.stack(logits).argmax(-1).cpu() == target).sum(-1)
        count += len(target)
    return tuple((correct / count).tolist())


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A sub-centroid and its similarity to an image.

    Attributes:
        class_index: Index of the class.
        class_name: Name of the class.
        sub_centroid: Index of the sub-centroid in the class.
        similarity: Cosine similarity to the image's feature, -1 .. 1.
        image: The training image that the sub-centroid represents, or None.
    """

    class_index: int
    class_name: str
    sub_centroid: int
    similarity: float
    image: AnchoredImage | None


@dataclass(frozen=True, eq=False)
class Explanation:
    """A prediction and the centroids that it is based on.

    Classes are ranked by their logits, which scale the similarity per class. So a centroid of the competing class may
    be slightly more similar than those of the predicted class.

    Attributes:
        class_index: Index of the predicted class.
        class_name: Name of the predicted class.
        probability: Probability of the predicted class, 0 .. 1.
        neighbours: All sub-centroids of the predicted class, nearest first.
        competitor: Nearest sub-centroid of the second class; None if the model has one class.
        competitor_probability: Probability of the second class; 0 if the model has one class.
    """

    class_index: int
    class_name: str
    probability: float
    neighbours: tuple[Neighbour, ...]
    competitor: Neighbour | None
    competitor_probability: float


def explain(
    model: nn.Module,
    image: Image.Image | Tensor,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> Explanation:
    """Classifies an image and returns the centroids, or training images, that it is most similar to.

    Args:
        model: A model that ends in a `NearestCentroidHead`, preferably an anchored one (`anchor`).
        image: A PIL image, to which timm's evaluation transform of the model is applied; or a normalized tensor
            [C, H, W].
        class_names: Names of the classes, see `cluster_zoo.datasets.class_names`; ``class 0`` and so on if None or
            empty.

    Raises:
        ValueError: The model has no centroid head, the image has another type or shape, or a class has no name.
    """
    head = centroid_head(model)
    names = resolve_class_names(class_names, head.num_classes)
    if isinstance(image, Image.Image):
        image = eval_transform(model)(image.convert('RGB'))
    if not isinstance(image, Tensor) or image.ndim != 3:
        found = f'a tensor {list(image.shape)}' if isinstance(image, Tensor) else f'a {type(image).__name__}'
        raise ValueError(f'Expected a PIL image or a normalized tensor [C, H, W], got {found}.')
    with eval_mode(model), torch.no_grad(), record_inputs(head) as recorded:
        logits = unwrap_model(model)(image.unsqueeze(0).to(head.prototypes))[0].float()
        features = recorded.pop()
        check_pooled(features)
        similarity = head.similarity(features)[0].float().cpu()
    probability = logits.softmax(-1).tolist()
    first, *others = logits.argsort(descending=True, stable=True).tolist()

    def neighbours(c: int) -> tuple[Neighbour, ...]:
        order = similarity[c].argsort(descending=True, stable=True).tolist()
        return tuple(Neighbour(c, names[c], s, similarity[c, s].item(), head.anchored_image(c, s)) for s in order)

    return Explanation(
        class_index=first,
        class_name=names[first],
        probability=probability[first],
        neighbours=neighbours(first),
        competitor=neighbours(others[0])[0] if others else None,
        competitor_probability=probability[others[0]] if others else 0.0,
    )


def resolve_class_names(class_names: Sequence[str] | Mapping[int, str] | None, num_classes: int) -> list[str]:
    """Returns the name of each class, or raises ValueError if a name is missing."""
    if not class_names:
        return [f'class {index}' for index in range(num_classes)]
    named = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
    if sorted(named) != list(range(num_classes)):
        raise ValueError(f'{len(named)} class names given, expected one for each class 0 to {num_classes - 1}.')
    return [str(named[index]) for index in range(num_classes)]

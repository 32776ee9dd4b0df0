"""Why a nearest-centroid model decided: the training images that its centroids stand for, and which are nearest.

Paper: 'Visual Recognition with Deep Nearest Centroids', ICLR 2023, https://arxiv.org/abs/2209.07383, section 3

When training is done, each sub-centroid gives way to the feature of a training image (:func:`anchor`). From then on a
decision has a reason that can be looked at: this image is most like that one (:func:`explain`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn as nn
from PIL import Image
from timm.utils import unwrap_model
from torch import Tensor
from torch.utils.data import Dataset

from ..features import IndexedImages, check_pooled, eval_mode, eval_transform, iterate_features, record_inputs
from ..layers.anchors import MAX_SIDE, AnchoredImage
from ..layers.nearest_centroid import NearestCentroidHead, centroid_head

__all__ = ['Anchoring', 'Explanation', 'Neighbour', 'anchor', 'explain']


@dataclass(frozen=True, eq=False)
class Anchoring:
    """What replacing the centroids by training images did.

    Attributes:
        accuracy_before: Share of images that the learned centroids classify correctly, 0 .. 1.
        accuracy_after: The same of the centroids that are images.
        measured_on: The images of both: ``'validation'`` or ``'training'``.
        index: Image of each sub-centroid, its place in the training dataset, int64 [K, k]; -1 for none.
        similarity: Cosine of the learned centroid to the feature of its image, [K, k], values -1 .. 1; NaN for none.
    """

    accuracy_before: float
    accuracy_after: float
    measured_on: str
    index: Tensor
    similarity: Tensor

    def __str__(self) -> str:
        found = self.index >= 0
        return (
            f'{int(found.sum())} of {found.numel()} sub-centroids are training images now, of mean similarity '
            f'{self.similarity[found].mean():.3f} to what they were; top-1 on the {self.measured_on} images: '
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
    """Replace each sub-centroid by the feature of its nearest training image of the class (section 3).

    The sub-centroids of a class become different images: the pair of greatest similarity first, then the greatest
    among the rest. A class with fewer images than sub-centroids has some of them several times, a class without keeps
    its centroids. The head records the images, and its record is saved with the model.

    Args:
        model: A trained model that ends in a `NearestCentroidHead`, also compiled or wrapped for several processes.
        dataset: Training images: ``dataset[index]`` is a PIL image and its class. A ``transform`` that it has is left
            alone and not used; images that it can not read are skipped.
        val_dataset: Images to measure the accuracy on; the training images if None.
        batch_size: Images at a time.
        num_workers: Processes that read images; 0 for none beside this one.
        thumbnail: Side of the square pictures that are kept of the images, 1 .. 256 pixels.
        transform: From a PIL image to the model's input [C, H, W]; timm's for evaluation of this model if None. A model
            that was trained at another size than its configuration's needs it.

    Returns:
        Accuracy before and after, and how similar the images are to the centroids.

    Raises:
        ValueError: The model has no centroid head, the dataset no images, no numbers, or classes that the model does
            not have, or features are NaN or infinite. The model is then unchanged, as after any other failure.
    """
    head = centroid_head(model)
    if not 1 <= thumbnail <= MAX_SIDE:
        raise ValueError(f'A thumbnail has 1 to {MAX_SIDE} pixels a side, got {thumbnail}.')
    images = IndexedImages(dataset, transform or eval_transform(model))
    measured = images if val_dataset is None else IndexedImages(val_dataset, images.transform)
    loading = dict(batch_size=batch_size, num_workers=num_workers)
    with eval_mode(model), torch.no_grad():
        similarity, index = _nearest_images(model, head, images, loading)
        index, similarity = _distinct(similarity, index)
        prototypes = _with_features(model, head, images, index, loading)
        before, after = _accuracies(model, head, prototypes, measured, loading)
    names = [images.name(i) if i >= 0 else '' for i in index.flatten().tolist()]
    thumbnails = torch.stack([images.thumbnail(i, thumbnail) for i in index.flatten().tolist()])
    head.prototypes.copy_(prototypes)
    head.record_anchors(index, names, thumbnails.unflatten(0, index.shape))
    return Anchoring(before, after, 'training' if val_dataset is None else 'validation', index, similarity)


# ---- Anchoring ----


def _nearest_images(
    model: nn.Module, head: NearestCentroidHead, images: IndexedImages, loading: dict[str, int]
) -> tuple[Tensor, Tensor]:
    """The k images of the class that are nearest to each sub-centroid, nearest first.

    As many are enough for distinct ones: all other sub-centroids of the class take fewer.

    Returns:
        Similarity [K, k, k], -inf where there are fewer images, and index, int64 [K, k, k], there -1.
    """
    K, k = head.num_classes, head.sub_centroids
    similarity, index = torch.full((K, k, k), -torch.inf), torch.full((K, k, k), -1)
    for number, features, target in iterate_features(model, images, loading, num_classes=head.num_classes):
        cosines = head.similarity(features).float().cpu()
        own = cosines[torch.arange(len(target)), target]  # [B, k]
        # The images of the batch as further candidates of their classes, behind the ones found before
        classes, row = target.unique(return_inverse=True)
        candidates = torch.full((len(classes), k, len(target)), -torch.inf)
        candidates[row, :, torch.arange(len(target))] = own
        candidates = torch.cat([similarity[classes], candidates], -1)
        numbers = torch.cat([index[classes], number.expand(len(classes), k, -1)], -1)
        nearest = candidates.argsort(dim=-1, descending=True, stable=True)[..., :k]
        similarity[classes] = candidates.gather(-1, nearest)
        index[classes] = numbers.gather(-1, nearest)
    return similarity, torch.where(similarity > -torch.inf, index, -1)


def _distinct(similarity: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """One of the candidates [K, k, k] for each sub-centroid, different ones in a class as far as they go.

    Returns:
        Index, int64 [K, k], -1 for none, and similarity [K, k], NaN for none.
    """
    K, k, _ = index.shape
    classes = torch.arange(K)
    chosen, achieved = torch.full((K, k), -1), torch.full((K, k), torch.nan)
    left = similarity.clone()
    for _ in range(k):
        best, place = left.flatten(1).max(1)
        some = best > -torch.inf
        sub = place // k
        image = index.flatten(1).gather(1, place[:, None])
        chosen[classes[some], sub[some]] = image[some, 0]
        achieved[classes[some], sub[some]] = best[some]
        left[index == image[:, :, None]] = -torch.inf
        left[classes, sub] = -torch.inf
    none = chosen < 0
    chosen[none] = index[..., 0][none]
    achieved[none] = similarity[..., 0][none]
    return chosen, achieved.masked_fill(chosen < 0, torch.nan)


def _with_features(
    model: nn.Module, head: NearestCentroidHead, images: IndexedImages, index: Tensor, loading: dict[str, int]
) -> Tensor:
    """The head's centroids [K, k, D], with the unit features of images in place of those that have an index."""
    prototypes = head.prototypes.clone()
    for number, features, _ in iterate_features(model, images, loading, index[index >= 0].unique().tolist()):
        unit = head.embed(features).to(prototypes)
        for one, feature in zip(number, unit):
            prototypes[(index == one).to(prototypes.device)] = feature
    return prototypes


def _accuracies(
    model: nn.Module, head: NearestCentroidHead, prototypes: Tensor, images: IndexedImages, loading: dict[str, int]
) -> tuple[float, float]:
    """Share of images that are classified correctly by the head's centroids, and by others."""
    right, count = torch.zeros(2, dtype=torch.int64), 0
    for _, features, target in iterate_features(model, images, loading, num_classes=head.num_classes):
        logits = head(features), torch.func.functional_call(head, dict(prototypes=prototypes), (features,))
        right += (torch.stack(logits).argmax(-1).cpu() == target).sum(-1)
        count += len(target)
    return tuple((right / count).tolist())


# ---- Explaining ----


@dataclass(frozen=True, eq=False)
class Neighbour:
    """A sub-centroid, as seen from an image.

    Attributes:
        class_index: Its class.
        class_name: Name of the class.
        sub_centroid: Its place in the class.
        similarity: Its cosine to the image's feature, -1 .. 1.
        image: The training image that it stands for; None if it stands for none.
    """

    class_index: int
    class_name: str
    sub_centroid: int
    similarity: float
    image: AnchoredImage | None


@dataclass(frozen=True, eq=False)
class Explanation:
    """A decision and what it rests on.

    Classes are ranked by the logits, which weigh the similarity of each class: a centroid of the competing class can be
    nearer by a little.

    Attributes:
        class_index: The predicted class.
        class_name: Its name.
        probability: Its probability, 0 .. 1.
        neighbours: All sub-centroids of the class, the nearest first.
        competitor: The nearest sub-centroid of the class that comes second; None if there is one class only.
        competitor_probability: Probability of that class; 0 if there is none.
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
    """What an image is classified as, and which centroids, or training images, it is most like.

    Args:
        model: A model that ends in a `NearestCentroidHead`, best an anchored one (:func:`anchor`).
        image: A picture, to which timm's transform for evaluation of this model is applied, in RGB; or the model's
            input itself, normalised, [C, H, W].
        class_names: Names of the classes, such as `cluster_zoo.data.class_names` gives; ``class 0`` and so on if None
            or empty.

    Raises:
        ValueError: The model has no centroid head, the image is neither, or a class has no name.
    """
    head = centroid_head(model)
    names = names_of_classes(class_names, head.num_classes)
    if isinstance(image, Image.Image):
        image = eval_transform(model)(image.convert('RGB'))
    if not isinstance(image, Tensor) or image.ndim != 3:
        found = f'a tensor {list(image.shape)}' if isinstance(image, Tensor) else f'a {type(image).__name__}'
        raise ValueError(f'Expected a PIL image or a normalised tensor [C, H, W], got {found}.')
    with eval_mode(model), torch.no_grad(), record_inputs(head) as seen:
        logits = unwrap_model(model)(image.unsqueeze(0).to(head.prototypes))[0].float()
        features = seen.pop()
        check_pooled(features)
        similarity = head.similarity(features)[0].float().cpu()
    probability = logits.softmax(-1).cpu()
    ranked = logits.argsort(descending=True, stable=True).tolist()

    def nearest(c: int) -> tuple[Neighbour, ...]:
        subs = similarity[c].argsort(descending=True, stable=True).tolist()
        return tuple(Neighbour(c, names[c], s, similarity[c, s].item(), head.anchored_image(c, s)) for s in subs)

    first, second = ranked[0], ranked[1] if len(ranked) > 1 else None
    return Explanation(
        class_index=first,
        class_name=names[first],
        probability=probability[first].item(),
        neighbours=nearest(first),
        competitor=None if second is None else nearest(second)[0],
        competitor_probability=0.0 if second is None else probability[second].item(),
    )


def names_of_classes(class_names: Sequence[str] | Mapping[int, str] | None, num_classes: int) -> list[str]:
    """A name for each class, or ValueError."""
    if not class_names:
        return [f'class {index}' for index in range(num_classes)]
    named = class_names if isinstance(class_names, Mapping) else dict(enumerate(class_names))
    if sorted(named) != list(range(num_classes)):
        raise ValueError(f'{len(named)} class names given, expected one for each class 0 to {num_classes - 1}.')
    return [str(named[index]) for index in range(num_classes)]

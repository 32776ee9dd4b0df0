"""Few-shot transfer: new classes for a nearest-centroid model from a few labeled images, without training.

Only the centroids of a nearest-centroid head depend on its classes, so the rest of a trained model can be used for any
other classes ('Visual Recognition with Deep Nearest Centroids', section 4.2, transfers classifiers in the same way).
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .features import IndexedImages, eval_mode, eval_transform, iterate_features
from .layers.centroid_learning import balanced_assignment, normalize, update_centroids
from .layers.nearest_centroid import centroid_head
from .models.dnc import NearestCentroidMixin

__all__ = ['class_centroids', 'embed_dataset', 'fit_centroids']


@torch.no_grad()
def embed_dataset(
    model: nn.Module,
    dataset: Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
    transform: Callable[[Image.Image], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the normalized features of a dataset, which the head compares with its centroids.

    Args:
        model: A model that ends in a `NearestCentroidHead`.
        dataset: Map-style dataset of PIL images and labels. Its own ``transform`` is not used.
        batch_size: Images per batch.
        num_workers: Worker processes that read images; 0 reads them in this process.
        transform: From a PIL image to the model's input [C, H, W]; timm's evaluation transform of the model by default.

    Returns:
        Normalized features, float32 [N, D], and labels, int64 [N], both on the CPU.

    Raises:
        ValueError: The model has no centroid head, or the dataset has no readable images.
    """
    head, images = centroid_head(model), IndexedImages(dataset, transform or eval_transform(model))
    loader_kwargs = dict(batch_size=batch_size, num_workers=num_workers)
    with eval_mode(model):
        batches = [
            (head.embed(features).float().cpu(), target)
            for _, features, target in iterate_features(model, images, loader_kwargs)
        ]
    features, labels = zip(*batches)
    return torch.cat(features), torch.cat(labels)


def class_centroids(features: Tensor, labels: Tensor, num_classes: int, sub_centroids: int, rounds: int = 10) -> Tensor:
    """Computes the centroids of labeled features.

    Shares the features of each class evenly among its sub-centroids, which become the mean directions of their
    features. This is the assignment and the update of training (section 3.2) without momentum, repeated until the
    assignment is stable. The first images of a class initialize its sub-centroids; a class with fewer images than
    sub-centroids repeats them.

    Args:
        features: Unit vectors [M, D].
        labels: Labels 0 .. K - 1, int64 [M], at least one feature of each class.
        num_classes: Number of classes K.
        sub_centroids: Number of sub-centroids per class k.
        rounds: Maximum number of iterations.

    Returns:
        Unit vectors [K, k, D].
    """
    order = labels.argsort(stable=True)
    count = labels.bincount(minlength=num_classes)
    first = count.cumsum(0) - count
    offset = torch.arange(sub_centroids, device=labels.device) % count.unsqueeze(1)
    centroids = normalize(features[order[first.unsqueeze(1) + offset]])
    assigned = None
    for _ in range(rounds):
        similarity = [(features @ each.T).gather(1, labels.unsqueeze(1)) for each in centroids.unbind(1)]
        previous, assigned = assigned, balanced_assignment(torch.cat(similarity, dim=1), labels, num_classes)
        if previous is not None and torch.equal(previous, assigned):
            break
        centroids = update_centroids(centroids, features, labels, assigned, momentum=0.0)
    return centroids


def fit_centroids(
    model: NearestCentroidMixin,
    dataset: Dataset,
    sub_centroids: int = 1,
    batch_size: int = 64,
    num_workers: int = 0,
    transform: Callable[[Image.Image], Tensor] | None = None,
) -> None:
    """Replaces the classes of a trained model by those of a dataset: a new head with their centroids.

    The backbone and the feature norm stay unchanged. The new ``mask_norm`` uses the mean scale of the old one for all
    classes, so that logits keep their range.

    Args:
        model: A `dnc_*` model, or a model of `cluster_zoo.nearest_centroid`. It is modified in place.
        dataset: Map-style dataset of PIL images and labels 0 .. K - 1, a few images per class.
        sub_centroids: Sub-centroids per class. 1 is the most accurate with few images.
        batch_size, num_workers, transform: See `embed_dataset`.

    Raises:
        ValueError: The model has no centroids, ``sub_centroids`` is not positive, or a class below the largest label
            has no readable image. The model stays unchanged.
    """
    if not isinstance(model, NearestCentroidMixin):
        raise ValueError(f'{type(model).__name__} has no centroid head to replace: expected a dnc_* model.')
    if sub_centroids < 1:
        raise ValueError(f'sub_centroids must be at least 1, got {sub_centroids}.')
    features, labels = embed_dataset(model, dataset, batch_size, num_workers, transform)
    count = labels.bincount().tolist()
    empty = [str(label) for label, images in enumerate(count) if not images]
    if empty:
        raise ValueError(f'{len(empty)} of {len(count)} classes have no image: {", ".join(empty[:4])}. Add images.')
    old = model.get_classifier()
    model.sub_centroids = sub_centroids
    model.reset_classifier(len(count))
    head = model.get_classifier()
    head.feat_norm.load_state_dict(old.feat_norm.state_dict())
    head.learning = old.learning
    with torch.no_grad():
        head.mask_norm.weight.fill_(old.mask_norm.weight.mean())
        head.prototypes.copy_(class_centroids(features, labels, len(count), sub_centroids))

"""New classes for a nearest-centroid model without training: their centroids are found among a few labelled images.

Nothing of a nearest-centroid head but the centroids belongs to its classes, so the rest of a trained model serves any
others ('Visual Recognition with Deep Nearest Centroids', section 4.2, transfers whole classifiers for this reason).
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .features import IndexedImages, eval_mode, eval_transform, iterate_features
from .layers.nearest_centroid import balanced_assignment, centroid_head, normalize, update_centroids
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
    """Unit features [N, D] and classes [N] of a dataset, as centroids are compared with: float32, on the CPU.

    Args:
        model: A model that ends in a `NearestCentroidHead`.
        dataset: PIL images and classes; a ``transform`` that it has is not used.
        batch_size: Images at a time.
        num_workers: Processes that read images; 0 for none beside this one.
        transform: From a PIL image to the model's input [C, H, W]; timm's for evaluation of this model if None.

    Raises:
        ValueError: The model has no centroid head, or the dataset no readable images.
    """
    head, images = centroid_head(model), IndexedImages(dataset, transform or eval_transform(model))
    loading = dict(batch_size=batch_size, num_workers=num_workers)
    with eval_mode(model):
        batches = [(head.embed(x).float().cpu(), target) for _, x, target in iterate_features(model, images, loading)]
    features, labels = zip(*batches)
    return torch.cat(features), torch.cat(labels)


def class_centroids(features: Tensor, labels: Tensor, num_classes: int, sub_centroids: int, rounds: int = 10) -> Tensor:
    """Centroids of labelled features: each class shared evenly among its sub-centroids, the mean direction of each.

    The assignment and the update of training (section 3.2), without momentum and repeated until they agree or `rounds`
    are over. They start from the first images of a class; a class with fewer has some of its centroids twice.

    Args:
        features: Unit vectors [M, D].
        labels: Classes 0 .. K - 1, int64 [M], at least one sample of each.
        num_classes: K.
        sub_centroids: k.
        rounds: The most repetitions.

    Returns:
        Unit vectors [K, k, D].
    """
    order = labels.argsort(stable=True)
    count = labels.bincount(minlength=num_classes)
    first = count.cumsum(0) - count
    turn = torch.arange(sub_centroids, device=labels.device) % count.unsqueeze(1)
    centroids = normalize(features[order[first.unsqueeze(1) + turn]])
    assigned = None
    for _ in range(rounds):
        cosines = (features @ each.T for each in centroids.unbind(1))
        own = torch.cat([of_all.gather(1, labels.unsqueeze(1)) for of_all in cosines], dim=1)
        before, assigned = assigned, balanced_assignment(own, labels, num_classes)
        if before is not None and torch.equal(before, assigned):
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
    """Give a trained model the classes of a dataset: a head with their centroids, everything else as it was.

    The new ``mask_norm`` has the mean scale of the old one for all classes, so that logits keep their range.

    Args:
        model: A `dnc_*` model, or one of `cluster_zoo.nearest_centroid`; its classes are replaced.
        dataset: PIL images and classes 0 .. K - 1, a few images of each.
        sub_centroids: Of each class; one measures best with few images.
        batch_size, num_workers, transform: See `embed_dataset`.

    Raises:
        ValueError: The model has no centroids, ``sub_centroids`` is not positive, or a class below the largest has no
            readable image. The model is then unchanged.
    """
    if not isinstance(model, NearestCentroidMixin):
        raise ValueError(f'{type(model).__name__} has no centroid head to replace: expected a dnc_* model.')
    if sub_centroids < 1:
        raise ValueError(f'sub_centroids must be at least 1, got {sub_centroids}.')
    features, labels = embed_dataset(model, dataset, batch_size, num_workers, transform)
    count = labels.bincount().tolist()
    empty = [str(index) for index, images in enumerate(count) if not images]
    if empty:
        raise ValueError(f'{len(empty)} of {len(count)} classes have no image: {", ".join(empty[:4])}.')
    old = model.get_classifier()
    model.sub_centroids = sub_centroids
    model.reset_classifier(len(count))
    head = model.get_classifier()
    head.feat_norm.load_state_dict(old.feat_norm.state_dict())
    head.learning = old.learning
    with torch.no_grad():
        head.mask_norm.weight.fill_(old.mask_norm.weight.mean())
        head.prototypes.copy_(class_centroids(features, labels, len(count), sub_centroids))

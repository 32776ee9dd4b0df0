"""New classes for a nearest-centroid model without training: their centroids are found among a few labelled images.

Nothing of a nearest-centroid head but the centroids belongs to its classes, so the rest of a trained model serves any
others ('Visual Recognition with Deep Nearest Centroids', section 4.2, transfers whole classifiers for this reason).
"""

import torch
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .centroids import balanced_assignment, moved_centroids, unit
from .data import DataError
from .dnc import NearestCentroidMixin

__all__ = ['class_centroids', 'embed_dataset', 'fit_centroids']


@torch.inference_mode()
def embed_dataset(
    model: NearestCentroidMixin,
    dataset: Dataset,
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Unit features [N, D] and classes [N] of a dataset, on the CPU, by a model as it is in evaluation.

    Args:
        model: A model with a nearest-centroid head.
        dataset: Images and classes. If its ``transform`` is None, it gets the model's own for the time being.
        batch_size: Images at a time.
        num_workers: Processes that read images.
    """
    if not isinstance(model, NearestCentroidMixin):
        raise ValueError(f'{type(model).__name__} has no centroids: expected a dnc_* model')
    was_training, transform = model.training, getattr(dataset, 'transform', dataset)
    device = next(model.parameters()).device
    if transform is None:
        dataset.transform = create_transform(**resolve_model_data_config(model))
    try:
        model.eval()
        features, labels = [], []
        for images, target in tqdm(DataLoader(dataset, batch_size, num_workers=num_workers), disable=None):
            features.append(model.embed(images.to(device)).cpu())
            labels.append(target)
    finally:
        model.train(was_training)
        if transform is None:
            dataset.transform = None
    if not features:
        raise DataError('the dataset has no images to find centroids among')
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
    centroids = unit(features[order[first.unsqueeze(1) + turn]])
    assigned = None
    for _ in range(rounds):
        own = torch.einsum('md,mkd->mk', features, centroids[labels])
        before, assigned = assigned, balanced_assignment(own, labels, num_classes)
        if before is not None and torch.equal(before, assigned):
            break
        centroids = moved_centroids(centroids, features, labels, assigned, momentum=0.0)
    return centroids


def fit_centroids(
    model: NearestCentroidMixin,
    dataset: Dataset,
    sub_centroids: int | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> None:
    """Give a trained model the classes of a dataset: a head with their centroids, everything else as it was.

    The new ``mask_norm`` has the mean scale of the old one for all classes, so that logits keep their range.

    Args:
        model: A model with a nearest-centroid head; its classes are replaced.
        dataset: Images and classes 0 .. K - 1, a few images of each. See `embed_dataset`.
        sub_centroids: Of each class; as the model has if None.
        batch_size: Images at a time.
        num_workers: Processes that read images.

    Raises:
        ValueError: The model has no centroids, or ``sub_centroids`` is not positive.
        DataError: A class below the largest has no image.
    """
    features, labels = embed_dataset(model, dataset, batch_size, num_workers)
    sub_centroids = model.sub_centroids if sub_centroids is None else sub_centroids
    if sub_centroids < 1:
        raise ValueError(f'sub_centroids must be at least 1, got {sub_centroids}')
    if labels.is_floating_point() or labels.min() < 0:
        raise DataError('the classes of the dataset must be numbers from 0 on')
    num_classes = int(labels.max()) + 1
    empty = [str(index) for index, count in enumerate(labels.bincount().tolist()) if count == 0]
    if empty:
        raise DataError(f'{len(empty)} of {num_classes} classes have no image: {", ".join(empty[:4])}')
    old = model.get_classifier()
    model.sub_centroids = sub_centroids
    model.reset_classifier(num_classes)
    head = model.get_classifier()
    head.feat_norm.load_state_dict(old.feat_norm.state_dict())
    with torch.no_grad():
        head.mask_norm.weight.fill_(old.mask_norm.weight.mean())
        head.prototypes.copy_(class_centroids(features.to(head.prototypes), labels, num_classes, sub_centroids).cpu())
    head.learning = old.learning

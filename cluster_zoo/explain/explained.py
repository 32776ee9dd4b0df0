"""All explanations of one image."""

from dataclasses import dataclass

import torch.nn as nn
from PIL import Image

from ..layers.nearest_centroid import centroid_heads
from ..weights.metadata import label_names
from .centroids import Explanation, explain
from .contributions import Contributions, contributions
from .maps import ClusterMaps, cluster_maps, has_clusters

__all__ = ['Explained', 'can_explain', 'explain_image']


@dataclass(frozen=True, eq=False)
class Explained:
    """An image and what a model says about it.

    Attributes:
        image: The image, RGB.
        name: Name of the image, for a reader.
        maps: Maps of all stages; None for a model without clusters.
        parts: Contributions of the last clusters; None for other classifiers than average pooling and a linear layer.
        decision: Nearest centroids; None for a model without centroids.
    """

    image: Image.Image
    name: str
    maps: ClusterMaps | None
    parts: Contributions | None
    decision: Explanation | None

    @property
    def caption(self) -> str:
        """Class and probability."""
        found = self.decision or self.parts
        return f'{found.class_name} {100 * found.probability:.1f} %' if found else self.name


def can_explain(model: nn.Module) -> bool:
    """Whether a model has clusters or centroids."""
    return has_clusters(model) or bool(centroid_heads(model))


def explain_image(
    model: nn.Module, image: Image.Image, name: str = '', size: int | None = None, class_index: int | None = None
) -> Explained:
    """Explains one image with one forward pass, and a second one for the centroids.

    Args:
        model: A classifier for which `can_explain` is true.
        image: An RGB image.
        name: Name of the image, for a reader.
        size: See `cluster_maps`.
        class_index: See `contributions`.

    Raises:
        ValueError: See `cluster_maps` and `contributions`.
        ImageError: The image is too narrow.
    """
    maps = cluster_maps(model, image, size=size) if has_clusters(model) else None
    if centroid_heads(model):
        labels = label_names({**model.pretrained_cfg, 'num_classes': model.num_classes})
        return Explained(image, name, maps, None, explain(model, maps.inputs[0] if maps else image, labels))
    return Explained(image, name, maps, contributions(model, maps, class_index), None)

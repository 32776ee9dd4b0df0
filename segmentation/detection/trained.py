"""A trained detector with the classes that its checkpoint names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from cluster_zoo.errors import OptionError
from cluster_zoo.training.runtime import option_errors
from cluster_zoo.weights import extract_state_dict, read_checkpoint, training_metadata, weights_in_use

from ..data.classes import numbered_classes
from ..data.layouts import LAYOUTS
from ..engine.masks import ImageLike
from .detectors import create_detector, has_masks, load_detector_weights
from .options import MODEL_OPTIONS
from .prediction import Detected, predict
from .published_systems import CONFIGS

__all__ = ['TrainedDetector', 'load_trained']


@dataclass(frozen=True)
class TrainedDetector:
    """A detector that is ready to predict.

    Attributes:
        model: The detector, in evaluation mode.
        classes: Names of its K classes; label i has the name ``classes[i - 1]``.
        masks: Whether it finds masks.
        weights: Which weights of the checkpoint are used.
    """

    model: nn.Module
    classes: tuple[str, ...]
    masks: bool
    weights: str

    def predict(self, image: ImageLike, threshold: float = 0.5) -> list[Detected]:
        """Returns the objects in an image, see `prediction.predict`."""
        return predict(self.model, image, threshold)


def load_trained(
    checkpoint: str | Path, *, use_ema: bool = False, device: torch.device | str = 'cpu', **arguments: Any
) -> TrainedDetector:
    """Loads a detector from a checkpoint of ``cluster-zoo detect train`` or of the authors.

    Args:
        checkpoint: The file. That of a training contains the arguments of `create_detector` and the classes.
        use_ema: Use the averaged weights of the checkpoint.
        device: Device of the model.
        **arguments: Arguments of `create_detector`, which replace those of the checkpoint: ``min_size``, for example.
            With ``detector``, nothing but weights is taken from the checkpoint.

    Raises:
        OptionError: The checkpoint does not name its model, or an argument is invalid.
        CheckpointError: The file cannot be read or does not fit.
    """
    content = read_checkpoint(checkpoint)
    saved, names = training_metadata(content), []
    if not arguments.get('detector'):
        options = {name: value for name in MODEL_OPTIONS if (value := saved['args'].get(name)) is not None}
        arguments = {**(options.pop('model_kwargs', None) or {}), **options, **arguments}
        names = saved['label_names']
    if not arguments.get('detector'):
        raise OptionError(
            f'--checkpoint {checkpoint} does not name its model: give --detector, and --backbone and --num-classes '
            'unless it is a published one'
        )
    detector = arguments['detector']
    with option_errors('model', TypeError):
        model = create_detector(**arguments)
        masks = has_masks(detector)
    load_detector_weights(model, extract_state_dict(content, checkpoint, use_ema), checkpoint)
    K = arguments.get('num_classes') or CONFIGS[detector].num_classes
    if not names and detector in CONFIGS:
        names = LAYOUTS['coco_stuff'].classes.names[: CONFIGS[detector].num_classes]  # the objects come first
    known = len(names) == K and all(isinstance(name, str) for name in names)
    classes = tuple(names if known else numbered_classes(K).names)
    return TrainedDetector(model.to(device).eval(), classes, masks, weights_in_use(content, use_ema))

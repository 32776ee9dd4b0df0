"""A trained segmenter with what its checkpoint says about images, test and classes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster_zoo.errors import OptionError
from cluster_zoo.training.runtime import option_errors
from cluster_zoo.weights import extract_state_dict, load_weights, read_checkpoint, training_metadata, weights_in_use

from ..data.classes import Classes, numbered_classes
from ..data.layouts import LAYOUTS
from ..models.published_systems import CONFIGS
from ..models.segmenter import Segmenter, check_is_segmenter, create_segmenter
from .masks import ImageLike, predict
from .shared_options import DATA_OPTIONS, MODEL_OPTIONS, TEST_OPTIONS, complete, model_options, test_protocol

__all__ = ['TrainedSegmenter', 'load_trained']


@dataclass(frozen=True)
class TrainedSegmenter:
    """A segmenter that is ready to predict.

    Attributes:
        model: The segmenter, in evaluation mode.
        classes: Names and colors of its K classes.
        options: Arguments of `masks.predict`: normalization and test protocol.
        weights: Which weights of the checkpoint are used.
    """

    model: Segmenter
    classes: Classes
    options: dict[str, Any]
    weights: str = 'pretrained'

    def predict(self, image: ImageLike, **options: Any) -> Tensor:
        """Returns the class of each pixel, int64 [H, W], see `masks.predict`; `options` replace those of the model."""
        return predict(self.model, image, **self.options | options)


def load_trained(
    checkpoint: str | Path | None = None,
    name: str | None = None,
    use_ema: bool = False,
    device: torch.device | str = 'cpu',
    given: argparse.Namespace | None = None,
) -> TrainedSegmenter:
    """Loads a segmenter from a checkpoint of ``segmentation/train.py``, or a pretrained one by its name.

    Args:
        checkpoint: A checkpoint, which contains the options of its model, its classes and its test protocol; or with a
            `name` the authors' weights of this system.
        name: A name that `create_segmenter` has pretrained weights for, or a model folder (``local-dir:FOLDER``,
            ``hf-hub:ORG/NAME``), which has classes, colors, normalization and test protocol, too.
        use_ema: Use the averaged weights of the checkpoint.
        device: Device of the model.
        given: Test options of ``segment predict``, and the list ``given`` of their names. They replace those of the
            checkpoint.

    Raises:
        OptionError: There is no such name, an option is invalid, or the checkpoint does not name its model.
        CheckpointError: The file cannot be read, has no weights of a segmenter, or the download fails.
    """
    args = argparse.Namespace(**dict.fromkeys((*MODEL_OPTIONS, *DATA_OPTIONS, *TEST_OPTIONS)), given=[])
    vars(args).update(vars(given) if given else {})
    weights, names, colors = 'pretrained', [], None
    if checkpoint is None:
        if name is None:
            raise OptionError('no model given: name a checkpoint (--checkpoint FILE) or pretrained weights (--model)')
        with option_errors(f'--model {name}'):
            model = create_segmenter(name, pretrained=True)
        if name in CONFIGS:
            args.segmenter = name
            complete(args, {}, '')
        else:
            names, colors = model.config['label_names'], model.config['label_colors']
            _use_config(args, model.config)
    else:
        args.segmenter = name
        content = read_checkpoint(checkpoint)
        state_dict = extract_state_dict(content, checkpoint, use_ema)
        check_is_segmenter(state_dict, checkpoint)
        saved = training_metadata(content)
        names, weights = saved['label_names'], weights_in_use(content, use_ema)
        missing = f"--checkpoint {checkpoint} does not name its model: give the name of the authors' system, --model"
        with option_errors(f'--checkpoint {checkpoint}: its options', TypeError, AttributeError):
            complete(args, saved['args'], missing)
            model = create_segmenter(**model_options(args))
        load_weights(model, state_dict)
    model.auxiliary = None
    classes = _classes(args.dataset, names, model.num_classes)
    if colors:
        classes = Classes(tuple(names), np.array(colors, np.uint8))
    return TrainedSegmenter(model.to(device).eval(), classes, predict_options(args), weights)


def _use_config(args: argparse.Namespace, config: dict[str, Any]) -> None:
    """Sets normalization and, where it is not given, the test protocol of a model folder."""
    args.mean, args.std = (config['pretrained_cfg'].get(name) for name in ('mean', 'std'))
    windows = any(f'test_{name}' in args.given for name in ('mode', 'crop', 'stride'))
    for name, value in config.get('test', {}).items():
        if f'test_{name}' not in args.given and not (windows and name in ('mode', 'crop', 'stride', 'pad')):
            lists = name in ('crop', 'stride', 'scale') and isinstance(value, int)
            setattr(args, f'test_{name}', [value] if lists else value)


def predict_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `masks.predict` from complete options."""
    with option_errors('test options', TypeError):
        options = test_protocol(args, prefix='', crop='window')
        if options['mode'] == 'whole' and 'test_mode' not in args.given:
            options['mode'] = None  # windows for large images
        more = dict(scale=args.test_scale, multiple=args.test_multiple, mean=args.mean, std=args.std)
        return options | {name: value for name, value in more.items() if value is not None}


def _classes(dataset: str | None, names: list[str], count: int) -> Classes:
    """Returns the classes of a dataset, or those with the names of the checkpoint, or numbers."""
    classes = LAYOUTS[dataset].classes if dataset in list(LAYOUTS) else numbered_classes(0)
    if len(classes.names) == count:
        return classes
    classes = numbered_classes(count)
    known = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
    return classes._replace(names=tuple(names)) if known else classes

"""Conversion of a checkpoint of ``segmentation/train.py`` or of the authors to a model folder."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster_zoo.errors import CheckpointError, OptionError, nearest, one_line, quoted
from cluster_zoo.weights import extract_state_dict, load_weights, read_checkpoint, training_metadata, weights_in_use
from cluster_zoo.weights.cache import sha256
from cluster_zoo.weights.configs import check_size

from ..data.classes import pascal_colours
from ..data.layouts import LAYOUTS
from .folders import check_segmenter_config, describe, save_pretrained
from .published_systems import CONFIGS
from .segmenter import HEADS, Segmenter, check_is_segmenter, create_segmenter

__all__ = ['import_segmenter', 'is_segmenter_checkpoint', 'load_segmenter']

_OPTIONS = ('backbone', 'num_classes', 'classifier', 'channels', 'dropout', 'sub_centroids', 'common_start', 'early')
_SIDE = 64  # pixels of the image that the model is run on


def is_segmenter_checkpoint(checkpoint: Any) -> bool:
    """Whether the content of a file names a segmenter, as that of ``segmentation/train.py`` does."""
    options = training_metadata(checkpoint)['args']
    return bool(options.get('segmenter') or options.get('head'))


def load_segmenter(
    path: str | Path,
    head: str | None = None,
    use_ema: bool = False,
    model_args: dict[str, Any] | None = None,
    label_names: list[str] | None = None,
) -> Segmenter:
    """Builds the segmenter of a checkpoint, without its auxiliary head.

    The options of the training in the file, which are untrusted, are the defaults of ``head``, ``model_args`` and
    ``label_names``, and determine the images, the colors and the test protocol in the model's ``config``.

    Args:
        path: See `cluster_zoo.weights.read_checkpoint`.
        head: Head or published system.
        use_ema: Prefer averaged weights.
        model_args: Further arguments of `create_segmenter`, such as ``backbone`` and ``num_classes``.
        label_names: Names of the K classes.

    Returns:
        The model in evaluation mode. Its ``config['source']`` is the origin of the weights.

    Raises:
        OptionError: The model is not known, or the number of names is not that of the classes.
        CheckpointError: The file cannot be read, is refused, does not fit, or the results are not finite.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path)
    state_dict = extract_state_dict(checkpoint, path, use_ema)
    check_is_segmenter(state_dict, path)
    saved = training_metadata(checkpoint)
    config, arguments = _describe_saved(saved, head, model_args or {}, label_names, path)
    check_segmenter_config(config, f"'{path}'")
    build = partial(create_segmenter, **arguments)
    check_size(build, state_dict, f"'{path}'")
    model = build()
    load_weights(model, state_dict)
    model.config |= {key: config[key] for key in ('pretrained_cfg', 'test', 'label_names', 'label_colors')}
    model.config['source'] = dict(
        file=one_line(path.name), sha256=sha256(path), weights=weights_in_use(checkpoint, use_ema)
    )
    _run(model.eval())
    return model


def import_segmenter(path: str | Path, folder: str | Path, *args: Any, **kwargs: Any) -> None:
    """Converts a checkpoint to a model folder for ``create_segmenter('local-dir:FOLDER')``.

    Args:
        path: Checkpoint.
        folder: Model folder. An existing one is replaced when the new one is complete.
        *args, **kwargs: Further arguments of `load_segmenter`, which also describes the errors.
    """
    model = load_segmenter(path, *args, **kwargs)
    save_pretrained(model, folder)
    if not torch.equal(_run(create_segmenter(f'local-dir:{folder}').eval()), _run(model)):
        raise CheckpointError('The model gives other results from the converted file than before it was written.')


def _describe_saved(
    saved: dict[str, Any], head: str | None, given: dict[str, Any], label_names: list[str] | None, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the configuration of a checkpoint and the arguments of `create_segmenter`, see `load_segmenter`."""
    options = saved['args']
    named = options.get('segmenter') or options.get('head')
    of_model = options if head in (None, named) else {}  # not those of another model
    extra, head = of_model.get('model_kwargs'), head or named
    arguments = {key: of_model.get(key) for key in _OPTIONS} | (extra if isinstance(extra, dict) else {}) | given
    arguments = {key: value for key, value in arguments.items() if value is not None} | dict(auxiliary=False)
    published = CONFIGS.get(head) if isinstance(head, str) else None
    if head not in HEADS and not published:
        problem = f"'{path}' does not name its model" if head is None else f'There is no head {quoted(head)}'
        hint = nearest(str(head), [*HEADS, *CONFIGS])
        raise OptionError(f'{problem}: name a published system or a head (--model){hint}, and its backbone.')
    backbone = arguments.get('backbone') or (published and published.backbone)
    K = arguments.get('num_classes') or (published and published.num_classes)
    if not backbone or not isinstance(K, int) or K < 1:
        raise OptionError(
            f"'{path}' does not name the backbone or the number of classes (--model-kwargs, --num-classes)."
        )
    rest = {key: value for key, value in arguments.items() if key not in ('backbone', 'num_classes')}
    config = describe(head, backbone, K, rest, head if published else None)
    images = {key: options[key] for key in ('mean', 'std') if options.get(key)}
    config |= dict(pretrained_cfg=config['pretrained_cfg'] | images) | _saved_test(options)
    return config | _saved_classes(saved, label_names, K), dict(head=head) | arguments


def _saved_test(options: dict[str, Any]) -> dict[str, Any]:
    """Returns the test protocol of a training as an entry of the configuration, if the file has one."""
    test = {key: options.get(f'test_{key}') for key in ('mode', 'crop', 'stride', 'pad', 'scale', 'multiple')}
    if test['mode'] != 'slide':
        test |= dict.fromkeys(('crop', 'stride', 'pad'))
    test = {key: list(value) if isinstance(value, tuple) else value for key, value in test.items() if value is not None}
    return dict(test=dict(mode='whole') | test) if test else {}


def _saved_classes(saved: dict[str, Any], label_names: list[str] | None, K: int) -> dict[str, Any]:
    """Returns names and colors of the classes: those given, of the file, or of the dataset that it names."""
    names = label_names or saved['label_names']
    layout = LAYOUTS.get(str(saved['args'].get('dataset')))
    if layout and len(layout.classes.names) == K:
        return dict(label_names=list(names or layout.classes.names), label_colors=layout.classes.colours.tolist())
    if not names:
        return {}
    if label_names and len(label_names) != K:
        raise OptionError(f'There are {len(label_names)} label names for {K} classes.')
    return dict(label_names=list(names), label_colors=np.asarray(pascal_colours(K)).tolist())


@torch.inference_mode()
def _run(model: Segmenter) -> Tensor:
    """Returns the logits of an image of noise."""
    image = torch.rand(1, model.in_chans, _SIDE, _SIDE, generator=torch.Generator().manual_seed(0))
    try:
        logits = model(image)
    except Exception as error:  # invalid sizes can raise any error in a model
        raise CheckpointError(f'The model does not accept such images: {one_line(error)}') from error
    if not bool(logits.isfinite().all()):
        raise CheckpointError('The model gives NaN or infinity with these weights.')
    return logits

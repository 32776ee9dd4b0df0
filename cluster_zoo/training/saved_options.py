"""Options of a training run from its checkpoint, for validation."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import CheckpointError, OptionError, quoted
from ..weights import check_architecture, metadata, read_checkpoint, training_metadata
from ..weights.configs import check_config
from ..weights.importing import training_config

__all__ = ['complete_options', 'held_out_images']

# Options that change the images or the results in validation, beside those of `training_config`
_SAVED = dict(bn_tf=bool, bn_eps=float, input_img_mode=str, input_key=str, target_key=str, multi_label=list)
_HELD_OUT = dict(val_fraction=float, seed=int, train_split=str)


def complete_options(args: argparse.Namespace) -> Any:
    """Reads ``--checkpoint``, and sets the options that are not given to those of the training that wrote it.

    Sets ``args.label_names`` to the names of the classes and ``args.held_out`` to those of the held-out images, [] if
    they are not known.

    Returns:
        The content of the checkpoint; None without one.

    Raises:
        CheckpointError: The file cannot be read, is of another model, or its options are refused.
        OptionError: Neither the file nor an option names the model.
    """
    args.label_names, args.held_out = [], []
    if not args.checkpoint:
        return None
    checkpoint, where = read_checkpoint(args.checkpoint), f"'{args.checkpoint}'"
    saved = training_metadata(checkpoint)
    if not (args.model or saved['arch']):
        raise OptionError(
            f'--checkpoint {args.checkpoint} does not name its model: give --model and, where they differ from its '
            'defaults, --num-classes, --img-size, --crop-pct and --model-kwargs'
        )
    if args.model and saved['arch'] and metadata.is_ours(saved['arch']):
        check_architecture(saved['arch'], args.model, where)
    args.model = args.model or saved['arch']
    config = training_config(saved, args.model.partition('.')[0])
    check_config(config, where)
    arguments, data = dict(config['model_args']), dict(config['pretrained_cfg'])
    values = {name: arguments.pop(name, None) for name in ('num_classes', 'in_chans', 'sub_centroids')}
    values |= dict(gp=arguments.pop('global_pool', None), model_kwargs=arguments)
    if {'img_size', 'in_chans', 'input_size'} & set(args.given):
        data.pop('input_size', None)
    values |= data | _typed(saved['args'], _SAVED, where)
    options, names = _typed(saved['args'], _HELD_OUT, where), held_out_images(saved, where)
    same = 'split' not in args.given and args.val_fraction in (None, options.get('val_fraction'))
    if options.get('val_fraction') and same:
        values |= dict(val_fraction=options['val_fraction'], split=options.get('train_split'))
        values |= dict(seed=options.get('seed'))
        args.held_out = names
    for name, value in values.items():
        if name not in args.given and value not in (None, '', [], {}):
            setattr(args, name, value)
    labels = config['label_names']
    if not (args.class_map or args.valid_labels) and isinstance(labels, list | tuple):
        args.label_names = list(labels)
    return checkpoint


def held_out_images(saved: dict[str, Any], where: str) -> list[str]:
    """Returns the names of the images that a training held out, from its `training_metadata`; [] if there are none."""
    names = _typed(saved, dict(held_out=str), where).get('held_out')
    return names.split('\0') if names else []


def _typed(saved: dict[str, Any], types: dict[str, type], where: str) -> dict[str, Any]:
    """Returns the options of these names that are set, and raises CheckpointError for values of other types."""
    values = {name: saved[name] for name in types if saved.get(name)}
    for name, value in values.items():
        items = value if isinstance(value, list) else ()
        if not isinstance(value, types[name]) or not all(isinstance(item, str) for item in items):
            raise CheckpointError(f'{where} was refused: its option {name} is {quoted(value)}.')
    return values

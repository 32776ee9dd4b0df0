"""Models of a run, built from the options."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.models import create_model, is_model, list_models, resolve_model_input_args

from ..errors import OptionError, nearest
from ..layers.centroid_learning import CentroidLearning
from ..layers.nearest_centroid import centroid_heads
from ..models.dnc import VARIANTS
from ..weights import load_checkpoint
from ..weights.configs import read_config
from ..weights.download import hub_folder
from .runtime import model_dtype, option_errors

__all__ = ['build_model', 'check_model_name', 'create_from_options', 'set_centroid_learning']


def check_model_name(name: str, option: str = '--model') -> None:
    """Raises `OptionError`, with the nearest names, for a model that is not registered."""
    if ':' not in name and not is_model(name):  # timm resolves 'hf-hub:...' and 'local-dir:...'
        hint = nearest(name.split('.')[0], list_models())
        if Path(name).is_dir():
            hint = f', but a folder: if it is a model folder, use {option} local-dir:{name}'
        raise OptionError(f'{option}: there is no model {name!r}{hint}')


def create_from_options(args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` with the options that training and validation share. Sets ``args.num_classes``."""
    if args.sub_centroids is not None:
        kwargs['sub_centroids'] = args.sub_centroids
    name = args.model
    if name.startswith('hf-hub:'):  # timm would try for half a minute without a network, and would not check the folder
        folder = hub_folder(name.partition(':')[2])
        read_config(folder)
        name = f'local-dir:{folder}'
    # A download can fail with any error of an HTTP library
    with option_errors(f'--model {args.model}', Exception if kwargs.get('pretrained') else KeyError, TypeError):
        arguments = resolve_model_input_args(
            name,
            vars(args),
            num_classes=args.num_classes,
            global_pool=args.gp,
            scriptable=args.torchscript,
            **kwargs,
            **args.model_kwargs,
        )
        model = create_model(**arguments)
    _set_batch_norm(model, args)
    args.num_classes = model.num_classes if args.num_classes is None else args.num_classes
    return model


def build_model(args: argparse.Namespace) -> nn.Module:
    """Builds the model to train, with its initial weights, on the device."""
    check_model_name(args.model)
    if args.common_start is not None and ('common_start' in args.given or args.model.split('.')[0] in VARIANTS):
        options = dict(common_start=args.common_start)
    else:
        options = {}  # the recipe of a DNC model also trains the linear model that it is compared with
    if args.pretrained_path:
        # With -1 classes in the configuration, timm always leaves out the head of the file.
        options['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)
    model = create_from_options(
        args,
        pretrained=args.pretrained or bool(args.pretrained_path),
        drop_rate=args.drop,
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block,
        **options,
    )
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    _init_head(model, args)
    set_centroid_learning(model, args)
    if args.grad_checkpointing:
        with option_errors('--grad-checkpointing', AttributeError):
            model.set_grad_checkpointing(enable=True)
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=args.device, dtype=model_dtype(args))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.sync_bn and args.distributed:
        model = convert_sync_batchnorm(model)
    if args.torchscript:
        if centroid_heads(model):
            raise OptionError(f'--torchscript: the centroids of {args.model} cannot learn in a scripted model')
        with option_errors('--torchscript', AttributeError, TypeError):
            model = torch.jit.script(model)
    return model


@torch.no_grad()
def _init_head(model: nn.Module, args: argparse.Namespace) -> None:
    if args.head_init_scale is not None:
        with option_errors('--head-init-scale', AttributeError):
            head = model.get_classifier()
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        with option_errors('--head-init-bias', AttributeError):
            nn.init.constant_(model.get_classifier().bias, args.head_init_bias)


def set_centroid_learning(model: nn.Module, args: argparse.Namespace) -> None:
    """Sets the learning of all nearest-centroid heads of a model from the ``--centroid-*`` options.

    Raises:
        OptionError: A value is out of range, or an option was given for a model without centroids.
    """
    values = {field.name: getattr(args, f'centroid_{field.name}', None) for field in fields(CentroidLearning)}
    values = {name: value for name, value in values.items() if value is not None}
    heads = centroid_heads(model)
    given = [name for name in values if f'centroid_{name}' in args.given]
    if given and not heads:
        name = getattr(args, 'model', 'the model')
        raise OptionError(f'--centroid-{given[0]}: {name} has no centroids; dnc_* models and --classifier dnc have')
    if 'dtype' in values:
        values['dtype'] = getattr(torch, values['dtype'])
    learning = CentroidLearning()
    for name, value in values.items():
        with option_errors(f'--centroid-{name}'):
            learning = replace(learning, **{name: value})
    for head in heads:
        head.learning = learning


def _set_batch_norm(model: nn.Module, args: argparse.Namespace) -> None:
    momentum, eps = getattr(args, 'bn_momentum', None), getattr(args, 'bn_eps', None)
    if getattr(args, 'bn_tf', False):
        momentum, eps = momentum or 0.01, eps or 1e-3
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = module.momentum if momentum is None else momentum
            module.eps = module.eps if eps is None else eps

"""Datasets and loaders of a run, built from the options."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from timm.data import AugMixDataset, FastCollateMixup, Mixup, create_loader
from torchvision import transforms

from ..datasets import check_dataset, create_dataset, find_split, hold_out, unreadable_images
from ..errors import DataError, OptionError
from .posterize import allow_zero_bits
from .runtime import model_dtype, option_errors
from .signals import keep_workers
from .streaming import shard_workers
from .train_options import is_mixing

__all__ = [
    'build_datasets',
    'build_loaders',
    'build_mixup',
    'check_data_dir',
    'data_root',
    'dataset_options',
    'drop_invalid',
    'loader_options',
    'uses_prefetcher',
]

_logger = logging.getLogger(__name__)

_WITHOUT_VALIDATION = (
    "Hold out some of the training images (--val-fraction 0.1), or train without validation (--val-split '')."
)


def uses_prefetcher(args: argparse.Namespace) -> bool:
    """Returns whether timm's prefetcher normalizes images. On a CPU the workers normalize them in parallel."""
    if getattr(args, 'tf_preprocessing', False) or getattr(args, 'aug_splits', 0):
        return True  # timm supports these two with the prefetcher only
    return not args.no_prefetcher and torch.device(args.device).type != 'cpu'


def data_root(args: argparse.Namespace) -> str | None:
    """Returns the directory of ``DIR`` or ``--data-dir``; raises `OptionError` if the command line has two."""
    given = [getattr(args, name) for name in ('data_dir', 'data') if name in args.given]
    if len({os.path.normpath(path) for path in given}) == 2:
        raise OptionError(f'--data-dir {args.data_dir} and DIR {args.data} are two data directories: give one of them')
    if given and 'data_dir' not in args.given:
        args.data_dir = None  # of --config
    return args.data_dir or args.data


def dataset_options(args: argparse.Namespace, in_chans: int) -> dict[str, Any]:
    """Returns the arguments of ``create_dataset`` that all splits share."""
    return dict(
        name=args.dataset,
        root=data_root(args),
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        strict=args.strict,
        label_files=args.multi_label,
    )


def check_data_dir(args: argparse.Namespace) -> None:
    """Checks that there are folders or archives of both splits, before a model is built.

    Raises:
        DataError: There is no such split, or training and validation images would be the same.
    """
    if args.dataset and not args.dataset.startswith('cluster_zoo/'):
        return
    root = data_root(args)
    train = args.dataset or find_split(root, args.train_split)
    if not args.val_split or args.val_fraction:
        return
    try:
        val = args.dataset or find_split(root, args.val_split)
    except DataError as error:
        raise DataError(f'{error} {_WITHOUT_VALIDATION}') from error
    # To train and validate on one split is a test that --val-split can ask for
    if train != val or args.train_split == args.val_split:
        return
    if args.dataset:
        raise DataError(f'{args.dataset} has no splits. {_WITHOUT_VALIDATION}')
    root, form = (train.parent, '{}.tar') if train.is_file() else (train, '{}/CLASS/*.jpg')
    expected = 'expected ' + ' and '.join(str(root / form.format(split)) for split in ('train', 'val'))
    if train.stem in ('train', 'training'):
        expected = f'give the folder that contains it, {train.resolve().parent}'
    raise DataError(
        f'{train} has no splits, so training and validation images would be the same: {expected}. {_WITHOUT_VALIDATION}'
    )


def build_datasets(
    args: argparse.Namespace, data_config: dict[str, Any], held_out: Collection[str] = ()
) -> tuple[Any, Any]:
    """Opens the training and validation splits and checks them against ``args.num_classes``.

    Args:
        args: Options of the run.
        data_config: The preparation of images.
        held_out: Images that ``--val-fraction`` holds out instead of a random choice, see `hold_out`.

    Returns:
        Both datasets. That of validation is None for ``--val-split ''``.
    """
    options = dataset_options(args, data_config['input_size'][0])
    train = create_dataset(
        split=args.train_split,
        is_training=True,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
        **options,
    )
    val = None
    check_dataset(train, args.num_classes, args.train_split)
    if args.val_fraction:
        with suppress(DataError):  # there is none
            root, unused = options['root'], None if args.dataset else find_split(options['root'], args.val_split)
            if unused and unused != find_split(root, args.train_split):
                _logger.info(f'{unused} is not used: --val-fraction holds out some of the training images instead.')
        train, val = hold_out(train, args.val_fraction, args.seed, held_out)
    elif args.val_split:
        if args.multi_label:  # the same classes, even if there is no validation image of some
            options['class_map'] = train.reader.class_to_idx
        options |= dict(num_samples=args.val_num_samples, replace_unreadable=False)
        val = create_dataset(split=args.val_split, **options)
        check_dataset(val, args.num_classes, args.val_split, like=train)
    return train, val


def drop_invalid(
    output: torch.Tensor, target: torch.Tensor, dataset: Any, remaining: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the outputs and targets of a validation batch that count.

    Args:
        output: Logits [B, K].
        target: Targets, [B] or [B, K].
        dataset: The dataset, whose unreadable images have negative targets.
        remaining: Number of images until those that a distributed sampler has added to fill the last batches; None if
            there are none.
    """
    output, target = output[:remaining], target[:remaining]
    if unreadable_images(dataset):
        valid = target.reshape(len(target), -1)[:, 0] >= 0
        output, target = output[valid], target[valid]
    return output, target


def loader_options(args: argparse.Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of ``create_loader`` that all splits share."""
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=bool(args.pin_mem),
        device=torch.device(args.device),
        use_prefetcher=uses_prefetcher(args),
        img_dtype=model_dtype(args),
    )


def build_mixup(args: argparse.Namespace) -> Mixup | None:
    """Returns mixup and cutmix, as a collate function if there is a prefetcher; None if both are off."""
    if not is_mixing(args):
        return None
    return (FastCollateMixup if uses_prefetcher(args) else Mixup)(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
        multi_label=bool(args.multi_label),
    )


def build_loaders(
    args: argparse.Namespace,
    datasets: tuple[Any, Any],
    data_config: dict[str, Any],
    mixup: Mixup | None,
) -> tuple[Any, Any]:
    """Builds the loaders of the training and validation splits; the second is None without validation."""
    train, val = datasets
    options = loader_options(args, data_config) | dict(
        distributed=args.distributed,
        # With new workers in each epoch, their generators do not depend on the epoch that a run was resumed at.
        persistent_workers=bool(args.persistent_workers),
    )
    workers = partial(shard_workers, name=args.dataset, workers=args.workers, processes=args.world_size)
    options['num_workers'] = workers(train, split=args.train_split)
    with option_errors('training data', KeyError):
        train_loader = create_loader(
            AugMixDataset(train, num_splits=args.aug_splits) if args.aug_splits > 1 else train,
            batch_size=args.batch_size,
            is_training=True,
            collate_fn=mixup if isinstance(mixup, FastCollateMixup) else None,
            worker_seeding=args.worker_seeding,
            interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
            **_augmentation(args),
            **_scheduled_sizes(args),
            **options,
        )
    if args.train_crop_mode == 'pad' and not args.no_aug:
        height, width = data_config['input_size'][-2:]
        # Replaces timm's crop, the first transform
        train.transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize((height, width)),
                transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
            ]
        )
    allow_zero_bits(train_loader.dataset)
    val_loader = None
    if val is not None:
        options['num_workers'] = workers(val, split=args.val_split)
        val_loader = create_loader(
            val,
            batch_size=args.validation_batch_size or args.batch_size,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            crop_mode=data_config.get('crop_mode'),
            **options,
        )
    for loader in filter(None, (train_loader, val_loader)):
        keep_workers(getattr(loader, 'loader', loader))  # in timm's prefetcher
    if len(train_loader) == 0:
        raise DataError(
            f'the {len(train)} images of the {args.train_split} split do not fill one batch of {args.batch_size} on '
            f'each of {args.world_size} processes: lower --batch-size'
        )
    return train_loader, val_loader


def _augmentation(args: argparse.Namespace) -> dict[str, Any]:
    return dict(
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=None if args.train_crop_mode == 'pad' else args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob or 0.0,
        gaussian_blur_prob=args.gaussian_blur_prob or 0.0,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=args.aug_splits,
    )


def _scheduled_sizes(args: argparse.Namespace) -> dict[str, Any]:
    if not args.train_img_sizes:
        return {}
    return dict(
        input_size_choices=args.train_img_sizes,
        batch_size_choices=args.train_batch_sizes,
        batch_choice_weights=args.train_size_probs,
        batch_choice_seed=args.seed,
        batch_choice_schedule=args.train_size_schedule,
        batch_schedule_epochs=args.epochs,
        batch_schedule_spread=args.train_size_schedule_spread,
        batch_schedule_random_mix=args.train_size_random_mix,
        num_batches=args.train_batches_per_epoch,
    )

"""The parts of a training or validation run, each built from the options: device, model, data, task, schedule.

What timm refuses becomes an :class:`~cluster_zoo.training.options.OptionError` that names the option.
"""

from __future__ import annotations

import argparse
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from timm import utils
from timm.data import AugMixDataset, FastCollateMixup, Mixup, auto_augment, create_loader
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.models import create_model, is_model, list_models, resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torchvision import transforms

from ..data import check_dataset, create_dataset
from ..errors import CheckpointError, DataError, OptionError, nearest
from ..layers.nearest_centroid import CentroidLearning, centroid_heads
from ..models.dnc import VARIANTS
from ..weights import load_checkpoint
from .tasks import with_centroid_learning

_logger = logging.getLogger(__name__)


@contextmanager
def option_errors(option: str) -> Iterator[None]:
    """Names an option as the cause of whatever timm or PyTorch raises for its value."""
    try:
        yield
    except (CheckpointError, DataError, OptionError):
        raise
    except (
        AssertionError,
        AttributeError,
        ImportError,
        KeyError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise OptionError(f'{option}: {reason}') from error


# --- runtime ----------------------------------------------------------------------------------------------------------


def default_device() -> str:
    """The accelerator of this machine (``cuda``, ``mps``, ...), or ``cpu``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else 'cpu'


def setup_runtime(args: argparse.Namespace) -> None:
    """Settles ``args.device`` and applies the process-wide switches."""
    for module in args.device_modules or ():
        with option_errors('--device-modules'):
            importlib.import_module(module)
    args.device = args.device or default_device()
    with option_errors(f'--device {args.device}'):
        torch.zeros(1, device=args.device)
    if args.device.startswith('cuda'):
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    if args.fuser:
        with option_errors('--fuser'):
            utils.set_jit_fuser(args.fuser)
    if args.fast_norm:
        set_fast_norm()
    if args.torchscript and args.torchcompile:
        raise OptionError('--torchscript and --torchcompile exclude each other')
    if args.model_dtype and args.amp:
        raise OptionError('--model-dtype and --amp exclude each other')


def model_dtype(args: argparse.Namespace) -> torch.dtype:
    """Type of the weights and of the images."""
    return getattr(torch, args.model_dtype or 'float32')


def build_precision(args: argparse.Namespace) -> tuple[Callable[[], AbstractContextManager], utils.NativeScaler | None]:
    """The autocast context of ``--amp``, and the loss scaler that float16 gradients need."""
    if not args.amp:
        return nullcontext, None
    kind = torch.device(args.device).type
    dtype = getattr(torch, args.amp_dtype or ('bfloat16' if kind == 'cpu' else 'float16'))
    scaler = utils.NativeScaler(device=kind) if dtype == torch.float16 else None
    return partial(torch.autocast, device_type=kind, dtype=dtype), scaler


# --- model ------------------------------------------------------------------------------------------------------------


def check_model_name(name: str, option: str = '--model') -> None:
    """Raises OptionError, with the nearest names, for a model that timm does not know."""
    if ':' not in name and not is_model(name):  # 'hf-hub:...' and 'local-dir:...' are for timm to find
        raise OptionError(f'{option}: there is no model {name!r}{nearest(name.split(".")[0], list_models())}')


def create(args: argparse.Namespace, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` for the options that both scripts have. Sets ``args.num_classes``."""
    if args.sub_centroids is not None:
        kwargs['sub_centroids'] = args.sub_centroids
    with option_errors(f'--model {args.model}'):
        arguments = resolve_model_input_args(
            args.model,
            vars(args),
            num_classes=args.num_classes,
            global_pool=args.gp,
            scriptable=args.torchscript,
            **kwargs,
            **args.model_kwargs,
        )
        model = create_model(**arguments)
    args.num_classes = model.num_classes if args.num_classes is None else args.num_classes
    return model


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model to train, with its weights, on the device."""
    check_model_name(args.model)
    # -1 classes never fit: the head of the file is left out, as for a task of one's own.
    overlay = dict(file=args.pretrained_path, num_classes=-1) if args.pretrained_path else None
    model = create(
        args,
        **_common_start(args),
        pretrained=args.pretrained or bool(args.pretrained_path),
        pretrained_cfg_overlay=overlay,
        drop_rate=args.drop,
        drop_path_rate=args.drop_connect if args.drop_path is None else args.drop_path,
        drop_block_rate=args.drop_block,
    )
    if args.initial_checkpoint:
        load_checkpoint(model, args.initial_checkpoint)
    _init_head(model, args)
    set_centroid_learning(model, args)
    _set_batch_norm(model, args)
    if args.grad_checkpointing:
        with option_errors('--grad-checkpointing'):
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
            raise OptionError(f'--torchscript: the centroids of {args.model} can not learn in a scripted model')
        with option_errors('--torchscript'):
            model = torch.jit.script(model)
    return model


@torch.no_grad()
def _init_head(model: nn.Module, args: argparse.Namespace) -> None:
    if args.head_init_scale is not None:
        with option_errors('--head-init-scale'):
            head = model.get_classifier()
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
    if args.head_init_bias is not None:
        with option_errors('--head-init-bias'):
            nn.init.constant_(model.get_classifier().bias, args.head_init_bias)


def _common_start(args: argparse.Namespace) -> dict[str, float]:
    # A recipe may be shared with a linear model, for a comparison.
    meant = 'common_start' in args.given or args.model.split('.')[0] in VARIANTS
    return dict(common_start=args.common_start) if meant and args.common_start is not None else {}


def set_centroid_learning(model: nn.Module, args: argparse.Namespace) -> None:
    """Has the centroids of a model learn as the ``--centroid-*`` options say, which have to mean something to it."""
    values = {field.name: getattr(args, f'centroid_{field.name}', None) for field in fields(CentroidLearning)}
    values = {name: value for name, value in values.items() if value is not None}
    heads = centroid_heads(model)
    # A recipe may be shared with a linear model, for a comparison.
    typed = [name for name in values if f'centroid_{name}' in args.given]
    if typed and not heads:
        raise OptionError(f'--centroid-{typed[0]}: {args.model} has no centroids; dnc_* models have')
    if 'dtype' in values:
        values['dtype'] = getattr(torch, values['dtype'])
    learning = CentroidLearning()
    for name, value in values.items():
        with option_errors(f'--centroid-{name}'):
            learning = replace(learning, **{name: value})
    for head in heads:
        head.learning = learning


def _set_batch_norm(model: nn.Module, args: argparse.Namespace) -> None:
    momentum, eps = args.bn_momentum, args.bn_eps
    if args.bn_tf:
        momentum, eps = momentum or 0.01, eps or 1e-3
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = module.momentum if momentum is None else momentum
            module.eps = module.eps if eps is None else eps


# --- data -------------------------------------------------------------------------------------------------------------


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep > 0 else image.point(lambda value: 0)


# At magnitude 10 RandAugment keeps no bits. That is a black image; timm leaves it to Pillow, which refuses from 13 on.
auto_augment.NAME_TO_OP |= dict.fromkeys(('Posterize', 'PosterizeIncreasing', 'PosterizeOriginal'), _posterize)


def uses_prefetcher(args: argparse.Namespace) -> bool:
    """Whether timm's prefetcher normalises. On a CPU the workers do instead, beside the process that computes."""
    if getattr(args, 'tf_preprocessing', False) or getattr(args, 'aug_splits', 0):
        return True  # only there does timm normalise the one's images, and spare the other's first split from erasing
    return not args.no_prefetcher and torch.device(args.device).type != 'cpu'


def dataset_options(args: argparse.Namespace, in_chans: int) -> dict[str, Any]:
    """Arguments of ``create_dataset`` that all splits share."""
    return dict(
        name=args.dataset,
        root=args.data_dir or args.data,
        class_map=args.class_map,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=args.input_img_mode or ('RGB' if in_chans == 3 else 'L'),
        input_key=args.input_key,
        target_key=args.target_key,
        trust_remote_code=args.dataset_trust_remote_code,
        strict=args.strict,
    )


def build_datasets(args: argparse.Namespace, data_config: dict[str, Any]) -> tuple[Any, Any]:
    """Training and validation split, both checked against ``args.num_classes``."""
    options = dataset_options(args, data_config['input_size'][0])
    train = create_dataset(
        split=args.train_split,
        is_training=True,
        repeats=args.epoch_repeats,
        num_samples=args.train_num_samples,
        **options,
    )
    val = create_dataset(split=args.val_split, num_samples=args.val_num_samples, **options)
    check_dataset(train, args.num_classes, args.train_split)
    check_dataset(val, args.num_classes, args.val_split, like=train)
    return train, val


def loader_options(args: argparse.Namespace, data_config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``create_loader`` that all splits share."""
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=torch.device(args.device),
        use_prefetcher=uses_prefetcher(args),
        img_dtype=model_dtype(args),
    )


def is_mixing(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix makes the targets soft."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args: argparse.Namespace) -> Mixup | None:
    """Mixup and cutmix, as a collate function where there is a prefetcher; None if both are off."""
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
    )


def build_loaders(
    args: argparse.Namespace,
    datasets: tuple[Any, Any],
    data_config: dict[str, Any],
    mixup: Mixup | None,
) -> tuple[Any, Any]:
    """Loaders of the training and the validation split."""
    train, val = datasets
    options = loader_options(args, data_config) | dict(
        distributed=args.distributed,
        # New workers each epoch: the state of their generators would otherwise depend on where the run was started.
        persistent_workers=False,
    )
    with option_errors('training data'):
        train_loader = create_loader(
            AugMixDataset(train, num_splits=args.aug_splits) if args.aug_splits > 1 else train,
            batch_size=args.batch_size,
            is_training=True,
            collate_fn=mixup if isinstance(mixup, FastCollateMixup) else None,
            use_multi_epochs_loader=args.use_multi_epochs_loader,
            worker_seeding=args.worker_seeding,
            interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
            **_augmentation(args),
            **_scheduled_sizes(args),
            **options,
        )
    if args.train_crop_mode == 'pad' and not args.no_aug:
        height, width = data_config['input_size'][-2:]
        # In place of timm's crop, which is the first step.
        train.transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize((height, width)),
                transforms.RandomCrop((height, width), padding=(width // 8, height // 8)),
            ]
        )
    val_loader = create_loader(
        val,
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **options,
    )
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


# --- training ---------------------------------------------------------------------------------------------------------


def check_training_options(args: argparse.Namespace) -> None:
    """Raises OptionError for options that contradict each other."""
    uneven = [size for size in (args.batch_size, *(args.train_batch_sizes or ())) if size % 2]
    rules = (
        (args.batch_size < 1 or args.grad_accum_steps < 1, '--batch-size and --grad-accum-steps must be at least 1'),
        (is_mixing(args) and uneven, f'mixup and cutmix mix pairs of images: a batch of {uneven} must be even'),
        (args.aug_splits == 1 or args.aug_splits < 0, '--aug-splits must be 0 or at least 2'),
        (args.jsd_loss and args.aug_splits < 2, '--jsd-loss compares augmentation splits: set --aug-splits'),
        (args.split_bn and args.aug_splits < 2 and not args.resplit, '--split-bn needs --aug-splits or --resplit'),
        (args.resume == 'auto' and not args.experiment, '--resume auto needs --experiment, to know where to look'),
        (args.train_batch_sizes and not args.train_img_sizes, '--train-batch-sizes needs --train-img-sizes'),
        (args.checkpoint_hist < 1, '--checkpoint-hist must be at least 1'),
        (
            args.train_crop_mode == 'pad' and (args.aug_splits or args.train_img_sizes),
            '--train-crop-mode pad does not go with --aug-splits or --train-img-sizes',
        ),
    )
    for broken, message in rules:
        if broken:
            raise OptionError(message)


def build_task(args: argparse.Namespace, model: nn.Module) -> TrainingTask:
    """The model together with its loss and, for distillation, its teacher."""
    task = _choose_task(args, model)
    # The loss in float32: autocast sees to that on a GPU, but on a CPU it would be computed and summed up in bfloat16.
    task.criterion.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(), *inputs[1:]))
    return task


def _choose_task(args: argparse.Namespace, model: nn.Module) -> TrainingTask:
    criterion = dict(
        loss_type='jsd' if args.jsd_loss else 'bce' if args.bce_loss else 'ce',
        smoothing=args.smoothing,
        soft_targets=is_mixing(args),
        jsd_splits=args.aug_splits,
    )
    if args.bce_loss:
        criterion |= dict(
            bce_sum=args.bce_sum,
            bce_target_thresh=args.bce_target_thresh,
            pos_weight=args.bce_pos_weight,
        )
    common = dict(
        criterion_kwargs=criterion,
        device=torch.device(args.device),
        dtype=model_dtype(args),
        verbose=utils.is_primary(args),
    )
    # The centroids of a model learn in any task.
    chosen = with_centroid_learning if centroid_heads(model) else lambda task_class: task_class
    if args.kd_model_name is None:
        return chosen(ClassificationTask)(model, **common)
    check_model_name(args.kd_model_name, '--kd-model-name')
    common |= dict(
        teacher_model=args.kd_model_name,
        distill_loss_weight=args.distill_loss_weight,
        task_loss_weight=args.task_loss_weight,
    )
    with option_errors(f'--kd-model-name {args.kd_model_name}'):
        if args.kd_distill_type == 'logit':
            return chosen(LogitDistillationTask)(
                model, loss_type=args.kd_loss_type, temperature=args.kd_temperature, **common
            )
        if args.kd_distill_type == 'token':
            kind = args.kd_token_distill_type
            return chosen(TokenDistillationTask)(model, distill_type=kind, temperature=args.kd_temperature, **common)
        return chosen(FeatureDistillationTask)(
            model,
            student_feature_dim=args.kd_student_feature_dim,
            teacher_feature_dim=args.kd_teacher_feature_dim,
            **common,
        )


def build_optimizer(args: argparse.Namespace, task: TrainingTask) -> torch.optim.Optimizer:
    """The optimizer. Sets ``args.lr`` from the base rate and the images an update sees, if it is not set."""
    if args.lr is None:
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        adaptive = any(name in args.opt.lower() for name in ('ada', 'lamb'))
        scale = args.lr_base_scale or ('sqrt' if adaptive else 'linear')
        args.lr = args.lr_base * (ratio**0.5 if scale == 'sqrt' else ratio)
        _logger.info(f'Learning rate {args.lr:.4g}: {args.lr_base:g} at {args.lr_base_size} images, {scale} scaling.')
    known = list_optimizers()
    if args.opt.lower().removeprefix('lookahead_') not in known:
        raise OptionError(f'--opt: there is no optimizer {args.opt!r}{nearest(args.opt.lower(), known)}')
    with option_errors(f'--opt {args.opt}'):
        return create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args), **args.opt_kwargs)


def build_scheduler(
    args: argparse.Namespace,
    optimizer: torch.optim.Optimizer,
    updates_per_epoch: int,
) -> tuple[Any, int]:
    """The scheduler, None for ``--sched none``, and the number of epochs with warm-up prefix and cool-down."""
    with option_errors(f'--sched {args.sched}'):
        return create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch)

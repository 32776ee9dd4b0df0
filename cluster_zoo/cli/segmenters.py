"""What ``list``, ``info``, ``fetch``, ``import``, ``push`` and ``export`` need of segmenters."""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from segmentation import create_segmenter
from segmentation.models.folders import BUNDLED, is_segmenter_folder, read_segmenter_config
from segmentation.models.importing import import_segmenter, is_segmenter_checkpoint, load_segmenter
from segmentation.models.published_systems import CONFIGS
from segmentation.models.segmenter import HEADS

from ..errors import CheckpointError, OptionError
from ..weights import cache, load_state_dict, read_checkpoint
from ..weights.archives import is_archive
from ..weights.download import hub_folder, is_drive, organization

__all__ = [
    'bundled',
    'checkpoint_of_segmenter',
    'import_folder',
    'info',
    'is_segmenter',
    'load',
    'local',
    'open_model_folder',
    'published',
    'rows',
    'usage',
]


def published() -> list[str]:
    """Returns the names of the published systems."""
    return list(CONFIGS)


def bundled() -> dict[str, Path]:
    """Returns the model folders of the segmenters in the package, by name."""
    return BUNDLED


def is_segmenter(name: str) -> bool:
    """Whether a name is that of a published or bundled system, ``hf-hub:`` excepted, or the folder of a segmenter."""
    return name in CONFIGS or name in BUNDLED or is_segmenter_folder(Path(name.removeprefix('local-dir:')))


def checkpoint_of_segmenter(path: Path, model: str | None) -> bool:
    """Whether a file is a checkpoint of a segmenter, which the name of the model or the file shows."""
    if model:
        return model in HEADS or model in CONFIGS
    try:
        return path.is_file() and not is_archive(path) and is_segmenter_checkpoint(read_checkpoint(path))
    except CheckpointError:
        return False  # the caller reads the file, too


def can_load(name: str) -> bool:
    """Whether `load` reads a name: a segmenter, or a file that is or should be a checkpoint of one."""
    path = Path(name)
    missing = path.suffix in ('.tar', '.pth', '.pt', '.safetensors') and not path.exists()
    return missing or is_segmenter(name) or checkpoint_of_segmenter(path, None)


def usage(name: str) -> str:
    """Returns an example of Python code for a published system or a folder."""
    pretrained = ', pretrained=True' if name in CONFIGS or name in BUNDLED else ''
    return f"from segmentation import create_segmenter; create_segmenter('{name}'{pretrained})"


def _location(name: str) -> str:
    if name in BUNDLED:
        return 'in the package'
    if cache.cached(name):
        return 'in the cache'
    sources = [f'{owner} on Hugging Face may have them'] if (owner := organization()) else []
    sources += ["the authors' release"] if is_drive(CONFIGS[name].source) else []
    return ', '.join(sources) or 'none released'


def _parameters(name: str, **options: Any) -> int:
    with torch.device('meta'):
        model = create_segmenter(name, pretrained=False, auxiliary=False, **options)
    return sum(parameter.numel() for parameter in model.parameters())


def rows(names: list[str]) -> list[dict[str, Any]]:
    """Returns a row for each published or bundled system, for ``list``, without auxiliary heads."""
    published = {name: config.miou for name, config in CONFIGS.items()}
    return [
        dict(name=name, parameters=_parameters(name), published_miou=published.get(name), weights=_location(name))
        for name in names
    ]


def open_model_folder(folder: Path) -> None:
    """Raises `CheckpointError` unless the configuration and the weights of a folder can be read."""
    read_segmenter_config(folder)
    load_state_dict(cache.verified_weights(folder))


def info(name: str) -> dict[str, Any]:
    """Returns what ``info`` prints of a published system or a folder."""
    folder = None if name in CONFIGS else BUNDLED.get(name) or Path(name.removeprefix('local-dir:'))
    stored = folder or cache.cached(name)
    with torch.device('meta'):
        model = create_segmenter(name if name in CONFIGS else _folder(name), pretrained=False, auxiliary=False)
    config = read_segmenter_config(folder) if folder else model.config
    system = CONFIGS.get(config.get('segmenter'))
    weights = read_segmenter_config(stored) if stored else {}
    return dict(
        name=config.get('segmenter') or model.pretrained_cfg['architecture'],
        head=config['head'],
        backbone=config['backbone'],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=config['num_classes'],
        data=system and system.dataset,
        published_miou=system and system.miou,
        published_miou_multi_scale=system and system.miou_ms,
        **config['pretrained_cfg'],
        test=config.get('test'),
        paper=system and system.paper,
        weights='in this folder' if folder and name not in BUNDLED else _location(name),
        sha256=weights.get('sha256'),
        made_from=weights.get('source'),
        url=system and system.source,
        label_names=config['label_names'],
    )


def import_folder(args: argparse.Namespace) -> dict[str, Any]:
    """Runs ``import`` for a checkpoint of a segmenter, and returns what it prints."""
    options = args.model_kwargs | (dict(num_classes=args.num_classes) if args.num_classes else {})
    import_segmenter(args.file, args.to, args.model, args.use_ema, options, args.label_names)
    config = read_segmenter_config(args.to)
    result = {key: config[key] for key in ('head', 'backbone')} | dict(classes=config['num_classes'])
    return result | {key: config[key] for key in ('source', 'sha256')}


def local(name: str) -> str:
    """Downloads a repository on the Hub; returns ``local-dir:`` of it if it has a segmenter, else the name."""
    source, _, location = name.partition(':')
    if source != 'hf-hub':
        return name
    folder = hub_folder(location)
    return f'local-dir:{folder}' if is_segmenter_folder(folder) else name


def load(name: str, checkpoint: str | None, untrained: bool, num_classes: int | None) -> nn.Module:
    """Returns the segmenter that ``export`` names.

    Args:
        name: Published system, model folder, or checkpoint of a training.
        checkpoint: Weights of a published system in place of the pretrained ones; None for those.
        untrained: Random weights of a published system.
        num_classes: Number of classes K, with ``checkpoint`` or ``untrained``.
    """
    options = dict(num_classes=num_classes) if num_classes else {}
    if name not in CONFIGS:
        if checkpoint or untrained:
            raise OptionError(f'{name} has weights: --checkpoint and --untrained are for the name of a model')
        is_folder = name.startswith('local-dir:') or name in BUNDLED or Path(name).is_dir()
        return create_segmenter(_folder(name)) if is_folder else load_segmenter(name)
    if checkpoint:
        return load_segmenter(checkpoint, name, model_args=options)
    return create_segmenter(name, auxiliary=False, pretrained=not untrained, **options)


def _folder(name: str) -> str:
    return name if name in BUNDLED else f'local-dir:{name.removeprefix("local-dir:")}'

"""The README.md of a model folder: what the Hub shows of a model, and what a person needs to use and to judge it."""

import html
import re
from typing import Any

from huggingface_hub import ModelCardData

from .tags import Release, label_names

__all__ = ['model_card']

_DATASETS = {'ImageNet-1k': 'imagenet-1k', 'CIFAR-10': 'cifar10'}  # as the Hub calls them
_LICENSES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'cc-by-nc-4.0', 'gpl-3.0')  # as the Hub does
_SHOWN = 20  # classes that are named

_CARD = """\
---
{data}
---

# {title}

{architecture}, {num_classes} classes, trained on {trained_on}. {paper}

```python
import timm

import cluster_zoo  # pip install cluster_zoo's checkout: timm then knows the architecture

model = timm.create_model('{load}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Results

{results}

## Images and classes

Images of {input_size} (channels, height, width), crop {crop_pct}, {interpolation}, mean {mean}, std {std}.

Classes by their index: {classes}

## Origin

{origin}

Licence of the weights: {license}.
"""


def model_card(config: dict[str, Any], release: Release, title: str, load: str) -> str:
    """A model card in Markdown, with the YAML front matter that the Hub reads.

    Args:
        config: The folder's ``config.json``. Its text may come from elsewhere, and adds no markup.
        release: What is known of the weights.
        title: Heading.
        load: Name for ``timm.create_model``.
    """
    cfg = config['pretrained_cfg']
    license_name = str(cfg.get('license') or 'unknown')
    known = license_name in (*_LICENSES, 'unknown')
    data = ModelCardData(
        license=license_name if known else 'other',
        license_name=None if known else _text(license_name),
        library_name='timm',
        pipeline_tag='image-classification' if config.get('num_classes') else 'image-feature-extraction',
        tags=['timm', 'cluster_zoo'],
        datasets=[_DATASETS[release.data]] if release.data in _DATASETS else None,
    )
    results = [f'- {release.published_top1} % top-1 on ImageNet-1k, as published by the authors']
    results = results if release.published_top1 is not None else []
    results += [
        f'- {one["top1"]:.2f} % top-1 on {one["images"]}, measured with cluster_zoo by `{one["command"]}` on '
        f'{one["machine"]}, {one["date"]}'
        for one in release.measured
    ]
    origin = [f'- {_text(key)}: {_text(value)}' for key, value in (config.get('source') or {}).items() if value]
    names = label_names({**cfg, **{key: config[key] for key in ('num_classes', 'label_names') if config.get(key)}})
    shown = ', '.join(map(_text, (names or [])[:_SHOWN]))
    card = _CARD.format(
        data=data.to_yaml(),
        title=_text(title),
        architecture=_text(config['architecture']),
        num_classes=config.get('num_classes'),
        trained_on=_text(release.data or 'data that is not known'),
        paper=_text(' '.join(str(cfg[key]) for key in ('paper_name', 'paper_ids') if cfg.get(key))),
        load=_text(load),
        results='\n'.join(results) or 'No figure is known for these weights.',
        classes=f'{shown or "not known"}{", ..." if names and len(names) > _SHOWN else ""}',
        origin='\n'.join([*origin, f'- SHA-256 of model.safetensors: {config["sha256"]}']),
        license=_text(license_name),
        **{key: _text(cfg.get(key)) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')},
    )
    return card + (f'\n## Citation\n\n```bibtex\n{release.citation}\n```\n' if release.citation else '')


def _text(value: Any) -> str:
    """Text of a configuration on one line, with all that Markdown or HTML would take for markup escaped."""
    line = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(value)).split())
    return re.sub(r'([\\`*\[\]#|~$!])', r'\\\1', html.escape(line, quote=False))

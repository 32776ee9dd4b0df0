"""The README.md of a model folder: what the Hub shows of a model, and what a person needs to use and to judge it."""

import html
import re
from typing import Any

from huggingface_hub import ModelCardData

from .metadata import label_names, release

__all__ = ['model_card']

_DATASETS = {'ImageNet-1k': ['imagenet-1k'], 'CIFAR-10': ['cifar10']}  # as the Hub calls them
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
- SHA-256 of model.safetensors: {sha256}

Licence of the weights: {license}.
{citation}"""


def model_card(config: dict[str, Any], title: str) -> str:
    """A model card in Markdown, with the YAML front matter that the Hub reads, from a folder's ``config.json``.

    Text in the configuration may come from elsewhere, and adds no markup.
    """
    cfg, name = config['pretrained_cfg'], config['architecture']
    known = release(f'{name}.{cfg["tag"]}' if cfg.get('tag') else name)
    stated = str(cfg.get('license') or 'unknown')
    common = stated in (*_LICENSES, 'unknown')
    data = ModelCardData(
        license=stated if common else 'other',
        license_name=None if common else _text(stated),
        library_name='timm',
        pipeline_tag='image-classification' if config.get('num_classes') else 'image-feature-extraction',
        tags=['timm', 'cluster_zoo'],
        datasets=_DATASETS.get(known.data),
    )
    top1 = '- {top1:.2f} % top-1 on {images}, measured with cluster_zoo by `{command}` on {machine}, {date}'
    published = f'- {known.published_top1} % top-1 on ImageNet-1k, as published by the authors'
    results = [published] * bool(known.published_top1) + [top1.format(**one) for one in known.measured]
    labels = label_names(cfg | {key: config[key] for key in ('num_classes', 'label_names') if config.get(key)}) or []
    return _CARD.format(
        data=data.to_yaml(),
        title=_text(title),
        architecture=name,
        num_classes=config.get('num_classes'),
        trained_on=known.data or 'data that is not known',
        paper=_text(' '.join(str(cfg[key]) for key in ('paper_name', 'paper_ids') if cfg.get(key))),
        load=f'{name}.{cfg["tag"]}' if cfg.get('tag') else 'local-dir:FOLDER',
        results='\n'.join(results) or 'No figure is known for these weights.',
        classes=(', '.join(map(_text, labels[:_SHOWN])) or 'not known') + ', ...' * (len(labels) > _SHOWN),
        origin='\n'.join(f'- {_text(key)}: {_text(value)}' for key, value in config['source'].items() if value),
        sha256=config['sha256'],
        license=_text(stated),
        citation=f'\n## Citation\n\n```bibtex\n{known.citation}\n```\n' if known.citation else '',
        **{key: _text(cfg.get(key)) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')},
    )


def _text(value: Any) -> str:
    """Text of a configuration on one line, with all that Markdown or HTML would take for markup escaped."""
    line = ' '.join(''.join(c if c.isprintable() else ' ' for c in str(value)).split())
    return re.sub(r'([\\`*_\[\]#|~$!])', r'\\\1', html.escape(line, quote=False))

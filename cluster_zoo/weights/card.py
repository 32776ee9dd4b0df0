"""The model card: README.md of a model folder, which the Hugging Face Hub displays."""

import html
import re
from typing import Any

from huggingface_hub import ModelCardData

from ..errors import one_line
from .metadata import label_names, release

__all__ = ['LICENSES', 'escape', 'model_card']

# The Hub's names of datasets and licenses
_DATASETS = {'ImageNet-1k': ['imagenet-1k'], 'CIFAR-10': ['cifar10']}
LICENSES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc0-1.0', 'cc-by-4.0', 'cc-by-nc-4.0', 'gpl-3.0', 'unknown')
_SHOWN = 20  # class names in the card

_CARD = """\
---
{data}
---

# {title}

{architecture}, {num_classes} classes{several}, trained on {dataset}. {paper}

```python
import timm

import cluster_zoo  # registers the architecture; to install: pip install a checkout of cluster_zoo

model = timm.create_model('{load}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Results

{results}

## Images and classes

Images of {input_size} (channels, height, width), crop {crop_pct}, {interpolation}, mean {mean}, std {std}.

Classes by index: {classes}

## Origin

{origin}
- SHA-256 of model.safetensors: {sha256}

License of the weights: {license}.
{citation}"""


def model_card(config: dict[str, Any], title: str) -> str:
    """Returns a model card in Markdown, with the YAML front matter of the Hub, from a folder's ``config.json``.

    Text from the configuration, which may be hostile, is escaped and cannot add markup.
    """
    cfg, name = config['pretrained_cfg'], config['architecture']
    full_name = f'{name}.{cfg["tag"]}' if cfg.get('tag') else None
    known = release(full_name or name)
    license = str(cfg.get('license') or 'unknown')
    data = ModelCardData(
        license=license if license in LICENSES else 'other',
        license_name=None if license in LICENSES else escape(license),
        library_name='timm',
        pipeline_tag='image-classification' if config.get('num_classes') else 'image-feature-extraction',
        tags=['timm', 'cluster_zoo'],
        datasets=_DATASETS.get(known.data),
    )
    measured = '- {top1:.2f} % top-1 on {images}, measured with cluster_zoo by `{command}` on {machine}, {date}'
    results = [measured.format(**one) for one in known.measured]
    if known.published_top1:
        results.insert(0, f'- {known.published_top1} % top-1 on ImageNet-1k, as published by the authors')
    labels = label_names(cfg | {key: config[key] for key in ('num_classes', 'label_names') if config.get(key)}) or []
    return _CARD.format(
        data=data.to_yaml(),
        title=escape(title),
        architecture=name,
        num_classes=config.get('num_classes'),
        several=' (an image can have several)' if config.get('multi_label') else '',
        dataset=known.data or 'unknown data',
        paper=escape(' '.join(str(cfg[key]) for key in ('paper_name', 'paper_ids') if cfg.get(key))),
        load=full_name or 'local-dir:FOLDER',
        results='\n'.join(results) or 'No results are known for these weights.',
        classes=(', '.join(map(escape, labels[:_SHOWN])) or 'not known') + ', ...' * (len(labels) > _SHOWN),
        origin='\n'.join(f'- {escape(key)}: {escape(value)}' for key, value in config['source'].items() if value),
        sha256=config['sha256'],
        license=escape(license),
        citation=f'\n## Citation\n\n```bibtex\n{known.citation}\n```\n' if known.citation else '',
        **{key: escape(cfg.get(key)) for key in ('input_size', 'crop_pct', 'interpolation', 'mean', 'std')},
    )


def escape(value: Any) -> str:
    """Escapes Markdown and HTML in external text."""
    return re.sub(r'([\\`*_\[\]#|~$!])', r'\\\1', html.escape(one_line(value), quote=False))

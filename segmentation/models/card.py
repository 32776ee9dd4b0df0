"""The model card of a segmenter: README.md of its model folder, which the Hugging Face Hub displays."""

from typing import Any

from huggingface_hub import ModelCardData

from cluster_zoo.weights.card import escape

from .published_systems import CONFIGS

__all__ = ['segmenter_card']

_DATASETS = dict(ade20k='ADE20K', cityscapes='Cityscapes', pascal_context_59='Pascal Context')
_SHOWN = 20  # class names in the card

_CARD = """\
---
{data}
---

# {title}

Semantic segmentation: the head {head} on the backbone {backbone}, {num_classes} classes. {paper}

```python
from segmentation import create_segmenter  # to install: pip install a checkout of cluster_zoo

model = create_segmenter('local-dir:FOLDER').eval()  # or hf-hub:ORG/NAME
```

## Images and classes

Images of {input_size} (channels, height, width) or another size, mean {mean}, std {std}. Test: {test}.

Classes by index: {classes}
{results}
## Origin

{origin}
- SHA-256 of model.safetensors: {sha256}

License of the weights: unknown.
"""


def segmenter_card(config: dict[str, Any], title: str) -> str:
    """Returns a model card in Markdown, with the YAML front matter of the Hub, from a folder's ``config.json``.

    Text from the configuration, which may be hostile, is escaped and cannot add markup.
    """
    published, images, labels = CONFIGS.get(config.get('segmenter')), config['pretrained_cfg'], config['label_names']
    data = ModelCardData(
        license='other',
        license_name='unknown',
        library_name='cluster_zoo',
        pipeline_tag='image-segmentation',
        tags=['cluster_zoo', 'semantic-segmentation'],
    )
    results = paper = ''
    if published:
        paper = published.paper
        if published.miou:
            dataset = _DATASETS[published.dataset]
            results = f'\n## Results\n\n- {published.miou} % mIoU on {dataset}, as published by the authors\n'
    return _CARD.format(
        data=data.to_yaml(),
        title=escape(title),
        paper=paper,
        results=results,
        classes=', '.join(map(escape, labels[:_SHOWN])) + ', ...' * (len(labels) > _SHOWN),
        test=', '.join(
            f'{escape(key)} {escape(value)}' for key, value in (config.get('test') or dict(mode='whole')).items()
        ),
        origin='\n'.join(f'- {escape(key)}: {escape(value)}' for key, value in config['source'].items() if value),
        sha256=config['sha256'],
        num_classes=config['num_classes'],
        **{key: escape(config[key]) for key in ('head', 'backbone')},
        **{key: escape(images.get(key)) for key in ('input_size', 'mean', 'std')},
    )

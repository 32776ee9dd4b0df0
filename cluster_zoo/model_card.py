"""The README.md of a model folder: what a Hub shows of a model, and what a person needs to use and to judge it.

It states what the configuration and the facts of the tag say, figures of the authors apart from figures of this
package, and says so where something is not known. Strings that came from elsewhere are shown as they are: they add no
key to the front matter and no markup to the text.
"""

import html
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from .tags import Facts, label_names

__all__ = ['model_card']

# What the Hub takes for a licence, of those that weights commonly have; any other is stated by its name.
_LICENSES = (
    *(
        'agpl-3.0',
        'apache-2.0',
        'bsd-2-clause',
        'bsd-3-clause',
        'cc0-1.0',
        'gpl-2.0',
        'gpl-3.0',
        'isc',
        'lgpl-3.0',
        'mit',
    ),
    *('cc-by-4.0', 'cc-by-nc-4.0', 'cc-by-nc-nd-4.0', 'cc-by-nc-sa-4.0', 'cc-by-nd-4.0', 'cc-by-sa-4.0'),
    *('mpl-2.0', 'openrail', 'unlicense'),
)
_DATASETS = {'ImageNet-1k': 'imagenet-1k', 'CIFAR-10': 'cifar10'}  # as the Hub calls them
_SHOWN = 20  # classes that are named


def model_card(config: dict[str, Any], facts: Facts | None, repo_id: str | None = None) -> str:
    """A model card in Markdown, with YAML front matter that the Hub reads.

    Args:
        config: The folder's ``config.json``: timm's layout, with ``sha256`` and ``source`` if they are known.
        facts: What is known of the weights, see `tags.facts`; None for nothing.
        repo_id: ``organisation/name`` on the Hub, if the folder is to lie there. Otherwise the examples call the model
            by its name, as it is in the local store.
    """
    facts = facts or Facts()
    cfg = config.get('pretrained_cfg') or {}
    name = '.'.join(_line(part) for part in (config['architecture'], cfg.get('tag')) if part)
    sections = (
        ('Model', _model(config, cfg, facts)),
        ('Use', _use(config, repo_id, name)),
        ('Results', _results(facts)),
        ('Classes', _classes(config, cfg)),
        ('Origin', _origin(config)),
        ('Licence', _licence(cfg)),
        ('Citation', _block(facts.citation.strip(), 'bibtex') if facts.citation else ''),
    )
    body = ''.join(f'\n## {title}\n\n{text}\n' for title, text in sections if text)
    return f'---\n{_front_matter(config, cfg, facts)}---\n\n# {_text(name)}\n{body}'


def _front_matter(config: dict[str, Any], cfg: dict[str, Any], facts: Facts) -> str:
    license_name = _line(cfg.get('license') or '')
    data: dict[str, Any] = {}
    if license_name.lower() in _LICENSES:
        data['license'] = license_name.lower()
    elif license_name:
        data |= dict(license='other', license_name=license_name)
    else:
        data['license'] = 'unknown'
    data['library_name'] = 'timm'
    data['pipeline_tag'] = 'image-classification' if config.get('num_classes') else 'image-feature-extraction'
    data['tags'] = ['timm', 'transformers', 'cluster_zoo'] if _suits_transformers(config) else ['timm', 'cluster_zoo']
    if facts.data in _DATASETS:
        data['datasets'] = [_DATASETS[facts.data]]
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)


def _model(config: dict[str, Any], cfg: dict[str, Any], facts: Facts) -> str:
    rows = [('Architecture', _text(config['architecture'])), ('Classes', _text(config.get('num_classes') or 'none'))]
    if config.get('model_args'):
        rows.append(('Arguments', _text(json.dumps(config['model_args'], ensure_ascii=False))))
    rows.append(('Trained on', _text(facts.data or 'not known')))
    if cfg.get('input_size'):
        rows.append(('Input', _text(' x '.join(map(str, cfg['input_size'])) + ' (channels, height, width)')))
    for label, key in (('Crop', 'crop_pct'), ('Interpolation', 'interpolation'), ('Mean', 'mean'), ('Std', 'std')):
        if cfg.get(key):
            rows.append((label, _text(', '.join(map(str, cfg[key])) if _is_list(cfg[key]) else cfg[key])))
    if cfg.get('paper_name'):
        rows.append(('Paper', _paper(cfg)))
    table = '\n'.join(f'| {label} | {value} |' for label, value in rows)
    described = f'Description: {_text(cfg["description"])}\n\n' if cfg.get('description') else ''
    return f'{described}| | |\n|---|---|\n{table}'


def _paper(cfg: dict[str, Any]) -> str:
    identifier = re.fullmatch(r'arXiv:(\d{4}\.\d{4,5})', str(cfg.get('paper_ids')))
    name = _text(cfg['paper_name'])
    return f'[{name}](https://arxiv.org/abs/{identifier[1]})' if identifier else name


def _use(config: dict[str, Any], repo_id: str | None, name: str) -> str:
    source = f'hf-hub:{_line(repo_id)}' if repo_id else name
    result, softmax = ('probabilities', '.softmax(-1)') if config.get('num_classes') else ('features', '')
    example = _block(
        '\n'.join(
            (
                'import timm',
                'import torch',
                'from PIL import Image',
                '',
                'import cluster_zoo  # timm then knows the architecture',
                '',
                f'model = timm.create_model({source!r}, pretrained=True).eval()',
                'transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))',
                "images = transform(Image.open('image.jpg').convert('RGB')).unsqueeze(0)",
                'with torch.inference_mode():',
                f'    {result} = model(images){softmax}',
            )
        ),
        'python',
    )
    example = (
        'First install cluster_zoo as its README says: it is on no package index, and `pip install .` in its checkout '
        f'does it.\n\n{example}'
    )
    if not repo_id or not _suits_transformers(config):
        return example
    in_transformers = _block(
        '\n'.join(
            (
                'import cluster_zoo',
                'from transformers import pipeline',
                '',
                f"pipeline('image-classification', model={_line(repo_id)!r})('image.jpg')",
            )
        ),
        'python',
    )
    return f"{example}\n\nWith transformers, whose wrapper builds timm's models:\n\n{in_transformers}"


def _suits_transformers(config: dict[str, Any]) -> bool:
    """Its wrapper passes the number of classes itself, and fails where the arguments have it too."""
    return bool(config.get('num_classes')) and 'num_classes' not in (config.get('model_args') or {})


def _results(facts: Facts) -> str:
    published = (
        'Published: no figure is known for these weights.\n\n'
        if facts.published_top1 is None
        else f'Published by the authors: {facts.published_top1} % top-1 on ImageNet-1k. This figure is theirs.\n\n'
    )
    if not facts.measured:
        return f'{published}Measured with cluster_zoo: nothing yet.'
    rows = '\n'.join(
        f'| {measured.value:.2f} % | {_text(measured.images)} | <code>{_text(measured.command)}</code> '
        f'| {_text(measured.machine)} | {_text(measured.date)} |'
        for measured in facts.measured
    )
    table = f'| top-1 | images | command | machine | date |\n|---|---|---|---|---|\n{rows}'
    # Weights of this package's own have no other authors
    return f'{published if facts.published_top1 is not None else ""}Measured with cluster_zoo:\n\n{table}'


def _classes(config: dict[str, Any], cfg: dict[str, Any]) -> str:
    own = {key: config[key] for key in ('num_classes', 'label_names', 'label_descriptions') if config.get(key)}
    names = label_names({**cfg, **own})
    if not names:
        return 'The names of the classes are not known.' if config.get('num_classes') else ''
    shown = ', '.join(map(_code, names[:_SHOWN]))
    return f'By their index: {shown}' + (f' and {len(names) - _SHOWN} more.' if len(names) > _SHOWN else '.')


def _origin(config: dict[str, Any]) -> str:
    lines = [f'- Source {_text(key)}: {_code(value)}' for key, value in _entries(config.get('source'))]
    if not lines:
        lines = ['- Where the weights come from is not known.']
    if config.get('sha256'):
        lines.append(f'- SHA-256 of `model.safetensors`: {_code(config["sha256"])}')
    return '\n'.join(lines)


def _entries(source: Any) -> Iterator[tuple[str, str]]:
    for key, value in source.items() if isinstance(source, dict) else ():
        yield str(key), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _licence(cfg: dict[str, Any]) -> str:
    if cfg.get('license'):
        return f'The weights are under {_text(cfg["license"])}, as stated with them.'
    return (
        'Not known: none is stated with these weights. Ask those who trained them before you pass them on or build on '
        'them.'
    )


# ---- Strings that came from elsewhere ----


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _line(value: Any) -> str:
    """On one line, without control characters, among them those that change the direction of writing."""
    return ' '.join(''.join(character if character.isprintable() else ' ' for character in str(value)).split())


def _text(value: Any) -> str:
    """As text, with all that Markdown or HTML would take for markup escaped."""
    escaped = re.sub(r'([\\`*\[\]#|~$!])', r'\\\1', html.escape(_line(value), quote=False))
    return re.sub(r'(?<![^\W_])_|_(?![^\W_])', r'\\_', escaped)  # within a word it is an underscore


def _code(value: Any) -> str:
    """As a code span, whose delimiter is longer than any run of backticks in it."""
    line = _line(value)
    fence = '`' * (1 + max(map(len, re.findall('`+', line)), default=0))
    pad = ' ' if line.startswith('`') or line.endswith('`') or not line else ''
    return f'{fence}{pad}{line}{pad}{fence}'


def _block(text: str, language: str) -> str:
    """As a code block, whose delimiter is longer than any run of backticks in it."""
    fence = '`' * max(3, 1 + max(map(len, re.findall('`+', text)), default=0))
    return f'{fence}{language}\n{text}\n{fence}'

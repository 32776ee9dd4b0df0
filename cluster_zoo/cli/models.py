"""``cluster-zoo list`` and ``cluster-zoo info``: what models and weights there are, and what is known of them."""

import argparse
import fnmatch
import json
from dataclasses import asdict
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg

from .. import authors, hub, store, tags
from ..options import OptionError, nearest
from ..sources import where
from .parser import Commands, our_tag
from .text import first_labels, printable


def add_parser(commands: Commands) -> None:
    """Registers both commands."""
    parser = commands.add_parser(
        'list',
        help='list models and weights',
        description='List the models of this package with their weights: parameters, top-1 accuracy in % as published '
        'by the authors on ImageNet-1k and as measured with this package, and where the weights are. The network is '
        'not asked.',
        epilog="examples:\n  cluster-zoo list\n  cluster-zoo list 'coc_*.in1k'\n  cluster-zoo list swin --json\n",
    )
    parser.add_argument('filter', nargs='?', metavar='FILTER', help="a part of the names, or a pattern such as 'coc_*'")
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_list)

    parser = commands.add_parser(
        'info',
        help='print what is known of a model and its weights',
        description='Print what is known of a model and its weights: where they are or could come from, licence, '
        'paper, accuracy, what images have to be like, and what the classes are called.',
        epilog='examples:\n  cluster-zoo info coc_small\n  cluster-zoo info coc_tiny_plain.cifar10 --json\n',
    )
    parser.add_argument('name', type=our_tag, metavar='NAME', help='a model, with or without a tag')
    parser.add_argument('--json', action='store_true', help='print JSON, with all label names and the citation')
    parser.set_defaults(run=_info)


def _list(args: argparse.Namespace) -> None:
    known = tags.our_tags()
    pattern = args.filter or '*'
    if not set(pattern) & set('*?['):
        pattern = f'*{pattern}*'
    names = fnmatch.filter(known, pattern)
    if not names:
        raise OptionError(f"no name matches '{args.filter}'{nearest(args.filter, tags.our_models())}")
    rows = [_summary(name) for name in names]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    width = max(map(len, names))
    print(f'{"name":{width}}  parameters  published  measured  weights')
    for row in rows:
        published, measured = _percent(row['published_top1']), _percent(row['measured_top1'])
        parameters = f'{row["parameters"] / 1e6:.2f} M'
        print(f'{row["name"]:{width}}  {parameters:>10}  {published:>9}  {measured:>8}  {_where(row["weights"])}')


def _summary(name: str) -> dict[str, Any]:
    facts = tags.facts(name)
    return dict(
        name=name,
        parameters=_parameters(name),
        published_top1=facts.published_top1,
        measured_top1=facts.measured[0].value if facts.measured else None,
        weights=where(name),
    )


def _parameters(name: str) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in timm.create_model(name).parameters())


def _percent(value: float | None) -> str:
    return '-' if value is None else f'{value:.1f}'


def _where(status: str) -> str:
    return {
        'package': 'in the package',
        'store': 'in the store',
        'hub': f'{hub.organisation()} on Hugging Face may have them',
        'authors': "the authors' publication",
        'none': 'none published',
    }[status]


def _info(args: argparse.Namespace) -> None:
    facts = describe(args.name)
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    weights, images = facts['weights'], facts['images']
    published = facts['published_top1']
    lines = [
        ('model', facts['name']),
        ('parameters', f'{facts["parameters"] / 1e6:.2f} M'),
        ('classes', f'{facts["num_classes"]}{first_labels(facts["label_names"])}'),
        ('trained on', facts['data']),
        ('published top-1', published and f'{published} % on ImageNet-1k, as the authors state'),
        *(('measured top-1', f'{one["value"]} % on {one["images"]}') for one in facts['measured']),
        *(('measured with', one['command']) for one in facts['measured']),
        ('image size', ' x '.join(map(str, images['input_size']))),
        ('crop', f'{100 * images["crop_pct"]:g} % of the resized image, {images["crop_mode"]}'),
        ('interpolation', images['interpolation']),
        ('mean', ' '.join(map(str, images['mean']))),
        ('std', ' '.join(map(str, images['std']))),
        ('paper', facts['paper']),
        ('licence', facts['license']),
        ('origin', facts['origin']),
        ('weights', _where(weights['where'])),
        ('file', weights['path']),
        ('SHA-256', weights['sha256'] or 'known once there is a file'),
        *(('made from', f'{key} {value}') for key, value in (weights['made_from'] or {}).items()),
        *(('could come from', source) for source in weights['sources'] if not weights['path']),
    ]
    for key, value in lines:
        print(f'{key:16} {printable(value or "-")}')


def describe(name: str) -> dict[str, Any]:
    """Everything that is known of a model and its weights, ready for JSON.

    Args:
        name: Architecture and tag, of this package.

    Raises:
        CheckpointError: The store's configuration of it is damaged.
    """
    cfg, facts = get_pretrained_cfg(name).to_dict(), tags.facts(name)
    return dict(
        name=name,
        parameters=_parameters(name),
        num_classes=cfg['num_classes'],
        data=facts.data,
        published_top1=facts.published_top1,
        measured=[asdict(measured) for measured in facts.measured],
        images={key: cfg[key] for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')},
        weights=_weights(name, cfg),
        license=cfg.get('license'),
        origin=cfg.get('origin_url'),
        paper=' '.join(cfg[key] for key in ('paper_name', 'paper_ids') if cfg.get(key)) or None,
        citation=facts.citation,
        label_names=tags.label_names(cfg),
    )


def _weights(name: str, cfg: dict[str, Any]) -> dict[str, Any]:
    status, path, digest, made_from = where(name), None, None, None
    if status == 'package':
        path, digest = cfg['file'], tags.facts(name).sha256
    elif status == 'store':
        config = store.read_config(store.folder(name))
        path, digest = str(store.folder(name) / store.WEIGHTS), config.get('sha256')
        made_from = config.get('source')
    organisation = hub.organisation()
    sources = [f'hf-hub:{organisation}/{name}'] if organisation else []
    sources += filter(None, [authors.publication(name)])
    return {'where': status, 'path': path, 'sha256': digest, 'made_from': made_from, 'sources': sources}

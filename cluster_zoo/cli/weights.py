"""``cluster-zoo list``, ``info``, ``fetch``, ``import`` and ``push``: models and their weights."""

import argparse
import ast
import fnmatch
import json
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from timm.models import get_pretrained_cfg

from .. import __version__
from ..options import OptionError, nearest
from ..weights import CheckpointError, cache, tags
from ..weights.build import load_model, open_folder, weights_folder
from ..weights.configs import read_config
from ..weights.download import is_drive, organization
from ..weights.errors import one_line
from ..weights.importing import import_checkpoint, install, write_folder
from .parser import Commands, positive
from .text import first_labels, printable


def add_parser(commands: Commands) -> None:
    """Registers the five commands."""
    parser = _add(commands, 'list', 'list models and weights', 'cluster-zoo list\ncluster-zoo list swin --json', _list)
    parser.add_argument('filter', nargs='?', metavar='FILTER', help="a part of the names, or a pattern such as 'coc_*'")

    parser = _add(
        commands,
        'info',
        'print what is known of a model and its weights',
        'cluster-zoo info coc_small\ncluster-zoo info my_model/',
        _info,
    )
    parser.add_argument('name', metavar='NAME', help='a model, with or without a tag, or a model folder')

    parser = _add(
        commands,
        'fetch',
        'download released weights',
        "cluster-zoo fetch coc_small\ncluster-zoo fetch dnc_resnet50 --file 'ImageNet/resnet50.pth'",
        _fetch,
    )
    parser.add_argument('name', metavar='NAME', help='a model, with or without a tag, or a published segmenter')
    parser.add_argument(
        '--file', metavar='PATH', help="file of the authors' folder, where it is not clear which is meant"
    )
    parser.add_argument('--force', action='store_true', help='download again, and accept a file that has changed')
    parser.add_argument('--pin', action='store_true', help='print the line that pins the file in cluster_zoo')

    parser = _add(
        commands,
        'import',
        'make a model folder of a checkpoint file',
        'cluster-zoo import output/birds/last.pth.tar --to birds/\n'
        'cluster-zoo import birds.pth --to birds/ --model coc_tiny --num-classes 200 --label-names birds.txt\n'
        'cluster-zoo import drive-download.zip --as fec_small.in1k',
        _import,
    )
    add = parser.add_argument
    add('file', type=Path, metavar='FILE', help="a checkpoint, the authors', timm's or your own, or an archive of one")
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument('--to', type=Path, metavar='FOLDER', help='model folder to make')
    place.add_argument(
        '--as', dest='name', metavar='NAME', help='release to put into the cache, such as coc_small.in1k'
    )
    add('--model', metavar='NAME', help='the architecture, where the file does not say')
    add('--use-ema', action='store_true', help='take the averaged weights where the file has both')
    add('--model-kwargs', nargs='+', default=[], type=_argument, metavar='K=V', help='further arguments of the model')
    add('--num-classes', type=positive, metavar='N', help="classes (default: the file's, else the model's)")
    add('--img-size', type=positive, metavar='PX', help="side of the images (default: the file's, else the model's)")
    add('--label-names', type=_lines, metavar='FILE', help='text file with the name of each class on a line, in order')
    add('--force', action='store_true', help='replace what is there')

    parser = _add(
        commands,
        'push',
        'upload weights to the Hugging Face Hub',
        'cluster-zoo push birds/ --to my-lab/birds --private\ncluster-zoo push coc_small --to my-lab/coc_small',
        _push,
    )
    parser.add_argument('name', metavar='NAME', help='a model folder, or a model whose weights are on this machine')
    parser.add_argument(
        '--to', required=True, metavar='ORG/NAME', help='the repository; it is made if it does not exist'
    )
    parser.add_argument('--private', action='store_true', help='make the repository private, if it is made')
    parser.add_argument('--message', default='Add model', help='of the commit (default: %(default)s)')


def _add(commands: Commands, name: str, help: str, examples: str, run: Any) -> argparse.ArgumentParser:
    lines = ''.join(f'\n  {line}' for line in examples.splitlines())
    parser = commands.add_parser(
        name, help=help, description=f'{help[0].upper()}{help[1:]}.', epilog=f'examples:{lines}'
    )
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=run)
    return parser


def _argument(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition('=')
    if not (equals and key.isidentifier()):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form name=value")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return key, value


def _lines(name: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(name).read_text(encoding='utf-8-sig').splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f'{name} cannot be read: {error}') from error
    if not all(lines):
        raise argparse.ArgumentTypeError(f'{name} has no name on line {lines.index("") + 1}: each class needs one')
    return lines


def _tag(name: str) -> str:
    """A name of this package with its tag."""
    known = tags.our_tags() if '.' in name else tags.our_models()
    if name not in known:
        raise OptionError(f"cluster_zoo has no '{name}'{nearest(name, known)}: see cluster-zoo list")
    return tags.full_name(name)


def _where(name: str) -> str:
    """Where the weights of a name are, or would come from."""
    cfg = get_pretrained_cfg(name)
    if cfg.file:
        return 'in the package'
    if cache.cached(name):
        return 'in the cache'
    named = [f'{organization()} on Hugging Face may have them'] if organization() else []
    return ', '.join([*named, *(["the authors' release"] if is_drive(cfg.url) else [])]) or 'none released'


def _parameters(name: str, **kwargs: Any) -> int:
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in timm.create_model(name, **kwargs).parameters())


def _list(args: argparse.Namespace) -> None:
    pattern = args.filter or '*'
    pattern = pattern if set(pattern) & set('*?[') else f'*{pattern}*'
    names = fnmatch.filter(tags.our_tags(), pattern)
    if not names:
        raise OptionError(f"no name matches '{args.filter}'{nearest(args.filter, tags.our_models())}")
    rows = []
    for name in names:
        release = tags.release(name)
        measured = release.measured[0]['top1'] if release.measured else None
        top1 = dict(published_top1=release.published_top1, measured_top1=measured)
        rows.append(dict(name=name, parameters=_parameters(name), **top1, weights=_where(name)))
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    width = max(map(len, names))
    print(f'{"name":{width}}  parameters  published  measured  weights')
    for row in rows:
        top1 = [f'{row[key]:.1f}' if row[key] else '-' for key in ('published_top1', 'measured_top1')]
        parameters = f'{row["parameters"] / 1e6:.2f} M'
        print(f'{row["name"]:{width}}  {parameters:>10}  {top1[0]:>9}  {top1[1]:>8}  {row["weights"]}')


def _info(args: argparse.Namespace) -> None:
    folder = Path(args.name.removeprefix('local-dir:'))
    if folder.is_dir():
        config = read_config(folder)
        cfg = dict(config['pretrained_cfg'], num_classes=config.get('num_classes'))
        cfg |= {key: config[key] for key in ('label_names', 'label_descriptions') if key in config}
        name, weights = config['architecture'], 'in this folder'
        parameters = _parameters(name, num_classes=cfg['num_classes'], **(config.get('model_args') or {}))
    else:
        name = _tag(args.name)
        cfg, weights, parameters = get_pretrained_cfg(name).to_dict(), _where(name), _parameters(name)
        found = cache.cached(name)
        config = read_config(found) if found else {}
    release, labels = tags.release(name), tags.label_names(cfg)
    facts = dict(
        name=name,
        parameters=parameters,
        classes=cfg['num_classes'],
        data=release.data,
        published_top1=release.published_top1,
        measured=list(release.measured),
        **{key: cfg.get(key) for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')},
        paper=cfg.get('paper_name'),
        license=cfg.get('license'),
        origin=cfg.get('origin_url'),
        weights=weights,
        sha256=config.get('sha256'),
        made_from=config.get('source'),
        url=cfg.get('url'),
        label_names=labels,
        citation=release.citation,
    )
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    facts |= dict(classes=f'{facts["classes"]}{first_labels(labels)}', parameters=f'{parameters / 1e6:.2f} M')
    for key, value in facts.items():
        if key not in ('label_names', 'citation'):
            print(f'{key:15} {printable("-" if value in (None, []) else value)}')


def _fetch(args: argparse.Namespace) -> None:
    options = dict(member=args.file, force=args.force) if args.file or args.force else {}
    segmenters = _segmenters()
    if args.name in segmenters:
        name, folder = args.name, segmenters[args.name](**options)
    else:
        name = _tag(args.name)
        cfg = get_pretrained_cfg(name)
        if cfg.file:
            print(f'{name}: part of the package')
            return
        folder = weights_folder(name, cfg.url, **options)
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    _show(args, f'{name}: in the cache', dict(name=name, folder=str(folder), sha256=config['sha256']), name)
    if args.pin:
        source = config['source']
        print(f"    '{name}': ('{source['drive_id']}', '{source['sha256']}'),")


def _segmenters() -> dict[str, Any]:
    from functools import partial

    from segmentation.segmenter import CONFIGS, fetch_segmenter

    return {name: partial(fetch_segmenter, name) for name in CONFIGS}


def _show(args: argparse.Namespace, headline: str, facts: dict[str, Any], load: str) -> None:
    """What was done, as JSON or for people, and how to use it."""
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    print(headline)
    for key, value in facts.items():
        print(f'  {key:10} {printable(value)}')
    print(f"  use it     import cluster_zoo, timm; timm.create_model('{load}', pretrained=True)")


def _import(args: argparse.Namespace) -> None:
    if args.name:
        _import_release(args)
        return
    if args.to.exists() and not args.force and any(args.to.iterdir() if args.to.is_dir() else [args.to]):
        raise OptionError(f"'{args.to}' is there already. With --force it is replaced.")
    model_args = dict(args.model_kwargs) | (dict(num_classes=args.num_classes) if args.num_classes else {})
    data = dict(img_size=args.img_size) if args.img_size else {}
    import_checkpoint(args.file, args.to, args.model, args.use_ema, model_args, data, args.label_names)
    config, _ = open_folder(args.to)
    facts = dict(architecture=config['architecture'], classes=config['num_classes'], **config['source'])
    facts |= dict(sha256=config['sha256'], input_size=config['pretrained_cfg']['input_size'])
    _show(args, f'{args.to}: made, and checked by running the model', facts, f'local-dir:{args.to}')


def _import_release(args: argparse.Namespace) -> None:
    name = _tag(args.name)
    own = dict(model=args.model, num_classes=args.num_classes, img_size=args.img_size, label_names=args.label_names)
    given = [key for key, value in own.items() if value] + ['model_kwargs'] * bool(args.model_kwargs)
    if given or args.use_ema or get_pretrained_cfg(name).file:
        raise OptionError(f'{name} has its own classes and images: --as takes no further options. Take --to FOLDER.')
    if cache.cached(name) and not args.force:
        raise OptionError(f'{name} is in the cache already. With --force it is replaced.')
    digest = cache.sha256(args.file) if args.file.is_file() else ''
    with cache.exclusive(name), cache.new_folder(cache.entry(name)) as folder:
        install(name, args.file, folder, dict(file=one_line(args.file.name), sha256=digest))
    _show(args, f'{name}: in the cache', dict(folder=str(cache.entry(name)), sha256=digest), name)


def _push(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.name.removeprefix('local-dir:'))
        if not folder.is_dir():
            name, folder = _tag(args.name), Path(scratch)
            if not (get_pretrained_cfg(name).file or cache.cached(name)):
                raise CheckpointError(f'The weights of {name} are not on this machine: cluster-zoo fetch {name}')
            model = load_model(name)
            labels = dict(label_names=tags.label_names(model.pretrained_cfg))
            write_folder(model, folder, name, dict(package=f'cluster_zoo {__version__}'), labels=labels)
        open_folder(folder)  # which refuses a damaged one
        try:
            huggingface_hub.create_repo(args.to, private=args.private, exist_ok=True)
            commit = huggingface_hub.upload_folder(
                repo_id=args.to,
                folder_path=folder,
                allow_patterns=['model.safetensors', 'config.json', 'README.md'],
                commit_message=args.message,
            )
        except Exception as error:  # of the client, or of the HTTP library under it
            refused = getattr(getattr(error, 'response', None), 'status_code', None) in (401, 403)
            hint = ' Log in first: hf auth login, or HF_TOKEN.' if refused else ''
            raise CheckpointError(f'The Hub did not take {args.to}: {one_line(error)}{hint}') from error
    _show(args, f'{args.name}: uploaded', dict(address=str(commit.commit_url)), f'hf-hub:{args.to}')

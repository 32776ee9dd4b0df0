"""``cluster-zoo list``, ``info``, ``fetch``, ``import`` and ``push``: models and their weights."""

import argparse
import fnmatch
import json
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg

from .. import __version__
from ..errors import CheckpointError, OptionError, nearest, one_line
from ..training.options import ParseKwargs
from ..weights import cache, metadata
from ..weights.configs import CONFIG, read_config
from ..weights.download import is_drive, organization
from ..weights.importing import find_weights, import_checkpoint, install, write_folder
from ..weights.loading import load_model, open_model_folder
from .parser import Commands, positive
from .text import first_labels, printable


def add_parser(commands: Commands) -> None:
    """Registers the five commands."""
    add = _add(commands, 'list', 'list models and weights', _list, 'list', 'list swin --json').add_argument
    add('filter', nargs='?', metavar='FILTER', help="a part of the names, or a pattern such as 'coc_*'")

    help = 'print what is known of a model and its weights'
    add = _add(commands, 'info', help, _info, 'info coc_small', 'info my_model/').add_argument
    add('name', metavar='NAME', help='a model, with or without a tag, or a model folder')

    examples = 'fetch coc_small', "fetch dnc_resnet50 --file 'ImageNet/resnet50.pth'"
    add = _add(commands, 'fetch', 'download released weights', _fetch, *examples).add_argument
    add('name', metavar='NAME', help='a model, with or without a tag, or a published segmenter')
    add('--file', metavar='PATH', help="file of the authors' folder, where it is not clear which is meant")
    add('--force', action='store_true', help='download again, and accept a file that has changed')
    add('--pin', action='store_true', help='print the line that pins the file in cluster_zoo')

    examples = (
        'import output/birds/last.pth.tar --to birds/',
        'import birds.pth --to birds/ --model coc_tiny --num-classes 200 --label-names birds.txt',
        'import drive-download.zip --as fec_small.in1k',
    )
    parser = _add(commands, 'import', 'make a model folder of a checkpoint file', _import, *examples)
    add, place = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    add('file', type=Path, metavar='FILE', help="a checkpoint, the authors', timm's or your own, or an archive of one")
    place('--to', type=Path, metavar='FOLDER', help='model folder to make')
    place('--as', dest='name', metavar='NAME', help='release to put into the cache, such as coc_small.in1k')
    add('--model', metavar='NAME', help='the architecture, where the file does not say')
    add('--use-ema', action='store_true', help='take the averaged weights where the file has both')
    add('--model-kwargs', nargs='+', default={}, action=ParseKwargs, metavar='K=V', help='arguments of the model')
    add('--num-classes', type=positive, metavar='N', help="classes (default: the file's, else the model's)")
    add('--img-size', type=positive, metavar='PX', help="side of the images (default: the file's, else the model's)")
    add('--label-names', type=_lines, metavar='FILE', help='text file with the name of each class on a line, in order')
    add('--force', action='store_true', help='replace what is there')

    examples = 'push birds/ --to my-lab/birds --private', 'push coc_small --to my-lab/coc_small'
    add = _add(commands, 'push', 'upload weights to the Hugging Face Hub', _push, *examples).add_argument
    add('name', metavar='NAME', help='a model folder, or a model whose weights are on this machine')
    add('--to', required=True, metavar='ORG/NAME', help='the repository; it is made if it does not exist')
    add('--private', action='store_true', help='make the repository private, if it is made')
    add('--message', default='Add model', help='of the commit (default: %(default)s)')


def _add(commands: Commands, name: str, help: str, run: Any, *examples: str) -> argparse.ArgumentParser:
    epilog = ''.join(f'\n  cluster-zoo {example}' for example in examples)
    description = f'{help[0].upper()}{help[1:]}.'
    parser = commands.add_parser(name, help=help, description=description, epilog=f'examples:{epilog}')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=run)
    return parser


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
    known = metadata.package_tags() if '.' in name else metadata.package_models()
    if name not in known:
        raise OptionError(f"cluster_zoo has no '{name}'{nearest(name, known)}: see cluster-zoo list")
    return metadata.full_name(name)


def _folder(name: str) -> Path | None:
    """The model folder that an argument names, if it names one."""
    folder = Path(name.removeprefix('local-dir:'))
    is_folder = (folder / CONFIG).is_file() or (folder.is_dir() and not timm.is_model(name))
    return folder if is_folder or name.startswith('local-dir:') else None


def _where(name: str) -> str:
    """Where the weights of a name are, or would come from."""
    cfg = get_pretrained_cfg(name)
    if cfg.file:
        return 'in the package'
    if cache.cached(name):
        return 'in the cache'
    named = [f'{organization()} on Hugging Face may have them'] if organization() else []
    return ', '.join([*named, *(["the authors' release"] if is_drive(cfg.url) else [])]) or 'none released'


def _described(name: str) -> tuple[nn.Module, int]:
    """A model without memory for its parameters, and their number."""
    with torch.device('meta'):
        model = load_model(name, pretrained=False)
    return model, sum(parameter.numel() for parameter in model.parameters())


def _list(args: argparse.Namespace) -> None:
    pattern = args.filter or '*'
    pattern = pattern if set(pattern) & set('*?[') else f'*{pattern}*'
    names = fnmatch.filter(metadata.package_tags(), pattern)
    if not names:
        raise OptionError(f"no name matches '{args.filter}'{nearest(args.filter, metadata.package_models())}")
    rows = []
    for name in names:
        known = metadata.release(name)
        measured = next((figure['top1'] for figure in known.measured), None)
        top1 = dict(published_top1=known.published_top1, measured_top1=measured)
        rows.append(dict(name=name, parameters=_described(name)[1], **top1, weights=_where(name)))
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
    folder = _folder(args.name)
    name = f'local-dir:{folder}' if folder else _tag(args.name)
    stored = folder or cache.cached(name)
    config = read_config(stored) if stored else {}
    model, parameters = _described(name)
    cfg = model.pretrained_cfg
    shown = config['architecture'] if folder else name
    labels, release = metadata.label_names(cfg), metadata.release(shown)
    facts = dict(
        name=shown,
        parameters=parameters,
        classes=model.num_classes,
        data=release.data,
        published_top1=release.published_top1,
        measured=list(release.measured),
        **{key: cfg.get(key) for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std')},
        paper=cfg.get('paper_name'),
        license=cfg.get('license'),
        origin=cfg.get('origin_url'),
        weights='in this folder' if folder else _where(name),
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
    from segmentation.models.segmenter import CONFIGS, fetch_segmenter

    options = dict(member=args.file, force=args.force) if args.file or args.force else {}
    if args.name in CONFIGS:
        name, folder = args.name, fetch_segmenter(args.name, **options)
        use = f"from segmentation import create_segmenter; create_segmenter('{name}', pretrained=True)"
    else:
        name = _tag(args.name)
        cfg, use = get_pretrained_cfg(name), _loading(name)
        if cfg.file:
            _show(args, f'{name}: part of the package', dict(file=cfg.file), use)
            return
        folder = find_weights(name, cfg.url, **options)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    source = config.get('source') or {}
    if not args.pin:
        _show(args, f'{name}: on this machine', dict(folder=str(folder), sha256=config.get('sha256')), use)
    elif 'drive_id' in source:
        print(f"    '{name}': ('{source['drive_id']}', '{source['sha256']}'),")
    else:
        raise OptionError(f'{name} is not from the authors: download it from them with --force')


def _loading(name: str) -> str:
    return f"import cluster_zoo, timm; timm.create_model('{name}', pretrained=True)"


def _show(args: argparse.Namespace, headline: str, facts: dict[str, Any], use: str) -> None:
    """What was done, as JSON or for people, and how to use it."""
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    for line in (headline, *(f'  {key:12} {value}' for key, value in facts.items()), f'  {"use it":12} {use}'):
        print(printable(line))


def _import(args: argparse.Namespace) -> None:
    if args.name:
        return _import_release(args)
    if args.to.exists():
        here, target = Path.cwd(), args.to.resolve()
        if not target.is_dir() or target in (here, *here.parents):
            raise OptionError(f"'{args.to}' cannot be replaced: name another folder")
        if any(target.iterdir()) and not (args.force and (target / CONFIG).is_file()):
            raise OptionError(f"'{args.to}' is there already. With --force a model folder is replaced.")
    model_args = args.model_kwargs | (dict(num_classes=args.num_classes) if args.num_classes else {})
    data = dict(img_size=args.img_size) if args.img_size else {}
    import_checkpoint(args.file, args.to, args.model, args.use_ema, model_args, data, args.label_names)
    config = read_config(args.to)
    facts = dict(architecture=config['architecture'], classes=config['num_classes'], source=config['source'])
    facts |= dict(sha256=config['sha256'], input_size=config['pretrained_cfg']['input_size'])
    _show(args, f'{args.to}: made, and checked by running the model', facts, _loading(f'local-dir:{args.to}'))


def _import_release(args: argparse.Namespace) -> None:
    name = _tag(args.name)
    if any((args.model, args.num_classes, args.img_size, args.label_names, args.model_kwargs, args.use_ema)):
        raise OptionError(f'{name} has its own classes and images: --as takes no further options. Take --to FOLDER.')
    if get_pretrained_cfg(name).file:
        raise OptionError(f'{name} is part of the package')
    if cache.cached(name) and not args.force:
        raise OptionError(f'{name} is in the cache already. With --force it is replaced.')
    source = dict(file=one_line(args.file.name), sha256=cache.sha256(args.file) if args.file.is_file() else '')
    with cache.exclusive(name), cache.new_folder(cache.entry(name)) as folder:
        install(name, args.file, folder, source)
    _show(args, f'{name}: in the cache', dict(folder=str(cache.entry(name)), source=source), _loading(name))


def _push(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder(args.name)
        if folder is None:
            name = _tag(args.name)
            if get_pretrained_cfg(name).file:
                folder = Path(scratch)
                write_folder(load_model(name), folder, name, dict(package=f'cluster_zoo {__version__}'))
            elif not (folder := cache.cached(name)):
                raise CheckpointError(f'The weights of {name} are not on this machine: cluster-zoo fetch {name}')
        open_model_folder(folder)  # which refuses a damaged one
        try:
            huggingface_hub.create_repo(args.to, private=args.private, exist_ok=True)
            commit = huggingface_hub.upload_folder(
                repo_id=args.to,
                folder_path=folder,
                allow_patterns=['model.safetensors', CONFIG, 'README.md'],
                commit_message=args.message,
            )
        except Exception as error:  # of the client, or of the HTTP library under it
            refused = getattr(getattr(error, 'response', None), 'status_code', None) in (401, 403)
            hint = ' Log in first: hf auth login, or HF_TOKEN.' if refused else ''
            raise CheckpointError(f'The Hub did not take {args.to}: {one_line(error)}{hint}') from error
    _show(args, f'{args.name}: uploaded', dict(address=str(commit.commit_url)), _loading(f'hf-hub:{args.to}'))

"""``cluster-zoo list``, ``info``, ``fetch``, ``import`` and ``push``: models and their weights."""

import argparse
import fnmatch
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torch.nn as nn
from timm.models import get_pretrained_cfg

from segmentation.models.segmenter import fetch_segmenter, install_segmenter

from .. import __version__
from ..errors import CheckpointError, OptionError, nearest, one_line, printable
from ..training.parser import ParseKwargs
from ..weights import cache, metadata
from ..weights.configs import CONFIG, read_config
from ..weights.download import is_drive, organization
from ..weights.importing import find_weights, import_checkpoint, install, write_folder
from ..weights.loading import load_model, open_model_folder
from . import segmenters
from .arguments import positive
from .parser import COMMANDS, Commands


def add_parser(commands: Commands) -> None:
    """Registers the five commands."""
    add = _add(commands, 'list', _list, 'list', 'list swin --json').add_argument
    add('filter', nargs='?', default='*', metavar='FILTER', help="part of the names, or a pattern such as 'coc_*'")

    add = _add(commands, 'info', _info, 'info coc_small', 'info my_model/').add_argument
    add('name', metavar='NAME', help='model, with or without a tag, or model folder')

    examples = 'fetch coc_small', "fetch dnc_resnet50 --file 'ImageNet/resnet50.pth'"
    add = _add(commands, 'fetch', _fetch, *examples).add_argument
    add('name', metavar='NAME', help='model, with or without a tag, or pretrained segmenter')
    add('--file', metavar='PATH', help='path in the Google Drive folder, if the right file cannot be determined')
    add('--force', action='store_true', help='download again, and accept a file that has changed')
    add('--pin', action='store_true', help='print the line of cluster_zoo/weights/metadata.py that pins the file')

    examples = (
        'import output/birds/last.pth.tar --to birds/',
        'import birds.pth --to birds/ --model coc_tiny --num-classes 200 --label-names birds.txt',
        'import drive-download.zip --as fec_small.in1k',
    )
    parser = _add(commands, 'import', _import, *examples)
    add, target = parser.add_argument, parser.add_mutually_exclusive_group(required=True).add_argument
    add('file', type=Path, metavar='FILE', help='checkpoint of any origin, or an archive of one')
    target('--to', type=Path, metavar='FOLDER', help='model folder to write')
    target('--as', dest='name', metavar='NAME', help='name in the cache, such as coc_small.in1k, for a downloaded file')
    add('--model', metavar='NAME', help='architecture, if the file does not contain it')
    add('--use-ema', action='store_true', help='prefer averaged weights')
    add('--model-kwargs', nargs='+', default={}, action=ParseKwargs, metavar='K=V', help='arguments of the model')
    add('--num-classes', type=positive, metavar='N', help="number of classes (default: the file's, else the model's)")
    add('--img-size', type=positive, metavar='PX', help="side of the images (default: the file's, else the model's)")
    add('--label-names', type=_lines, metavar='FILE', help='text file with one class name per line')
    add('--force', action='store_true', help='replace an existing model folder')

    examples = 'push birds/ --to my-lab/birds --private', 'push coc_small --to my-lab/coc_small'
    add = _add(commands, 'push', _push, *examples).add_argument
    add('name', metavar='NAME', help='model folder, or model whose weights are in the cache')
    add('--to', required=True, metavar='ORG/NAME', help='repository or, with ./ or / before it, folder; it is created')
    add('--force', action='store_true', help='replace an existing model folder')
    add('--private', action='store_true', help='create a private repository')
    add('--message', default='Add model', help='commit message (default: %(default)s)')


def _add(commands: Commands, name: str, run: Any, *examples: str) -> argparse.ArgumentParser:
    epilog = ''.join(f'\n  cluster-zoo {example}' for example in examples)
    help = COMMANDS[name].help
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
        raise argparse.ArgumentTypeError(f'{name} has no class name on line {lines.index("") + 1}')
    return lines


def _full_name(name: str) -> str:
    """Returns a name of this package with its tag, by default the first one."""
    known = metadata.package_tags() if '.' in name else metadata.package_models()
    if name not in known:
        raise OptionError(f"cluster_zoo has no '{name}'{nearest(name, known)}: see cluster-zoo list")
    return name if '.' in name else f'{name}.{get_pretrained_cfg(name).tag}'


def _model_folder(name: str) -> Path | None:
    """Returns the folder if an argument is that of a model folder and not the name of a model."""
    folder = Path(name.removeprefix('local-dir:'))
    is_folder = (folder / CONFIG).is_file() or (folder.is_dir() and not timm.is_model(name))
    return folder if is_folder or name.startswith('local-dir:') else None


def _location(name: str) -> str:
    cfg, owner = get_pretrained_cfg(name), organization()
    if cfg.file:
        return 'in the package'
    if cache.cached(name):
        return 'in the cache'
    sources = [f'{owner} on Hugging Face may have them'] if owner else []
    sources += ["the authors' release"] if is_drive(cfg.url) else []
    return ', '.join(sources) or 'none released'


def _meta_model(name: str) -> tuple[nn.Module, int]:
    """Returns a model on the meta device and its number of parameters."""
    with torch.device('meta'):
        model = load_model(name, pretrained=False)
    return model, sum(parameter.numel() for parameter in model.parameters())


def _list(args: argparse.Namespace) -> None:
    pattern = args.filter if set(args.filter) & set('*?[') else f'*{args.filter}*'
    names = fnmatch.filter(metadata.package_tags(), pattern)
    systems = segmenters.rows(fnmatch.filter([*segmenters.bundled(), *segmenters.published()], pattern))
    if not names and not systems:
        known = [*metadata.package_models(), *segmenters.bundled(), *segmenters.published()]
        raise OptionError(f"no name matches '{args.filter}'{nearest(args.filter, known)}")
    rows = []
    for name in names:
        known = metadata.release(name)
        measured = known.measured[0]['top1'] if known.measured else None
        top1 = dict(published_top1=known.published_top1, measured_top1=measured)
        rows.append(dict(name=name, parameters=_meta_model(name)[1], **top1, weights=_location(name)))
    if args.json:
        print(json.dumps(rows + systems, indent=2))
        return
    if rows:
        _print_rows(rows, dict(published='published_top1', measured='measured_top1'))
    if systems:
        print('\nsegmenters, published mIoU' if rows else 'segmenters, published mIoU')
        _print_rows(systems, dict(published='published_miou'))


def _print_rows(rows: list[dict[str, Any]], results: dict[str, str]) -> None:
    """Prints a table of models. ``results`` has the key of a row for each title of a column."""
    width = max(len(row['name']) for row in rows)
    print(f'{"name":{width}}  parameters  {"  ".join(f"{title:>9}" for title in results)}  weights')
    for row in rows:
        shown = '  '.join(f'{row[key]:9.1f}' if row[key] else f'{"-":>9}' for key in results.values())
        parameters = f'{row["parameters"] / 1e6:.2f} M'
        print(f'{row["name"]:{width}}  {parameters:>10}  {shown}  {row["weights"]}')


def _info(args: argparse.Namespace) -> None:
    if segmenters.is_segmenter(args.name):
        return _print_info(args, segmenters.info(args.name))
    folder = _model_folder(args.name)
    name = f'local-dir:{folder}' if folder else _full_name(args.name)
    stored = folder or cache.cached(name)
    config = read_config(stored) if stored else {}
    model, parameters = _meta_model(name)
    cfg, shown = model.pretrained_cfg, config['architecture'] if folder else name
    labels, release = metadata.label_names(cfg), metadata.release(shown)
    info = dict(
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
        weights='in this folder' if folder else _location(name),
        sha256=config.get('sha256'),
        made_from=config.get('source'),
        url=cfg.get('url'),
        label_names=labels,
        citation=release.citation,
    )
    _print_info(args, info)


def _print_info(args: argparse.Namespace, info: dict[str, Any]) -> None:
    """Prints what is known of a model as JSON or as text."""
    if args.json:
        print(json.dumps(info, indent=2))
        return
    labels = info['label_names']
    # The first classes, each with the first of ImageNet's synonyms
    shown = ', '.join([label.partition(',')[0] for label in labels or ()][:5])
    shown = f': {shown}{", ..." if len(labels) > 5 else ""}' if labels else ', without names'
    info |= dict(classes=f'{info["classes"]}{shown}', parameters=f'{info["parameters"] / 1e6:.2f} M')
    for key, value in info.items():
        if key not in ('label_names', 'citation'):
            print(f'{key:15} {printable("-" if value in (None, []) else value)}')


def _fetch(args: argparse.Namespace) -> None:
    options = dict(member=args.file, force=args.force)
    if bundled := segmenters.bundled().get(args.name):
        return _show(args, f'{args.name}: part of the package', dict(folder=str(bundled)), _usage(args.name))
    if args.name in segmenters.published():
        name, folder, use = args.name, fetch_segmenter(args.name, **options), _usage(args.name)
    else:
        name = _full_name(args.name)
        cfg, use = get_pretrained_cfg(name), _usage(name)
        if cfg.file:
            return _show(args, f'{name}: part of the package', dict(file=cfg.file), use)
        folder = find_weights(name, cfg.url, **options)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    source = config.get('source') or {}
    if not args.pin:
        _show(args, f'{name}: on this machine', dict(folder=str(folder), sha256=config.get('sha256')), use)
    elif 'drive_id' in source:
        print(f"    '{name}': ('{source['drive_id']}', '{source['sha256']}'),")
    else:
        raise OptionError(f'{name} is not from the authors: download it from them with --force')


def _usage(name: str) -> str:
    if segmenters.is_segmenter(name):
        return segmenters.usage(name)
    return f"import cluster_zoo, timm; timm.create_model('{name}', pretrained=True)"


def _show(args: argparse.Namespace, headline: str, result: dict[str, Any], use: str) -> None:
    """Prints the result of a command as JSON, or as text with an example of use."""
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(printable(headline))
    for key, value in (*result.items(), ('use it', use)):
        print(printable(f'  {key:12} {value}'))


def _import(args: argparse.Namespace) -> None:
    if args.name:
        return _import_release(args)
    _check_target(args.to, args.force)
    if segmenters.checkpoint_of_segmenter(args.file, args.model):
        if args.img_size:
            raise OptionError('--img-size is not an option of segmenters: they accept images of any size')
        result = segmenters.import_folder(args)
        return _show(
            args, f'{args.to}: written, and checked by running the model', result, _usage(f'local-dir:{args.to}')
        )
    model_args = args.model_kwargs | (dict(num_classes=args.num_classes) if args.num_classes else {})
    data = dict(img_size=args.img_size) if args.img_size else {}
    import_checkpoint(args.file, args.to, args.model, args.use_ema, model_args, data, args.label_names)
    config = read_config(args.to)
    result = dict(architecture=config['architecture'], classes=config['num_classes'], source=config['source'])
    result |= dict(sha256=config['sha256'], input_size=config['pretrained_cfg']['input_size'])
    _show(args, f'{args.to}: written, and checked by running the model', result, _usage(f'local-dir:{args.to}'))


def _check_target(folder: Path, force: bool) -> None:
    """Raises `OptionError` if a folder exists already, unless it is a model folder that may be replaced."""
    if not folder.exists():
        return
    here, target = Path.cwd(), folder.resolve()
    if not target.is_dir() or target in (here, *here.parents):
        raise OptionError(f"'{folder}' cannot be replaced: name another folder")
    if any(target.iterdir()) and not (force and (target / CONFIG).is_file()):
        raise OptionError(f"'{folder}' exists already: name another folder, or replace a model folder with --force")


def _import_release(args: argparse.Namespace) -> None:
    is_segmenter = args.name in segmenters.published()
    name = args.name if is_segmenter else _full_name(args.name)
    if any((args.model, args.num_classes, args.img_size, args.label_names, args.model_kwargs, args.use_ema)):
        raise OptionError(f'--as takes no further options: {name} has fixed classes and images. Use --to FOLDER.')
    if not is_segmenter and get_pretrained_cfg(name).file:
        raise OptionError(f'{name} is part of the package')
    if cache.cached(name) and not args.force:
        raise OptionError(f'{name} is in the cache already: replace it with --force')
    source = dict(file=one_line(args.file.name), sha256=cache.sha256(args.file) if args.file.is_file() else '')
    with cache.exclusive(name), cache.new_folder(cache.entry(name)) as folder:
        (install_segmenter if is_segmenter else install)(name, args.file, folder, source)
    _show(args, f'{name}: in the cache', dict(folder=str(cache.entry(name)), source=source), _usage(name))


def _push(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = _folder_to_push(args.name, Path(scratch))
        is_segmenter = segmenters.is_segmenter(str(folder))
        # Refuses a damaged one
        segmenters.open_model_folder(folder) if is_segmenter else open_model_folder(folder)
        usage = segmenters.usage if is_segmenter else _usage
        if args.to.startswith(('.', '/', '~')) or Path(args.to).is_dir():
            target = Path(args.to).expanduser()
            _check_target(target, args.force)
            with cache.new_folder(target.resolve()) as new:
                for file in (cache.WEIGHTS, CONFIG, 'README.md'):
                    if (folder / file).is_file():
                        shutil.copyfile(folder / file, new / file)
            return _show(args, f'{args.name}: copied', dict(folder=str(target)), usage(f'local-dir:{target}'))
        address = _upload(folder, args)
    _show(args, f'{args.name}: uploaded', dict(address=address), usage(f'hf-hub:{args.to}'))


def _folder_to_push(name: str, scratch: Path) -> Path:
    """Returns the model folder of an argument, and writes bundled weights to ``scratch``."""
    if folder := segmenters.bundled().get(name) or _model_folder(name):
        return folder
    if name not in segmenters.published():
        name = _full_name(name)
        if get_pretrained_cfg(name).file:
            write_folder(load_model(name), scratch, name, dict(package=f'cluster_zoo {__version__}'))
            return scratch
    if not (folder := cache.cached(name)):
        raise CheckpointError(f'The weights of {name} are not on this machine: cluster-zoo fetch {name}')
    return folder


def _upload(folder: Path, args: argparse.Namespace) -> str:
    """Uploads a model folder to the Hub and returns the address of the commit."""
    try:
        huggingface_hub.create_repo(args.to, private=args.private, exist_ok=True)
        commit = huggingface_hub.upload_folder(
            repo_id=args.to,
            folder_path=folder,
            allow_patterns=[cache.WEIGHTS, CONFIG, 'README.md'],
            commit_message=args.message,
        )
    except Exception as error:  # of the client, or of its HTTP library
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        hint = ' Log in first: hf auth login, or HF_TOKEN.' if status in (401, 403) else ''
        raise CheckpointError(f'The upload to {args.to} failed: {one_line(error)}{hint}') from error
    return str(commit.commit_url)

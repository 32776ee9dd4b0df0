"""``cluster-zoo fetch``, ``import`` and ``push``: weights into the local store, and from it to Hugging Face."""

import argparse
import ast
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from timm.models import get_pretrained_cfg

from .. import __version__, authors, hub, importing, store, tags
from ..model_card import model_card
from ..options import OptionError, nearest
from ..sources import where
from ..weights import CheckpointError
from .parser import Commands, our_tag, positive
from .text import first_labels, printable


def add_parser(commands: Commands) -> None:
    """Registers the three commands."""
    _add_fetch(commands)
    _add_import(commands)
    _add_push(commands)


def _add_fetch(commands: Commands) -> None:
    parser = commands.add_parser(
        'fetch',
        help='download published weights',
        description='Get the weights of a model onto this machine, unless they are there: from the Hugging Face '
        "organisation that CLUSTER_ZOO_HUB names, else, after a question, from the authors' publication.",
        epilog='examples:\n'
        '  cluster-zoo fetch coc_small\n'
        '  cluster-zoo fetch coc_small.in1k --yes --quiet\n'
        '  CLUSTER_ZOO_HUB=my-lab cluster-zoo fetch coc_small.in1k\n',
    )
    add = parser.add_argument
    add('name', type=our_tag, metavar='NAME', help='a model, with or without a tag')
    add('-y', '--yes', action='store_true', help='answer the question with yes')
    add(
        '--force',
        action='store_true',
        help="ask the authors' publication again, replace what the store has, and accept that they have changed a file",
    )
    add('--file', metavar='MEMBER', help="file of the authors' folder, where it is not clear which one is meant")
    add('-q', '--quiet', action='store_true', help='no progress (there is none either where nobody watches)')
    add('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_fetch)


def _fetch(args: argparse.Namespace) -> None:
    found, path = (None if args.force else _on_this_machine(args.name)) or _download(args)
    facts = dict(name=args.name, found=found, weights=str(path), sha256=store.sha256(path))
    _show(args, f'{args.name}: {found}', facts, [('weights', path), ('SHA-256', facts['sha256'])])


def _on_this_machine(name: str) -> tuple[str, Path] | None:
    """What the package or the store has; None if they have nothing, or a damaged file."""
    status = where(name)
    if status == 'package':
        return 'part of the package', Path(get_pretrained_cfg(name).file)
    if status == 'store':
        try:
            return 'in the store already', store.verified_weights(store.folder(name))
        except CheckpointError as error:
            _note(f'{error} (it is fetched again)')
    return None


def _download(args: argparse.Namespace) -> tuple[str, Path]:
    name, progress, organisation = args.name, not args.quiet and sys.stderr.isatty(), hub.organisation()
    url = authors.publication(name)
    if organisation and not (args.force or args.file):  # which concern the publication
        with _hub_progress(progress):
            try:
                return f'from {organisation} on Hugging Face', hub.fetch(name)
            except CheckpointError as error:
                if url is None:
                    raise
                _note(str(error))
    if url is None:
        raise CheckpointError(
            f'There is no publication of {name}. Import a file of your own (cluster-zoo import FILE --as NAME.TAG), or '
            'let CLUSTER_ZOO_HUB name an organisation that has them.'
        )
    if not (args.yes or authors.allowed() or _agrees(f'Downloading the weights of {name} from {url}')):
        raise OptionError('Nothing was downloaded.')
    folder = authors.fetch(name, member=args.file, force=args.force, progress=progress)
    return "from the authors' publication", store.verified_weights(folder)


@contextmanager
def _hub_progress(shown: bool) -> Iterator[None]:
    """Progress of the Hub's client, unless its own settings (``HF_HUB_DISABLE_PROGRESS_BARS``) say something else."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _agrees(question: str) -> bool:
    if not sys.stdin.isatty():
        raise OptionError(f'{question} needs a yes, and there is no terminal to ask on. Give it with --yes.')
    print(f'{question}? [y/N] ', end='', file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ('y', 'yes')


def _note(message: str) -> None:
    print(f'note: {message}', file=sys.stderr)


def _show(args: argparse.Namespace, headline: str, facts: dict[str, Any], shown: Sequence[tuple[str, Any]]) -> None:
    """What was done, as JSON or for people, and how to use what it was done for."""
    if args.json:
        print(json.dumps(facts, indent=2))
        return
    print(headline)
    for key, value in shown:
        print(f'  {key:11} {printable(value)}')
    print(f"  use it      import cluster_zoo, timm; timm.create_model('{facts['name']}', pretrained=True)")


def _add_import(commands: Commands) -> None:
    parser = commands.add_parser(
        'import',
        help='put a checkpoint file into the local store',
        description="Convert a checkpoint, the authors', timm's or your own, and put it into the local store under a "
        'name that timm.create_model knows from then on: safetensors, config.json and a model card, checked by '
        'running the model. The file may be a .zip or .tar archive that holds one checkpoint.',
        epilog='examples:\n'
        '  cluster-zoo import model_best.pth.tar --as coc_small.in1k\n'
        '  cluster-zoo import output/birds/last.pth.tar --as coc_tiny.birds --no-ema\n'
        '  cluster-zoo import drive-download.zip --as fec_small.in1k --json\n'
        '  cluster-zoo import birds.safetensors --as coc_tiny.birds --num-classes 200 --label-names birds.txt\n',
    )
    add = parser.add_argument
    add('file', type=Path, metavar='FILE', help='the checkpoint, or an archive of one')
    add(
        '--as',
        dest='name',
        type=_new_tag,
        required=True,
        metavar='NAME.TAG',
        help='a published tag, or a model with a tag of your own',
    )
    add('--no-ema', action='store_true', help='take the weights themselves where the file has their average too')
    add(
        '--model-kwargs',
        nargs='+',
        default=[],
        type=_model_argument,
        metavar='K=V',
        help='arguments that the model was made with, as for timm.create_model',
    )
    add(
        '--num-classes', type=positive, metavar='N', help="classes of the model (default: the file's, else the model's)"
    )
    add('--img-size', type=positive, metavar='PX', help="side of the images (default: the file's, else the model's)")
    add('--label-names', type=_lines, metavar='FILE', help='text file with the name of each class on a line, in order')
    add('--force', action='store_true', help='replace what the store has under this name')
    add('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_import)


def _new_tag(name: str) -> str:
    architecture = name.partition('.')[0]
    if not tags.is_ours(architecture):
        known = tags.our_models()
        raise argparse.ArgumentTypeError(f"this package has no model '{architecture}'{nearest(architecture, known)}")
    return name


def _model_argument(text: str) -> tuple[str, Any]:
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
        raise argparse.ArgumentTypeError(f'{name} can not be read: {error}') from error
    if not all(lines):
        raise argparse.ArgumentTypeError(f'{name} has no name on line {lines.index("") + 1}: each class needs one')
    return lines


def _import(args: argparse.Namespace) -> None:
    model_args = dict(args.model_kwargs)
    if args.num_classes is not None:
        model_args['num_classes'] = args.num_classes
    folder = importing.import_checkpoint(
        args.file,
        args.name,
        use_ema=not args.no_ema,
        model_args=model_args,
        data_config=dict(img_size=args.img_size) if args.img_size else None,
        label_names=args.label_names,
        replace=args.force,
    )
    config = store.read_config(folder)
    model = timm.create_model(f'local-dir:{folder}')
    facts = dict(
        name=args.name,
        folder=str(folder),
        sha256=config['sha256'],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=model.num_classes,
        input_size=list(config['pretrained_cfg']['input_size']),
        model_args=config.get('model_args') or {},
    )
    shown = [
        ('folder', folder),
        ('SHA-256', facts['sha256']),
        ('parameters', f'{facts["parameters"] / 1e6:.2f} M'),
        ('classes', f'{facts["classes"]}{first_labels(tags.label_names(model.pretrained_cfg))}'),
        ('image size', ' x '.join(map(str, facts['input_size']))),
        *(('made with', f'{key}={value}') for key, value in facts['model_args'].items()),
    ]
    _show(args, f'{args.name}: imported, and checked by running it', facts, shown)


def _add_push(commands: Commands) -> None:
    parser = commands.add_parser(
        'push',
        help='upload weights to Hugging Face',
        description='Upload weights that are on this machine to a repository on Hugging Face, made if need be, in '
        "timm's layout. You need to be logged in (hf auth login, or HF_TOKEN).",
        epilog='examples:\n'
        '  cluster-zoo push coc_tiny.birds --to my-lab/coc_tiny.birds --private\n'
        "  cluster-zoo push coc_small.in1k --to my-lab/coc_small.in1k --message 'As published in June 2023'\n",
    )
    add = parser.add_argument
    add('name', type=our_tag, metavar='NAME', help='a tag of the store, or the one that is part of the package')
    add('--to', type=_repository, required=True, metavar='ORG/NAME', help='the repository')
    add('--private', action='store_true', help='make the repository private, if it is made')
    add('--message', default='Add model', help='what the commit says (default: %(default)s)')
    add('--json', action='store_true', help='print JSON')
    parser.set_defaults(run=_push)


def _repository(name: str) -> str:
    if name.count('/') != 1 or not all(name.split('/')):
        raise argparse.ArgumentTypeError(f"'{name}' is not of the form organisation/name")
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _push(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / args.name
        _copy(args.name, folder)
        config = store.read_config(folder)
        card = model_card(config, tags.facts(args.name), repo_id=args.to)  # which says how to load it from there
        (folder / store.CARD).write_text(card, encoding='utf-8')
        with _hub_progress(not args.json and sys.stderr.isatty()):
            url = hub.push(folder, args.to, private=args.private, message=args.message)
    facts = dict(name=f'hf-hub:{args.to}', url=url, sha256=config['sha256'])
    _show(args, f'{args.name}: uploaded', facts, [('address', url), ('SHA-256', facts['sha256'])])


def _copy(name: str, folder: Path) -> None:
    """Makes a model folder, of weights that are on this machine."""
    status = where(name)
    if status == 'store':
        store.verified_weights(store.folder(name))
        shutil.copytree(store.folder(name), folder)
    elif status == 'package':
        model = timm.create_model(name, pretrained=True)
        labels = dict(label_names=tags.label_names(model.pretrained_cfg))
        importing.write_folder(model, folder, name, labels, dict(package=f'cluster_zoo {__version__}'))
    else:
        raise CheckpointError(f'The weights of {name} are not on this machine: cluster-zoo fetch {name} comes first.')

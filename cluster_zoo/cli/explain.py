"""``cluster-zoo explain``: shows the clusters, the contributions or the centroids that a prediction is based on."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.nn as nn
from PIL import Image

from ..errors import ImageError, OptionError, nearest, print_error, printable
from ..explain import (
    Explained,
    can_explain,
    center_view,
    draw_center,
    draw_explanation,
    draw_film,
    draw_page,
    explain_image,
    has_clusters,
    html_page,
    report,
    segments,
    similar_patches,
)
from ..images import read_image
from ..layers.nearest_centroid import centroid_heads
from ..predict import Classified, find_images, load_classifier
from ..weights.metadata import label_names
from .arguments import DEMO_MODEL, PHOTO, add_device, image_path, model_name, output_path, positive
from .parser import COMMANDS, Commands

_MOST = 16  # images in one figure


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'explain',
        help=COMMANDS['explain'].help,
        description='Classify images and show what the predictions are based on. Context Cluster and FEC: the clusters '
        'of every stage, and what the clusters of the last stage add to the logit of the class. Nearest-centroid '
        'models: the training images that are the nearest centroids, and the one of the next class.',
        epilog='examples:\n'
        '  cluster-zoo explain cat.jpg\n'
        '  cluster-zoo explain cat.jpg --model fec_small.cifar10 --segments 5 -o cat.png\n'
        '  cluster-zoo explain photos/ --stage 2 --head 1 --html photos.html\n'
        '  cluster-zoo explain cat.jpg photos/ --center 1 0 2 5\n\n'
        'exit status: 0 all images were explained, 1 some were not readable, 2 an error\n',
    )
    add = parser.add_argument
    add(
        'images',
        nargs='*',
        default=[str(PHOTO)],
        metavar='IMAGE',
        help=f'files and folders, of which {_MOST} images are explained (default: a bundled photograph)',
    )
    add('--model', type=model_name, default=DEMO_MODEL, metavar='NAME', help='as for predict (default: %(default)s)')
    add(
        '--size',
        type=positive,
        metavar='N',
        help='shorter side of the input in pixels, from 32; the aspect ratio is kept (default: the test size of the '
        'model). FEC takes long for sizes above 500',
    )
    which = parser.add_argument_group('clusters')
    which.add_argument('--stage', type=int, metavar='S', help='only this stage, from 0')
    which.add_argument('--block', type=int, metavar='B', help='only this block of each stage (default: the last one)')
    which.add_argument('--head', type=int, default=0, metavar='H', help='head of the blocks (default: %(default)s)')
    which.add_argument('--all', action='store_true', default=None, help='all blocks and poolings')
    which.add_argument('--segments', type=positive, metavar='K', help='also K segments, by k-means (extra: explain)')
    which.add_argument(
        '--class', dest='label', metavar='NAME', help='name or index of the class to explain (default: the predicted)'
    )
    which.add_argument(
        '--center',
        nargs=4,
        metavar=('S', 'B', 'H', 'N'),
        help='only center N (stage, block or pool, head) of the first image, and the patches of all images like it',
    )
    output = parser.add_argument_group('output')
    output.add_argument('-o', '--output', type=image_path, metavar='FILE', help='figure (default: explain.png)')
    output.add_argument('--html', type=output_path, metavar='FILE', help='web page to explore, without other files')
    output.add_argument('--gif', type=output_path, metavar='FILE', help='all layers of one image as an animation')
    output.add_argument('--json', action='store_true', help='print the numbers as JSON')
    add_device(parser)
    parser.set_defaults(run=_explain)


def _draw(model: nn.Module, explained: Sequence[Explained], args: argparse.Namespace) -> Image.Image:
    """Draws the clusters and contributions, and below them the centroids."""
    sheets = []
    if explained[0].maps:
        groups = segments(model, explained[0].maps, args.segments) if args.segments else None
        sheets.append(draw_page(explained, args.stage, args.block, args.head, bool(args.all), groups))
    sheets += [draw_explanation(one.decision, one.image) for one in explained if one.decision]
    figure = Image.new('RGB', (max(sheet.width for sheet in sheets), sum(sheet.height for sheet in sheets)), 'white')
    top = 0
    for sheet in sheets:
        figure.paste(sheet, (0, top))
        top += sheet.height
    return figure


def _class_index(model: nn.Module, name: str | None) -> int | None:
    """Index of ``--class``, a name or an index."""
    if name is None:
        return None
    labels = label_names({**model.pretrained_cfg, 'num_classes': model.num_classes}) or []
    if name in labels:
        return labels.index(name)
    if name.isdecimal() and int(name) < model.num_classes:
        return int(name)
    hint = nearest(name, labels)
    raise OptionError(f'--class {name}: the model has no such class{hint}. Give a name or 0 to {model.num_classes - 1}')


def _check(model: nn.Module, args: argparse.Namespace, images: int) -> None:
    """Raises `OptionError` for options that the model or the number of images does not allow."""
    if not can_explain(model):
        raise OptionError(
            f'--model {args.model} has no clusters and no centroids: choose a coc_*, fec_* or dnc_* model'
        )
    if args.size and args.size < 32:
        raise OptionError(f'--size {args.size}: expected at least 32 pixels')
    if images > 1 and (args.gif or args.segments):
        raise OptionError(f'{"--gif" if args.gif else "--segments"} is for one image: name one file')
    given = [
        name
        for name in ('stage', 'block', 'all', 'segments', 'gif', 'size', 'center')
        if getattr(args, name) is not None
    ]
    if given and not has_clusters(model):
        raise OptionError(f'--{given[0]} is for models with clusters, which {args.model} does not have')
    if args.center and (args.html or args.gif or args.json):
        raise OptionError('--center writes a figure: leave out --html, --gif and --json')
    if args.label is not None and centroid_heads(model):
        raise OptionError(f'--class is for models with a linear classifier, and {args.model} has centroids')


def _explain(args: argparse.Namespace) -> int:
    model, found = load_classifier(args.model, args.device), find_images(args.images)
    _check(model, args, len(found))
    if args.center:
        return _explain_center(model, found, args)
    class_index = _class_index(model, args.label)
    explained, records, failed = [], [], False
    try:
        for source in found[:_MOST]:
            try:
                if isinstance(source, Classified):
                    raise ImageError(source.error)
                one = explain_image(model, read_image(source), source, args.size, class_index)
            except ImageError as error:
                failed = True
                name = source.image if isinstance(source, Classified) else source
                print_error(error, printable(name))
                records.append(dict(name=name, error=str(error)))
                continue
            explained.append(one)
            if not args.json:
                at = f', at {one.maps.inputs.shape[-1]} x {one.maps.inputs.shape[-2]} pixels' if one.maps else ''
                print(f'{printable(one.name)}: {printable(one.caption)}{at}', flush=True)
        if not explained:
            raise OptionError('There is no image to explain: name files or folders of images.')
        _write(model, explained, args, records)
    except ValueError as error:
        raise OptionError(str(error)) from error
    if len(found) > _MOST:
        print(f'{len(found) - _MOST} further images are left out: {_MOST} are explained at a time', file=sys.stderr)
    return int(failed)


def _explain_center(model: nn.Module, found: Sequence[str | Classified], args: argparse.Namespace) -> int:
    """Draws one center of the first image, and the patches of all images that are most like it."""
    stage, block, head, center = args.center
    numbers = [stage, *([] if block == 'pool' else [block]), head, center]
    if not all(number.isdecimal() for number in numbers):
        raise OptionError(f'--center {" ".join(args.center)}: expected stage, block (or pool), head and center, from 0')
    where = (int(stage), None if block == 'pool' else int(block), int(head), int(center))
    for source in found:
        if isinstance(source, Classified):
            raise ImageError(f'{printable(source.image)}: {source.error}')
    try:
        image = read_image(found[0])
        view = center_view(model, image, *where, size=args.size)
        patches = similar_patches(model, view, found, count=25, size=args.size)
    except ImageError:
        raise
    except ValueError as error:
        raise OptionError(f'--center {" ".join(args.center)}: {error}') from error
    for patch in patches:
        print(f'{printable(patch.image)}: similarity {patch.similarity:.3f} at {", ".join(map(str, patch.box))}')
    output = args.output or Path('explain.png')
    draw_center(image, view, patches).save(output, quality=92)
    print(output)
    return 0


def _write(
    model: nn.Module,
    explained: Sequence[Explained],
    args: argparse.Namespace,
    records: list[dict[str, Any]],
) -> None:
    """Writes the outputs that are asked for."""
    written = []
    if args.output or not (args.html or args.gif or args.json):
        written.append(args.output or Path('explain.png'))
        _draw(model, explained, args).save(written[-1], quality=92)
    if args.gif:
        frames = draw_film(explained[0].maps, args.head)
        written.append(args.gif)
        frames[0].save(args.gif, 'GIF', save_all=True, append_images=frames[1:], duration=900, loop=0)
    if args.html:
        written.append(args.html)
        page = html_page(model, args.model, explained)
        args.html.write_text(page, encoding='utf-8')
    if args.json:
        ks = [args.segments] if args.segments else []
        reports = [report(model, one, ks) for one in explained]
        print(json.dumps(dict(model=args.model, images=reports + records)))
    for path in written:
        print(path, file=sys.stderr if args.json else sys.stdout)

"""Prints the published systems as a markdown table: ``python -m segmentation [FILTER]``."""

import argparse
import os
import sys

import torch

from .models.published_systems import list_segmenters, segmenter_config
from .models.segmenter import create_segmenter


def markdown_table(filter: str = '') -> str:
    """Returns a markdown table of the published systems. Parameters are counted without auxiliary heads.

    Args:
        filter: See `list_segmenters`.
    """
    rows = [
        '| name | head | backbone | dataset | parameters, M | published mIoU, % | multi-scale and flip, % |',
        '|---|---|---|---|---:|---:|---:|',
    ]
    for config in map(segmenter_config, list_segmenters(filter)):
        with torch.device('meta'):
            model = create_segmenter(config.name, auxiliary=False)
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        backbone = config.backbone.partition('.')[0]
        miou, miou_ms = ('' if value is None else value for value in (config.miou, config.miou_ms))
        rows.append(
            f'| `{config.name}` | {config.head} | `{backbone}` | {config.dataset} | {parameters:.2f} | {miou} | '
            f'{miou_ms} |'
        )
    return '\n'.join(rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog='python -m segmentation', description='List the published systems.')
    parser.add_argument(
        'filter',
        nargs='?',
        default='',
        help="part of a name, such as coc, or a pattern of names, such as '*_25' (default: all)",
    )
    args = parser.parse_args()
    if not list_segmenters(args.filter):
        parser.error(f'no published system matches {args.filter!r}; python -m segmentation lists all')
    try:
        print(markdown_table(args.filter), flush=True)
    except BrokenPipeError:  # the reader has ended, as in `python -m segmentation | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes again at exit
        sys.exit(141)


if __name__ == '__main__':
    main()

"""Prints the published systems as a markdown table: ``python -m segmentation [FILTER]``."""

import argparse

import torch

from .models.configs import list_segmenters, segmenter_config
from .models.segmenter import create_segmenter


def markdown_table(filter: str = '') -> str:
    """The published systems as a markdown table, parameters counted (auxiliary heads are left out, they only train).

    Args:
        filter: As in `list_segmenters`.
    """
    rows = [
        '| name | head | backbone | dataset | parameters, M | published mIoU, % | multi-scale and flip, % |',
        '|---|---|---|---|---:|---:|---:|',
    ]
    for config in map(segmenter_config, list_segmenters(filter)):
        with torch.device('meta'):
            model = create_segmenter(config.name, auxiliary=False)
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        backbone = config.backbone.split('.')[0]
        figures = ['' if figure is None else str(figure) for figure in (config.miou, config.miou_ms)]
        rows.append(
            f'| `{config.name}` | {config.head} | `{backbone}` | {config.dataset} | {parameters:.2f} | '
            f'{" | ".join(figures)} |'
        )
    return '\n'.join(rows)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog='python -m segmentation', description='List the published systems.')
    parser.add_argument('filter', nargs='?', default='', help="pattern of names, such as '*coc*' (default: all)")
    args = parser.parse_args()
    if not list_segmenters(args.filter):
        parser.error(f'no published system has a name like {args.filter!r}; a * stands for any part of a name')
    print(markdown_table(args.filter))


if __name__ == '__main__':
    main()

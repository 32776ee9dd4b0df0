"""Prints the published systems as a markdown table: ``python -m segmentation [FILTER]``."""

import argparse

from .configs import list_segmenters, markdown_table

parser = argparse.ArgumentParser(prog='python -m segmentation', description='List the published systems.')
parser.add_argument('filter', nargs='?', default='', help="pattern of names, such as '*coc*' (default: all)")
args = parser.parse_args()
if not list_segmenters(args.filter):
    parser.error(f'no published system has a name like {args.filter!r}; a * stands for any part of a name')
print(markdown_table(args.filter))

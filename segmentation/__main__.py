"""Prints the published systems as a markdown table: ``python -m segmentation [FILTER]``."""

import sys

from .configs import markdown_table

print(markdown_table(*sys.argv[1:2]))

"""``--help`` of the scripts in parts that fit a screen, and ``--help-all``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import nearest

__all__ = ['HelpFormatter', 'add_help_options']


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to the help of each option that has one and does not state it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _get_help_string(self, action: argparse.Action) -> str:
        help, value = action.help or '', action.default
        if not value or value is argparse.SUPPRESS or 'default' in help or value == 'None':
            return help
        shown = ' '.join(map(str, value)) if isinstance(value, list | tuple) else value
        return f'{help} (default: {shown})'.replace('%', '%%').replace('%%(', '%(')


class _Help(argparse.Action):
    """Prints the common options, or those of a group."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, word: Any, option: str | None = None) -> None:
        groups = {group.title: group for group in parser._action_groups if group._group_actions}
        formatter = parser._get_formatter()
        if not (word or parser.common):
            parser.print_help()
            parser.exit()
        if word is None:
            known = {action.dest: action for action in parser._actions}
            formatter.add_usage(parser.usage, parser._actions, [])
            formatter.add_text(parser.description)
            formatter.start_section('common options')
            formatter.add_arguments([known[dest] for dest in parser.common])
            formatter.end_section()
            listed = ', '.join(f'{title} ({len(group._group_actions)})' for title, group in groups.items())
            formatter.add_text(f'Groups of options: {listed}.')
            formatter.add_text('--help GROUP prints one group (a part of its name is enough), --help-all prints all.')
        else:
            found = [group for title, group in groups.items() if word.lower() in title]
            if not found:
                parser.error(
                    f'--help: there is no group {word!r}{nearest(word, groups)}; there are {", ".join(groups)}'
                )
            for group in found:
                formatter.start_section(group.title)
                formatter.add_arguments(group._group_actions)
                formatter.end_section()
        print(formatter.format_help(), end='')
        parser.exit()


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        parser.print_help()
        parser.exit()


def add_help_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--help [GROUP]`` and ``--help-all``.

    The parser's ``common`` has the destinations of common options; if it is empty, ``--help`` prints all.
    """
    add, hidden = parser.add_argument, dict(dest=argparse.SUPPRESS, default=argparse.SUPPRESS)
    help = 'print the common options, or those of a group'
    add('-h', '--help', nargs='?', metavar='GROUP', action=_Help, help=help, **hidden)
    add('--help-all', nargs=0, action=_HelpAll, help='print all options', **hidden)

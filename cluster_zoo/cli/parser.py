"""The commands and their argument parser. Importing this module does not import PyTorch."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from ..errors import nearest


class Command(NamedTuple):
    """A command."""

    module: str  # in this package; its `add_parser` adds the parser
    help: str


COMMANDS = {
    'demo': Command('demo', 'classify the bundled images with the bundled weights'),
    'list': Command('weights', 'list models and weights'),
    'info': Command('weights', 'print the metadata of a model and its weights'),
    'fetch': Command('weights', 'download pretrained weights'),
    'import': Command('weights', 'convert a checkpoint file to a model folder'),
    'push': Command('weights', 'upload weights to the Hugging Face Hub, or copy them to a folder'),
    'predict': Command('predict', 'classify images: files, folders, standard input'),
    'explain': Command('explain', 'draw what a model grouped, or the training images that it compares with'),
    'app': Command('app', 'explore in the browser what models grouped'),
    'export': Command('export', 'write a model as ONNX, TorchScript or pt2'),
    'env': Command('env', 'print versions, devices and kernels, for a report of a problem'),
    'train': Command('training', 'train an image classifier'),
    'validate': Command('training', 'measure accuracy and speed of image classifiers'),
    'segment': Command('training', 'train, validate or apply a segmenter'),
    'detect': Command('training', 'train, validate or apply a detector'),
}

Commands = argparse._SubParsersAction  # what ``add_subparsers`` returns, for annotations


class _HelpFormatter(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fills paragraphs, except those with indented lines such as examples."""
        fill = super()._fill_text
        paragraphs = text.strip().split('\n\n')
        return '\n\n'.join(one if '\n ' in one else fill(one, width, indent) for one in paragraphs)


class Parser(argparse.ArgumentParser):
    """Argument parser of the command, or of one of its commands.

    Args:
        **kwargs: As for ``argparse.ArgumentParser``.
    """

    def __init__(self, **kwargs: Any) -> None:
        # With abbreviations, a new option could change the meaning of existing commands.
        kwargs = dict(formatter_class=_HelpFormatter, allow_abbrev=False) | kwargs
        super().__init__(**kwargs)
        self.add_argument(
            '--debug', action='store_true', default=argparse.SUPPRESS, help='print the traceback of an error'
        )

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses arguments. Unknown ones are an error of this parser, which can name the nearest option."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            hints = ''.join(nearest(word.partition('=')[0], known) for word in unknown if word.startswith('-'))
            self.error(f'unknown argument{"s" * (len(unknown) > 1)} {" ".join(unknown)}{hints}')
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Prints the error and the command for help, and exits with status 2."""
        mistyped = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        if mistyped:
            known = [name.strip(" '") for name in mistyped[2].split(',')]
            message = f"there is no command '{mistyped[1]}'{nearest(mistyped[1], known)}"
        self.exit(2, f'error: {message}\n(see {self.prog} --help)\n')

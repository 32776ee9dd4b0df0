"""``cluster-zoo train``, ``validate``, ``segment`` and ``detect``: the checkout's scripts, for an installed package.

``segment predict`` is in `segment` and ``detect predict`` in `detect`, which parse their own command lines, too.
"""

import importlib
from collections.abc import Sequence

from ..errors import OptionError
from .parser import COMMANDS, Commands

_SCRIPTS = {
    ('train',): 'cluster_zoo.training.train',
    ('validate',): 'cluster_zoo.training.validate',
    ('segment', 'train'): 'segmentation.train',
    ('segment', 'validate'): 'segmentation.validate',
    ('segment', 'predict'): 'cluster_zoo.cli.segment',
    ('detect', 'train'): 'segmentation.detection.train',
    ('detect', 'validate'): 'segmentation.detection.validate',
    ('detect', 'predict'): 'cluster_zoo.cli.detect',
}


def add_parser(commands: Commands) -> None:
    """Registers the commands. Their own parsers are those of the scripts."""
    commands.add_parser('train', help=COMMANDS['train'].help, add_help=False)
    commands.add_parser('validate', help=COMMANDS['validate'].help, add_help=False)
    segment = commands.add_parser(
        'segment',
        help=COMMANDS['segment'].help,
        description='Train, validate or apply a segmenter.',
        epilog='examples:\n'
        '  cluster-zoo segment train DATA --dataset camvid --head semantic_fpn --backbone coc_tiny\n'
        '  cluster-zoo segment validate DATA --checkpoint output/segmentation/NAME/model_best.pth.tar\n'
        '  cluster-zoo segment predict photos/ --checkpoint FILE --output masks --overlays overlays\n',
    ).add_subparsers(title='commands', metavar='COMMAND', required=True)
    segment.add_parser('train', help='train a segmenter', add_help=False)
    segment.add_parser('validate', help='measure accuracy and speed of a segmenter', add_help=False)
    segment.add_parser('predict', help='write the masks of images', add_help=False)
    detect = commands.add_parser(
        'detect',
        help=COMMANDS['detect'].help,
        description='Train, validate or apply a detector.',
        epilog='examples:\n'
        '  cluster-zoo detect train DATA --detector mask_rcnn --backbone coc_tiny\n'
        '  cluster-zoo detect validate DATA --checkpoint output/detection/NAME/model_best.pth.tar\n'
        '  cluster-zoo detect predict photos/ --checkpoint FILE --output objects\n',
    ).add_subparsers(title='commands', metavar='COMMAND', required=True)
    detect.add_parser('train', help='train a detector', add_help=False)
    detect.add_parser('validate', help='measure the average precision of a detector', add_help=False)
    detect.add_parser('predict', help='draw the objects in images', add_help=False)


def run_script(argv: Sequence[str]) -> int | None:
    """Runs the script that a command line names.

    Args:
        argv: Arguments of ``cluster-zoo``.

    Returns:
        The exit status of the script; None if the command line names another command.

    Raises:
        OptionError: A package that the script needs is not installed.
    """
    for words, module in _SCRIPTS.items():
        if tuple(argv[: len(words)]) == words:
            try:
                importlib.import_module('cluster_zoo.models')  # registers the models
                main = importlib.import_module(module).main
            except ModuleNotFoundError as error:
                raise OptionError(str(error)) from error
            return main(argv[len(words) :], prog=' '.join(['cluster-zoo', *words]))
    return None

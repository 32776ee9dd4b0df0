"""``cluster-zoo app``: a page in the browser that shows what models grouped."""

import argparse
import os
import socket
import tempfile
from importlib.util import find_spec

from ..errors import OptionError
from ..explain import can_explain
from ..predict import load_classifier
from .arguments import BUNDLED_MODELS, PHOTO, add_device, model_name
from .parser import COMMANDS, Commands


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'app',
        help=COMMANDS['app'].help,
        description='Serve a page on which one uploads a photograph and sees what models group in it: the clusters of '
        'every layer, segments, what each cluster adds to a class, and the nearest training images of nearest-centroid '
        'models. Uploaded files are in a temporary folder, which is removed at the end. Needs the extra app.',
        epilog='examples:\n'
        '  cluster-zoo app\n'
        '  cluster-zoo app --model coc_small.in1k --model local-dir:my_model --port 8000\n',
    )
    add = parser.add_argument
    add(
        '--model',
        type=model_name,
        action='append',
        metavar='NAME',
        help=f'a model to choose from, can be repeated (default: {", ".join(BUNDLED_MODELS)})',
    )
    add('--host', default='127.0.0.1', help='address to listen at; 0.0.0.0 for other machines (default: %(default)s)')
    add('--port', type=_port, default=7860, help='port, 0 for any free one (default: %(default)s)')
    add_device(parser)
    parser.set_defaults(run=_app)


def _port(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise argparse.ArgumentTypeError(f'{value} is not a port: expected 0 to 65535')
    return int(value)


def free_port(host: str) -> int:
    """Returns a port that no program listens at."""
    with socket.socket() as server:
        server.bind((host, 0))
        return server.getsockname()[1]


def _app(args: argparse.Namespace) -> None:
    if find_spec('gradio') is None:
        raise OptionError("The app needs Gradio: pip install 'cluster_zoo[app]'")
    models = {name: load_classifier(name, args.device) for name in args.model or BUNDLED_MODELS}
    for name, model in models.items():
        if not can_explain(model):
            raise OptionError(f'--model {name} has no clusters and no centroids: choose a coc_*, fec_* or dnc_* model')
    with tempfile.TemporaryDirectory(prefix='cluster-zoo-app-') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
        import gradio as gr

        from ..app import build_app

        fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['monospace'])  # no fonts from other servers
        try:
            app = build_app(models, str(PHOTO))
            _, address, _ = app.launch(
                server_name=args.host,
                server_port=args.port or free_port(args.host),
                max_file_size='20mb',
                footer_links=[],
                theme=gr.themes.Default(**fonts),
                ssr_mode=False,
                quiet=True,
                prevent_thread_lock=True,
            )
            print(f'{address} (Ctrl-C ends)', flush=True)
            app.block_thread()
        except OSError as error:
            raise OptionError(f'--port {args.port}: {error}') from error

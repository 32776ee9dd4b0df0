"""The page of ``cluster-zoo app``: upload a photograph and explore what models grouped, side by side.

Each image needs one forward pass of each model. The explanation is a web page of its own (`html_page`) with all
assignments, so that its sliders and its pointer need no server.
"""

import html
import threading
from functools import partial

import torch.nn as nn
from PIL import Image

from .explain import explain_image, html_page
from .images import read_image

__all__ = ['build_app']

_MAX_PIXELS = 50_000_000
_SIZES = {'test size of the model': None, '96 px': 96, '128 px': 128, '192 px': 192, '256 px': 256, '384 px': 384}


def build_app(models: dict[str, nn.Module], photo: str):
    """Returns the app, a ``gradio.Blocks``.

    Args:
        models: Models by name. A user chooses among them.
        photo: An image file that is shown first.
    """
    import gradio as gr

    names, none = list(models), 'no second model'
    lock = threading.Lock()  # the maps are read by hooks, so that a model explains one image at a time

    def explain(name: str, image: Image.Image, size: int | None) -> str:
        with lock:
            explained = explain_image(models[name], image, size=size)
        return _frame(html_page(models[name], name, [explained]))

    def show(quiet: bool, path: str | None, name: str, size: str) -> gr.HTML:
        if name not in models:
            return gr.HTML('', visible=False)
        try:
            return gr.HTML(explain(name, read_image(path or photo, _MAX_PIXELS), _SIZES[size]), visible=True)
        except ValueError as error:  # also ImageError
            if quiet:
                return gr.skip()
            raise gr.Error(f'This image cannot be explained: {error}', print_exception=False) from error

    with gr.Blocks(title='cluster_zoo', fill_width=True, delete_cache=(600, 3600), analytics_enabled=False) as app:
        gr.Markdown('# What did the model group?\nUpload a photograph, or explore the bundled one.')
        with gr.Row():
            file = gr.File(label='photograph', file_types=['image'], type='filepath', height=120)
            chosen = [
                gr.Dropdown(names, value=names[0], label='model', filterable=False),
                gr.Dropdown([none, *names], value=none, label='beside it', filterable=False),
            ]
            size = gr.Dropdown(list(_SIZES), label='shorter side of the input', filterable=False)
        with gr.Row():
            frames = [show(False, None, control.value, size.value) for control in chosen]
        for quiet, control, frame in zip((False, True), chosen, frames):  # one message for both models
            gr.on(
                [file.upload, file.clear, size.change, control.change],  # file.change can come twice for one upload
                partial(show, quiet),
                [file, control, size],
                frame,
                show_progress='minimal',
                trigger_mode='always_last',  # a choice during a computation is not lost
            )
    return app


def _frame(page: str) -> str:
    # The sandbox has no origin, so that the page can neither read nor send anything.
    style = 'width: 100%; height: 1150px; border: 0'
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{html.escape(page)}"></iframe>'

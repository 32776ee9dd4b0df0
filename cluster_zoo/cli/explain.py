"""``cluster-zoo explain``: draws the clusters or the centroids that a prediction is based on."""

import argparse

import timm
import torch

from ..errors import ImageError, OptionError, printable
from ..explain import draw_explanation, draw_stages, explain
from ..layers.cluster_mixer import ClusterMixer
from ..layers.nearest_centroid import centroid_heads
from ..predict import Classified, classify, find_images, load_classifier, read_image
from ..weights.metadata import label_names
from .arguments import DEMO_MODEL, add_device, image_path, model_name
from .parser import COMMANDS, Commands

_MOST = 16  # images in one figure


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    parser = commands.add_parser(
        'explain',
        help=COMMANDS['explain'].help,
        description='Classify images and draw what the prediction is based on. Context Cluster and FEC: the clusters '
        'in the last block of the first three stages, one color per center. Nearest-centroid models of other '
        'backbones: the training images that are the nearest centroids of the first image.',
        epilog='examples:\n'
        '  cluster-zoo explain cat.jpg dog.jpg\n'
        '  cluster-zoo explain photos/ --model coc_small.in1k --output clusters.png\n',
    )
    add = parser.add_argument
    add('images', nargs='+', metavar='IMAGE', help=f'files and folders; the first {_MOST} images are drawn')
    add('--model', type=model_name, default=DEMO_MODEL, metavar='NAME', help='as for predict (default: %(default)s)')
    add('--output', type=image_path, default='explain.png', metavar='FILE', help='figure (default: %(default)s)')
    add_device(parser)
    parser.set_defaults(run=_explain)


@torch.inference_mode()
def _explain(args: argparse.Namespace) -> None:
    found = find_images(args.images)
    if wrong := next((image for image in found if isinstance(image, Classified)), None):
        raise ImageError(f'{printable(wrong.image)}: {wrong.error}')
    model = load_classifier(args.model, args.device)
    clusters = any(isinstance(module, ClusterMixer) for module in model.modules())
    if not (clusters or centroid_heads(model)):
        raise OptionError(
            f'--model {args.model} has no clusters and no centroids: choose a coc_*, fec_* or dnc_* model'
        )
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model, use_test_size=True))
    images, inputs, captions = [], [], []
    for name, result in zip(found[:_MOST], classify(model, found[:_MOST], top=1)):
        if result.error:
            raise ImageError(f'{printable(name)}: {result.error}')
        best = result.classes[0]
        captions.append(f'{best.label or f"class {best.index}"} {100 * best.probability:.0f} %')
        images.append(read_image(name))
        inputs.append(transform(images[-1]))
        print(f'{printable(name)}: {printable(captions[-1])}')
    if clusters:
        figure = draw_stages(model, torch.stack(inputs).to(args.device), captions)
    else:
        labels = label_names({**model.pretrained_cfg, 'num_classes': model.num_classes})
        figure = draw_explanation(explain(model, images[0], labels), images[0])
    figure.save(args.output)
    left_out = f', without {len(found) - _MOST} further images' if len(found) > _MOST else ''
    print(f'{args.output}: {"clusters in three stages" if clusters else "centroids of the first image"}{left_out}')

"""``cluster-zoo demo``: classifies the bundled images with the bundled weights."""

import argparse
import time

from ..datasets import check_dataset, class_names, create_dataset
from ..explain import draw_page, explain_image
from ..images import read_image
from ..predict import classify, load_classifier
from .arguments import DEMO_MODEL, PHOTO, add_device, image_path
from .parser import COMMANDS, Commands

DEMO_DATASET = 'cluster_zoo/cifar10_sample'


def add_parser(commands: Commands) -> None:
    """Registers the command."""
    demo = commands.add_parser(
        'demo',
        help=COMMANDS['demo'].help,
        description=f'Classify 1,000 test images of CIFAR-10 with {DEMO_MODEL}, both part of the package, and draw '
        'what the model groups in a bundled photograph.',
        epilog='examples:\n  cluster-zoo demo\n  cluster-zoo demo --output clusters.png --device cpu\n',
    )
    demo.add_argument(
        '--output', metavar='FILE', type=image_path, default='demo.png', help='image to write (default: %(default)s)'
    )
    add_device(demo)
    demo.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    model = load_classifier(DEMO_MODEL, args.device)
    dataset = create_dataset(DEMO_DATASET)
    check_dataset(dataset, model.num_classes, 'test')
    names = class_names(dataset)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f'{DEMO_MODEL}: {parameters / 1e6:.2f} M parameters, on {args.device}', flush=True)

    start = time.perf_counter()
    images, targets = zip(*dataset)
    predictions = [result.classes[0] for result in classify(model, images, top=1, batch_size=100)]
    seconds = time.perf_counter() - start
    top1 = 100 * sum(best.index == target for best, target in zip(predictions, targets)) / len(targets)
    print(f"top-1 {top1:.1f} % of {len(dataset)} of CIFAR-10's test images, {len(dataset) / seconds:.0f} images/s\n")

    print(f'{"image":22} {"label":12} {"prediction":12} probability')
    for index in [targets.index(label) for label in names]:  # the first image of each class
        best = predictions[index]
        percent = 100 * best.probability
        print(f'{dataset.filename(index):22} {names[targets[index]]:12} {names[best.index]:12} {percent:9.1f} %')

    photo = explain_image(model, read_image(str(PHOTO)), size=96)
    draw_page([photo]).save(args.output)
    print(f'\n{PHOTO.name}: {photo.caption}; its clusters and what they add to the class: {args.output}')

"""Classifies images with a model of this package or of timm, and prints the most probable classes.

python examples/classify.py photo.jpg photos/ --model coc_tiny_plain.cifar10
"""

import argparse

from cluster_zoo.predict import classify, find_images, load_classifier

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('images', nargs='+')
parser.add_argument('--model', default='coc_tiny_plain.cifar10')
args = parser.parse_args()

model = load_classifier(args.model)
for result in classify(model, find_images(args.images), top=3):
    classes = ', '.join(f'{one.label} {one.probability:.1%}' for one in result.classes)
    print(f'{result.image}: {result.error or classes}')

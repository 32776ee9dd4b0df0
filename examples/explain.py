"""Shows what a model grouped in an image, and what each group adds to its class.

python examples/explain.py photo.jpg explained.png

`cluster-zoo explain` and `cluster-zoo app` show more.
"""

import argparse

import timm
from PIL import Image

import cluster_zoo  # noqa: F401  registers the models
from cluster_zoo.explain import cluster_maps, contributions, draw_clusters, draw_contributions, remove_cluster

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('image')
parser.add_argument('output')
parser.add_argument('--model', default='coc_tiny_plain.cifar10')
args = parser.parse_args()

model = timm.create_model(args.model, pretrained=True)
maps = cluster_maps(model, Image.open(args.image))  # one forward pass; all else is computed from its results
photo = maps.images[0]

blocks = [maps.at(stage) for stage in range(4)]
drawings = [draw_clusters(photo, maps.at_pixels(one.center[0, 0], one.stride, photo.size)) for one in blocks]
parts = contributions(model, maps)
drawings.append(draw_contributions(photo, maps, parts))

sheet = Image.new('RGB', (photo.width * len(drawings), photo.height))
for column, drawing in enumerate(drawings):
    sheet.paste(drawing, (photo.width * column, 0))
sheet.save(args.output)

print(f'{parts.class_name}: probability {parts.probability:.1%}, logit {parts.logit:.2f} = bias {parts.bias:.2f}')
for center in sorted(set(parts.center.flatten())):
    points = (parts.center == center).sum()
    if points < parts.center.size:
        without = remove_cluster(model, maps, center)[parts.class_index]
        print(f'  + {parts.clusters[center]:.2f} from {points} points of center {center}; {without:.2f} without them')

"""Trains a segmenter on images and masks for a few steps, and draws its prediction for an image.

python examples/segment.py streets photo.jpg segmented.png --steps 500

The folder has train/images/*.jpg and train/masks/*.png of the same names, with labels from 0.
`cluster-zoo segment train` does the same with validation, schedules and checkpoints.
"""

import argparse

import timm
import timm.optim
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from segmentation import create_segmenter
from segmentation.data.datasets import create_dataset
from segmentation.data.transforms import eval_transform, train_transform
from segmentation.engine.overlays import draw_overlay

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('folder')
parser.add_argument('image')
parser.add_argument('output')
parser.add_argument('--steps', type=int, default=500)
parser.add_argument('--crop', type=int, default=256)
args = parser.parse_args()

dataset = create_dataset('folder', args.folder, 'train', train_transform(args.crop, scale=None))
classes = dataset.classes
model = create_segmenter('semantic_fpn', 'coc_tiny_plain', num_classes=len(classes))
weights = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).state_dict()
model.backbone.model.load_state_dict(weights, strict=False)  # the head has no weights yet

loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=5e-4, weight_decay=0.05)
step = 0
while step < args.steps:
    for images, masks in loader:
        loss = F.cross_entropy(model.train()(images), masks.long(), ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 10 == 0 or step == args.steps:
            print(f'step {step}: loss {loss.item():.3f}')
        if step == args.steps:
            break

photo = pil_to_tensor(Image.open(args.image).convert('RGB'))
with torch.inference_mode():
    mask = model.eval()(eval_transform()(photo).unsqueeze(0)).argmax(1)[0]
draw_overlay(photo, mask, classes, dataset.colours).save(args.output)

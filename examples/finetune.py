"""Fine-tunes the bundled model on a folder with one subfolder of images per class, in a loop of plain PyTorch and timm.

python examples/finetune.py photographs --epochs 10 --output my_model
cluster-zoo predict photo.jpg --model my_model

`cluster-zoo train` does the same with validation, augmentation, schedules and checkpoints.
"""

import argparse

import timm
import timm.optim
import torch
import torch.nn.functional as F

import cluster_zoo  # noqa: F401  registers the models

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument('folder')
parser.add_argument('--epochs', type=int, default=10)
parser.add_argument('--output', default='my_model')
args = parser.parse_args()

dataset = timm.data.create_dataset('', args.folder)
names = sorted(dataset.reader.class_to_idx, key=dataset.reader.class_to_idx.get)
model = timm.create_model('coc_tiny_plain.cifar10', pretrained=True, num_classes=len(names), drop_path_rate=0.05)
config = timm.data.resolve_model_data_config(model)
dataset.transform = timm.data.create_transform(**config, is_training=True, scale=(0.5, 1))
loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=True)
optimizer = timm.optim.create_optimizer_v2(model, 'adamw', lr=5e-4, weight_decay=0.05)

model.train()
for epoch in range(args.epochs):
    correct = 0
    for images, targets in loader:
        logits = model(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct += (logits.argmax(1) == targets).sum().item()
    print(f'epoch {epoch}: loss {loss.item():.3f}, training accuracy {correct / len(dataset):.1%}')

model.pretrained_cfg = model.pretrained_cfg | dict(label_names=names, num_classes=len(names))
timm.models.save_for_hf(model, args.output, safe_serialization=True)
print(f'{args.output}: {len(names)} classes, {", ".join(names)}')

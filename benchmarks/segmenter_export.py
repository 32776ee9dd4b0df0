"""Differences between segmenters and their ONNX files at other sizes than the exported one.

    python benchmarks/segmenter_export.py [upernet:coc_tiny:cond ...]

Each row is a head, a backbone and a classifier: small models with random weights, whose layer scales and classifiers
are large enough for the clustering and the position to matter. Prints the largest difference of a logit over `SHAPES`,
and the largest logit.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn as nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'benchmarks')]

from measuring import print_table  # noqa: E402

from cluster_zoo.export import export_model  # noqa: E402
from segmentation import create_segmenter  # noqa: E402

EXPORTED = (64, 96)
SHAPES = ((1, 64, 64), (3, 128, 96), (1, 160, 224), (2, 224, 64))
BACKBONES = dict(
    resnet10t={},
    coc_tiny=dict(depths=(1, 0, 0, 1), dims=(16, 24, 32, 48), num_heads=(2, 2, 2, 2), head_dim=8),
    fec_small=dict(depths=(0, 0, 0, 1), dims=(8, 16, 24, 32), num_heads=(1, 2, 2, 2), head_dim=8),
    vit_tiny_patch16_224=dict(depth=3),
)
HEADS = ('semantic_fpn', 'upernet', 'deeplabv3plus', 'fcn')


def rows() -> Iterator[str]:
    """Yields the rows of the whole table."""
    for backbone in BACKBONES:
        for head in ('region_proxy',) if backbone.startswith('vit') else HEADS:
            for classifier in ('plain',) if backbone.startswith('vit') else ('plain', 'cond', 'dnc'):
                yield f'{head}:{backbone}:{classifier}'


def build(row: str) -> nn.Module:
    """Builds the model of a row."""
    head, backbone, classifier = row.split(':')
    torch.manual_seed(0)
    options = {} if head == 'region_proxy' else dict(channels=32, classifier=classifier)
    if head == 'semantic_fpn':
        options['pyramid_channels'] = 16
    model = create_segmenter(head, backbone, 5, **options, **BACKBONES[backbone]).eval().requires_grad_(False)
    model.config['pretrained_cfg']['input_size'] = [3, *EXPORTED]
    for name, parameter in model.named_parameters():
        if name.endswith('.gamma'):
            nn.init.constant_(parameter, 0.5)
        elif 'classifier.' in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif 'sep_bottleneck.1.pointwise_conv.bn.weight' in name:  # random weights of DeepLabV3+ give logits near 0
            nn.init.constant_(parameter, 30.0)
    return model


def measure(row: str) -> list[str]:
    """Exports the model of a row and returns the cells of the table."""
    import onnxruntime

    torch.set_num_threads(1)
    model, difference, largest = build(row), 0.0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = export_model(model, Path(folder) / 'model.onnx').path
        session = onnxruntime.InferenceSession(path)
        for batch, *size in SHAPES:
            images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(size[0]))
            expected = model(images)
            found = torch.from_numpy(session.run(['logits'], {'image': images.numpy()})[0])
            difference = max(difference, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return [*row.split(':'), f'{difference:.1e}', f'{largest:.0f}']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = list(rows())
    parser.add_argument('rows', nargs='*', metavar='HEAD:BACKBONE:CLASSIFIER', help='default: the whole table')
    args = parser.parse_args()
    if unknown := [row for row in args.rows if row not in known]:
        parser.error(f'there is no row {unknown[0]}: choose from {", ".join(known)}')
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context('spawn')) as processes:
        table = list(processes.map(measure, args.rows or known))
    print_table([['head', 'backbone', 'classifier', 'difference', 'largest logit'], *table], markdown=True)


if __name__ == '__main__':
    main()

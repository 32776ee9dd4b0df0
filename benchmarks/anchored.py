#!/usr/bin/env python3
"""Makes a nearest-centroid model from the bundled weights without training, for `cluster-zoo explain`.

    python benchmarks/anchored.py DATA FOLDER
    cluster-zoo explain --model FOLDER

The backbone is that of coc_tiny_plain.cifar10. Its centroids are the means of the features of CIFAR-10's training
images, then the nearest training images. DATA has train.tar and val.tar, or train/ and val/, of class folders.
"""

import argparse
import sys
from pathlib import Path

import timm
from timm.models import save_for_hf

sys.path.insert(0, str(Path(__file__).parents[1]))

from cluster_zoo.datasets import class_names, create_dataset
from cluster_zoo.explain import anchor
from cluster_zoo.transfer import fit_centroids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('data')
    parser.add_argument('folder')
    args = parser.parse_args()

    trained = timm.create_model('coc_tiny_plain.cifar10', pretrained=True)
    sizes = dict(proposals=[4, 4, 2, 2], regions=1)  # of coc_tiny_plain
    model = timm.create_model('dnc_coc_tiny', num_classes=10, **sizes)
    backbone = {name: value for name, value in trained.state_dict().items() if not name.startswith('head.')}
    _, unexpected = model.load_state_dict(backbone, strict=False)
    assert not unexpected, unexpected
    config = {key: trained.pretrained_cfg[key] for key in ('input_size', 'pool_size', 'crop_pct', 'mean', 'std')}
    model.pretrained_cfg = {**model.pretrained_cfg, **config}

    train, val = (create_dataset('', args.data, split) for split in ('train', 'val'))
    fit_centroids(model, train)
    print(anchor(model, train, val))
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': list(class_names(train).values()), 'num_classes': 10}
    save_for_hf(model, args.folder, model_args=sizes | dict(sub_centroids=1), safe_serialization=True)


if __name__ == '__main__':
    main()

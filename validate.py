#!/usr/bin/env python3
"""Measure accuracy and speed of image classifiers with timm's options.

    python validate.py /path/to/imagenet --model coc_tiny -b 128 --checkpoint /path/to/checkpoint
    python validate.py --dataset cluster_zoo/cifar10_sample --model coc_tiny_plain.cifar10
    python validate.py /path/to/imagenet --model 'coc_*,resnet18' --results-file results.csv

The code is `cluster_zoo/training/validate.py`. An installed package has the same command: ``cluster-zoo validate``.
"""

import sys

try:
    from cluster_zoo.training.validate import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(main())

#!/usr/bin/env python3
"""Train an image classifier with timm's options.

    python train.py --data-dir /path/to/imagenet --model coc_tiny -b 128 --amp
    torchrun --nproc-per-node=8 train.py --data-dir /path/to/imagenet --model fec_small -b 128 --amp

The code is `cluster_zoo/training/train.py`. An installed package has the same command: ``cluster-zoo train``.
"""

import sys

try:
    from cluster_zoo.training.train import main
except KeyboardInterrupt:
    sys.exit(130)

if __name__ == '__main__':
    sys.exit(main())

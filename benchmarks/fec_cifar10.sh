#!/usr/bin/env bash
# Trains fec_small on CIFAR-10 at 64 px from the bundled weights of coc_tiny_plain, on two CPU cores.
#
#   bash benchmarks/fec_cifar10.sh DATA [EPOCHS]
#
# DATA has train.tar and val.tar, or train/ and val/, with one folder of images per class. The two models differ only in
# the layers between the stages: the strided convolution is part of cluster pooling, whose other weights start at random.
set -euo pipefail
[[ -e ${1:-} ]] || { sed -n '2,7p' "$0" >&2; exit 2; }
data=$(realpath "$1") epochs=${2:-5}
cd "$(dirname "$0")/.."

initial=output/fec_small-initial.safetensors
python3 - "$initial" <<'PYTHON'
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

import cluster_zoo

torch.manual_seed(0)
model = timm.create_model('fec_small', num_classes=10)
weights = timm.create_model('coc_tiny_plain.cifar10', pretrained=True).state_dict()
weights = {name.replace('downsample.', 'downsample.skip.'): weight for name, weight in weights.items()}
missing, unexpected = model.load_state_dict(weights, strict=False)
assert not unexpected and all('.downsample.' in name for name in missing), (missing, unexpected)
Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
save_file(model.state_dict(), sys.argv[1])
PYTHON

torchrun --nproc-per-node 2 train.py --data-dir "$data" --model fec_small --num-classes 10 --img-size 64 --crop-pct 1 \
  --initial-checkpoint "$initial" --recipe timm --opt adamw --lr 1e-3 --weight-decay 0.05 --clip-grad 1 \
  --epochs "$epochs" --sched-on-updates --warmup-epochs 1 --warmup-lr 1e-6 --min-lr 1e-6 \
  --scale 0.5 1 --ratio 0.9 1.11 --color-jitter 0 --train-interpolation bicubic --reprob 0.1 --drop-path 0.05 \
  --amp --amp-dtype bfloat16 --device cpu --workers 1 -b 64 --checkpoint-hist 1 --experiment cifar10-fec_small

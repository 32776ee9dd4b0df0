#!/usr/bin/env bash
# Trains three models with one recipe and seed on 100 classes of ImageNet at 48 px, on two CPU cores.
#
#   bash benchmarks/tiny_imagenet.sh DATA [EPOCHS]
#
# DATA has train.tar and val.tar, or train/ and val/, with one folder of images per class.
set -euo pipefail
[[ -e ${1:-} ]] || { sed -n '2,6p' "$0" >&2; exit 2; }
data=$(realpath "$1") epochs=${2:-3}
cd "$(dirname "$0")/.."

for model in coc_tiny fec_small resnet18; do
  torchrun --nproc-per-node 2 train.py --data-dir "$data" --model "$model" --num-classes 100 --img-size 48 --crop-pct 1 \
    --recipe timm --opt adamw --lr 1e-3 --weight-decay 0.05 --clip-grad 1 \
    --epochs "$epochs" --sched-on-updates --warmup-epochs 1 --warmup-lr 1e-6 --min-lr 1e-6 \
    --scale 0.5 1 --ratio 0.9 1.11 --color-jitter 0 --train-interpolation bicubic \
    --amp --amp-dtype bfloat16 --device cpu --workers 1 -b 64 --checkpoint-hist 1 --experiment "tiny-imagenet-$model"
done

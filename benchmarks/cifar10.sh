#!/usr/bin/env bash
# Trains the bundled weights: coc_tiny_plain on CIFAR-10's 50,000 training images, resized to 64 px.
#
#   bash benchmarks/cifar10.sh cpu DATA    the bundled weights: two processes with one thread each, 24 epochs
#   bash benchmarks/cifar10.sh gpu DATA    one GPU, 300 epochs and stronger augmentation; has not been run
#
# Further arguments are options of train.py, such as --resume auto. EPOCHS=100 sets the number of epochs.
# DATA has train.tar and val.tar, or train/ and val/, with one folder of images per class.
set -euo pipefail
[[ ${1:-} =~ ^(cpu|gpu)$ && -e ${2:-} ]] || { sed -n '2,8p' "$0" >&2; exit 2; }
where=$1 data=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."

common=(
  --data-dir "$data" --model coc_tiny_plain --num-classes 10 --img-size 64 --crop-pct 1
  --recipe timm --opt adamw --lr 2e-3 --weight-decay 0.05 --clip-grad 1
  --sched-on-updates --warmup-lr 1e-6 --min-lr 1e-6
  --ratio 0.9 1.11 --color-jitter 0 --train-interpolation bicubic
  --amp --amp-dtype bfloat16 --checkpoint-hist 2 --experiment "cifar10-$where"
)
if [[ $where == cpu ]]; then
  torchrun --nproc-per-node 2 train.py "${common[@]}" --device cpu --workers 1 -b 64 \
    --epochs "${EPOCHS:-24}" --warmup-epochs 1 --scale 0.5 1 --reprob 0.1 --drop-path 0.05 "$@"
else
  epochs=${EPOCHS:-300}
  exec python3 train.py "${common[@]}" --device cuda --workers 8 -b 512 --epochs "$epochs" \
    --warmup-epochs $((epochs / 30)) --scale 0.35 1 --reprob 0.25 --drop-path 0.1 --aa rand-m5-mstd0.5-inc1 \
    --mixup 0.2 --cutmix 1 --mixup-off-epoch $((epochs * 14 / 15)) "$@"
fi

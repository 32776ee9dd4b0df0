#!/usr/bin/env bash
# Compares a linear head and three nearest-centroid heads with the same backbone, recipe and seed.
#
#   bash benchmarks/dnc.sh cpu cifar10 DATA         a few epochs, two runs at a time with one thread each
#   bash benchmarks/dnc.sh cpu tiny_imagenet DATA
#   bash benchmarks/dnc.sh cpu cifar10_small DATA   a narrow ResNet with one block per stage, two seeds
#   bash benchmarks/dnc.sh gpu cifar10 DATA         one GPU, 100 epochs and three seeds; has not been run
#   bash benchmarks/dnc.sh gpu tiny_imagenet DATA
#   bash benchmarks/dnc.sh gpu cifar10 DATA resnet18_cifar linear 42 [OPTIONS]   one run: backbone, head, seed
#
# DATA has train.tar and val.tar, or train/ and val/, with one folder of images per class. The heads are
#
#   linear
#   published   memory used in one of 1000 batches, unrelated initial sub-centroids
#   queue       memory used in each batch, unrelated initial sub-centroids
#   default     memory used in each batch, similar initial sub-centroids in a class
#
# A stopped run is resumed. HEADS="linear default" selects heads, EPOCHS=30 sets the number of epochs. Then
# `python benchmarks/dnc.py cifar10 DATA` anchors the centroids and prints a table.
set -euo pipefail
[[ ${1:-} =~ ^(cpu|gpu)$ && ${2:-} =~ ^(cifar10|cifar10_small|tiny_imagenet)$ && -e ${3:-} ]] || { sed -n '2,19p' "$0" >&2; exit 2; }
where=$1 data=$2 folder=$(realpath "$3") heads=${HEADS:-linear published queue default}
shift 3
cd "$(dirname "$0")/.."

common=(
  --recipe timm --data-dir "$folder" --sched-on-updates --smoothing 0 --color-jitter 0 --checkpoint-hist 1 --resume auto
  --amp --amp-dtype bfloat16 --log-interval 100
)
sgd=(--opt sgd --lr 0.1 --weight-decay 5e-4 --warmup-epochs 0)
adamw=(--opt adamw --lr 1e-3 --weight-decay 0.05 --clip-grad 1 --warmup-epochs 1 --warmup-lr 1e-6)
if [[ $data == cifar10* ]]; then
  common+=(--num-classes 10 -b 128)
  resnet=resnet18_cifar resnet_options=("${sgd[@]}" --img-size 32 --train-crop-mode pad)
  cluster=coc_tiny cluster_options=("${adamw[@]}" --img-size 64 --crop-pct 1 --scale 0.5 1 --ratio 0.9 1.11)
  epochs_cpu=(3 1) epochs_gpu=(100 100)
else
  common+=(--num-classes 100 -b 64 --img-size 48 --crop-pct 1 --scale 0.5 1 --ratio 0.9 1.11)
  resnet=resnet18 resnet_options=("${adamw[@]}")
  cluster=fec_small cluster_options=("${adamw[@]}")
  epochs_cpu=(3 1) epochs_gpu=(100 100)
fi
if [[ $data == cifar10_small ]]; then
  epochs_cpu=(2) epochs_gpu=(30) resnet_options+=(--model-kwargs 'channels=(16,32,64,128)' 'layers=(1,1,1,1)')
fi
if [[ $where == cpu ]]; then
  export OMP_NUM_THREADS=1
  seeds=(42) at_once=2 epochs=("${epochs_cpu[@]}") common+=(--device cpu --workers 1)
else
  seeds=(42 43 44) at_once=3 epochs=("${epochs_gpu[@]}") common+=(--device cuda --workers 5)
fi

train() {  # BACKBONE HEAD SEED EPOCHS OPTIONS...
  local backbone=$1 head=$2 seed=$3 epochs=$4 model=$1
  shift 4
  [[ $head == linear ]] || model=dnc_$backbone
  [[ $head != published ]] || set -- "$@" --centroid-every 1000
  [[ $head == linear || $head == default ]] || set -- "$@" --common-start 0
  exec python3 train.py "${common[@]}" --model "$model" --seed "$seed" --epochs "${EPOCHS:-$epochs}" \
    --experiment "dnc-$data-$backbone-$head-$seed" "$@"
}

if (($# >= 3)); then
  if [[ $1 == "$resnet" ]]; then
    train "$1" "$2" "$3" "${epochs[0]}" "${resnet_options[@]}" "${@:4}"
  else
    train "$1" "$2" "$3" "${epochs[1]}" "${cluster_options[@]}" "${@:4}"
  fi
fi

running=() failed=0
trap 'kill "${running[@]}" 2> /dev/null || true' EXIT
finish() {  # COUNT: waits until at most COUNT runs are left
  while ((${#running[@]} > $1)); do
    wait "${running[0]}" || failed=1
    running=("${running[@]:1}")
  done
}
start() {
  finish $((at_once - 1))
  train "$@" &
  running+=($!)
}
[[ $data != cifar10_small ]] || seeds=(42 43)
for seed in "${seeds[@]}"; do
  for head in $heads; do start "$resnet" "$head" "$seed" "${epochs[0]}" "${resnet_options[@]}"; done
  if [[ $data != cifar10_small ]]; then
    for head in $heads; do start "$cluster" "$head" "$seed" "${epochs[1]}" "${cluster_options[@]}"; done
  fi
done
finish 0
exit "$failed"

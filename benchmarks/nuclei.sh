#!/usr/bin/env bash
# Trains Mask R-CNN on the nuclei of the Data Science Bowl 2018 from scratch, all backbones with the same recipe. DATA is
# the folder or tar of the data in the format of COCO.
#
#   bash benchmarks/nuclei.sh cpu DATA [BACKBONE ...]    450 iterations of 4 crops; half an hour per backbone and core
#   bash benchmarks/nuclei.sh gpu DATA [BACKBONE ...]    12,000 iterations of 16 crops; has not been run
#
# Runs are in output/detection/nuclei-KIND-BACKBONE. A stopped run is resumed, a finished run is skipped.
set -euo pipefail
[[ ${1:-} =~ ^(cpu|gpu)$ && -e ${2:-} ]] || { sed -n '2,8p' "$0" >&2; exit 2; }
kind=$1 data=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."

declare -A options=(
    [coc_tiny]='proposals=5'
    [fec_small]='proposals=7 regions=(2,2,1,1) pool_regions=(2,1,1)'
    [resnet18]=''
)
order=(coc_tiny fec_small resnet18)
# Nuclei are small and many: images are enlarged, and few proposals are trained per crop.
recipe=(
    --detector mask_rcnn --min-size 512 --max-size 1024 --crop 256
    --weight-decay 0.05 --clip-grad 5 --steps 0.75 0.92 --amp --amp-dtype bfloat16 --resume auto
)
few=(rpn_pre_nms_top_n_train=1000 rpn_post_nms_top_n_train=300 rpn_post_nms_top_n_test=500 box_batch_size_per_image=64)
case $kind in
    cpu) export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # for two cores, start the script twice with other backbones
         recipe+=(-b 4 --lr 3e-4 --iterations 450 --warmup 50 --val-interval 450 --recovery-interval 100 --workers 0) ;;
    gpu) recipe+=(-b 16 --lr 6e-4 --iterations 12000 --warmup 500 --val-interval 2000 --workers 8) ;;
esac

for backbone in "${@:-${order[@]}}"; do
    [[ -v options[$backbone] ]] || { echo "unknown backbone '$backbone': ${order[*]}" >&2; exit 2; }
    run=nuclei-$kind-$backbone
    [[ -e output/detection/$run/done ]] && continue
    # The options are several words.
    # shellcheck disable=SC2086
    python3 -m cluster_zoo detect train "$data" "${recipe[@]}" --backbone "$backbone" \
        --model-kwargs "${few[@]}" ${options[$backbone]} --experiment "$run"
    touch "output/detection/$run/done"
done

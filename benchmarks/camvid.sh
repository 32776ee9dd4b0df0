#!/usr/bin/env bash
# Trains segmentation heads on CamVid from scratch, all rows with the same recipe. DATA is the folder or tar of CamVid.
#
#   bash benchmarks/camvid.sh cpu DATA [ROW ...]    1,500 iterations of 8 crops, seed 42; half an hour per row and core
#   bash benchmarks/camvid.sh gpu DATA [ROW ...]    20,000 iterations of 16 crops, three seeds; has not been run
#   bash benchmarks/camvid.sh bundled DATA          the bundled model: from the bundled classifier, cross-entropy + Lovasz
#
# Runs are in output/segmentation/camvid-KIND-ROW-SEED. A stopped run is resumed, a finished run is skipped. Then
#
#   python benchmarks/camvid.py KIND DATA           prints the table for the test images
set -euo pipefail
[[ ${1:-} =~ ^(cpu|gpu|bundled)$ && -e ${2:-} ]] || { sed -n '2,10p' "$0" >&2; exit 2; }
kind=$1 data=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."

fpn=(--head semantic_fpn --channels 64 --model-kwargs pyramid_channels=128)
declare -A rows=(
    [semantic_fpn-resnet18]="${fpn[*]} --backbone resnet18"
    [semantic_fpn-coc_tiny]="${fpn[*]} --backbone coc_tiny"
    [semantic_fpn-fec_small]="${fpn[*]} --backbone fec_small"
    [semantic_fpn-coc_tiny-cond]="${fpn[*]} --backbone coc_tiny --classifier cond"
    [semantic_fpn-coc_tiny-dnc]="${fpn[*]} --backbone coc_tiny --classifier dnc"
    [region_proxy-vit_tiny]='--head region_proxy --backbone vit_tiny_patch16_224 --model-kwargs img_size=256'
)
order=(semantic_fpn-{resnet18,coc_tiny,fec_small,coc_tiny-cond,coc_tiny-dnc} region_proxy-vit_tiny)
recipe=(
    --dataset camvid --crop 256 --scale 480 360 --ratio 0.5 2 --test-multiple 32
    --lr 1e-3 --weight-decay 0.05 --norm-decay none --clip-grad 5 --power 0.9 --channels-last
    --amp --amp-dtype bfloat16 --resume auto
)
case $kind in
    cpu) export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # for two cores, start the script twice with different rows
         recipe+=(-b 8 --iterations 1500 --warmup 100 --val-interval 500 --workers 0); seeds=${SEEDS:-42} ;;
    gpu) recipe+=(-b 16 --iterations 20000 --warmup 500 --val-interval 2000 --workers 8); seeds=${SEEDS:-42 43 44} ;;
    bundled) export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
         recipe+=(-b 8 --iterations 1200 --warmup 100 --val-interval 600 --workers 0 --loss ce lovasz
                  --pretrained-backbone cluster_zoo/assets/coc_tiny_plain.cifar10.safetensors)
         seeds=42 order=(semantic_fpn-coc_tiny) ;;
esac

for seed in $seeds; do
    for row in "${@:-${order[@]}}"; do
        [[ -v rows[$row] ]] || { echo "unknown row '$row': ${order[*]}" >&2; exit 2; }
        run=camvid-$kind-$row-$seed
        [[ -e output/segmentation/$run/done ]] && continue
        # Each row is several words.
        # shellcheck disable=SC2086
        python3 segmentation/train.py "$data" "${recipe[@]}" ${rows[$row]} --seed "$seed" --experiment "$run"
        touch "output/segmentation/$run/done"
    done
done

#!/usr/bin/env bash
# Tests the Triton kernels on a GPU, and measures the cost of clustering with and without them, centroid updates, and
# the speed of all models. Writes tables and JSON to the folder OUT. It has not been run.
set -euo pipefail
out=$(mkdir -p "${1:?usage: bash benchmarks/gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."

python -m pytest -q tests/test_kernels_gpu.py tests/test_kernels.py tests/test_transcription.py | tee "$out/tests.txt"
cost() {
  python benchmarks/clustering.py --device cuda --batch-size "${BATCH:-256}" "${@:2}" --json "$out/$1.json" |
    tee "$out/$1.md"
}
cost eager --amp
cost compiled --amp --compile --skip check
cost float32 --skip check
CLUSTER_ZOO_KERNELS=plain cost plain --amp --skip check
for dtype in float32 bfloat16; do
  python benchmarks/centroids.py --device cuda --dtype "$dtype" --markdown --json "$out/centroids-$dtype.json" |
    tee "$out/centroids-$dtype.md"
done
python benchmarks/throughput.py --device cuda --amp --channels-last --batch-size 128 --rounds 5 --markdown \
  --json "$out/throughput.json" | tee "$out/throughput.md"
python benchmarks/throughput.py --device cuda --amp --batch-size 8 --rounds 5 --growth --markdown \
  --json "$out/growth.json" | tee "$out/growth.md"

#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most nine minutes, on a machine with torch and nvcc and no network:
#   bench/gpu.sh OUT [build] [tests] [sanitize] [bench] [profile]        (all of them when none is named)
# A first GPU is best used in three calls: "build tests", "bench profile", "sanitize" (the build is kept between them).
# Logs, tables and JSON go to OUT; a summary is printed. CAMVID=folder: its labels for the benches. WHEELS=folder: pure
# Python packages that the machine lacks. Without a GPU each stage goes as far as it can, on tiny sizes: for tests.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: bench/gpu.sh OUT [build] [tests] [sanitize] [bench] [profile]}")
shift
mkdir -p "$out"
deadline=$((SECONDS + 535))
failed=()
export CI=1 # all tests, not the default run's
python=${PYTHON:-python3}
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if [ "$gpu" = 1 ]; then
  device=cuda size=() rounds=21 step=(--crop 1024 1024) frame=()
else
  device=cpu size=(--size 2 19 24 32) rounds=3 step=(--crop 64 64 --batch 2 --rounds 2)
  frame=(--size 64 96 --no-compile)
fi

stage() { # name, seconds at most, command…: its log, its last lines, and whether it failed
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS))
  shift 2
  [ "$left" -lt "$limit" ] && limit=$left
  if [ "$limit" -le 0 ]; then
    printf '=== %s: no time left\n' "$name"
    failed+=("$name")
    return
  fi
  timeout -s INT -k 15 "$limit" "$@" >"$out/$name.log" 2>&1
  local rc=$?
  [ $rc -ne 0 ] && failed+=("$name (exit $rc)")
  printf '=== %s: exit %d, %d s\n' "$name" $rc $((SECONDS - start))
  tail -n "${lines:-6}" "$out/$name.log"
}

build() {
  [ -n "${WHEELS:-}" ] && "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
  lines=40 stage build 240 bash -c "$python -m pip install -v --no-build-isolation --no-deps . && $python -m bcmf_ext.info"
}

tests() { # CUDA first: Triton compiles a kernel for every new kind of argument; one process to a GPU
  local pytest=("$python" -m pytest -o addopts=-q -m gpu --durations=5 --tb=short --maxfail=25)
  lines=15 stage tests-cuda 220 "${pytest[@]}" python_tests -k "not triton"
  lines=15 stage tests-triton 300 "${pytest[@]}" python_tests/test_metrics.py python_tests/test_ops.py \
    python_tests/test_loss_op.py python_tests/test_lmfm.py \
    -k "triton and (argmax or segmentation_loss or min_kept or norm_relu or lmfm)"
}

sanitize() { # the kernels on small shapes
  if ! command -v compute-sanitizer >/dev/null; then
    echo "=== sanitize: compute-sanitizer not found"
    [ "$gpu" = 1 ] && failed+=(sanitize)
    return
  fi
  for tool in memcheck racecheck initcheck; do # without PyTorch's cache of memory, so that every tensor has bounds
    stage "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all --kernel-regex kns=bcmf "$python" -m pytest -o addopts=-q python_tests/test_ops.py \
      python_tests/test_loss_op.py -m gpu -p no:cacheprovider -k "cuda and not norm_relu and \
      (bfloat16 and (test_any_layout or test_any_size) or test_ohem_at_ties or test_out_of_range_labels)"
    stage "$tool-lmfm" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all --kernel-regex kns=bcmf "$python" -m pytest -o addopts=-q python_tests/test_ops.py -m gpu \
      -k "cuda and norm_relu and bfloat16 and test_any_layout" -p no:cacheprovider
  done
}

bench() {
  lines=60 stage bench 400 "$python" bench/kernels.py --device "$device" "${size[@]}" --rounds "$rounds" --output "$out" \
    ${CAMVID:+--labels "$CAMVID"}
  lines=40 stage inference 150 "$python" bench/inference.py --device "$device" "${frame[@]}" --rounds "$rounds" --output "$out"
  lines=20 stage metrics 40 "$python" bench/metrics.py --device "$device" "${size[@]}" --rounds "$rounds" --output "$out" \
    ${CAMVID:+--labels "$CAMVID"}
  lines=8 stage train_step 60 "$python" bench/train_step.py --device "$device" "${step[@]}" --output "$out" \
    ${CAMVID:+--data "$CAMVID"}
}

profile() {
  lines=40 stage profile 60 "$python" bench/profile_kernels.py --device "$device" "${size[@]}" ${CAMVID:+--labels "$CAMVID"}
}

[ $# -eq 0 ] && set -- build tests bench profile sanitize
for name in "$@"; do
  case $name in
    build | tests | sanitize | bench | profile) "$name" ;;
    *) echo "no such stage: $name" && exit 2 ;;
  esac
done
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[*]}"
  exit 1
fi
echo "all stages passed"

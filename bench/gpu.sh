#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with torch and nvcc and without a network, in calls of at most nine minutes:
#   bench/gpu.sh [--dry-run] OUT [STAGE…]           (all stages in their order when none is named; --help names them)
# It leaves two files in OUT: gpu-TIME.txt, a summary that can be read alone, and gpu-TIME.tar.gz, with every log, table
# and JSON. Both are written anew after each stage, so that a call that is interrupted or killed leaves what it has.
# Stages come in the order of their worth. The last line names those that did not run to their end: the next call's.
# Exit status: 0 all passed; 1 a stage failed; 2 wrong arguments; 3 none failed, but some did not run to their end.
# PYTHON: the interpreter. CAMVID=folder: its labels for the benches. WHEELS=folder: pure Python packages that the
# machine lacks. Where CUDA's kernels are not installed, they are built first; without them no stage runs.
# --dry-run: on the CPU, on tiny sizes, without what needs a GPU. It tries this script, and shows nothing of CUDA.
set -uo pipefail
set -m # A stage is a process group of its own: an interrupt ends all of it, and not this script before it has packed.

stages=(build cuda-tests profile training segmentation_loss cross_entropy inference train_step triton-tests memcheck
  racecheck initcheck lmfm srm sizes table4 blocks metrics rmi)
usage="usage: bench/gpu.sh [--dry-run] OUT [STAGE…], a STAGE being one of: ${stages[*]}"
[ "${1:-}" != --help ] || { echo "$usage" && exit 0; }
dry=0
[ "${1:-}" != --dry-run ] || { dry=1 && shift; }
case ${1:-} in "" | -*) echo "$usage" >&2 && exit 2 ;; esac
out=$(realpath -m "$1")
shift
for name in "$@"; do
  [[ " ${stages[*]} " == *" $name "* ]] || { printf 'There is no stage %s. %s\n' "$name" "$usage" >&2 && exit 2; }
done
[ $# -gt 0 ] || set -- "${stages[@]}"
for folder in CAMVID WHEELS; do # they are relative to where the caller is
  [ -z "${!folder:-}" ] || export "$folder=$(realpath "${!folder}")"
done
cd "$(dirname "$0")/.." || exit 2
mkdir -p "$out" || exit 2

deadline=$((SECONDS + 530))
least=10 # seconds that are worth a start
export CI=1 PIP_NO_INDEX=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 # CI: all tests, not the default run's
python=${PYTHON:-python3}
work=$(mktemp -d)
archive=gpu-$(date -u +%Y%m%d-%H%M%S)
asked=("$@") done=() current="" interrupted=0 no_gpu=""
declare -A result=() took=()

# --- What is left behind

state() { # of a stage, in words
  echo "${result[$1]:-$([ $interrupted = 1 ] && echo "not run: the call was interrupted" || echo "not run yet")}"
}

unfinished() { # the stages that neither passed nor failed
  for name in "${asked[@]}"; do
    case $(state "$name") in passed* | FAILED* | "left out"*) ;; *) printf ' %s' "$name" ;; esac
  done
}

verdict() {
  local failed=() left
  [ -z "$no_gpu" ] || { echo "FAILED: $no_gpu" && return; }
  for name in "${done[@]}"; do [[ ${result[$name]} != FAILED* ]] || failed+=("$name"); done
  left=$(unfinished)
  [ ${#failed[@]} -eq 0 ] || echo "FAILED: ${failed[*]}"
  [ -z "$left" ] || echo "Did not run to the end; the next call: bench/gpu.sh OUT$left"
  [ ${#failed[@]} -gt 0 ] || [ -n "$left" ] || if [ $dry = 1 ]; then
    echo "The dry run went through on the CPU. NOTHING WAS SHOWN OF CUDA."
  else
    echo "all stages passed"
  fi
}

summarise() {
  local name
  printf 'bench/gpu.sh at %s, %s UTC\n%s\n\n' "$commit" "$(date -u '+%F %T')" "$machine"
  for name in "${done[@]}"; do printf '%-18s %4d s  %s\n' "$name" "${took[$name]}" "${result[$name]}"; done
  for name in "${asked[@]}"; do [ -n "${result[$name]:-}" ] || printf '%-18s %6s  %s\n' "$name" "" "$(state "$name")"; done
  printf '\n%s\n' "$(verdict)"
  for name in "${done[@]}"; do
    [ -s "$work/$name.log" ] || continue
    printf '\n=== %s: %s\n' "$name" "${result[$name]}"
    tail -n "$(lines_of "$name")" "$work/$name.log" | cut -c -300
  done
}

lines_of() { # of a log that the summary repeats: tables whole, of the rest the end
  case $1 in cuda-tests | triton-tests) echo 40 ;; build | triton-cache) echo 15 ;; *check) echo 25 ;; *) echo 150 ;; esac
}

pack() {
  summarise >"$work/summary.txt"
  cp "$work/summary.txt" "$out/$archive.txt"
  tar -czf "$work.tar.gz" -C "$work" . && mv "$work.tar.gz" "$out/$archive.tar.gz"
}

finish() {
  trap '' INT TERM HUP
  local pid
  for pid in $(jobs -p); do kill -INT -- "-$pid"; done 2>/dev/null
  for _ in 1 2 3 4 5 6 7 8 9 10; do [ -z "$(jobs -pr)" ] || sleep 0.5; done
  for pid in $(jobs -p); do kill -KILL -- "-$pid"; done 2>/dev/null
  [ -z "$current" ] || record "$current" "CUT OFF: the call was interrupted"
  pack
  verdict
  printf '%s\n' "$out/$archive.txt" "$out/$archive.tar.gz"
  rm -rf "$work" "$work.tar.gz"
  case $(verdict) in FAILED*) exit 1 ;; Did*) exit 3 ;; *) exit 0 ;; esac
}

record() { # name, result; seconds from `began`
  result[$1]=$2 took[$1]=$((SECONDS - began)) current=""
  done+=("$1")
  printf '=== %s: %s, %d s\n' "$1" "$2" "${took[$1]}"
  pack
}

# --- Stages

# Starts a command as a process group of its own, with its log in `work`; the caller waits for it.
start() { # name, seconds at most, command…
  timeout -s INT -k 10 "$2" "${@:3}" >"$work/$1.log" 2>&1 </dev/null &
}

run() { # name, seconds at most, command…
  local name=$1 limit=$2 left=$((deadline - SECONDS)) rc log=$work/$1.log
  began=$SECONDS
  [ "$left" -ge $least ] || { record "$name" "not run: no time was left" && return; }
  [ "$limit" -le "$left" ] || limit=$left
  current=$name
  start "$name" "$limit" "${@:3}"
  wait $!
  rc=$?
  if [ $rc = 124 ] || [ $rc = 137 ]; then
    if grep -Eq '^(FAILED|ERROR) |[0-9]+ failed' "$log"; then
      record "$name" "FAILED, and cut off after $limit s"
    else
      record "$name" "CUT OFF after $limit s; what it has written is in the archive"
    fi
  elif [ $rc != 0 ]; then
    record "$name" "FAILED (exit status $rc)"
  elif [ $dry = 0 ] && grep -Eq '^(cuda|triton): not measured' "$log"; then
    record "$name" "FAILED: $(grep -E '^(cuda|triton): not measured' "$log" | head -n 1)"
  elif [[ $name == *-tests || $name == *check ]] && ! grep -Eq '[0-9]+ passed' "$log"; then
    record "$name" "FAILED: no test ran"
  else
    record "$name" "passed"
  fi
}

# Tells why the kernels cannot run, from the source tree, as the tests import it, and from elsewhere, as the benches do.
why_no_kernels() {
  local folder
  for folder in . bench; do
    (cd "$folder" && "$python" -W ignore -c '
import sys
from bcmf_ext import dispatch
reasons = {impl: dispatch.why_not(impl, "cuda") for impl in ("cuda", "triton")}
sys.exit("; ".join(f"{impl}: {reason}" for impl, reason in reasons.items() if reason) or None)') 2>&1 | tail -n 1
    [ "${PIPESTATUS[0]}" = 0 ] || return
  done
}

build() { # Triton's kernels for the benches are compiled beside it, by the cores that nvcc leaves
  local cache="" cuda=()
  if [ $dry = 0 ]; then
    cuda=(BCMF_CUDA=1)
    start triton-cache 200 env PYTHONPATH=. "$python" bench/fill_triton_cache.py --device cuda "${labels[@]}"
    cache=$!
  fi
  run build 240 env "${cuda[@]}" bash -c '
    [ -z "${WHEELS:-}" ] || "$0" -m pip install -q --no-deps "$WHEELS"/*.whl || exit
    "$0" -m pip install -v --no-build-isolation --no-deps . && cd bench && "$0" -m bcmf_ext.info' "$python"
  [ $dry = 0 ] || return
  no_kernels=$(why_no_kernels)
  if [ -n "$no_kernels" ] && [[ ${result[build]} != FAILED* ]]; then # it was cut off, or left CUDA out
    result[build]="FAILED: there are no kernels after it ($no_kernels)"
    echo "=== build: ${result[build]}"
  fi
  wait "$cache"
  local rc=$?
  record triton-cache "$([ $rc = 0 ] && echo passed || echo "not filled (exit status $rc): benches compile the rest")"
}

tests() { # name, seconds at most, pytest's arguments…: side by side where pytest-xdist is there
  local workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  run "$1" "$2" "$python" -m pytest -o addopts=-q "${workers[@]}" -m gpu --continue-on-collection-errors --durations=5 \
    --tb=short --maxfail=25 "${@:3}"
}

# The sanitizers run the CUDA kernels on small shapes, each tensor in memory of its own, so that it has bounds. memcheck
# and racecheck look at our kernels alone. initcheck looks at all: what a kernel that it does not look at has written,
# such as torch's own that make the tensors, counts as never written, and reading it would be an error.
sanitize() { # tool
  local ours=(--kernel-name kns=bcmf)
  [ "$1" != initcheck ] || ours=()
  command -v compute-sanitizer >/dev/null || { began=$SECONDS && record "$1" "FAILED: compute-sanitizer is not on the PATH" && return; }
  run "$1" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    --target-processes all "${ours[@]}" "$python" -m pytest -o addopts=-q python_tests/test_ops.py \
    python_tests/test_loss_op.py -m gpu -p no:cacheprovider -k "cuda and (bfloat16 and (test_any_layout or \
    test_any_size) or not norm_relu and (test_ohem_at_ties or test_out_of_range_labels))"
}

bench() { # name, seconds at most, script, flags…
  run "$1" "$2" "$python" "bench/$3.py" --device "$device" --output "$work" "${@:4}"
}

stage() {
  if [ $dry = 1 ]; then
    case $1 in *-tests | *check) began=$SECONDS && record "$1" "left out: it needs a GPU" && return ;; esac
  elif [ "$1" != build ] && [ -n "$no_kernels" ]; then
    began=$SECONDS
    record "$1" "FAILED: not run, since there are no CUDA kernels ($no_kernels)"
    return
  fi
  case $1 in
    build) build ;;
    cuda-tests) tests "$1" 200 python_tests -k "not triton" ;;
    triton-tests) # Triton compiles a kernel for every new kind of argument: ops that between them have all kernels
      tests "$1" 200 python_tests/test_metrics.py python_tests/test_ops.py python_tests/test_loss_op.py \
        python_tests/test_lmfm.py -k "triton and (argmax or segmentation_loss or min_kept or norm_relu or lmfm)" ;;
    memcheck | racecheck | initcheck) sanitize "$1" ;;
    profile) # kernel by kernel
      run profile 60 "$python" bench/profile_kernels.py --device "$device" --op training segmentation_loss "${size[@]}" \
        "${labels[@]}" ;;
    inference) bench inference 90 inference --no-compile --rounds "$rounds" "${frame[@]}" ;;
    train_step) bench train_step 60 train_step "${step[@]}" ${CAMVID:+--data "$CAMVID"} ;;
    metrics) bench metrics 40 metrics --rounds "$rounds" "${size[@]}" "${labels[@]}" ;;
    segmentation_loss) bench "$1" 150 kernels --op "$1" --rounds "$rounds" "${size[@]}" "${labels[@]}" ;;
    *) bench "$1" 90 kernels --op "$1" --rounds "$rounds" "${size[@]}" "${labels[@]}" ;;
  esac
}

# --- The machine

began=$SECONDS machine="" commit=$(git describe --always --dirty 2>/dev/null || echo "an unknown commit")
trap finish EXIT
trap 'interrupted=1; exit' INT TERM HUP
labels=(${CAMVID:+--labels "$CAMVID"})
if [ $dry = 1 ]; then
  machine="DRY RUN on the CPU: no GPU was used, and nothing here says anything of CUDA."
  device=cpu rounds=3 size=(--size 2 19 24 32) step=(--crop 64 64 --batch 2 --rounds 2) frame=(--size 64 96)
else
  device=cuda rounds=21 size=() step=(--crop 1024 1024) frame=()
  if ! said=$("$python" -c 'import torch; torch.ones(9, device="cuda").sum().item()' 2>&1); then
    no_gpu="no GPU answers ($(tail -n 1 <<<"$said")), so that nothing was run; --dry-run tries the script without one"
    machine="No GPU"
    exit
  fi
  machine=$("$python" -W ignore -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__, sep=", ")')
  said=$(timeout 20 nvidia-smi --query-gpu=driver_version,clocks.max.sm,memory.total --format=csv,noheader 2>/dev/null) || said=""
  machine+="; driver, clock and memory: ${said:-nvidia-smi does not tell}"
fi

no_kernels=""
if [ $dry = 0 ] && [ "${asked[0]}" != build ] && [ -n "$(why_no_kernels)" ]; then
  asked=(build "${asked[@]}")
fi
pack
for name in "${asked[@]}"; do
  stage "$name"
done

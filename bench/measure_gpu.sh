#!/usr/bin/env bash
# Run all GPU measurements within 9 minutes on 16 cores.
#
#   [BEFORE=CHECKOUT] bench/measure_gpu.sh OUT_FOLDER [--small]
#
# Order: a start that times convolutions while the GPU is quiet; the GPU tests, while the steps timed later are compiled
# into torch's cache; the captured step at K = 8 and other K; a profile by kind of kernel and by named range
# (OUT_FOLDER/profile); the baseline step and its variants; plain PyTorch and USB; kernels, convolutions and views; starts
# with all of cuDNN's plans and with ten; DALI's operators. The report at the end compares predictions with measurements.
#
# Records go to OUT_FOLDER/NAME.jsonl and output to OUT_FOLDER/NAME.log. A part that fails or times out does not stop the
# others and is listed at the end.
#
# --small measures at minimal sizes, on a CPU too, to test this script.
# BEFORE is a checkout of an earlier version (from git worktree or git archive) to time alongside the present one.
# PYTHON is the interpreter (default: python3). REMIXMATCH_COMMIT names the commit if the files have no git history.
set -uo pipefail
out=${1:?usage: bench/measure_gpu.sh OUT_FOLDER [--small]}
small=${2:-}
[[ -z $small || $small == --small ]] || { echo "measure_gpu.sh: unknown option '$small'; the only option is --small" >&2; exit 2; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
end=$((SECONDS + 540))
failed=()

# part NAME SECONDS COMMAND...: run a command with a time limit, shortened to what is left of the 9 minutes.
part() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  ((limit < end - SECONDS)) || limit=$((end - SECONDS))
  if ((limit < 1)); then
    echo "== $name: no time left"
    failed+=("$name (no time left)")
    return
  fi
  echo "== $name (at most $limit s): $*"
  timeout --kill-after=3 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "== $name: $((SECONDS - begin)) s"
  ((status == 0)) && return
  ((status == 124 || status == 137)) && failed+=("$name (timed out)") || failed+=("$name (exit code $status)")
}

# bench NAME SECONDS FLAGS...: run one bench with a time limit.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m bench "$name" --out "$out/$name.jsonl" "$@"
}

# profile SECONDS FLAGS...: profile the paper's step by named range.
profile() {
  local limit=$1
  shift
  rm -f "$out/profile/profile.json"  # An existing file would not be overwritten.
  part profile "$limit" "$python" -m engine.studies.profile cifar10-250 --dataset noise-32 --split balanced --out "$out/profile" "$@"
}

views=(fused synthetic)
dali=
# Whole runs mostly start processes; make test-gpu runs them.
tests=(tests --ignore=tests/engine/training/test_gpu_runs.py)
if ! "$python" -c "import nvidia.dali" 2>/dev/null; then
  echo "DALI is not installed; skipping its views and their tests"
  tests+=(--ignore=tests/pipelines/{test_views,test_transformations,test_ctaugment_code,test_fused,test_dali_graph}.py)
  tests+=(--ignore=tests/pipelines/data/test_decode.py)
else
  dali=yes
fi
parallel=()
! "$python" -c "import xdist" 2>/dev/null || parallel=(-n 8 --dist worksteal)
before=()
[[ -z ${BEFORE:-} ]] || before=(--before "$BEFORE")
if [[ $small ]]; then
  bench variants 90 --variants "one stream" --k 1 --batch 2 --repeats 1 --steps 1 --profile 1 ${before[@]+"${before[@]}"}
  profile 60 --k 1 --batch 2 --steps 1 --warm-up 1
  bench convolutions 60 --rows 1 --repeats 1
  bench kernels 60 --repeats 1 --providers eager --sizes step
  bench pipelines 60 --repeats 1 --rows 16 --batches 1 --threads 1
  bench throughput 60 --repeats 1 --k 1 --modes eager --views "${views[@]}" --steps 2
  bench scaling 60 --ranks 1 --rounds 1 --repeats 1 --steps 1 --batch 2 --views synthetic
  bench baseline 60 --repeats 1 --k 1 --steps 1 --batch 2 --workers 1
else
  warm_up=$(mktemp -d)
  trap 'rm -rf "$warm_up"' EXIT
  # The first start on a quiet GPU: times of convolutions are cached, and everything after this relies on them. Eager steps
  # of all K need no compilation.
  part quiet-start 150 "$python" -m bench throughput --k 8 1 16 2 4 --modes eager --views synthetic --repeats 1 --steps 1 \
    --out "$warm_up/quiet.jsonl"
  # Compile each K in its own process, at the same time.
  compiled=()
  for k in 8 1 16 2 4; do
    timeout --kill-after=3 150 "$python" -m bench throughput --k "$k" --modes graph --views synthetic --repeats 1 --steps 1 \
      --out "$warm_up/records.jsonl" > "$warm_up/$k.log" 2>&1 &
    compiled+=($!)
  done
  part tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors \
    ${parallel[@]+"${parallel[@]}"} "${tests[@]}"
  wait "${compiled[@]}"
  bench throughput 90 --k 8 1 16 2 4 --modes graph --views "${views[@]}"
  profile 50 --k 8
  bench variants 150 --k 8 ${before[@]+"${before[@]}"} --variants "Inductor's defaults" "read threshold alone" \
    "one stream" "8 input channels" "cuDNN by rule" "ten cuDNN plans" "cuDNN convolutions" "Triton convolutions"
  bench baseline 60 --k 8
  bench kernels 60
  bench convolutions 60
  part convolutions-heuristic 25 "$python" -m bench convolutions --out "$out/convolutions.jsonl" --heuristic
  bench pipelines 50 --backends torchvision dali-cpu-1 dali-cpu fused kornia triton-augment
  # The cost of --deterministic, relative to the same case above.
  part deterministic 30 "$python" -m bench throughput --out "$out/throughput.jsonl" --deterministic \
    --k 8 --modes graph --views "${views[0]}"
  # What timing all of cuDNN's plans adds to the start of a run.
  for plans in 0 10; do
    part "start-$plans" 60 "$python" -m bench start --out "$out/start.jsonl" --preset cifar10-250 --repeats 2 \
      --flags="--dataset noise-32 --split balanced --cudnn-plans $plans"
  done
  if [[ $dali ]]; then
    # The graph of DALI's operators: alone at three sizes, and in the step, where its cost is what the step waits for it.
    part dali-step 60 "$python" -m bench throughput --out "$out/throughput.jsonl" --k 8 1 16 --modes graph --views fused dali-graph
    for side in 96 224; do
      part "pipelines-$side" 30 "$python" -m bench pipelines --out "$out/pipelines.jsonl" --side "$side" --batches 2 --repeats 3 \
        --rows 256 --backends dali-gpu auto-aug-gpu fused
    done
  fi
fi
end=$((SECONDS + 25))  # The report always runs.
part report 25 "$python" -m bench report --results "$out" --charts "$out/charts"
((${#failed[@]} == 0)) && { echo "all parts succeeded; records in $out"; exit 0; }
(IFS=';'; echo "failed: ${failed[*]}")
exit 1

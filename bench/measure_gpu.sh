#!/usr/bin/env bash
# Measures everything on a machine with a GPU, within 9 minutes on 16 cores. First the tests for a GPU, and beside them,
# since they time nothing, steps are compiled that are timed later: from torch's cache they begin in seconds. Then the
# largest question first: how long the captured step takes at K = 8 and at other K; where its time goes, by kind of kernel
# and by named range (OUT_FOLDER/profile); the step as it was, and with each decision taken otherwise; the plain baseline;
# kernels, convolutions and views. It ends with what was predicted and by how much that was wrong.
#
#   [BEFORE=CHECKOUT] bench/measure_gpu.sh OUT_FOLDER [--small]
#
# BEFORE is a checkout of an earlier version whose step takes turns with the present one, as git worktree or git archive
# makes it. Rows go to OUT_FOLDER/NAME.jsonl, what was printed to OUT_FOLDER/NAME.log. A part that fails or takes too long is
# named at the end, and the others go on. --small measures next to nothing, on a CPU too: it tries out this script.
# PYTHON names the interpreter (python3), REMIXMATCH_COMMIT the commit where the files came without their history.
set -uo pipefail
out=${1:?usage: bench/measure_gpu.sh OUT_FOLDER [--small]}
small=${2:-}
[[ -z $small || $small == --small ]] || { echo "measure_gpu.sh: unknown option '$small'; there is --small" >&2; exit 2; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
end=$((SECONDS + 540))
failed=()

# part NAME SECONDS COMMAND...: runs a command for at most so long, and no longer than the 9 minutes leave
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
  ((status == 124 || status == 137)) && failed+=("$name (out of time)") || failed+=("$name (exit code $status)")
}

# bench NAME SECONDS FLAGS...: one bench, its rows to its file
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" -m bench "$name" --out "$out/$name.jsonl" "$@"
}

# profile SECONDS FLAGS...: the paper's step by named range, its trace and its table
profile() {
  local limit=$1
  shift
  rm -f "$out/profile/profile.json"  # of an earlier time, which would not be written over
  part profile "$limit" "$python" -m engine.studies.profile cifar10-250 --dataset noise-32 --split balanced --out "$out/profile" "$@"
}

views=(fused synthetic)
# whole runs, most of whose time goes into starting processes, are left to make test-gpu
tests=(tests --ignore=tests/engine/training/test_gpu_runs.py)
if ! "$python" -c "import nvidia.dali" 2>/dev/null; then
  echo "DALI is not here: going on without it, and without the tests of its views"
  tests+=(--ignore=tests/pipelines/test_{views,transformations,ctaugment_code,fused,decode}.py)
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
  # a process each, at the same time
  others=$(mktemp -d)
  trap 'rm -rf "$others"' EXIT
  compiled=()
  for k in 8 1 16 2 4; do
    timeout --kill-after=3 150 "$python" -m bench throughput --k "$k" --modes graph --views synthetic --repeats 1 --steps 1 \
      --out "$others/rows.jsonl" > "$others/$k.log" 2>&1 &
    compiled+=($!)
  done
  part tests 150 "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors \
    ${parallel[@]+"${parallel[@]}"} "${tests[@]}"
  wait "${compiled[@]}"
  bench throughput 90 --k 8 1 16 2 4 --modes graph --views "${views[@]}"
  profile 50 --k 8
  bench variants 150 --k 8 ${before[@]+"${before[@]}"} --variants "Inductor's defaults" "read threshold alone" \
    "combined kernels alone" "one stream" "8 input channels" "combined kernels, blocks of their own" "cuDNN by rule"
  bench baseline 60 --k 8
  bench kernels 60
  bench convolutions 35
  bench pipelines 35
  # beside the row of the same case above: what --deterministic costs
  part deterministic 30 "$python" -m bench throughput --out "$out/throughput.jsonl" --deterministic \
    --k 8 --modes graph --views "${views[0]}"
fi
end=$((SECONDS + 25))  # whatever the others have taken
part report 25 "$python" -m bench report --results "$out" --charts "$out/charts"
((${#failed[@]} == 0)) && { echo "all parts succeeded; rows in $out"; exit 0; }
(IFS=';'; echo "failed: ${failed[*]}")
exit 1

#!/usr/bin/env bash
# Measures everything on a machine with a GPU, within 8 minutes: GPU tests, then every bench but the digits.
#
#   bench/measure_gpu.sh OUT_FOLDER [--small]
#
# Rows go to OUT_FOLDER/NAME.jsonl, what was printed to OUT_FOLDER/NAME.log. A part that fails or takes too long is
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
end=$((SECONDS + 480))
failed=()

# part NAME SECONDS COMMAND...: runs a command for at most so long, and no longer than the 8 minutes leave
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

views=(fused synthetic)
# whole runs, most of whose time goes into starting processes, are left to make test-gpu
tests=(tests --ignore=tests/engine/test_gpu_runs.py)
if ! "$python" -c "import nvidia.dali" 2>/dev/null; then
  echo "DALI is not here: going on without it, and without the tests of its views"
  tests+=(--ignore=tests/pipelines/test_{views,transformations,fused}.py)
fi
if [[ $small ]]; then
  bench kernels 60 --repeats 1 --providers eager --sizes step
  bench pipelines 60 --repeats 1 --rows 16 --batches 1 --threads 1
  bench throughput 60 --repeats 1 --k 1 --modes eager --views "${views[@]}" --steps 2
  bench scaling 60 --ranks 1 --rounds 1 --repeats 1 --steps 1 --batch 2 --views synthetic
  bench baseline 60 --repeats 1 --k 1 --steps 1 --batch 2 --workers 1
else
  part tests 70 "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors "${tests[@]}"
  bench kernels 50
  bench pipelines 50
  # K = 8 first, should time run out
  bench throughput 150 --k 8 1 2 4 16 --modes eager compile graph --views "${views[@]}"
  # beside the row of the same case above: what --deterministic costs
  part deterministic 30 "$python" -m bench throughput --out "$out/throughput.jsonl" --deterministic \
    --k 8 --modes graph --views "${views[0]}"
  # last, when compiled code of the engine's step is in its cache
  bench scaling 40 --rounds 1
  bench baseline 65 --k 8
fi
part report 25 "$python" -m bench report --results "$out" --charts "$out/charts"
((${#failed[@]} == 0)) && { echo "all parts succeeded; rows in $out"; exit 0; }
(IFS=';'; echo "failed: ${failed[*]}")
exit 1

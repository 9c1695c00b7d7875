#!/usr/bin/env bash
# Checks and times everything on one GPU, within ten minutes.
#
#   experiments/benchmarks/gpu.sh           results go to runs/gpu (or OUT=...)
#   TINY=1 experiments/benchmarks/gpu.sh    sizes for a CPU: does this script work?
#   ONLY='decode nf4' experiments/benchmarks/gpu.sh    these parts, where time is short
#
# Needs a Python (PYTHON=...) with what `pip install -e '.[gpu,test]'` installs,
# and, to compare with, torch, peft and bitsandbytes that see the GPU (the extra
# `parity`); without them ours is timed alone. Nothing is fetched: weights are
# random. About 65 GB of the GPU's memory, and 20 GB of the host's.
#
# First come nvidia-smi, JAX's devices and versions; without a GPU it ends there.
# Then, each with a limit of its own: a training step over four bits, over 16 and
# with products kept; decoding; NF4 alone; golden values of bitsandbytes and PEFT
# on the GPU (codes, logits, gradients, QDoRA's first twenty losses); memory beside
# the plan; tables and plots. A part that fails or takes too long does not stop the
# others: it is named at the end, and the exit code is 1.
set -u
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python}
out=${OUT:-runs/gpu}
tiny=${TINY:-} only=" ${ONLY:-} "
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# JAX and torch share the GPU; products of float32 are float32 in the checks.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
here=experiments/benchmarks
budget=${BUDGET:-575} # Seconds for all parts but the report.
failed=()
mkdir -p "$out" || exit 2

if [[ $tiny ]]; then
  export JAX_PLATFORMS=cpu
  budget=3600 stretch=6
else
  stretch=1
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv || {
    echo 'gpu.sh: no GPU here (nvidia-smi failed); TINY=1 tries the script.' >&2
    exit 2
  }
  "$python" -c '
import jax
assert jax.default_backend() == "gpu", f"JAX sees {jax.devices()}: no GPU"
' || {
    echo "gpu.sh: JAX sees no GPU; pip install 'qdora_jax[gpu]'" >&2
    exit 2
  }
fi
(cd $here && "$python" -c '
import result
print(result.hardware(), result.versions(), result.commit(), sep="\n")
') || exit 2

parts=0
# part NAME LIMIT COMMAND...: runs it for at most LIMIT seconds.
part() {
  local name=$1 limit=$(($2 * stretch)) left=$((budget - SECONDS)) code
  shift 2
  [[ -z ${ONLY:-} || " $ONLY report " == *" $name "* ]] || return 0
  only=${only/ $name / }
  parts=$((parts + 1))
  ((limit <= left)) || limit=$left
  if ((limit < 5)); then
    failed+=("$name (no time was left)")
    return
  fi
  echo "== $name, at most $limit s: $*"
  timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) ;;
    124 | 137) failed+=("$name (stopped, after at most $limit s)") ;;
    *) failed+=("$name (exit code $code)") ;;
  esac
}

# bench NAME LIMIT FLAGS...: the script of that name, up to a dash.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" "$python" "$here/${name%%-*}.py" --out "$out" "$@"
}

kernels='dequantized_weight or at_once or not_finite or in_slices'
golden='reference or edges or 256x128/64 or logits or twenty_steps or gradients'
# Without conftest.py, which makes tests run on CPU devices.
check() {
  JAX_DEFAULT_MATMUL_PRECISION=highest part check 110 "$python" -m pytest \
    --noconftest -o addopts= -o filterwarnings=default -p no:cacheprovider \
    --import-mode=importlib -q -k "$1" \
    tests/test_few.py tests/test_nf4_golden.py tests/test_linear_golden.py \
    tests/test_curves_golden.py
}

if [[ $tiny ]]; then
  bench step 60 --model tiny --sequence 32 --rounds 2 --methods QDoRA --together
  bench decode 60 --model tiny --tokens 3 --batches 1 --rounds 2 \
    --methods QDoRA
  bench nf4 20 --shapes 64x64 --rows 1,16 --rounds 2 --turn 0
  check 'reference or edges'
  bench large 60 tiny 64
else
  step=(--model llama-3-8b --sequence 2048 --batch 4 --dtype bfloat16
    --checkpointing --together --rounds 4)
  packed=(--methods QLoRA,QDoRA)
  bench step 120 "${step[@]}" "${packed[@]}" --remat block --beside QDoRA
  bench step-dense 80 "${step[@]}" --methods LoRA,DoRA --remat block \
    --beside '' --name step-dense
  bench step-dots 70 "${step[@]}" "${packed[@]}" --remat dots \
    --beside '' --name step-dots
  bench decode 110 --model llama-3-8b "${packed[@]}" --batches 1 --tokens 33 \
    --rounds 3
  bench nf4 50 --shapes 4096x14336 --rounds 3
  check "$kernels or $golden"
  bench large 50 llama-3-8b 2048
fi

budget=$((SECONDS + 25)) # Only drawing is left.
part report 25 "$python" $here/report.py "$out" --tables "$out/report.md"
[[ -z ${only// /} ]] || failed+=("ONLY: no part is called$only")
echo "== $SECONDS s, results in $out"
if ((${#failed[@]})); then
  echo "FAILED: ${#failed[@]} of $parts parts:" >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi

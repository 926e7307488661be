#!/usr/bin/env bash
# Everything that needs a GPU, in one command: builds, runs the tests and gradcheck on CUDA, compute-sanitizer on a small
# set, and the benchmark beside the peers.
#
#   bash benchmarks/gpu_check.sh OUT
#
# Writes OUT/<step>.log, OUT/peers.json with its table and chart, and OUT/summary.json: step, seconds, status (ok, failed,
# timeout, partial, refused, skipped) and a note. `refused` is what the machine does not allow or lacks, `partial` a sanitizer
# that found nothing in the calls it had time for; neither fails anything.
# Exits with 1 if a step failed or ran out of its time. Nothing is downloaded.
#
# Environment:
#   PYTHON               the interpreter that has a CUDA build of torch (python3)
#   SPARSE_ATTN_BUILD    a folder with a ready libsparse_attn.so, built for the same torch: nothing is compiled. A _C*.so
#                        for the same Python may lie beside it.
#   SPARSE_ATTN_WHEELS   a folder of wheels to install first, into a folder of their own (pip --no-index)
#   SPARSE_ATTN_ARCH     what to compile for, as in CMAKE_CUDA_ARCHITECTURES (the card's own)
#   SPARSE_ATTN_COMMIT   the commit, where git does not know it
#   GPU_CHECK_SECONDS    for everything together (530); the benchmark gets what is left
#   GPU_CHECK_STEPS      which of: machine wheels build tests gradcheck sm90 sanitizer peers (all)
set -uo pipefail

if [ $# -ne 1 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  [ $# -eq 1 ] && exit 0
  exit 2
fi

mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python3}
total=${GPU_CHECK_SECONDS:-530}
steps=${GPU_CHECK_STEPS:-machine wheels build tests gradcheck sm90 sanitizer peers}
table=$out/.steps
: >"$table"
PATH=$PATH:/usr/local/cuda/bin # nvcc and compute-sanitizer, where no other is found first
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

left() { echo $((total - SECONDS)); }
wanted() { [[ " $steps " == *" $1 "* ]]; }
record() { # step seconds status note
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$table"
  printf '%-20s %4s s  %-8s %s\n' "$@"
}

# step NAME LIMIT COMMAND...: runs it with its own log and time limit, and records how it ended.
step() {
  local name=$1 limit=$2 began=$SECONDS rc
  shift 2
  if [ "$limit" -gt "$(left)" ]; then limit=$(left); fi
  if [ "$limit" -lt 5 ]; then
    record "$name" 0 skipped "no time left"
    return 1
  fi
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  rc=$?
  case $rc in
    0) record "$name" $((SECONDS - began)) ok "" ;;
    124 | 137) record "$name" $((SECONDS - began)) timeout "limit $limit s" ;;
    *) record "$name" $((SECONDS - began)) failed "$(last_words "$out/$name.log" "exit status $rc")" ;;
  esac
  return $rc
}

last_words() { # LOG OTHERWISE
  local words
  words=$(grep -v '^[[:space:]]*$' "$1" | tail -n 1 | tr -d '\t"\\' | cut -c1-160)
  echo "${words:-$2}"
}

machine() {
  nvidia-smi
  "$python" - <<'PYTHON'
import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA device")
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
PYTHON
}

wheels() {
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$SPARSE_ATTN_WHEELS"/*.whl
}

card() { # 9.0 is 90a, for the instructions that only this architecture has
  "$python" -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a >= 9))'
}

build() {
  if [ -n "${SPARSE_ATTN_BUILD:-}" ]; then
    echo "uses $SPARSE_ATTN_LIBRARY"
    cp -n "$SPARSE_ATTN_BUILD"/_C*.so sparse_attn/ 2>/dev/null
  else
    local arch=${SPARSE_ATTN_ARCH:-$(card)}
    echo "compiles for $arch"
    MAX_JOBS=${MAX_JOBS:-$(nproc)} SPARSE_ATTN_CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=$arch ${SPARSE_ATTN_CMAKE_ARGS:-}" \
      "$python" setup.py build_ext --inplace || return
  fi
  "$python" - <<'PYTHON'
import torch, sparse_attn
if not torch.ops.sparse_attn._cuda_archs():
    raise SystemExit("this build of sparse_attn has no CUDA kernels")
PYTHON
}

has() { "$python" -c "import $1" 2>/dev/null; }

run_pytest() { # OPTIONS...
  local name missing=
  for name in pytest hypothesis numpy; do has "$name" || missing+=" $name"; done
  if [ -n "$missing" ]; then
    echo "missing packages:$missing (SPARSE_ATTN_WHEELS may name a folder of wheels)"
    return 3
  fi
  if has xdist; then set -- -n auto "$@"; else echo "no pytest-xdist: one process"; fi
  # Not built for this Python: the ops do without it.
  has sparse_attn._C || set -- --deselect 'tests/test_doctests.py::test_module[sparse_attn.info]' "$@"
  # Many processes share the cores.
  OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider --device cuda --maxfail=300 --tb=short -ra "$@"
}

# The kernels for sm_90a, which are not the default: tests of what they serve.
sm90() {
  local tests=(tests/test_attention.py tests/test_cuda.py tests/test_modifiers.py tests/test_random_patterns.py)
  if ! "$python" -c 'import torch; raise SystemExit(torch.cuda.get_device_capability() != (9, 0))'; then
    echo "not a device of sm_90: they do not run here"
    return
  fi
  SPARSE_ATTN_SM90=1 run_pytest "${tests[@]}" -k 'not float64' && SPARSE_ATTN_SM90=1 "$python" benchmarks/gpu_small.py
}

# Only our kernels are looked at, but by initcheck: what torch's write is initialized, too.
sanitize() {
  local options=(--tool "$1" --error-exitcode 9) filter
  # torch asks the driver for what may fail, and handles it.
  [ "$1" = memcheck ] && options+=(--report-api-errors no)
  if [ "$1" != initcheck ]; then
    for filter in --kernel-regex --kernel-name; do
      if compute-sanitizer --help 2>&1 | grep -q -e "$filter"; then
        options+=("$filter" kns=sparse_attn)
        break
      fi
    done
  fi
  # Without torch's caching every tensor is an allocation of its own, whose bounds the tools know.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout --kill-after=5 40 compute-sanitizer "${options[@]}" \
    "$python" benchmarks/gpu_small.py
}

sanitizers() { # all at a time: they wait for the CPU, each for one of its cores
  local tool began=$SECONDS
  if ! command -v compute-sanitizer >/dev/null; then
    record sanitizer 0 refused "compute-sanitizer is not installed"
    return
  fi
  if [ "$(left)" -lt 50 ]; then
    record sanitizer 0 skipped "no time left"
    return
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    (
      sanitize $tool >"$out/$tool.log" 2>&1
      echo $? >"$out/.$tool.rc"
    ) &
  done
  wait
  for tool in memcheck racecheck synccheck initcheck; do
    judge $tool "$(cat "$out/.$tool.rc")" $((SECONDS - began))
    rm -f "$out/.$tool.rc"
  done
}

judge() { # TOOL RC SECONDS: what the tool said counts; without a summary it did not do its work
  local log=$out/$1.log found
  found=$(grep -oE '(ERROR SUMMARY|RACECHECK SUMMARY): .*' "$log" | tail -n 1)
  if [ "$2" -eq 124 ] || [ "$2" -eq 137 ]; then
    local calls
    calls=$(grep -c 'of the tolerance' "$log")
    if grep -qE '^=+ (Invalid|Error|Race|Warning: Race|Barrier|Uninitialized)' "$log"; then
      record "$1" "$3" failed "errors before the limit of 40 s, see the log"
    elif [ "$calls" -gt 0 ]; then
      record "$1" "$3" partial "no errors in the $calls calls within 40 s"
    else
      record "$1" "$3" timeout "no call was finished in 40 s"
    fi
  elif grep -qiE 'device not supported|not supported on this|failed to initialize|unable to initialize' "$log"; then
    record "$1" "$3" refused "$(grep -iE 'not supported|initialize' "$log" | head -n 1 | tr -d '\t"\\' | cut -c1-160)"
  elif [ -z "$found" ]; then
    record "$1" "$3" refused "no summary: $(last_words "$log" "exit status $2")"
  elif [ "$2" -eq 0 ]; then
    record "$1" "$3" ok "$found"
  elif [ "$2" -eq 9 ]; then
    record "$1" "$3" failed "$found"
  else
    record "$1" "$3" failed "$(grep -v '^===' "$log" | last_words /dev/stdin "exit status $2"); $found"
  fi
}

finish() {
  "$python" - "$table" "$out/summary.json" "$SECONDS" <<'PYTHON'
import json, sys
table, path, seconds = sys.argv[1:]
names = ("step", "seconds", "status", "note")
steps = [dict(zip(names, line.rstrip("\n").split("\t"))) for line in open(table)]
for step in steps:
    step["seconds"] = int(step["seconds"])
failed = [step["step"] for step in steps if step["status"] in ("failed", "timeout")]
with open(path, "w") as file:
    json.dump({"seconds": int(seconds), "failed": failed, "steps": steps}, file, indent=1)
    file.write("\n")
sys.exit(bool(failed))
PYTHON
}

site=$(mktemp -d)
trap 'rm -rf "$site" "$table"' EXIT
if [ -n "${SPARSE_ATTN_BUILD:-}" ]; then
  SPARSE_ATTN_LIBRARY=$(cd "$SPARSE_ATTN_BUILD" && pwd)/libsparse_attn.so || exit 2
  export SPARSE_ATTN_LIBRARY
fi
export python site out
export -f machine wheels card build has run_pytest sm90

usable=yes
wanted machine && { step machine 60 bash -c machine || usable=; }
if wanted wheels && [ -n "${SPARSE_ATTN_WHEELS:-}" ]; then
  step wheels 60 bash -c wheels
  export PYTHONPATH=$PYTHONPATH:$site
fi
[ -n "$usable" ] && wanted build && { step build 300 bash -c build || usable=; }
if [ -n "$usable" ]; then
  wanted tests && step tests 150 bash -c 'run_pytest tests --ignore tests/test_gradcheck.py'
  wanted gradcheck && SPARSE_ATTN_FULL=1 step gradcheck 60 bash -c 'run_pytest tests/test_gradcheck.py'
  wanted sm90 && step sm90 90 bash -c sm90
  wanted sanitizer && sanitizers
  if wanted peers && [ "$(left)" -gt 60 ]; then
    budget=$(($(left) - 30)) # to start, and to write what it has
    step peers $((budget + 25)) "$python" benchmarks/gpu_peers.py --budget "$budget" --out "$out/peers.json"
  fi
else
  for name in build tests gradcheck sm90 sanitizer peers; do
    wanted "$name" && ! grep -q "^$name"$'\t' "$table" && record "$name" 0 skipped "an earlier step failed"
  done
fi
finish

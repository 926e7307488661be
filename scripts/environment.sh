# Sourced by examples/quickstart.sh and tests/run.sh: one Python environment and one build serve both.
#
#   prepare GROUP...   makes an environment with torch and the packages of requirements/GROUP.txt, builds sparse_attn
#                      in place, and sets `python`, the interpreter to run
#
# The environment is the active one if it has torch, which then stays as it is; otherwise .venv in this folder.
# Whatever is there already is not installed or built again, so a second call takes seconds.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() { printf '\n== %s (after %d s)\n' "$*" "$SECONDS"; }
fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

python_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python python3.{14,13,12,11,10}; do
    if python_is_new_enough "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "Python 3.10 or newer is needed; set PYTHON to one (python3 here: $(python3 --version 2>&1))"
}

check_tools() {
  local compiler version
  for compiler in "${CXX:-}" c++ g++ clang++; do
    [ -n "$compiler" ] && command -v "$compiler" >/dev/null && break
    compiler=
  done
  [ -n "$compiler" ] || fail "a C++ compiler is needed: GCC 11 or Clang 13, or newer (Debian: apt install g++)"
  command -v cmake >/dev/null || fail "CMake 3.18 or newer is needed (Debian: apt install cmake)"
  version=$(cmake --version | sed -n 's/^cmake version \([0-9]*\.[0-9]*\).*/\1/p')
  [ "${version%.*}" -gt 3 ] || { [ "${version%.*}" -eq 3 ] && [ "${version#*.}" -ge 18 ]; } ||
    fail "CMake 3.18 or newer is needed, this one is $version"
}

has_torch() { "$1" -c 'from importlib.util import find_spec; exit(find_spec("torch") is None)' 2>/dev/null; }

# Sets `python`, and `exact` when the environment is ours, so that its packages are the pinned ones.
choose_environment() {
  local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  exact=
  if [ -n "$active" ] && [ "$active" != "$root/.venv" ] && has_torch "$active/bin/python"; then
    python=$active/bin/python
    python_is_new_enough "$python" || fail "Python 3.10 or newer is needed, $active has $("$python" --version)"
    say "Using the active environment $active"
    return
  fi
  exact=--exact
  python=$root/.venv/bin/python
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    local base
    base=$(find_python)
    say "Making .venv with $("$base" --version)"
    "$base" -m venv --clear "$root/.venv" ||
      fail "could not make a virtual environment with $base (Debian: apt install python3-venv)"
  fi
}

install_missing() {
  local files=("${@/#/$root/requirements/}") missing keep_torch=
  missing=$("$python" "$root/scripts/missing_packages.py" $exact "${files[@]/%/.txt}")
  [ -n "$missing" ] || return 0
  say "Installing" $missing
  # What comes later must not replace torch, whose packages are large: so it is always among what is asked for.
  if has_torch "$python"; then
    keep_torch=$("$python" -c 'from importlib.metadata import version as v; print("torch==" + v("torch"))')
  fi
  printf '%s\n' "$missing" "$keep_torch" | "$python" -m pip install --quiet -r /dev/stdin
}

build() {
  local header
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -e "$header" ] || fail "Python's headers are needed, $header is not there (Debian: apt install python3-dev)"
  say "Building (minutes the first time, seconds when nothing changed)"
  # Directly at first, as pip would hide the progress.
  (cd "$root" && "$python" setup.py --quiet build_ext --inplace)
  local here='from importlib.util import find_spec as f; s = f("sparse_attn"); print(s and s.origin)'
  if [ "$(cd / && "$python" -c "$here")" != "$root/sparse_attn/__init__.py" ]; then
    "$python" -m pip install --quiet --no-build-isolation --no-deps -e "$root"
  fi
}

prepare() {
  check_tools
  choose_environment
  install_missing torch
  install_missing build "$@"
  build
}

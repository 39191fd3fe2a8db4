#!/usr/bin/env bash
# Lint and the whole test suite, on the CPU, without network beyond the installation.
#
#   bash test.sh [PYTEST ARGUMENT ...]            all rooms in .venv, after ruff and shellcheck
#   bash test.sh --newest [PYTEST ARGUMENT ...]   model, evaluation, serving and doors on the newest torch, in .venv-newest
#
# Examples: bash test.sh tests/model    bash test.sh -k resume    bash test.sh -m slow
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$repo"

case "${1:-}" in
    -h | --help)
        sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    --newest)
        shift
        environment=newest
        venv=$repo/.venv-newest
        setup=(bash "$repo/setup_env.sh" --newest)
        # All but the rest: of folders that are named each conftest.py is loaded before the workers start. The judge of
        # programs knows the standard library alone: tests/test_repository.py holds it to that.
        tests=(tests --ignore=tests/{benchmarks,posttrain,pretrain,quickstart} --ignore-glob="tests/test_*.py"
            --ignore=tests/eval/test_sandbox.py)
        ;;
    *)
        environment=tested
        venv=$repo/.venv
        setup=(bash "$repo/setup_env.sh" --all)
        tests=(tests)
        ;;
esac

workers=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc) # nproc gives the number of threads where that is set
# Tests are small: more threads than this only get in each other's way. Nothing may be fetched.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MKL_NUM_THREADS=${MKL_NUM_THREADS:-1}
export TOKENIZERS_PARALLELISM=false PJRT_DEVICE=CPU CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-}
export PYTHONDONTWRITEBYTECODE= # byte code is compiled on first use, and each process would compile it anew
export USE_TORCH_XLA=0 # transformers would import it in every process; the pre-training backend imports it itself
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 WANDB_MODE=disabled

summary=() failed=0

# stage NAME COMMAND...: run it, remember how long it took and whether it passed.
stage() {
    local name=$1 started=$SECONDS result=passed
    shift
    printf '\n== %s\n' "$name"
    "$@" || {
        result="FAILED (exit $?)"
        failed=1
    }
    summary+=("$(printf '%-12s %5d s  %s' "$name" "$((SECONDS - started))" "$result")")
}

finish() {
    printf '\n== summary of test.sh (%s versions)\n' "$environment"
    printf '%s\n' "${summary[@]}"
    exit "$failed"
}

# shellcheck disable=SC2329 # called through stage
lint_shell() {
    git ls-files -z --cached --others --exclude-standard -- '*.sh' .ci/run | xargs -0 "$venv/bin/shellcheck" -x
}

# Beside the environment, not in it: accelerate imports DeepSpeed wherever it is installed, which takes seconds in every
# process and fails on machines with a GPU but no CUDA compiler. The tests that need it name this folder.
# shellcheck disable=SC2329 # called through stage
install_deepspeed() {
    local version
    version=$(sed -n 's/^deepspeed==//p' "$repo/constraints.txt")
    [ -d "$venv/deepspeed/deepspeed-$version.dist-info" ] ||
        "$venv/bin/python" -m pip install --quiet --no-input --disable-pip-version-check --no-deps --upgrade \
            --constraint "$repo/constraints.txt" --target "$venv/deepspeed" deepspeed hjson ninja py-cpuinfo
}

# The common tests of transformers, which its wheels lack: from the source distribution of the installed version, whose
# hash tests/model/transformers_sdists.txt knows. tests/model/test_common.py runs them.
# shellcheck disable=SC2329 # called through stage
fetch_common_tests() {
    local version scratch
    version=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("transformers"))')
    [ ! -e "$venv/transformers-tests/$version" ] || return 0
    scratch=$(mktemp -d "$venv/transformers-tests.XXXXXX")
    grep "^transformers==$version " "$repo/tests/model/transformers_sdists.txt" >"$scratch/requirements.txt" &&
        "$venv/bin/python" -m pip download --quiet --no-input --disable-pip-version-check --no-deps \
            --no-binary transformers --require-hashes --requirement "$scratch/requirements.txt" --dest "$scratch" &&
        tar -xzf "$scratch/transformers-$version.tar.gz" -C "$scratch" "transformers-$version/tests" &&
        mkdir -p "$venv/transformers-tests" &&
        mv "$scratch/transformers-$version/tests" "$venv/transformers-tests/$version"
    local status=$?
    rm -rf "$scratch"
    [ "$status" -eq 0 ] || printf 'no common tests of transformers %s: see above, or its hash is not known\n' "$version"
    return "$status"
}

stage environment "${setup[@]}"
[ "$failed" -eq 0 ] || finish
stage "common tests" fetch_common_tests
if [ "$environment" = tested ]; then
    stage deepspeed install_deepspeed
    stage "ruff check" "$venv/bin/ruff" check .
    stage "ruff format" "$venv/bin/ruff" format --check .
    stage shellcheck lint_shell
fi
# A path among the arguments replaces the default selection.
for argument in "$@"; do
    if [ -e "${argument%%::*}" ]; then
        tests=()
    fi
done
# One worker per core; a file's tests stay together, since they share models, servers and training runs. The order is
# that of tests/conftest.py.
stage pytest "$venv/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder --durations=15 \
    "${tests[@]}" "$@"
finish

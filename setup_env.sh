#!/usr/bin/env bash
# Make the Python environment of this repository. Does nothing when it is up to date.
#
#   bash setup_env.sh            .venv: what quickstart.sh runs, the versions of constraints.txt
#   bash setup_env.sh --all      the same with torch_xla and what the tests need
#   bash setup_env.sh --newest   .venv-newest: model, evaluation and serving on the newest torch and transformers
#
# PYTHON=/path/to/python3.11 picks the interpreter, INSTALLER=uv installs with uv, which has to be on the PATH.
# Needs network only when something has to be installed.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    printf 'setup_env.sh: %s\n' "$*" >&2
    exit 1
}

case "${1:-}" in
    "") venv=$repo/.venv extra=loop constraints=$repo/constraints.txt ;;
    --all) venv=$repo/.venv extra=all constraints=$repo/constraints.txt ;;
    --newest) venv=$repo/.venv-newest extra=newest constraints=$repo/constraints-newest.txt ;;
    -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) fail "unknown argument '$1' (allowed: --all, --newest, --help)" ;;
esac
[ $# -le 1 ] || fail "one argument at most, got: $*"
installer=${INSTALLER:-pip}
case $installer in
    pip) ;;
    uv) command -v uv >/dev/null || fail "INSTALLER=uv, but uv is not on the PATH" ;;
    *) fail "INSTALLER must be pip or uv, got '$installer'" ;;
esac
log=$venv.install.log

# Everything the installed environment depends on. The package list is part of it because an editable install
# only maps the packages that existed when it was made.
wanted() {
    {
        cat "$repo/pyproject.toml" "$constraints"
        printf '%s\n' "$repo" "$1"
        (cd "$repo" && printf '%s\n' CoDALanguageModel/__init__.py ./*/coda_*/__init__.py)
        grep '^version' "$venv/pyvenv.cfg" 2>/dev/null || true
    } | sha256sum | cut -d ' ' -f 1
}

# Whether it is installed; an environment with everything will do for a part.
is_current() {
    local installed
    [ -f "$venv/.complete" ] || return 1
    installed=$(cat "$venv/.complete")
    [ "$installed" = "$(wanted "$extra")" ] || { [ "$extra" = loop ] && [ "$installed" = "$(wanted all)" ]; } || return 1
    "$venv/bin/python" -c '' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not Python 3.11 or newer with the venv module"
    done
    fail "needs Python 3.11 or newer with its venv module (Debian and Ubuntu: apt install python3.11-venv);" \
        "set PYTHON to use one that is not on the PATH"
}

# Run a long command quietly, with one line of progress; its whole output goes to the log.
with_progress() {
    local started=$SECONDS shown=$SECONDS status=0 every=15 end='\n' pid
    if [ -t 1 ]; then
        every=2 end='\033[K\r'
    fi
    "$@" >>"$log" 2>&1 </dev/null &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true' INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        if ((SECONDS - shown >= every)); then
            shown=$SECONDS
            # shellcheck disable=SC2059 # the line end depends on whether this is a terminal
            printf "  %4d s  %3d packages installed  %.80s$end" "$((SECONDS - started))" \
                "$(find "$venv/lib" -maxdepth 3 -name '*.dist-info' 2>/dev/null | wc -l)" \
                "$(grep -v '^WARNING' "$log" | tail -n 1 | tr -d '\r' | sed 's/^ *//')"
        fi
    done
    wait "$pid" || status=$?
    trap - INT TERM
    if [ "$status" -ne 0 ]; then
        tail -n 25 "$log" | cut -c 1-500 >&2
        fail "installation failed (exit $status); the whole output is in $log"
    fi
}

if is_current; then
    exit 0
fi

# One installation at a time; a second one waits and then finds the work done.
if command -v flock >/dev/null; then
    exec 9>"$venv.lock"
    flock --nonblock 9 || {
        printf 'waiting for another installation into %s\n' "$venv"
        flock 9
    }
    if is_current; then
        exit 0
    fi
fi

# An installation that died may have left packages that only look complete. pip's cache makes the second try fast.
if [ -e "$venv/.installing" ] || { [ -e "$venv" ] && ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    printf 'removing the unfinished %s\n' "$venv"
    rm -rf "$venv"
fi
: >"$log"
if [ ! -e "$venv" ]; then
    python=$(find_python)
    version=$("$python" -c 'import platform; print(platform.python_version())')
    printf 'creating %s with Python %s\n' "$venv" "$version"
    case $version in 3.11.*) ;; *) printf 'note: the tested version is Python 3.11\n' ;; esac
    mkdir "$venv"
    touch "$venv/.installing"
    "$python" -m venv "$venv" </dev/null
fi
touch "$venv/.installing"
rm -f "$venv/.complete"
# Said before the minutes of downloads: 9 GB stay, and about 4 GB of packages lie in the temporary folder meanwhile.
free_gb=$(df -Pk "$venv" | awk 'NR == 2 { print int($4 / 1048576) }')
[ "$free_gb" -ge 13 ] || printf 'note: %d GB are free for %s; installing may need 13 GB\n' "$free_gb" "$venv"
printf 'installing coda-lm[%s] with the versions of %s\n' "$extra" "$(basename "$constraints")"
# Byte code is compiled on first use: compiling all of it here takes longer than all tests need.
command=("$venv/bin/python" -m pip install --no-input --disable-pip-version-check --progress-bar off --no-compile)
[ "$installer" = pip ] || command=(uv pip install --no-progress --python "$venv/bin/python")
with_progress "${command[@]}" --constraint "$constraints" --editable "${repo}[${extra}]"
wanted "$extra" >"$venv/.complete"
rm "$venv/.installing"
printf 'environment ready in %d s: %s\n' "$SECONDS" "$venv"

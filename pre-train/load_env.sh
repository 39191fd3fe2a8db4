# shellcheck shell=bash
# Sourced by the scripts of this folder: reads pre-train/.env, and checks that settings are there.

coda_pretrain_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# KEY=value lines, of which comments after the value are dropped; the environment wins over the file.
load_env() {
    local file=${CODA_ENV_FILE:-$coda_pretrain_dir/.env} line key value
    if [[ ! -e $file ]]; then
        [[ -z ${CODA_ENV_FILE:-} ]] || { printf 'CODA_ENV_FILE: no such file: %s\n' "$file" >&2 && return 1; }
        return 0
    fi
    while IFS= read -r line || [[ -n $line ]]; do
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        if [[ ! $line =~ ^[[:space:]]*([A-Z_][A-Z0-9_]*)=(.*)$ ]]; then
            printf '%s: expected KEY=value, got: %s\n' "$file" "$line" >&2
            return 1
        fi
        key=${BASH_REMATCH[1]} value=${BASH_REMATCH[2]}
        value=${value%%[[:space:]]#*}
        value=${value%"${value##*[![:space:]]}"}
        value=${value#"${value%%[![:space:]]*}"}
        [[ -n ${!key:-} ]] || export "$key=$value"
    done <"$file"
}

# require NAME...: fail with a hint if a setting is empty.
require() {
    local name missing=()
    for name in "$@"; do
        [[ -n ${!name:-} ]] || missing+=("$name")
    done
    if ((${#missing[@]})); then
        printf 'not set: %s. Set it in %s (see %s)\n' "${missing[*]}" \
            "${CODA_ENV_FILE:-pre-train/.env}" "$coda_pretrain_dir/env.example" >&2
        return 2
    fi
}

# The interpreter of the repository's environment, else the one on the PATH.
find_python() {
    local own=$coda_pretrain_dir/../.venv/bin/python
    if [[ -n ${PYTHON:-} ]]; then
        printf '%s\n' "$PYTHON"
    elif [[ -x $own ]]; then
        printf '%s\n' "$own"
    else
        command -v python3
    fi
}

load_env

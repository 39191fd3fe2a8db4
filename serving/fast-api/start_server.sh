#!/usr/bin/env bash
# Starts the OpenAI-compatible server. All configuration is by environment variables, see env.example:
#   MODEL_NAME=runs/quickstart/model bash serving/fast-api/start_server.sh
# A file .env beside this script is read too, or the file that ENV_FILE names; variables of the process win.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)

if [[ -z "${PYTHON:-}" ]]; then
  if [[ -x "$repository/.venv/bin/python" ]]; then
    PYTHON="$repository/.venv/bin/python"
  else
    PYTHON=python3
  fi
fi
if ! command -v "$PYTHON" > /dev/null; then
  echo "error: PYTHON=$PYTHON is not a program" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, ("coda_serving", "fastapi"))))'; then
  echo "error: $PYTHON has no coda_serving; install it: $PYTHON -m pip install -e '${repository}[serving]'" >&2
  exit 2
fi
if [[ -z "${ENV_FILE:-}" && -f "$here/.env" ]]; then
  export ENV_FILE="$here/.env"
fi
exec "$PYTHON" -m coda_serving "$@"

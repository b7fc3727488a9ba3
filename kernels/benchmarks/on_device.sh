#!/usr/bin/env bash
# Prepares a machine without a network (wheels in .gpu, see CONTRIBUTING) and runs the commands given, one argument each.
set -uo pipefail
if ls .gpu/whl/*.whl >/dev/null 2>&1; then
  SITE=$(mktemp -d)
  python3 -m pip install -q --no-index --no-deps --no-compile --target "$SITE" .gpu/whl/*.whl 2>/dev/null
  export PYTHONPATH="$SITE:.gpu/stubs:${PYTHONPATH:-}"
fi
export PYTHONUNBUFFERED=1 PYTHONPATH="kernels:.:${PYTHONPATH:-}"
for command in "$@"; do
  start=$SECONDS
  echo "== $command"
  bash -c "$command" 2>&1 | grep -v -i warning
  echo "== $((SECONDS - start)) s"
done

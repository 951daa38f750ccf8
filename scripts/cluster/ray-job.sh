#!/usr/bin/env bash
# Hand a search to a running Ray cluster, and follow its output.
#
#   ray-job.sh CONFIG RUN [--set KEY=VALUE ...]
#
# CONFIG and RUN are absolute paths on a folder that every node of the cluster sees; depthsearch is
# installed on the nodes. The same command continues a run that was interrupted.
#
#   RAY_ADDRESS             the cluster's dashboard; default http://127.0.0.1:8265, which reaches the
#                           head through `ssh -L 8265:127.0.0.1:8265 HEAD` or `ray dashboard cluster.yaml`
#   RAY_AUTH_TOKEN_PATH     the cluster's token; default ~/.ray/auth_token
#   DEPTHSEARCH_RUNTIME_ENV runtime environment of the job; default runtime-env.yaml beside this file
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

if (($# < 2)) || [[ "$1" != /* || "$2" != /* ]]; then
  echo "ray-job: expected CONFIG RUN [--set KEY=VALUE ...], both absolute paths" >&2
  exit 2
fi
export RAY_AUTH_MODE=token
token="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"
if [[ -z "${RAY_AUTH_TOKEN:-}" && ! -s "$token" ]]; then
  echo "ray-job: no token at $token: copy the cluster's, or name it with RAY_AUTH_TOKEN_PATH" >&2
  exit 2
fi

# The folder of these scripts travels with the job: its entry point is one of them.
exec ray job submit \
  --address "${RAY_ADDRESS:-http://127.0.0.1:8265}" \
  --working-dir "$here" \
  --runtime-env "${DEPTHSEARCH_RUNTIME_ENV:-$here/runtime-env.yaml}" \
  -- bash run-or-resume.sh "$@"

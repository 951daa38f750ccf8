#!/usr/bin/env bash
# Search on the Ray cluster that this process is in, or continue a run that was interrupted.
#
#   run-or-resume.sh CONFIG RUN [--set KEY=VALUE ...]
#
# CONFIG and RUN lie on a folder that every node sees. Where RUN exists it is resumed with the
# settings that it was started with, and --set is not looked at; a finished RUN is left alone.
set -euo pipefail

if (($# < 2)); then
  echo "run-or-resume: expected CONFIG RUN [--set KEY=VALUE ...]" >&2
  exit 2
fi
config="$1"
run="$2"
shift 2

if [[ -f "$run/best.json" ]]; then
  echo "run-or-resume: $run has finished" >&2
  exit 0
fi
if [[ -f "$run/journal.jsonl" ]]; then
  exec depthsearch resume "$run"
fi
exec depthsearch search "$config" --out "$run" \
  --set cluster.backend=ray --set cluster.address=auto "$@"

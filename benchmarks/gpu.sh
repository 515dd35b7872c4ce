#!/usr/bin/env bash
# What one GPU says of this package, in under 8 minutes: OUT/gpu.jsonl and OUT/gpu.md, written as it goes.
#
#     benchmarks/gpu.sh OUT [--dry]
#
# Needs torch, Triton, SpeechBrain and this package; pytest, cut-cross-entropy and liger-kernel are used where they
# are. --dry is the same on small tensors, on a CPU too, in seconds. Stopped at any time it keeps what was done.
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 OUT [--dry]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec timeout --signal=INT --kill-after=10 470 python3 "$here/gpu.py" "$@"

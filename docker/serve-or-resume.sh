#!/bin/sh
# serve-or-resume SCENARIO [--set KEY=VALUE ...] -- OPTIONS OF SERVE
#
# Serve a scenario; where the volume already holds a run, go on with that one instead. A server that is restarted in
# the middle of a run carries on, and one whose run is complete ends at once with status 0. What stands before "--" is
# for a new run only.
set -eu
resume=$(find "${TRELLIS_RUNS}" -mindepth 3 -maxdepth 3 -name scenario.yaml 2>/dev/null | head -n 1)
if [ -z "${resume}" ]; then
    new="$*"
    count=$#
    for each; do
        shift
        [ "${each}" = "--" ] || set -- "$@" "${each}"
    done
    [ "${count}" -gt "$#" ] || { echo "serve-or-resume: no -- in: ${new}" >&2; exit 2; }
    exec trellis serve "$@"
fi
while [ "$#" -gt 0 ] && [ "$1" != "--" ]; do shift; done
[ "$#" -gt 0 ] && shift
exec trellis serve --resume latest "$@"

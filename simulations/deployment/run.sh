#!/bin/sh
# Starts a run, or goes on with it; all words are settings. The held-out images are on the SuperLink's machine.
#   run.sh run=hospitals data.root=/srv/held-out 'partition.names=[hospital_a,hospital_b]' rounds=20
. "$(dirname "$0")/settings.sh"
sh "$(dirname "$0")/connect.sh"
app=${APP:-$(dirname "$0")/../digits}
exec flwr run "$app" deployment --stream \
    --run-config "overrides=\"data.name=folder partition.kind=nodes $*\""

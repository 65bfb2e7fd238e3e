#!/bin/sh
# Starts a run, or goes on with it; all words are settings. The held-out images are on the SuperLink's machine.
#   run.sh run=hospitals data.root=/srv/held-out 'partition.names=[hospital_a,hospital_b]' rounds=20
. "$(dirname "$0")/settings.sh"
[ $# -gt 0 ] || usage
sh "$(dirname "$0")/connect.sh"
app=${APP:-$(dirname "$0")/../digits}
printf 'overrides = %s\n' "$(quoted "data.name=folder partition.kind=nodes $*")" > "$FLWR_HOME/run.toml"
log=$FLWR_HOME/run.log
flwr run "$app" deployment --stream --run-config "$FLWR_HOME/run.toml" | tee "$log"
run=$(sed -n 's/^Successfully started run //p' "$log")
# Flower answers 0 for a run that has failed too
[ -n "$run" ] && flwr ls deployment --run-id "$run" --format json | grep -q '"finished:completed"'

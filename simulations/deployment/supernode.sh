#!/bin/sh
# Starts the SuperNode of a client whose images are in a folder, CLASS/image.png; it runs until it is ended.
#   supernode.sh hospital_b /data/b
# After a hard end a SuperLink refuses the client for up to a minute: so it is tried again.
. "$(dirname "$0")/settings.sh"
client=$1 folder=$2 node="" ended=""
trap 'ended=1; [ -z "$node" ] || kill -- "-$node" 2>/dev/null || true' INT TERM
while [ -z "$ended" ]; do
    setsid flower-supernode --superlink "$SUPERLINK" \
        --root-certificates "$DEPLOYMENT/certificates/ca.crt" \
        --auth-supernode-private-key "$DEPLOYMENT/keys/$client" \
        --host 127.0.0.1 --port "${PORT:-9094}" \
        --node-config "${NODE_CONFIG:-client=\"$client\"} data-root=\"$folder\"" &
    node=$!
    echo "$node" > "$FLWR_HOME/supernode.pid"
    wait "$node" || true
    kill -- "-$node" 2>/dev/null || true
    [ -n "$ended" ] || sleep 5
done

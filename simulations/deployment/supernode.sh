#!/bin/sh
# Starts the SuperNode of a client whose images are in a folder, CLASS/image.png; it runs until it is ended.
#   supernode.sh hospital_b /data/b
# After a hard end a SuperLink refuses the client for up to a minute: so it is tried again.
. "$(dirname "$0")/settings.sh"
[ $# -eq 2 ] || usage
client=$1 folder=$2 node="" ended=""
if [ -z "${NODE_CONFIG:-}" ]; then
    fedunlearn deploy check "$DEPLOYMENT" --client "$client" --images "$folder" || exit 1
    printf 'client = %s\ndata-root = %s\n' "$(quoted "$client")" "$(quoted "$folder")" > "$FLWR_HOME/node.toml"
fi
trap 'ended=1; [ -z "$node" ] || kill -- "-$node" 2>/dev/null || true' HUP INT TERM
while [ -z "$ended" ]; do
    setsid flower-supernode --superlink "$SUPERLINK" \
        --root-certificates "$DEPLOYMENT/certificates/ca.crt" \
        --auth-supernode-private-key "$DEPLOYMENT/keys/$client" \
        --host 127.0.0.1 --port "${PORT:-9094}" \
        --node-config "${NODE_CONFIG:-$FLWR_HOME/node.toml}" &
    node=$!
    echo "$node" > "$FLWR_HOME/supernode.pid"
    wait "$node" || true
    kill -- "-$node" 2>/dev/null || true
    [ -z "$ended" ] || break
    echo "The SuperNode of $client has ended, and is started again:" >&2
    fedunlearn deploy check "$DEPLOYMENT" --superlink "$SUPERLINK" >&2 &&
        echo "It refuses a key that it does not have (register.sh), a second SuperNode with one key, and any for up to a minute after a hard end." >&2
    sleep 5
done

#!/bin/sh
# Starts the SuperNode of a client whose images are in a folder, CLASS/image.png; it runs until it is ended.
#   supernode.sh hospital_b /data/b
. "$(dirname "$0")/settings.sh"
client=$1 folder=$2
exec flower-supernode --superlink "$SUPERLINK" \
    --root-certificates "$DEPLOYMENT/certificates/ca.crt" \
    --auth-supernode-private-key "$DEPLOYMENT/keys/$client" \
    --host 127.0.0.1 --port "${PORT:-9094}" \
    --node-config "${NODE_CONFIG:-client=\"$client\"} data-root=\"$folder\""

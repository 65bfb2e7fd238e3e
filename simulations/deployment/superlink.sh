#!/bin/sh
# Starts the SuperLink with TLS and SuperNode authentication; it runs until it is ended.
#   superlink.sh
. "$(dirname "$0")/settings.sh"
certificates=$DEPLOYMENT/certificates
[ -e "$certificates/server.pem" ] || { echo "$certificates/server.pem is not here: certificates.sh makes it" >&2; exit 1; }
exec flower-superlink --host "${HOST:-0.0.0.0}" --port "${SUPERLINK##*:}" \
    --ssl-ca-certfile "$certificates/ca.crt" \
    --ssl-certfile "$certificates/server.pem" \
    --ssl-keyfile "$certificates/server.key" \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --database "$DEPLOYMENT/superlink.db"

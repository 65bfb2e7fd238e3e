# What all scripts share; set these in the environment for others.
set -eu
DEPLOYMENT=${DEPLOYMENT:-$PWD/deployment}       # certificates, keys and state of this machine
SUPERLINK=${SUPERLINK:-127.0.0.1:8000}          # address of the SuperLink, as SuperNodes see it
case $DEPLOYMENT in /*) ;; *) DEPLOYMENT=$PWD/$DEPLOYMENT ;; esac
export FLWR_HOME=${FLWR_HOME:-$DEPLOYMENT/flwr}
export FEDUNLEARN_HOME=${FEDUNLEARN_HOME:-$DEPLOYMENT/fedunlearn}
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0}
mkdir -p "$DEPLOYMENT/certificates" "$FLWR_HOME" "$FEDUNLEARN_HOME"

# Prints how the script is called, from its own first lines, and ends it.
usage() {
    sed -n '/^#!/d; /^#/!q; p' "$0" >&2
    exit 2
}

# Gives text as TOML has it.
quoted() {
    printf '"%s"' "$(printf '%s' "$*" | tr '\n' ' ' | sed 's/[\\"]/\\&/g')"
}

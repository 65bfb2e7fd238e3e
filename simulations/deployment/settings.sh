# What all scripts share; set these in the environment for others.
set -eu
DEPLOYMENT=${DEPLOYMENT:-$PWD/deployment}       # certificates, keys and state of this machine
SUPERLINK=${SUPERLINK:-127.0.0.1:8000}          # address of the SuperLink, as SuperNodes see it
export FLWR_HOME=${FLWR_HOME:-$DEPLOYMENT/flwr}
export FEDUNLEARN_HOME=${FEDUNLEARN_HOME:-$DEPLOYMENT/fedunlearn}
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0}
mkdir -p "$DEPLOYMENT" "$FLWR_HOME" "$FEDUNLEARN_HOME"

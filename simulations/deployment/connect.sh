#!/bin/sh
# Lets `flwr` find the SuperLink under the name `deployment`; `register.sh` and `run.sh` call it.
. "$(dirname "$0")/settings.sh"
cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "deployment"

[superlink.deployment]
address = "$SUPERLINK"
root-certificates = "$DEPLOYMENT/certificates/ca.crt"
END

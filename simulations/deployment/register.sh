#!/bin/sh
# Tells the SuperLink which keys SuperNodes may have:
#   register.sh keys/hospital_a.pub keys/hospital_b.pub
. "$(dirname "$0")/settings.sh"
sh "$(dirname "$0")/connect.sh"
for file in "$@"; do
    flwr supernode register "$file" deployment
done

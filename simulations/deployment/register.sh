#!/bin/sh
# Tells the SuperLink which keys SuperNodes may have:
#   register.sh keys/hospital_a.pub keys/hospital_b.pub
. "$(dirname "$0")/settings.sh"
[ $# -gt 0 ] || usage
sh "$(dirname "$0")/connect.sh"
failed=0
for file in "$@"; do
    if said=$(flwr supernode register "$file" deployment 2>&1); then
        echo "$said"
    else
        case $said in
            *"already in use"*) echo "$file was registered before" ;;
            *) echo "$file is not registered: $said" >&2; failed=1 ;;
        esac
    fi
done
exit "$failed"

#!/bin/sh
# Makes the key of a SuperNode, where its client's images are, and prints the key's id for partition.keys:
#   key.sh hospital_b
# The server needs keys/hospital_b.pub. The file keys/hospital_b stays here.
. "$(dirname "$0")/settings.sh"
[ $# -eq 1 ] || usage
file=$DEPLOYMENT/keys/$1
mkdir -p "$DEPLOYMENT/keys"
[ -e "$file" ] || ssh-keygen -q -t ecdsa -b 384 -N "" -C "$1" -f "$file"
fedunlearn keys id "$file.pub"

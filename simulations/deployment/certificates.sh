#!/bin/sh
# Makes an authority, and the SuperLink's certificate for the names and addresses that it is called by:
#   certificates.sh superlink.example.org 192.0.2.7
# SuperNodes and people need certificates/ca.crt. The file ca.key stays where it was made.
. "$(dirname "$0")/settings.sh"
folder=$DEPLOYMENT/certificates
names="DNS:localhost,IP:127.0.0.1"
for name in "$@"; do
    case $name in
        *[!0-9.]*) names="$names,DNS:$name" ;;
        *) names="$names,IP:$name" ;;
    esac
done
mkdir -p "$folder"
umask 077

# runs openssl, whose progress nobody needs to see but where it fails
make() {
    said=$(openssl "$@" 2>&1) || { echo "$said" >&2; exit 1; }
}
curve="ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
[ -e "$folder/ca.crt" ] || make req -x509 -newkey $curve -days 3650 -subj "/CN=fedunlearn authority" \
    -keyout "$folder/ca.key" -out "$folder/ca.crt"
make req -newkey $curve -subj "/CN=fedunlearn SuperLink" -keyout "$folder/server.key" -out "$folder/server.csr"
printf 'subjectAltName=%s\n' "$names" > "$folder/server.ext"
make x509 -req -in "$folder/server.csr" -CA "$folder/ca.crt" -CAkey "$folder/ca.key" -CAcreateserial -days 825 \
    -extfile "$folder/server.ext" -out "$folder/server.pem"
rm "$folder/server.csr" "$folder/server.ext"
echo "$folder/server.pem is for $names"

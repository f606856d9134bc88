#!/bin/sh
# A certificate authority of one's own, a server's certificate and devices' certificates, by openssl:
#   make-certificates.sh FOLDER NAME[,NAME...] [DEVICE...]
# NAMEs are what devices connect to: host names and IP addresses. Run again, it keeps the authority and renews the rest;
# a running server and running devices use what is new from the next connection on. Keep FOLDER/ca.key to yourself.
set -eu
folder=$1 names=$2
shift 2
mkdir -p "$folder"
cd "$folder"
umask 077
days=${DAYS:-397}

if [ ! -e ca.key ]; then
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 3650 -subj "/CN=Headrace authority" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" \
    -keyout ca.key -out ca.pem 2>/dev/null
fi

issue() { # FILE NAME SUBJECT-ALTERNATIVE-NAMES USAGE
  openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$2" -keyout "$1.key.new" \
    -out "$1.csr" 2>/dev/null
  printf 'basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=%s\nsubjectAltName=%s\n' \
    "$4" "$3" > "$1.ext"
  openssl x509 -req -in "$1.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days "$days" -extfile "$1.ext" \
    -out "$1.pem.new" 2>/dev/null
  mv "$1.key.new" "$1.key"
  mv "$1.pem.new" "$1.pem"
  rm "$1.csr" "$1.ext"
}

alternatives=
for name in $(echo "$names" | tr , ' '); do
  case $name in
    *:* | *[0-9].[0-9]*.[0-9]*.[0-9]*) kind=IP ;;
    *) kind=DNS ;;
  esac
  alternatives="$alternatives,$kind:$name"
done
issue server "${names%%,*}" "${alternatives#,}" serverAuth
for device in "$@"; do
  issue "$device" "$device" "DNS:$device" clientAuth
done

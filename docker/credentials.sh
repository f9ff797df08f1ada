#!/bin/sh
# credentials.sh NODE...
#
# Make certificates and tokens, once: the server's in /credentials/server, each node's in a folder of its own name.
# The first node is client 0, the second client 1. Where credentials are there already, nothing is done.
# TRELLIS_HOSTS: names of the server beside those inside the fleet, with spaces between.
set -eu
umask 007
cd "${TRELLIS_CREDENTIALS:-/credentials}"
if [ -e server/nodes.yaml ]; then
    echo "credentials are there"
    exit 0
fi
# In memory, not on a volume: the authority's key signs this once and is gone.
work=$(mktemp -d "${TRELLIS_WORK:-/tmp}/credentials.XXXXXX")
trap 'rm -rf "${work}"' EXIT
names=""
for host in server localhost 127.0.0.1 ${TRELLIS_HOSTS:-}; do
    names="${names} --host ${host}"
done
# shellcheck disable=SC2086  # names are words
trellis certs "${work}/certs" ${names}
client=0
for node; do
    trellis token "${node}" --nodes "${work}/nodes.yaml" --client "${client}" --to "${node}/token"
    cp "${work}/certs/ca.pem" "${node}/"
    client=$((client + 1))
done
cp "${work}/certs/ca.pem" "${work}/certs/server.pem" "${work}/certs/server.key" server/
# Last, because its being there says that all else is.
cp "${work}/nodes.yaml" server/

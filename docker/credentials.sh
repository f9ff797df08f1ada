#!/bin/sh
# credentials.sh NODE...
#
# Make certificates and tokens, once: the server's in /credentials/server, each node's in a folder of its own name.
# The first node is client 0, the second client 1. Where credentials are there already, nothing is done.
set -eu
umask 007
cd "${TRELLIS_CREDENTIALS:-/credentials}"
if [ -e server/nodes.yaml ]; then
    echo "credentials are there"
    exit 0
fi
trellis certs "${TMPDIR}/certs" --host server --host localhost --host 127.0.0.1
client=0
for node; do
    trellis token "${node}" --nodes "${TMPDIR}/nodes.yaml" --client "${client}" > "${node}/token"
    cp "${TMPDIR}/certs/ca.pem" "${node}/"
    client=$((client + 1))
done
cp "${TMPDIR}/certs/ca.pem" "${TMPDIR}/certs/server.pem" "${TMPDIR}/certs/server.key" server/
# Last, because its being there says that all else is.
cp "${TMPDIR}/nodes.yaml" server/

#!/bin/sh
# Copies the CA certificates that the host's administrator added. A host behind a proxy that inspects TLS trusts the
# proxy's CA, and its guests have to trust it too.
#   certificates.sh FROM TO
# TO is an absolute path. As for update-ca-certificates(8), a certificate is a file below FROM whose name ends with .crt.
set -eu
from=$1 to=$2
[ -d "$from" ] || exit 0
cd "$from"
find -L . -type f -name '*.crt' | while IFS= read -r file; do
	install -D -m 644 "$file" "$to/$file"
done

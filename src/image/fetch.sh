#!/bin/sh
# Fetches the kernel and busybox into DIR with the build's own apt configuration.
#   fetch.sh DIR
set -eu
cd "$1"
arch=$(apt-config shell a APT::Architecture)
eval "$arch"
meta=linux-image-cloud-${a:?}
kernel=$(apt-cache depends --important "$meta" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p' | head -n 1)
[ -n "$kernel" ] || {
	echo "$meta names no kernel" >&2
	exit 1
}
apt-get download "$kernel" busybox-static

#!/bin/sh
# Builds the parts of a guest runtime in STAGE_DIR/out. Runs as root, or as the root of a user namespace, in its own
# mount and PID namespaces, so its mounts and processes end with it.
#   build.sh STAGE_DIR SUITE PACKAGES TREE_BYTES_MAX
# STAGE_DIR/in holds sources.list, apt.conf and the guest's files. Each stage begins with a line "fcd-stage NAME".
set -eu
stage_dir=$1 suite=$2 packages=$3 tree_bytes_max=$4
work=$stage_dir/work out=$stage_dir/out in=$stage_dir/in
tree=$work/tree
umask 022
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

stage() { echo "fcd-stage $1"; }

mount -t tmpfs -o "mode=755,size=$tree_bytes_max" fcd-runtime "$work"
mkdir -m 1777 "$work/tmp"
mkdir "$work/debs"
# apt downloads as this user if the user can access the directory.
chown _apt "$work/debs" 2>/dev/null || :
export TMPDIR="$work/tmp" FCD_IN="$in" FCD_DEBS="$work/debs" FCD_PACKAGES="$work/packages"

stage packages
# The packages are unpacked and not installed. The hook runs while apt's lists and the downloaded packages still exist.
# shellcheck disable=SC2016
mmdebstrap --mode=root --variant=extract --format=directory --include="$packages" \
	--aptopt="$in/apt.conf" \
	--dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' \
	--dpkgopt='path-exclude=/usr/share/info/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	--extract-hook='APT_CONFIG=$MMDEBSTRAP_APT_CONFIG sh "$FCD_IN/fetch.sh" "$FCD_DEBS"' \
	--extract-hook='for deb in "$1"/var/cache/apt/archives/*.deb "$FCD_DEBS"/*.deb; do
		dpkg-deb -W --showformat="\${Package} \${Version}\n" "$deb"; done | sort >"$FCD_PACKAGES"' \
	"$suite" "$tree" - <"$in/sources.list"
cp "$work/packages" "$out/packages"

stage kernel
for deb in "$work"/debs/*.deb; do
	case ${deb##*/} in
	linux-image-*) dpkg -x "$deb" "$work/kernel" ;;
	busybox-static_*) dpkg -x "$deb" "$work/busybox" ;;
	esac
done
set -- "$work"/kernel/boot/vmlinuz-*
version=${1#"$work"/kernel/boot/vmlinuz-}
cp "$1" "$out/vmlinuz"
cp "$work/busybox/bin/busybox" "$out/busybox"
mkdir -p "$tree/lib/modules"
mv "$work/kernel/lib/modules/$version" "$tree/lib/modules/"
chroot "$tree" /sbin/depmod "$version"
mkdir "$out/modules"
cp "$tree/lib/modules/$version/modules.dep" "$out/modules/"
for module in virtio_pci virtio_mmio virtio_blk virtio_net virtio_balloon; do
	for path in $(chroot "$tree" /sbin/modprobe --set-version "$version" --show-depends "$module" | sed -n 's/^insmod //p'); do
		cp "$tree/$path" "$out/modules/"
	done
done
mv "$tree/lib/modules" "$work/modules"

stage assemble
sh "$in/bundle.sh" "$tree" "$work/modules" "$out/busybox" "$in" "$work/runtime"
printf '%s\n' "$version" >"$out/kernel-version"
# The identity of the content. The file system's own bytes depend on the time of the build.
tar -C "$work/runtime" --sort=name --format=gnu --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - . |
	sha256sum | cut -d ' ' -f 1 >"$out/tree-digest"

stage filesystem
kib=$(du -sk --apparent-size "$work/runtime" | cut -f 1)
truncate -s "$((kib * 5 / 4096 + 16))M" "$out/runtime.ext4"
mkfs.ext4 -q -F -b 4096 -m 0 -L fcd-runtime -O ^has_journal,^resize_inode -E root_owner=0:0 \
	-d "$work/runtime" "$out/runtime.ext4"

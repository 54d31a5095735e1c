#!/bin/sh
# Builds an image's parts in STAGE_DIR/out. Runs as root, or as the root of a user namespace, in its own mount and PID
# namespaces, so its mounts and processes end with it.
#   build.sh STAGE_DIR SUITE PACKAGES DISK_BYTES TREE_BYTES_MAX full|minimal
# STAGE_DIR/in holds sources.list, apt.conf and the guest's files. Each stage begins with a line "fcd-stage NAME".
set -eu
stage_dir=$1 suite=$2 packages=$3 disk_bytes=$4 tree_bytes_max=$5 profile=$6
work=$stage_dir/work out=$stage_dir/out in=$stage_dir/in
tree=$work/tree
umask 022
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive

stage() { echo "fcd-stage $1"; }

# The tree is in memory, because dpkg calls fsync often, and so that no files of other uids remain on the host's disk.
mount -t tmpfs -o "mode=755,size=$tree_bytes_max" fcd-image "$work"
mkdir -m 1777 "$work/tmp"
mkdir "$work/debs"
# apt downloads as this user if the user can access the directory.
chown _apt "$work/debs" 2>/dev/null || :
export TMPDIR="$work/tmp" FCD_IN="$in" FCD_DEBS="$work/debs"

stage packages
# The hook runs while apt's lists still exist, so the kernel comes from the same sources. It is unpacked, not installed.
# shellcheck disable=SC2016
mmdebstrap --mode=root --variant=essential --format=directory --include="$packages" \
	--aptopt="$in/apt.conf" \
	--dpkgopt='path-exclude=/usr/share/man/*' \
	--dpkgopt='path-exclude=/usr/share/doc/*' \
	--dpkgopt='path-exclude=/usr/share/info/*' \
	--dpkgopt='path-exclude=/usr/share/locale/*' \
	--dpkgopt='path-include=/usr/share/locale/locale.alias' \
	--dpkgopt='path-include=/usr/share/doc/*/copyright' \
	--customize-hook='APT_CONFIG=$MMDEBSTRAP_APT_CONFIG sh "$FCD_IN/fetch.sh" "$FCD_DEBS"' \
	"$suite" "$tree" - <"$in/sources.list"

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
cp -a "$work/kernel/lib/modules/$version" "$tree/lib/modules/"
chroot "$tree" /sbin/depmod "$version"
mkdir "$out/modules"
cp "$tree/lib/modules/$version/modules.dep" "$out/modules/"
for module in virtio_pci virtio_mmio virtio_blk virtio_net virtio_balloon; do
	for path in $(chroot "$tree" /sbin/modprobe --set-version "$version" --show-depends "$module" | sed -n 's/^insmod //p'); do
		cp "$tree/$path" "$out/modules/"
	done
done

stage customise
install -d -m 755 "$tree/usr/lib/fcd/bin" "$tree/var/lib/fcd"
install -m 755 "$in/init" "$tree/usr/lib/fcd/init"
install -m 755 "$in/shutdown" "$tree/usr/sbin/fcd-shutdown"
install -m 755 "$out/busybox" "$tree/usr/lib/fcd/busybox"
for applet in ip kill ln mkdir mkfifo mount rm setsid sh sleep sync tar usleep; do
	ln -s ../busybox "$tree/usr/lib/fcd/bin/$applet"
done
install -m 644 "$in/sshd_config" "$tree/etc/ssh/sshd_config"
install -m 644 "$in/modprobe.conf" "$tree/etc/modprobe.d/fcd.conf"
rm -f "$tree"/etc/ssh/ssh_host_* "$tree/etc/apt/apt.conf.d/99mmdebstrap" "$tree/etc/resolv.conf"
rm -rf "$tree"/var/log/* "$tree"/var/cache/debconf/*-old "$tree"/var/lib/dpkg/*-old
: >"$tree/etc/machine-id"
: >"$tree/etc/hostname"
: >"$tree/etc/fstab"
install -d -m 700 "$tree/root"
# In a user namespace, mmdebstrap leaves these directories owned by root.
chroot "$tree" chown _apt /var/lib/apt/lists/partial /var/cache/apt/archives/partial
if [ "$profile" = full ]; then
	# A locked password ("!") would make sshd refuse the user's keys, because it does not use PAM.
	chroot "$tree" useradd --uid 1000 --user-group --create-home --shell /bin/bash --password '*' dev
	echo 'dev ALL=(ALL:ALL) NOPASSWD: ALL' >"$tree/etc/sudoers.d/dev"
	chmod 440 "$tree/etc/sudoers.d/dev"
	echo LANG=C.UTF-8 >"$tree/etc/default/locale"
	certificates=/usr/local/share/ca-certificates
	sh "$in/certificates.sh" "$certificates" "$tree$certificates"
	TMPDIR=/tmp chroot "$tree" update-ca-certificates >/dev/null
fi
echo $((disk_bytes / 512)) >"$tree/var/lib/fcd/disk-sectors"
# shellcheck source=/dev/null
. "$tree/etc/os-release"
printf '%s\n' "$version" >"$out/kernel-version"
printf '%s\n' "$PRETTY_NAME" >"$out/os"

stage filesystem
truncate -s "$disk_bytes" "$out/rootfs.ext4"
# The journal is small. The inode tables of a sparse file are already zero, so the guest need not initialize them.
mkfs.ext4 -q -F -m 1 -L fcd-root -J size=32 -e remount-ro \
	-O has_journal,resize_inode,metadata_csum -E lazy_journal_init=1,root_owner=0:0 \
	-d "$tree" "$out/rootfs.ext4"

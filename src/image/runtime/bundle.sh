#!/bin/sh
# Assembles the guest runtime, the tree that guests mount at /.fcd.
#   bundle.sh TREE MODULES BUSYBOX IN TO
# TREE holds the unpacked packages with all libraries that they need, MODULES the kernel's modules, and IN the guest's
# files of fcd. Programs find the loader and the libraries in /.fcd/lib and never use those of an image.
set -eu
tree=$1 modules=$2 busybox=$3 in=$4 to=$5
prefix=/.fcd

is_elf() {
	[ "$(head -c 4 "$1" | od -An -tx1)" = ' 7f 45 4c 46' ]
}

# The first word of the first line of a script, without its directory; empty for anything else.
interpreter() {
	head -c 128 "$1" | head -n 1 | tr -d '\0' | sed -n 's,^#! *\([^ ]*\).*,\1,p'
}

mkdir -p "$to/bin" "$to/etc" "$to/lib/git-core" "$to/lib/modules" "$to/lib/openssh" "$to/run" "$to/share"
install -m 755 "$busybox" "$to/bin/busybox"
for applet in $("$busybox" --list); do
	[ "$applet" = busybox ] || ln -s busybox "$to/bin/$applet"
done

# The programs of the distribution replace the applets of the same name. sh is dash, because busybox's shell would run
# its own applets instead of the programs in PATH.
while read -r name; do
	for dir in bin usr/bin sbin usr/sbin; do
		if [ -f "$tree/$dir/$name" ] && [ ! -L "$tree/$dir" ]; then
			rm -f "$to/bin/$name"
			install -m 755 "$tree/$dir/$name" "$to/bin/$name"
			break
		fi
	done
	if [ ! -f "$to/bin/$name" ]; then
		echo "the packages have no program $name" >&2
		exit 1
	fi
done <"$in/programs"
mv "$to/bin/dash" "$to/bin/sh.new"
mv -f "$to/bin/sh.new" "$to/bin/sh"

# sshd from version 9.8 on has parts that it starts by their absolute paths.
for path in "$tree"/usr/lib/openssh/sftp-server "$tree"/usr/lib/openssh/sshd-*; do
	[ ! -f "$path" ] || install -m 755 "$path" "$to/lib/openssh/"
done

# git's own commands are links to one program. Scripts in Perl are omitted.
cp -a "$tree"/usr/lib/git-core/. "$to/lib/git-core/"
for path in "$to"/lib/git-core/*; do
	if [ -L "$path" ] || [ ! -f "$path" ]; then continue; fi
	case ${path##*/} in
	git-daemon | git-http-backend | git-http-push | git-imap-send | git-instaweb | git-shell | scalar)
		rm "$path"
		continue
		;;
	esac
	case $(interpreter "$path") in
	/bin/sh) sed -i "1s,/bin/sh,$prefix/bin/sh," "$path" ;;
	*/perl | */python3) rm "$path" ;;
	esac
done
cp -a "$tree/usr/share/git-core" "$to/share/git-core"
# git starts a shell for commands of several words. An image may have none, so the name is replaced by another of the
# same length.
LC_ALL=C sed -i 's,/bin/sh\x00,/.fcd/s\x00,g' "$to/lib/git-core/git"
ln -s bin/sh "$to/s"
rm -f "$to/bin/git"
install -m 755 "$in/git" "$to/bin/git"
for name in git-receive-pack git-upload-archive git-upload-pack; do
	ln -s git "$to/bin/$name"
done
cat "$tree"/usr/share/ca-certificates/mozilla/*.crt >"$to/etc/ca-certificates.crt"

mkdir "$to/lib/kmod"
rm -f "$to/bin/depmod" "$to/bin/modinfo" "$to/bin/modprobe"
mv "$to/bin/kmod" "$to/lib/kmod/modprobe"
install -m 755 "$in/modprobe" "$to/bin/modprobe"
mkdir "$to/etc/modprobe.d"
install -m 644 "$in/modprobe.conf" "$to/etc/modprobe.d/fcd.conf"
cp -a "$modules/." "$to/lib/modules/"
for name in init sshd-root shutdown image-off enter; do
	install -m 755 "$in/$name" "$to/lib/$name"
done
ln -s lib/init "$to/init"
ln -s ../bin/sh "$to/lib/@sh"
ln -s enter "$to/lib/enter-own"
ln -s enter "$to/lib/enter-reseed"
install -m 644 "$in/sshd_config" "$to/etc/sshd_config"

# The loader lists all libraries of a program, including those of its libraries.
loader=/lib64/ld-linux-x86-64.so.2
find "$to/bin" "$to/lib" -path "$to/lib/modules" -prune -o -type f -print >"$tree/candidates"
while read -r path; do
	case $path in
	"$to/bin/busybox" | "$to/lib/enter") continue ;;
	esac
	! is_elf "$path" || printf '%s\n' "$path"
done <"$tree/candidates" >"$tree/programs"
rm -rf "$tree/relocate"
mkdir "$tree/relocate"
while read -r path; do
	cp "$path" "$tree/relocate/program"
	chroot "$tree" "$loader" --list /relocate/program
done <"$tree/programs" | sed -n 's/.* => \(\/[^ ]*\) (.*/\1/p' | sort -u >"$tree/libraries"
rm "$tree/relocate/program"
while read -r path; do
	cp -L "$tree/$path" "$tree/relocate/${path##*/}"
	chmod 755 "$tree/relocate/${path##*/}"
done <"$tree/libraries"
for path in "$tree"/relocate/*; do
	case ${path##*/} in
	ld-linux-*) ;;
	*) chroot "$tree" patchelf --force-rpath --set-rpath "$prefix/lib" "/relocate/${path##*/}" ;;
	esac
done
cp -L "$tree/$loader" "$tree/relocate/${loader##*/}"
# Keep these programs from loading the image's preloaded libraries and library cache. The replaced names keep their
# lengths.
LC_ALL=C sed -i -e 's,/etc/ld\.so\.preload,/.fcd/no-ldpreload,' -e 's,/etc/ld\.so\.cache,/.fcd/no-ldcache,' \
	"$tree/relocate/${loader##*/}"
# The programs look up users and hosts in the image's files only, and load none of the image's NSS modules.
LC_ALL=C sed -i 's,/etc/nsswitch\.conf,/.fcd/nsswitch.cnf,' "$tree/relocate/libc.so.6"
printf 'passwd: files\ngroup: files\nhosts: files dns\n' >"$to/nsswitch.cnf"
install -m 755 "$tree"/relocate/* "$to/lib/"
# sftp-server ends if its user has no name. enter passes the users, with an entry for this one, as descriptor 100.
mkdir "$to/lib/sftp"
LC_ALL=C sed 's,/etc/passwd,/dev/fd/100,' "$to/lib/libc.so.6" >"$to/lib/sftp/libc.so.6"
chmod 755 "$to/lib/sftp/libc.so.6"
while read -r path; do
	cp "$path" "$tree/relocate/program"
	case $path in
	*/sftp-server) libraries=$prefix/lib/sftp:$prefix/lib ;;
	*) libraries=$prefix/lib ;;
	esac
	chroot "$tree" patchelf --set-interpreter "$prefix/lib/${loader##*/}" --force-rpath --set-rpath "$libraries" \
		/relocate/program
	cat "$tree/relocate/program" >"$path"
done <"$tree/programs"

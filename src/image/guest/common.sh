# Functions of both kinds of PID 1. The script that includes them sets `state`, the directory for files that do not
# outlive a boot, `seed`, a directory in it, and `work_device`, the block device of the work disk.

say() { echo "fcd-init: $*" >/dev/console; }

link_descriptors() {
	ln -s /proc/self/fd /dev/fd
	ln -s /proc/self/fd/0 /dev/stdin
	ln -s /proc/self/fd/1 /dev/stdout
	ln -s /proc/self/fd/2 /dev/stderr
}

# The seed drive is a tar archive with config (key=value), host_key, authorized_keys, and optionally files.tar.
read_seed() {
	# sshd reads authorized_keys as the user who logs in. The archive's modes protect the other files.
	mkdir -m 711 "$seed"
	tar -C "$seed" -xf /dev/vdb || say "cannot read the seed drive /dev/vdb"
	host_name=
	address=
	gateway=
	address6=
	gateway6=
	dns=
	work_disk=
	chosen_init=fcd
	while IFS='=' read -r key value; do
		case $key in
		host_name) host_name=$value ;;
		address) address=$value ;;
		gateway) gateway=$value ;;
		address6) address6=$value ;;
		gateway6) gateway6=$value ;;
		dns) dns="$dns $value" ;;
		work_disk) work_disk=$value ;;
		init) chosen_init=$value ;;
		esac
	done <"$seed/config"
}

write_hosts() {
	printf '127.0.0.1\tlocalhost\n127.0.1.1\t%s\n::1\tlocalhost ip6-localhost ip6-loopback\n' "$host_name" >/etc/hosts
}

set_network() {
	ip link set lo up
	[ -n "$address" ] || return 0
	# The addresses are static. Router advertisements are ignored, and IPv6 addresses work at once, without a check for
	# duplicates.
	for setting in accept_ra accept_dad; do
		[ ! -e "/proc/sys/net/ipv6/conf/eth0/$setting" ] || echo 0 >"/proc/sys/net/ipv6/conf/eth0/$setting"
	done
	ip address add "$address" dev eth0 || say "cannot give eth0 the address $address"
	ip link set eth0 up || say "cannot bring eth0 up"
	[ -z "$gateway" ] || ip route add default via "$gateway" dev eth0 || say "cannot set the route by $gateway"
	set_ipv6
	[ -n "$dns" ] || return 0
	mkdir -p /etc
	rm -f /etc/resolv.conf
	for server in $dns; do
		echo "nameserver $server"
	done >/etc/resolv.conf
}

# Does nothing if the guest's kernel has no IPv6.
set_ipv6() {
	[ -n "$address6" ] && [ -e /proc/sys/net/ipv6/conf/eth0 ] || return 0
	ip -6 address add "$address6" dev eth0 || say "cannot give eth0 the address $address6"
	# On the bridge, the prefix of the address does not contain the gateway.
	[ -z "$gateway6" ] || { ip -6 route replace "$gateway6" dev eth0 &&
		ip -6 route replace default via "$gateway6" dev eth0; } || say "cannot set the route by $gateway6"
}

# Copies the files that the host adds to every guest. They replace existing files; existing directories keep their mode.
copy_files() {
	[ -e "$seed/files.tar" ] || return 0
	tar -C / -xf "$seed/files.tar" || say "cannot copy the files that the host gives"
	rm -f "$seed/files.tar"
}

# Mounts the work disk if the seed names a mount point. The disk may appear a moment after the others.
mount_work_disk() {
	[ -n "$work_disk" ] || return 0
	tries=0
	while [ ! -b "$work_device" ] && [ "$tries" -lt 500 ]; do
		tries=$((tries + 1))
		usleep 10000
	done
	mkdir -p "$work_disk"
	mount -t ext4 -o noatime "$work_device" "$work_disk" && return 0
	say "cannot mount the work disk $work_device"
	# Mount a read-only file system instead, so that nothing writes to the root disk by mistake.
	mount -t tmpfs -o ro,size=4k none "$work_disk"
}

set_traps() {
	trap power_off TERM INT
	# Make Ctrl-Alt-Del send SIGINT to PID 1 instead of resetting the guest.
	echo 0 >/proc/sys/kernel/ctrl-alt-del
	# shellcheck disable=SC3045
	ulimit -n 524288 && ulimit -S -n 65536
}

# Ends all processes, makes the disk consistent and powers off. Never returns.
power_off() {
	trap '' TERM INT
	say "shutting down"
	kill -TERM -1
	# A stopped process (SIGSTOP) handles SIGTERM only after it continues.
	kill -CONT -1
	wait_for_others
	kill -KILL -1
	# A process that still writes would prevent the remount as read-only.
	wait_for_others
	# Nothing may read the disk from here on, so load the programs that are used later now.
	sleep 0
	# The host passes fcd.off=reset if only a reset ends the VMM.
	key=o
	read -r command_line </proc/cmdline
	case " $command_line " in
	*' fcd.off=reset '*) key=b ;;
	esac
	mkfifo "$state/never"
	sync
	[ -z "$work_disk" ] || umount "$work_disk" || say "the work disk is still in use"
	if mount -o remount,ro /; then
		say "disk is clean"
	else
		say "disk synced, but still in use"
	fi
	# A power-off by ACPI ends the VMM on microvm and on q35. If it does not, reset the guest, which makes the VMM
	# exit because of -no-reboot.
	(sleep 5 && echo b >/proc/sysrq-trigger) &
	echo "$key" >/proc/sysrq-trigger
	read -r _ <"$state/never"
}

# Waits at most two seconds for other processes to exit.
wait_for_others() {
	tries=0
	while [ "$tries" -lt 40 ] && others_live; do
		tries=$((tries + 1))
		usleep 50000
	done
}

others_live() {
	for proc in /proc/[2-9]* /proc/1?*; do
		line=
		# Kernel threads have an empty command line, and a process may have exited since the listing.
		{ read -r line <"$proc/cmdline"; } 2>/dev/null
		[ -n "$line" ] && return 0
	done
	return 1
}

# Starts sshd, and starts it again when it ends. Never returns.
run() {
	start_sshd
	read -r up _ </proc/uptime
	say "ssh is up after $up s"
	# The wait reaps sshd and every orphan that init adopts.
	while :; do
		wait "$sshd"
		kill -0 "$sshd" 2>/dev/null && continue
		say "sshd ended; starting it again"
		sleep 1
		start_sshd
	done
}

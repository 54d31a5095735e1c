# Runs in a guest that is about to be saved. Prints "ready" and watches its seed drive. When the
# guest resumes from the snapshot, the drive has other content, which this script applies: the
# clock, random numbers and, in a new VM, the name, address and keys. In the original guest, which
# continues to run, the script times out.
# Before it, the daemon sets bb, the guest's busybox, and run, the directory of the seed.
seed=$run/seed

say() { echo "fcd-rejoin: $*" >/dev/console; }

# Bypasses the page cache, which still holds the old drive.
head_of_seed() { $bb dd if=/dev/vdb bs=4096 count=1 iflag=direct 2>/dev/null | $bb md5sum; }

read_seed() {
	$bb blockdev --flushbufs /dev/vdb
	$bb rm -rf "$seed.new"
	$bb mkdir -m 700 "$seed.new"
	$bb tar -C "$seed.new" -xf /dev/vdb || return 1
	host_name= address= gateway= address6= gateway6= dns= mac= machine_id= wake= now= random=
	while IFS='=' read -r key value; do
		case $key in
		host_name) host_name=$value ;;
		address) address=$value ;;
		gateway) gateway=$value ;;
		address6) address6=$value ;;
		gateway6) gateway6=$value ;;
		dns) dns="$dns $value" ;;
		mac) mac=$value ;;
		machine_id) machine_id=$value ;;
		wake) wake=$value ;;
		now) now=$value ;;
		random) random=$value ;;
		esac
	done <"$seed.new/config"
	# The seed that was last applied. It is not applied again.
	seen=
	[ -e "$run/rejoined" ] && read -r seen <"$run/rejoined"
	[ -n "$wake" ] && [ "$wake" != "$seen" ]
}

# Another guest may have started from the same memory, and would produce the same random numbers.
# The ioctl, RNDRESEEDCRNG of random(4), makes the kernel use the new bytes at once; without perl or
# the program of the guest runtime, the kernel does so within a minute.
set_random() {
	echo "$random" >/dev/urandom
	if [ -x /.fcd/lib/enter-reseed ]; then
		/.fcd/lib/enter-reseed
		return 0
	fi
	perl -e 'open(F, ">", "/dev/urandom") and ioctl(F, 0x5207, 0)' 2>/dev/null
}

set_name() {
	read -r old </proc/sys/kernel/hostname
	[ "$old" = "$host_name" ] && return 0
	echo "$host_name" >/proc/sys/kernel/hostname
	echo "$host_name" >/etc/hostname
	$bb sed -i "s/^127\.0\.1\.1[[:space:]].*/127.0.1.1 $host_name/" /etc/hosts
}

has_address() {
	read -r known </sys/class/net/eth0/address
	[ -n "$mac" ] && [ "$known" != "$mac" ] && return 1
	$bb ip -4 -o address show dev eth0 | $bb grep -qF " $address "
}

# Replaces the IPv6 address that the guest got from its earlier seed. Other addresses stay.
set_ipv6() {
	[ -e /proc/sys/net/ipv6/conf/eth0 ] || return 0
	old=$($bb sed -n 's/^address6=//p' "$seed/config")
	[ "$old$address6" = "" ] && return 0
	[ "$old" = "$address6" ] && $bb ip -6 -o address show dev eth0 | $bb grep -qF " $address6 " && return 0
	if [ -n "$old" ]; then
		$bb ip -6 address delete "$old" dev eth0
		$bb ip -6 route delete default dev eth0
	fi 2>/dev/null
	[ -n "$address6" ] || return 0
	echo 0 >/proc/sys/net/ipv6/conf/eth0/accept_dad
	$bb ip -6 address add "$address6" dev eth0 || say "cannot give eth0 the address $address6"
	[ -z "$gateway6" ] || { $bb ip -6 route replace "$gateway6" dev eth0 &&
		$bb ip -6 route replace default via "$gateway6" dev eth0; } || say "cannot set the route by $gateway6"
}

set_network() {
	[ -z "$address" ] && return 0
	has_address && return 0
	$bb ip link set eth0 down
	[ -z "$mac" ] || $bb ip link set eth0 address "$mac" || say "cannot give eth0 the address $mac"
	$bb ip address flush dev eth0
	$bb ip address add "$address" dev eth0 || say "cannot give eth0 the address $address"
	$bb ip link set eth0 up || say "cannot bring eth0 up"
	[ -z "$gateway" ] || $bb ip route add default via "$gateway" dev eth0 || say "cannot set the route by $gateway"
	[ -n "$dns" ] || return 0
	$bb rm -f /etc/resolv.conf
	for server in $dns; do
		echo "nameserver $server"
	done >/etc/resolv.conf
}

# The servers of connections are children of the listening server.
restart_sshd() {
	for proc in /proc/[0-9]*; do
		name= parent=
		{ read -r name <"$proc/comm"; } 2>/dev/null
		[ "$name" = sshd ] || continue
		parent=$($bb sed -n 's/^PPid:[[:space:]]*//p' "$proc/status" 2>/dev/null)
		{ read -r parent <"/proc/$parent/comm"; } 2>/dev/null
		[ "$parent" != sshd ] && kill -HUP "${proc#/proc/}"
	done
}

rejoin() {
	read_seed || return 1
	set_random
	[ -z "$now" ] || $bb date -s "@$now" >/dev/null
	[ -z "$machine_id" ] || echo "$machine_id" >/etc/machine-id
	set_name
	set_network
	set_ipv6
	same_key=
	$bb cmp -s "$seed/host_key" "$seed.new/host_key" && same_key=yes
	# Replace the files one by one, because somebody may log in at any time.
	for file in config authorized_keys host_key; do
		$bb mv -f "$seed.new/$file" "$seed/$file"
	done
	$bb rm -rf "$seed.new"
	[ -n "$same_key" ] || restart_sshd
	echo "$wake" >"$run/rejoined"
	say "resumed from a snapshot"
}

# Watches for a minute by this guest's own clock. If several watchers were saved, only the latest
# applies the seed.
watch() {
	trap '' HUP
	tries=0
	while [ "$tries" -lt 240 ]; do
		tries=$((tries + 1))
		$bb usleep 250000
		now_there=$(head_of_seed)
		[ "$now_there" = "$before" ] || [ "$now_there" = "$nothing" ] || [ -z "$now_there" ] && continue
		read -r last <"$run/watcher"
		[ "$last" = "$me" ] || return 0
		rejoin && return 0
	done
}

[ -x "$bb" ] || { echo "the guest has no $bb" >&2; exit 1; }
before=$(head_of_seed)
# The checksum of a drive that cannot be read.
nothing=$($bb md5sum </dev/null)
read -r uptime </proc/uptime
me="$$ $uptime"
echo "$me" >"$run/watcher"
# exec also closes the old descriptors, which would keep the connection open. A redirection of
# `watch` alone would not close them.
(exec </dev/null >/dev/null 2>&1; watch) &
echo ready

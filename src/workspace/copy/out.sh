# Prints the first line of a copy out of the guest, then the tar. $1: the path, which is absolute.
# $2: `follow`, to copy the target of a link. $3: `archive`, to record owners, hard links and
# attributes. $4: `named`, for entries that begin with the path's last component. $5: `count`, to
# print how much there is.
src=$1 follow=$2 archive=$3 named=$4 count=$5
trimmed=$src
while [ "${trimmed%/}" != "$trimmed" ]; do trimmed=${trimmed%/}; done
if [ -L "$src" ] && [ -z "$follow" ]; then
  kind='link'
elif [ -d "$src" ]; then
  kind='dir'
elif [ -f "$src" ]; then
  kind='file'
elif [ -e "$src" ]; then
  fail 74 "$src"
elif [ -e "$trimmed" ] || [ -L "$trimmed" ]; then
  fail 71 "$src"
else
  fail 70 "$src"
fi
set -- -c -f - --no-unquote --format=posix --pax-option=delete=atime,delete=ctime --sparse \
  --sparse-version=1.0 --numeric-owner
if [ -n "$archive" ]; then
  set -- "$@" --xattrs '--xattrs-include=user.*' --xattrs-include=security.capability
else
  set -- "$@" --hard-dereference --owner=0 --group=0
fi
if [ "$kind" = dir ] && [ -z "$named" ]; then
  cd "$src" || exit 73
  member=.
else
  cd "${trimmed%/*}/" || exit 73
  member=./${trimmed##*/}
  # tar does not follow a link that it is given, not even one with a slash at its end.
  if [ "$kind" = dir ] && [ -L "$trimmed" ]; then member=$member/.; fi
  if [ "$kind" = file ] && [ -n "$follow" ]; then set -- "$@" -h; fi
fi
bytes=
if [ -n "$count" ]; then bytes=$(du -s -B 1 -- "$member" 2>/dev/null); fi
printf 'fcd-copy 1 %s %s\n' "$kind" "${bytes%%[!0-9]*}"
tar "$@" -- "$member"
# Status 1 means that a file changed while it was read. tar names it.
[ $? -le 1 ] || exit 78

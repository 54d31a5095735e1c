# Unpacks the tar on standard input beside its destination, then moves everything there. So a copy
# that is cut off leaves no half file. $1: what the tar has: `file` or `dir`, named $3; `contents`,
# of a directory; `many`, several of these; or `tar`, anything. $2: the destination, which is
# absolute. $4: the name of the last entry, which shows that the tar is complete. $5: `archive`, to
# keep owners and attributes. $6: the directory of this guest that is copied, or empty.
what=$1 dst=$2 name=$3 last=$4 archive=$5 origin=$6
umask 0
exists() { [ -e "$1" ] || [ -L "$1" ]; }
is_real_dir() { [ -d "$1" ] && [ ! -L "$1" ]; }
final=
if [ -d "$dst" ]; then
  where=$dst
  case $what in file | dir) final=${dst%/}/$name ;; esac
else
  trimmed=$dst
  while [ "${trimmed%/}" != "$trimmed" ]; do trimmed=${trimmed%/}; done
  case $what in
  file) if [ "$trimmed" != "$dst" ]; then if exists "$trimmed"; then fail 71 "$dst"; else fail 70 "$dst"; fi; fi ;;
  dir | contents) if exists "$trimmed"; then fail 72 "$trimmed"; fi ;;
  *) if exists "$trimmed"; then fail 71 "$dst"; else fail 70 "$dst"; fi ;;
  esac
  where=${trimmed%/*}/
  final=$trimmed
  if [ ! -d "$where" ]; then if exists "${where%/}"; then fail 71 "$where"; else fail 70 "$where"; fi; fi
fi
if [ -n "$final" ] && exists "$final"; then
  if [ "$what" = file ]; then
    if is_real_dir "$final"; then fail 75 "$final"; fi
    if [ -e "$final" ] && [ ! -f "$final" ] && [ ! -d "$final" ]; then fail 74 "$final"; fi
    # Links such as /dev/stdout may lead to a file.
    if [ "$(cd "$where" && pwd -P)" = /dev ]; then fail 74 "$final"; fi
  elif ! is_real_dir "$final"; then
    fail 72 "$final"
  fi
fi
real() { (cd "$1" && pwd -P && echo x); }
if [ -n "$origin" ]; then
  from=$(real "$origin") to=$(real "$where") || exit 73
  case ${to%??}/ in "${from%??}"/*) fail 77 "$where" ;; esac
fi
stage=$(mktemp -d "${where%/}/.fcctl-cp-XXXXXXXXXX" && echo x) || exit 73
stage=${stage%??}
trap 'cd /; rm -rf "$stage" 2>/dev/null || { chmod -R u+rwX "$stage"; rm -rf "$stage"; } 2>/dev/null' EXIT
trap 'exit 143' HUP INT TERM PIPE
tree=$stage/tree
mkdir -m 755 "$tree" || exit 73
set -- -x -f - -C "$tree" --delay-directory-restore --warning=no-timestamp
if [ -n "$archive" ]; then
  set -- "$@" --same-permissions --xattrs '--xattrs-include=user.*'
  # Only root can give files away. What others copy belongs to them, as with cp -a.
  if [ "$(id -u)" = 0 ]; then
    set -- "$@" --same-owner --numeric-owner --xattrs-include=security.capability
  else
    set -- "$@" --no-same-owner
  fi
else
  set -- "$@" --no-same-owner --no-same-permissions
fi
tar "$@" || exit 79
[ -e "$tree/$last" ] || exit 76
rm -f "$tree/$last"
# Adds links to the unpacked files, which takes no space. The files are copied where the destination
# has another file system mounted.
if [ -n "$archive" ]; then set -- -dR --preserve=all; else set -- -dR; fi
place() { cp -l --remove-destination "$@" 2>/dev/null || cp --remove-destination "$@"; }
case $what in
file)
  if is_real_dir "$tree/$name"; then exit 76; fi
  mv -fT "$tree/$name" "$final" || exit 73
  exit 0
  ;;
dir) from=$tree/$name ;;
*) from=$tree ;;
esac
is_real_dir "$from" || exit 76
if [ -n "$final" ] && ! exists "$final" && mv -T "$from" "$final" 2>/dev/null; then exit 0; fi
case $what$archive in
manyarchive | tararchive)
  # The destination keeps its own owner and mode.
  cd "$from" || exit 73
  # shellcheck disable=SC2016 # the inner shell expands it
  find . -mindepth 1 -maxdepth 1 -print0 | xargs -0 -r sh -c '
    to=$0
    cp -dR --preserve=all -l --remove-destination -t "$to" -- "$@" 2>/dev/null ||
      cp -dR --preserve=all --remove-destination -t "$to" -- "$@"' "${dst%/}/." || exit 73
  ;;
*) place "$@" -T "$from" "${final:-${dst%/}/.}" || exit 73 ;;
esac

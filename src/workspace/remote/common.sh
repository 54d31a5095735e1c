# Precedes each script. $1: the workspace, $2: its state directory. Both are absolute paths that fcd
# chose.
set -eu
umask 022
export LC_ALL=C GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_OPTIONAL_LOCKS=0 GIT_TERMINAL_PROMPT=0
# Never fetch what a partial clone lacks.
export GIT_NO_LAZY_FETCH=1 GIT_ALLOW_PROTOCOL=none
unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
W=$1
S=$2
P=$S/git
M=$S/meta
shift 2
die() {
  code=$1
  shift
  printf 'fcd: %s\n' "$*" >&2
  exit "$code"
}
# Runs git on the baseline with the workspace as its work tree. Nothing that the guest configured
# applies.
g() { git --git-dir="$P" --work-tree="$W" "$@"; }
# Runs git on the guest's own repository.
u() { git -c core.fsmonitor=false -c core.hooksPath=/dev/null -c safe.directory='*' -C "$W" "$@"; }
mnt() { if command -v mount >/dev/null; then mount "$@"; else busybox mount "$@"; fi; }
kind_of() { if [ -f "$S/kind" ]; then cat "$S/kind"; elif [ -e "$W/.git" ]; then echo git; else echo plain; fi; }
# Waits until the processes of an earlier connection have ended.
alone() {
  command -v flock >/dev/null || return 0
  exec 9>"$S/alone"
  flock -w 60 9 || die 71 "an earlier import or export still runs in the guest"
}
make_private() {
  rm -rf "$P.new"
  git init -q --bare --template= --object-format="$1" "$P.new"
  mkdir -p "$P.new/info" "$P.new/objects/pack"
  printf '* -text !eol -filter -ident -working-tree-encoding !diff\n' >"$P.new/info/attributes"
  printf '%s\n' '[core]' 'bare = false' 'fileMode = true' 'symlinks = true' 'autocrlf = false' 'protectNTFS = false' \
    'protectHFS = false' 'compression = 1' 'looseCompression = 1' 'logAllRefUpdates = false' '[gc]' 'auto = 0' >>"$P.new/config"
  # Sync before the rename, so that a power cut cannot leave the name without its content.
  sync -f "$P.new"
  mv "$P.new" "$P"
}
# Lists everything in the tree that is not a git directory, with find's conditions.
found() { find . -mindepth 1 -iname .git -prune -o \( "$@" \) -printf '%P\0'; }
# Lists files that the baseline's index does not have and git does not ignore. A nested repository
# ends with a slash. $1: a file with paths below which nothing is listed.
others() {
  case $(kind_of) in
  plain | raw) found -type f -o -type l ;;
  *)
    apart=$1
    if [ -f .git/info/exclude ]; then set -- --exclude-from=.git/info/exclude; else set --; fi
    if [ -s "$apart" ]; then
      sed -z 's,^,:(top\,exclude\,literal),' "$apart" |
        xargs -0 git --git-dir="$P" --work-tree="$W" ls-files -z -o --exclude-standard "$@" -- .
    else
      g ls-files -z -o --exclude-standard "$@"
    fi
    ;;
  esac
}
# Lists the places that belong to the host: submodules and repositories whose files were not sent.
# Each record of $S/submodules is "x" if the host has files there or "-" if not, then the commit or
# "-", then the path. A submodule that only the guest has checked out does not belong to the tree
# either.
apart() {
  [ -f "$S/submodules" ] || return 0
  sed -z -n 's/^x [^ ]* //p' "$S/submodules"
  sed -z -n 's/^- [^ ]* \(.*\)$/\1\/.git/p' "$S/submodules" |
    find -files0-from - -maxdepth 0 -printf '%h\0' 2>/dev/null || :
}
# Lists those of these places where the guest has its own files. A clean checkout of the recorded
# commit does not count.
strayed() {
  [ -f "$S/submodules" ] || return 0
  apart | sort -z >"$1/apart.now"
  # shellcheck disable=SC2016 # the inner shell expands it
  sed -z 's/^[^ ]* //' "$S/submodules" | xargs -0 -r -n 1 sh -c '
    oid=${0%% *} path=${0#* }
    if [ ! -e "./$path" ] && [ ! -L "./$path" ]; then [ "$oid" = - ] || printf "%s\0" "$path"; exit 0; fi
    if [ -L "./$path" ] || [ ! -d "./$path" ]; then printf "%s\0" "$path"; exit 0; fi
    [ -n "$(ls -A "./$path" 2>/dev/null)" ] || exit 0
    unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
    v() { git -c core.fsmonitor=false -c safe.directory="*" -C "./$path" "$@" 2>/dev/null; }
    if [ -e "./$path/.git" ] && [ "$(v rev-parse HEAD)" = "$oid" ] && [ -z "$(v status --porcelain | head -c 1)" ] &&
      [ -z "$(v rev-list -n 1 --all --not --remotes HEAD)" ]; then exit 0; fi
    printf "%s\0" "$path"' | sort -z | comm -z -12 - "$1/apart.now"
}
# Prints "sum size path" for each .git path on stdin. The checksum covers the refs, so it changes
# with the repository's history.
refs_of() {
  # shellcheck disable=SC2016 # the inner shell expands it
  xargs -0 -r -n 1 sh -c '
    sum=$(cd "./$0" 2>/dev/null && { cat HEAD packed-refs 2>/dev/null; find refs -type f 2>/dev/null | sort | xargs -r cat; } | cksum)
    printf "%s %s\0" "$sum" "$0"'
}
# Lists the .git of every repository that the guest created in the tree, or whose history it
# changed.
repositories() {
  {
    case $(kind_of) in
    plain | raw) find . -mindepth 1 -iname .git -prune -printf '%P\0' ;;
    *)
      if [ "$(kind_of)" = files ] && [ -e .git ]; then printf '.git\0'; fi
      sed -z 's/$/.git/' "$1/inside"
      g ls-files -z | sed -z -n ':a;s,/[^/]*$,,;tp;b;:p;p;ba' | sort -zu |
        find -files0-from - -mindepth 1 -maxdepth 1 -name .git -printf '%p\0' 2>/dev/null || :
      ;;
    esac
  } | sort -zu >"$1/repositories"
  if [ -s "$S/repositories" ]; then
    refs_of <"$1/repositories" | sort -z | comm -z -23 - "$S/repositories" | sed -z 's/^[^ ]* [^ ]* //' | sort -z
  else
    cat "$1/repositories"
  fi
}
# Matches paths with a component such as .GIT, which git also takes for a git directory.
git_like='/\(^\|\/\)\.[gG][iI][tT]\(\/\|$\)/'
# Lists ignored files that the guest's repository tracks because they were added by force.
forced() {
  [ -e .git ] || return 0
  (
    unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
    u ls-files -z -c -i --exclude-standard 2>/dev/null || :
  ) | find -files0-from - -maxdepth 0 \( -type f -o -type l \) -print0 2>/dev/null || :
}
# Lists the tracked files of repositories that the guest created. Reads their paths, each with a
# trailing slash.
tracked_inside() {
  # shellcheck disable=SC2016 # the inner shell expands it
  xargs -0 -r -n 1 sh -c '
    unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
    prefix=$(printf "%s." "$0" | sed -e "s/[\\\\&,]/\\\\&/g" -e "\$!s/\$/\\\\/")
    git -c core.fsmonitor=false -c safe.directory="*" -C "./$0" ls-files -z -c 2>/dev/null | sed -z "s,^,${prefix%.},"' |
    sed -z "${git_like}d" | find -files0-from - -maxdepth 0 \( -type f -o -type l \) -print0 2>/dev/null || :
}
# New blobs go into one uncompressed pack per process, because writing and deflating one file per
# blob is slow.
store='-c core.bigFileThreshold=1 -c core.compression=0'
# shellcheck disable=SC2086 # $store is several words
add() { g $store update-index -z --add --remove --replace --stdin; }
# shellcheck disable=SC2086 # $store is several words
# Creates blobs of the baseline's content for those paths in the file $1 whose content only the
# stored archive has. $2: a directory to unpack to, which is removed afterwards.
recall() {
  if [ ! -f "$S/tree.tar" ] || [ ! -s "$1" ]; then return 0; fi
  mkdir "$2"
  if [ "$(tr -cd '\0' <"$1" | wc -c)" -le 2000 ]; then
    tar -x --no-same-owner -C "$2" -f "$S/tree.tar" --null --verbatim-files-from -T "$1" 2>&1 | grep -v -e 'Not found in archive' -e 'Exiting with' >&2 || :
  else
    tar -x --no-same-owner -C "$2" -f "$S/tree.tar"
  fi
  (
    cd "$2"
    GIT_INDEX_FILE=$2.index git --git-dir="$P" --work-tree="$2" $store update-index -z --add --remove --stdin <"$1"
  )
  rm -rf "$2" "$2.index"
}
# shellcheck disable=SC2086 # $store is several words
# Updates the index $1, a copy of the baseline's index, to the present state of the tree. $2: a
# directory for lists. Files in repositories that the guest created count as files of the tree.
# $2/left gets what cannot be part of the tree: a letter, a space and a path. r: the .git of a
# repository, s: a place that belongs to the host, n: a name that git rejects.
snapshot() {
  GIT_INDEX_FILE=$1
  export GIT_INDEX_FILE
  if [ -f "$1" ]; then
    g $store add -u
    # If a repository has replaced a file, git records the repository's commit. Remove that entry.
    g ls-files -s -z | sed -z -n 's/^160000 [^	]*	//p' | g update-index -z --force-remove --stdin
  fi
  apart >"$2/apart"
  others "$2/apart" >"$2/others"
  : >"$2/inside"
  mark=.fcd-inside-$$
  empty=$(g hash-object --stdin </dev/null)
  depth=0
  # Once the index has a path below a repository, git treats the repository as an ordinary
  # directory.
  while [ "$depth" -lt 32 ] && sed -z -n '/\/$/p' "$2/others" | sort -z | comm -z -23 - "$2/inside" >"$2/found" && [ -s "$2/found" ]; do
    sed -z "s,^\(.*\)/\$,100644 $empty 0	\1/$mark," "$2/found" | g update-index -z --index-info
    sort -z "$2/found" "$2/inside" >"$2/inside.new"
    mv "$2/inside.new" "$2/inside"
    others "$2/apart" >"$2/others"
    depth=$((depth + 1))
  done
  sed -z "s,\$,$mark," "$2/inside" | g update-index -z --force-remove --stdin
  sed -z -n "${git_like}p" "$2/others" | sed -z 's/^/n /' >"$2/left"
  sed -z -e '/\/$/d' -e "${git_like}d" "$2/others" | add
  { forced && tracked_inside <"$2/inside"; } >"$2/forced"
  if [ -s "$2/forced" ] && ! add <"$2/forced" 2>/dev/null; then
    xargs -0 -r -n 1 git --git-dir="$P" --work-tree="$W" update-index --add -- <"$2/forced" 2>/dev/null || :
  fi
  repositories "$2" | sed -z -e '/\(^\|\/\)\.git$/{s/^/r /;b' -e '}' -e 's/^/n /' >>"$2/left"
  strayed "$2" | sed -z 's/^/s /' >>"$2/left"
}

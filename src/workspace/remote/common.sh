# Comes before each script. $1: the workspace, $2: its state directory; both absolute, made by us.
set -eu
umask 022
export LC_ALL=C GIT_CONFIG_NOSYSTEM=1 GIT_CONFIG_GLOBAL=/dev/null GIT_OPTIONAL_LOCKS=0 GIT_TERMINAL_PROMPT=0
# What a partial clone lacks is not fetched for us.
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
# git on the baseline, the workspace as its work tree: nothing that the guest configured counts.
g() { git --git-dir="$P" --work-tree="$W" "$@"; }
# git on the guest's own repository.
u() { git -c core.fsmonitor=false -c core.hooksPath=/dev/null -c safe.directory='*' -C "$W" "$@"; }
mnt() { if command -v mount >/dev/null; then mount "$@"; else busybox mount "$@"; fi; }
kind_of() { if [ -f "$S/kind" ]; then cat "$S/kind"; elif [ -e "$W/.git" ]; then echo git; else echo plain; fi; }
# What an earlier connection left behind ends first, with all that it started.
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
  # A power cut must not leave the name without what is in it.
  sync -f "$P.new"
  mv "$P.new" "$P"
}
# Everything in the tree that is no git directory, as find sees it.
found() { find . -mindepth 1 -iname .git -prune -o \( "$@" \) -printf '%P\0'; }
# What the baseline's index does not have and git does not ignore.
others() {
  case $(kind_of) in
  plain | raw) found -type f -o -type l ;;
  *)
    if [ -f .git/info/exclude ]; then set -- --exclude-from=.git/info/exclude; else set --; fi
    g ls-files -z -o --exclude-standard "$@" | sed -z '/\/$/d'
    ;;
  esac
}
# Tracked by the guest's repository although ignored: added by force.
forced() {
  [ -e .git ] || return 0
  (
    unset GIT_INDEX_FILE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES
    u ls-files -z -c -i --exclude-standard 2>/dev/null || :
  ) | find -files0-from - -maxdepth 0 \( -type f -o -type l \) -print0 2>/dev/null || :
}
# New blobs go into one pack for each process, not into a file each, and not deflated: that is what takes time.
store='-c core.bigFileThreshold=1 -c core.compression=0'
# shellcheck disable=SC2086 # $store is several words
add() { g $store update-index -z --add --remove --replace --stdin; }
# shellcheck disable=SC2086 # $store is several words
# Makes blobs of the baseline's content of the paths in the file $1, where only the archive that was sent has it.
# $2: a directory to unpack to, which is removed again.
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
# Brings the index $1, a copy of the baseline's, to what is there now. $2: a directory for lists.
snapshot() {
  GIT_INDEX_FILE=$1
  export GIT_INDEX_FILE
  if [ -f "$1" ]; then g $store add -u; fi
  others >"$2/others"
  add <"$2/others"
  forced >"$2/forced"
  if [ -s "$2/forced" ] && ! add <"$2/forced" 2>/dev/null; then
    xargs -0 -r -n 1 git --git-dir="$P" --work-tree="$W" update-index --add -- <"$2/forced" 2>/dev/null || :
  fi
}

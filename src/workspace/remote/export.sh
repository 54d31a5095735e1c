# Prints the patch or the tree. Changes nothing in the workspace. $1: patch or tree.
what=$1
[ -f "$S/baseline" ] || [ -e "$S/dirty" ] || die 67 "there is no workspace"
if [ -e "$S/dirty" ]; then die 66 "an import was interrupted"; fi
[ -d "$W" ] || die 67 "$W is gone"
alone
cd "$W"
rm -rf "$S"/export.*
tmp=$(mktemp -d "$S/export.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
trap 'exit 143' HUP INT TERM PIPE
mkdir -p "$tmp/objects/pack"
export GIT_OBJECT_DIRECTORY="$tmp/objects" GIT_ALTERNATE_OBJECT_DIRECTORIES="$P/objects"
# Preserve the index's time. git rereads files that are as young as their index (racy-git),
# comparing whole seconds only.
cp -p "$S/index" "$tmp/index"
snapshot "$tmp/index" "$tmp"
base=$(cat "$S/baseline")
# The list of what cannot be exported comes first. It is truncated if it is too long.
head -c 262144 "$tmp/left" >"$tmp/left.cut"
printf 'fcd-export 1 %s %s\n' "$(tr -cd '\0' <"$tmp/left" | wc -c)" "$(wc -c <"$tmp/left.cut")"
cat "$tmp/left.cut"
if [ "$what" = patch ]; then
  g diff-index --cached --name-only -z --no-renames --diff-filter=DMT "$base" >"$tmp/old"
  recall "$tmp/old" "$tmp/recall"
  g -c core.quotePath=true diff-index --cached -p --binary --full-index --no-renames --no-ext-diff --no-textconv --no-color \
    --src-prefix=a/ --dst-prefix=b/ "$base"
else
  case $(kind_of) in
  plain | raw) found -type f -o -type l -o -type d >"$tmp/list" ;;
  *) g ls-files -z >"$tmp/list" ;;
  esac
  # Status 1 means that a file changed while it was read.
  # The POSIX format stores the exact time of each file.
  tar -c -f - --format=posix --pax-option=delete=atime,delete=ctime --sparse --sparse-version=1.0 --hard-dereference --numeric-owner --owner=0 --group=0 --no-recursion --null \
    --verbatim-files-from -T "$tmp/list" || [ $? -eq 1 ]
fi

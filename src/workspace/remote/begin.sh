# Runs before an import: marks the workspace dirty and prints what the guest changed since the last
# complete import.
for tool in git tar find xargs comm sort cut sed head cksum; do
  command -v "$tool" >/dev/null || die 68 "$tool is not installed in the guest"
done
if [ -L "$W" ]; then die 65 "$W is a symbolic link"; fi
if [ -e "$W" ] && [ ! -d "$W" ]; then die 65 "$W is not a directory"; fi
gone=0
[ -d "$W" ] || gone=1
mkdir -p "$W" "$S"
alone
: >"$S/dirty"
sync "$S/dirty" "$S"
if [ -e "$S/readonly" ]; then mnt -o remount,rw,bind "$W" 2>/dev/null || :; fi
cd "$W"
# Remove the locks of a git process that was killed.
rm -f "$S"/*.lock
if [ -e "$S/repository" ]; then
  find .git -maxdepth 1 -name '*.lock' -type f -delete 2>/dev/null || :
  find .git/refs -name '*.lock' -type f -delete 2>/dev/null || :
fi
# After a power cut, remove a repository that was only half created and a baseline that cannot be
# read.
if [ -e "$S/init" ]; then rm -rf .git "$S/init"; fi
if [ -d "$P" ] && ! g rev-parse --git-dir >/dev/null 2>&1; then rm -rf "$P" "$S/index" "$S/baseline"; fi
# If the guest removed the directory, or emptied a repository's directory, that does not count as a
# change to keep: the whole tree is sent again.
if [ "$(kind_of)" = git ] && [ -z "$(ls -A)" ]; then gone=1; fi
if [ "$gone" = 1 ]; then
  for file in index baseline sent dirs pending head kind raw readonly tree.tar rules.exclude rules.attributes rules.sparse-checkout; do
    rm -f "$S/$file"
  done
fi
rm -rf "$S"/export.* "$S/current.index" "$S/work" "$S/recall" "$S/recall.index" "$S/tree.new" "$M"
mkdir "$S/work"
: >"$S/changed"
if [ -f "$S/index" ] && [ -f "$S/baseline" ]; then
  cp -p "$S/index" "$S/current.index"
  base=$(cat "$S/baseline")
elif [ -n "$(ls -A)" ]; then
  [ -d "$P" ] || make_private sha1
  base=$(g hash-object -t tree -w --stdin </dev/null)
fi
if [ -n "${base-}" ]; then
  snapshot "$S/current.index" "$S/work"
  # Files that an interrupted import wrote do not count as changes by the guest.
  touch "$S/pending"
  if [ -e "$S/raw" ]; then
    # The names in a raw tar were not known in advance, so every file counts as written by the
    # import. No raw tar is accepted while the guest has changed files.
    found -type f -o -type l | sort -zu - "$S/pending" >"$S/pending.new"
    mv "$S/pending.new" "$S/pending"
  fi
  {
    g diff-index --cached --name-only -z --no-renames "$base"
    sed -z 's/^..//' "$S/work/left"
  } | sort -zu | comm -z -23 - "$S/pending" >"$S/changed"
fi
rm -rf "$S/work"
printf 'fcd-begin 1\n'
cat "$S/changed"

# Runs after the stream was verified: writes the guest's index and the baseline, then marks the
# workspace complete. Prints the paths that were kept. $1: 1 for read-only, $2: 1 to replace what
# the guest changed, $3: the directory in which commands start.
readonly_=$1
overwrite=$2
subdir=$3
[ -e "$S/dirty" ] && [ -f "$M/kind" ] && [ -f "$M/put" ] || die 66 "no import was received"
alone
cd "$W"
kind=$(cat "$M/kind")
if [ "$kind" = raw ]; then
  found -type f -o -type l | sort -z >"$M/sent"
  cp "$M/sent" "$M/put"
fi
: >"$M/differ"
if [ -f "$M/exclude" ]; then cp "$M/exclude" "$P/info/exclude"; else rm -f "$P/info/exclude"; fi
new=$S/index.new
rm -f "$new" "$new.lock"
export GIT_INDEX_FILE="$new"
if [ -f "$S/index" ] && [ "$kind" != raw ]; then
  cp -p "$S/index" "$new"
  g ls-files -z | comm -z -23 - "$M/sent" | g update-index -z --force-remove --stdin
else
  g read-tree --empty
fi
# Most files match git's index or the previous baseline. Refreshing the index finds them by hashing
# and stores nothing.
if [ -s "$M/seed" ]; then g update-index -z --index-info <"$M/seed"; fi
g update-index -q --refresh >/dev/null || :
# The content of the remaining files is stored if there is little of it. Otherwise the archive is
# kept and searched on demand.
archive=0
if [ -f "$S/tree.new" ]; then
  g ls-files -z | comm -z -13 - "$M/put" >"$M/fresh"
  g diff-files --name-only -z | sort -zu - "$M/fresh" | comm -z -12 - "$M/put" >"$M/unknown"
  bytes=$(du -cb --files0-from="$M/unknown" 2>/dev/null | tail -n 1 | cut -f1)
  if [ -f "$S/tree.tar" ] || [ "${bytes:-0}" -gt 8388608 ] || [ "$(tr -cd '\0' <"$M/unknown" | wc -c)" -gt 2000 ]; then
    archive=1
  fi
fi
if [ "$archive" = 1 ]; then
  # Do not use $store here: its pack setting would deflate files that only need hashing.
  g update-index -z --add --remove --replace --info-only --stdin <"$M/put"
else
  add <"$M/put"
fi
if [ -s "$M/kept" ]; then
  GIT_INDEX_FILE="$S/current.index" g ls-files -s -z | sort -z >"$M/now"
  sort -z "$M/kept" >"$M/host"
  # Record files that the guest changed to what the host has now.
  comm -z -12 "$M/now" "$M/host" | g update-index -z --index-info
  comm -z -13 "$M/now" "$M/host" | cut -z -f2- >>"$M/differ"
  recall "$M/differ" "$S/recall"
  g update-index -q --refresh >/dev/null || :
fi
if [ "$overwrite" = 0 ]; then
  # Report files that the guest changed or created and that the host does not have.
  comm -z -23 "$S/changed" "$M/sent" |
    find -files0-from - -maxdepth 0 -print0 2>/dev/null >>"$M/differ" || :
fi
cp -p "$new" "$S/repo.index"
tree=$(g write-tree --missing-ok)

set_head() {
  if [ "$branch" = - ]; then
    u update-ref --no-deref -m 'fcd: import' HEAD "$oid"
  else
    u symbolic-ref HEAD "$branch"
    if [ "$oid" = - ]; then u update-ref -d "$branch" 2>/dev/null || :; else u update-ref -m 'fcd: import' "$branch" "$oid"; fi
  fi
}
set_shallow() {
  if [ -s "$M/commits" ] && [ -f .git/shallow ]; then
    sort .git/shallow | comm -23 - "$M/commits" >"$M/shallow.old"
  else
    : >"$M/shallow.old"
  fi
  touch "$M/shallow"
  sort -u "$M/shallow" "$M/shallow.old" >"$M/shallow.new"
  if [ -s "$M/shallow.new" ]; then cp "$M/shallow.new" .git/shallow; else rm -f .git/shallow; fi
}
set_index() {
  GIT_INDEX_FILE=$S/repo.index
  [ -e "$M/index" ] || : >"$M/index"
  g ls-files -s -z | sort -z >"$M/now"
  sort -z "$M/index" >"$M/host"
  comm -z -23 "$M/now" "$M/host" | cut -z -f2- | u update-index -z --force-remove --stdin
  comm -z -13 "$M/now" "$M/host" | u update-index -z --index-info
  if [ -f "$M/intent-to-add" ]; then
    u --literal-pathspecs add -f -N --pathspec-from-file="$M/intent-to-add" --pathspec-file-nul 2>/dev/null || :
  fi
  set_filters
  u update-index -q --refresh >/dev/null 2>&1 || :
  for flag in skip-worktree assume-unchanged; do
    if [ -f "$M/$flag" ]; then u update-index -z --$flag --stdin <"$M/$flag"; fi
  done
  rm -f .git/index.lock
  mv "$S/repo.index" .git/index
}
set_rules() {
  mkdir -p .git/info
  for file in exclude attributes sparse-checkout; do
    # Keep the file if the guest has changed it.
    if cmp -s ".git/info/$file" "$S/rules.$file" || [ ! -e ".git/info/$file" ] || [ "$overwrite" = 1 ]; then
      if [ -f "$M/$file" ]; then cp "$M/$file" ".git/info/$file"; else rm -f ".git/info/$file"; fi
    fi
    if [ -f "$M/$file" ]; then cp "$M/$file" "$S/rules.$file"; else rm -f "$S/rules.$file"; fi
  done
}
# Updates the guest's repository, unless the guest has moved its HEAD.
repository() {
  { IFS= read -r branch && IFS= read -r oid; } <"$M/head"
  format=$(cat "$M/format")
  if [ -e .git ] || [ -L .git ]; then
    at="$(u symbolic-ref -q HEAD || echo -) $(u rev-parse -q --verify HEAD || echo -)"
    if ! { [ -f "$S/head" ] && grep -Fxq -e "$at" "$S/head"; }; then
      if [ "$overwrite" = 0 ]; then
        printf '.git/HEAD\0' >>"$M/differ"
        return 0
      fi
      at=${at##* }
      if [ "$at" != - ]; then u update-ref "refs/fcd/before/$at" "$at" || :; fi
    fi
    if [ "$(u rev-parse --show-object-format 2>/dev/null)" != "$format" ]; then rm -rf .git; fi
  fi
  printf '%s\n' "${at-refs/heads/main -}" "refs/heads/main -" "$branch -" "$branch $oid" >"$S/head"
  if [ ! -e .git ]; then
    : >"$S/init"
    sync "$S/init" "$S"
    git init -q --template= --object-format="$format" -b main "$W"
    if [ -f "$M/config" ]; then cat "$M/config" >>.git/config; fi
    sync -f .git
    rm -f "$S/init"
  fi
  mkdir -p .git/objects/pack
  if [ -f "$M/name" ]; then
    name=$(cat "$M/name")
    for file in "$name.pack" "$name.idx"; do
      [ -e ".git/objects/pack/$file" ] || ln "$P/objects/pack/$file" ".git/objects/pack/$file" 2>/dev/null ||
        cp "$P/objects/pack/$file" ".git/objects/pack/$file"
    done
    # Mark the pack as a promisor's, so that git does not consider the objects that it lacks
    # corrupt.
    if [ -f "$M/partial" ]; then : >".git/objects/pack/$name.promisor"; fi
  fi
  set_shallow
  if [ -f "$M/tags" ]; then sed 's/^\([^ ]*\) \(.*\)$/update \2 \1/' "$M/tags" | u update-ref --stdin 2>/dev/null || :; fi
  set_head
  set_rules
  if [ -f "$M/global-attributes" ]; then
    mkdir -p .git/fcd
    cp "$M/global-attributes" .git/fcd/attributes
    u config core.attributesFile "$W/.git/fcd/attributes"
  fi
  set_index
  printf '%s\n' "$branch $oid" >"$S/head"
}
if [ "$kind" = git ]; then
  : >"$S/repository"
  (repository)
  rm -f "$S/repository"
fi

if [ -n "$subdir" ]; then mkdir -p "./$subdir" 2>/dev/null || :; fi
if [ "$archive" = 1 ]; then mv "$S/tree.new" "$S/tree.tar"; else rm -f "$S/tree.new" "$S/tree.tar"; fi
printf '%s\n' "$tree" >"$S/baseline.new"
# Sync before the renames, so that the index and the baseline describe files that are completely on
# disk.
sync -f "$S"
mv "$new" "$S/index"
mv "$S/baseline.new" "$S/baseline"
printf '%s\n' "$kind" >"$S/kind"
# Record repositories that the host sent as files, except those that the guest keeps.
if [ "$kind" = raw ]; then find . -mindepth 1 -iname .git -prune -printf '%P\0' >"$M/repositories"; fi
for file in repositories submodules; do [ -e "$M/$file" ] || : >"$M/$file"; done
sort -z "$M/repositories" >"$M/repositories.sent"
if [ "$overwrite" = 0 ]; then cat "$S/changed"; fi | comm -z -23 "$M/repositories.sent" - | refs_of | sort -z >"$S/repositories.new"
mv "$S/repositories.new" "$S/repositories"
mv "$M/submodules" "$S/submodules"
count=$(tr -cd '\0' <"$M/sent" | wc -c)
mv "$M/sent" "$S/sent"
mv "$M/dirs" "$S/dirs"
sort -zu "$M/differ" >"$S/differ"
rm -rf "$M" "$S/raw" "$S/pending" "$S/changed" "$S/current.index" "$S/repo.index"
sync -f "$W"
sync -f "$S"
if [ "$readonly_" = 1 ]; then
  : >"$S/readonly"
  if ! mnt -o remount,ro,bind "$W" 2>/dev/null; then
    mnt -o bind "$W" "$W"
    mnt -o remount,ro,bind "$W"
  fi
elif [ -e "$S/readonly" ]; then
  rm -f "$S/readonly"
fi
rm -f "$S/dirty"
sync "$S"
printf 'fcd-finish 1 %s\n' "$count"
cat "$S/differ"

# Reads the payload on stdin. $1: 1 to replace what the guest changed.
overwrite=$1
[ -e "$S/dirty" ] || die 66 "no import was started"
alone
IFS= read -r line || die 69 "the stream ends before its first line"
bytes=${line#fcd-import 1 }
case $bytes in '' | *[!0-9]*) die 70 "the stream has an unknown form" ;; esac
rm -rf "$M"
mkdir "$M"
head -c "$bytes" | tar -x --no-same-owner --warning=no-timestamp -f - -C "$M"
kind=$(cat "$M/kind")
for file in sent dirs kept seed; do [ -e "$M/$file" ] || : >"$M/$file"; done
format=sha1
if [ -f "$M/format" ]; then format=$(cat "$M/format"); fi
if [ -d "$P" ] && [ "$(g rev-parse --show-object-format)" != "$format" ]; then
  rm -rf "$P" "$S/index" "$S/baseline" "$S/current.index"
fi
[ -d "$P" ] || make_private "$format"
if [ -f "$M/pack" ]; then
  name=$(cat "$M/name")
  mv -f "$M/pack" "$P/objects/pack/$name.pack"
  mv -f "$M/idx" "$P/objects/pack/$name.idx"
fi
for file in sent dirs pending changed; do [ -e "$S/$file" ] || : >"$S/$file"; done
cut -z -f2- "$M/kept" | sort -z >"$M/kept.paths"
comm -z -23 "$M/sent" "$M/kept.paths" >"$M/put"
cd "$W"
if [ "$kind" = raw ]; then
  : >"$S/raw"
else
  sort -zu "$S/sent" "$S/pending" | comm -z -23 - "$M/sent" >"$M/gone"
  if [ "$overwrite" = 1 ]; then
    # After a complete import, remove everything that the host does not have. Before the first one,
    # files that were already there do not belong to us.
    if [ -f "$S/index" ]; then cat "$S/changed" >>"$M/gone"; fi
  else
    comm -z -23 "$M/gone" "$S/changed" >"$M/gone.ours"
    mv "$M/gone.ours" "$M/gone"
  fi
  sort -zu "$S/pending" "$M/gone" "$M/put" >"$S/pending.new"
  mv "$S/pending.new" "$S/pending"
  # From here on, every file that the import writes is recorded as ours, even if the import is
  # interrupted.
  sync -f "$S"
  sort -zu "$M/gone" >"$M/gone.sorted"
  if [ "$overwrite" = 1 ]; then
    xargs -0 -r rm -rf -- <"$M/gone.sorted"
  else
    xargs -0 -r rm -f -- <"$M/gone.sorted" 2>/dev/null || :
  fi
  xargs -0 -r dirname -z -- <"$M/gone.sorted" | sort -zu | sed -z '/^\.$/d' |
    xargs -0 -r rmdir -p --ignore-fail-on-non-empty -- 2>/dev/null || :
  comm -z -23 "$S/dirs" "$M/dirs" | sort -zr | xargs -0 -r rmdir --ignore-fail-on-non-empty -- 2>/dev/null || :
  # The host has a file here. Remove a directory in its place that holds only ignored files.
  comm -z -13 "$S/sent" "$M/put" | find -files0-from - -maxdepth 0 -type d -print0 2>/dev/null | xargs -0 -r rm -rf --
fi
if [ "$kind" != raw ] && { [ -f "$M/archive" ] || [ -f "$S/tree.tar" ]; }; then
  # Keep the archive. finish decides what the baseline needs of it, after the stream was verified.
  { tee "$S/tree.new" || : >"$M/cut"; } | tar -x -p --no-same-owner --warning=no-timestamp -f -
  if [ -e "$M/cut" ]; then die 1 "No space left on device"; fi
else
  tar -x -p --no-same-owner --warning=no-timestamp -f -
fi

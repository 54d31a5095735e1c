# The payload comes on stdin. $1: 1 to replace what the guest changed.
overwrite=$1
[ -e "$S/dirty" ] || die 66 "no import was begun"
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
    # After a complete import nothing but the host's stays; before one, what lies there is none of ours.
    if [ -f "$S/index" ]; then cat "$S/changed" >>"$M/gone"; fi
  else
    comm -z -23 "$M/gone" "$S/changed" >"$M/gone.ours"
    mv "$M/gone.ours" "$M/gone"
  fi
  sort -zu "$S/pending" "$M/gone" "$M/put" >"$S/pending.new"
  mv "$S/pending.new" "$S/pending"
  # What is put from here on is known to be ours, whatever cuts this short.
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
  # A directory with nothing but ignored files where the host has a file now.
  comm -z -13 "$S/sent" "$M/put" | find -files0-from - -maxdepth 0 -type d -print0 2>/dev/null | xargs -0 -r rm -rf --
fi
if [ "$kind" != raw ] && { [ -f "$M/archive" ] || [ -f "$S/tree.tar" ]; }; then
  # The archive is kept: what the baseline needs of it is decided when it has been verified.
  { tee "$S/tree.new" || : >"$M/cut"; } | tar -x -p --no-same-owner --warning=no-timestamp -f -
  if [ -e "$M/cut" ]; then die 1 "No space left on device"; fi
else
  tar -x -p --no-same-owner --warning=no-timestamp -f -
fi

# Filters do not run in the guest, because they need the host's programs and keys. fcd's own program
# replaces them. The program knows what git stores for each file that was unchanged on the host, and
# makes git refuse to store anything else.
programs() {
  cat >.git/fcd/clean <<'END'
t=$(mktemp)
trap 'rm -f "$t"' EXIT
cat >"$t"
raw=$(git hash-object --no-filters --stdin <"$t")
clean=$(sed -n "s/^$raw //p" "$0.table" | head -n 1)
if [ -n "$clean" ]; then git cat-file blob "$clean"; exit; fi
if git cat-file -e "$raw" 2>/dev/null; then cat "$t"; exit; fi
p=$PPID
for i in 1 2 3 4; do
c=$(tr '\0' ' ' 2>/dev/null <"/proc/$p/cmdline") || c=
case $c in git\ * | */git\ * | *git-core/git*) break ;; esac
p=$(sed -n 's/^PPid:[^0-9]*//p' "/proc/$p/status" 2>/dev/null) || p=0
c=
done
case " $c" in
"  " | " " | *\ add\ * | *\ stage\ * | *\ stash* | *\ update-index\ *--stdin* | *\ update-index\ *--add* | *\ hash-object\ * | *\ commit\ -a* | *\ commit\ *\ -a* | *\ commit\ *\ --all*)
n=$(git check-attr filter -- "$1" | sed 's/.*: //')
echo "fcd: $1 is not added: its filter ($n) does not run in this VM, so git would store the wrong content" >&2
echo "hint: bring it to the host with fcctl workspace apply, and commit it there" >&2
exit 1 ;;
esac
cat "$0.mark"
END
  cat >.git/fcd/smudge <<'END'
t=$(mktemp)
trap 'rm -f "$t"' EXIT
cat >"$t"
clean=$(git hash-object --no-filters --stdin <"$t")
raw=$(sed -n "s/ $clean\$//p" "${0%smudge}clean.table" | head -n 1)
s=$(cat "${0%smudge}state")
if [ -n "$raw" ]; then
if git --git-dir="$s/git" cat-file -e "$raw" 2>/dev/null; then git --git-dir="$s/git" cat-file blob "$raw"; exit; fi
if [ -f "$s/tree.tar" ] && tar -xOf "$s/tree.tar" -- "$1" >"$t.tar" 2>/dev/null && [ "$(git hash-object --no-filters "$t.tar")" = "$raw" ]; then
mv "$t.tar" "$t"
fi
rm -f "$t.tar"
fi
cat "$t"
END
  cat >.git/fcd/check <<'END'
m=$(git hash-object --no-filters --stdin <"${0%check}clean.mark")
if git ls-files -s | grep " $m " >&2; then
echo "fcd: these files are not committed: their filter does not run in this VM; commit them on the host" >&2
exit 1
fi
END
  echo 'The filter of this file does not run in this VM, and git has nothing to store of its changes here.' >.git/fcd/clean.mark
  printf '%s\n' "$S" >.git/fcd/state
  mkdir -p .git/hooks
  if [ ! -e .git/hooks/pre-commit ]; then
    printf '%s\n' '#!/bin/sh' 'exec sh "$(git rev-parse --git-common-dir)/fcd/check"' >.git/hooks/pre-commit
    chmod 755 .git/hooks/pre-commit
  fi
}
# Configures the clean program $2 for each filter name in the file $1, and the smudge program $3 for
# all of them.
configure() {
  # shellcheck disable=SC2016 # the inner shell expands it
  xargs -0 -r -n 1 env clean="$2" smudge="$3" sh -c '
    for pair in "clean $clean" "smudge $smudge" "required true"; do
      git -c safe.directory="*" config "filter.$0.${pair%% *}" "${pair#* }"
    done' <"$1"
}
set_filters() {
  if [ -s "$S/filters" ]; then
    # shellcheck disable=SC2016 # the inner shell expands it
    xargs -0 -r -n 1 sh -c 'git -c safe.directory="*" config --remove-section "filter.$0" 2>/dev/null || :' <"$S/filters"
  fi
  [ -s "$M/filters" ] || return 0
  mkdir -p .git/fcd
  programs
  # An empty list is not sent. The list is empty if every filtered file was changed on the host.
  : >>"$M/filtered"
  comm -z -12 "$M/filtered" "$M/put" >"$M/known"
  oids() { xargs -0 -r git "$@" --literal-pathspecs ls-files -s -z -- <"$M/known" | sed -z 's/^[0-9]* \([0-9a-f]*\) .*/\1/'; }
  # The stored object may be missing, as in a partial clone. Then the clean program has nothing to
  # return.
  oids -c safe.directory='*' >"$M/known.clean"
  # Use the configuration of the private repository, which has no remote. With a promisor, git stops
  # at the first object that it cannot fetch.
  tr '\0' '\n' <"$M/known.clean" | GIT_OBJECT_DIRECTORY=.git/objects g cat-file --batch-check='%(objectname)' |
    sed -n 's/^\(.*\) missing$/^\1 /p' >"$M/known.missing"
  if [ -s "$M/known.missing" ]; then
    paste -z -d ' ' "$M/known.clean" "$M/known" | grep -z -v -f "$M/known.missing" | sed -z 's/^[^ ]* //' >"$M/known.new" || :
    mv "$M/known.new" "$M/known"
    oids -c safe.directory='*' >"$M/known.clean"
  fi
  (GIT_INDEX_FILE=$new && oids --git-dir="$P" --work-tree="$W") >"$M/known.raw"
  paste -z -d ' ' "$M/known.raw" "$M/known.clean" | tr '\0' '\n' | sort -u >.git/fcd/clean.table
  # These files are known to be unchanged. Record their times in the index with a filter that does
  # not read them.
  configure "$M/filters" 'git cat-file blob :0:%f' cat
  u update-index -z --stdin <"$M/known"
  programs='sh "$(git rev-parse --git-common-dir)/fcd'
  configure "$M/filters" "$programs/clean\" %f" "$programs/smudge\" %f"
  cp "$M/filters" "$S/filters"
}

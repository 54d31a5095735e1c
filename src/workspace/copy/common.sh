# Precedes each script. The guest runtime's programs come first, because those of an image may lack
# options.
[ ! -x /.fcd/bin/tar ] || PATH=/.fcd/bin:$PATH
unset TAR_OPTIONS POSIXLY_CORRECT CDPATH
export LC_ALL=C
# Exits with a status that says what is wrong with a path. The path is all that goes to stderr.
fail() {
  printf '%s' "$2" >&2
  exit "$1"
}

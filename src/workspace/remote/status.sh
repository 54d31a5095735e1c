# Prints none, incomplete or complete. Mounts a read-only workspace read-only again, because mounts
# do not survive a boot.
if [ -e "$S/dirty" ]; then
  echo incomplete
elif [ -f "$S/baseline" ] && [ -d "$W" ]; then
  if [ -e "$S/readonly" ] && ! mnt -o remount,ro,bind "$W" 2>/dev/null; then
    mnt -o bind "$W" "$W"
    mnt -o remount,ro,bind "$W"
  fi
  echo complete
else
  echo none
fi

#!/usr/bin/env bash
# Keeps a copy of the first disk up to date with bmaptool, which writes what changed, in place.
#
#   examples/bmaptool.sh MOUNT COPY [NOTE]
#
# COPY is a raw image, or a block device. NOTE is a file that remembers which checkpoint the copy is
# at; if it is missing, all is copied. It is COPY.checkpoint unless given. Needs root: bmaptool
# empties plain files before it writes, so an image is made a loop device.
set -euo pipefail
case $# in 2 | 3) ;; *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
mount=$1 copy=$2 note=${3-$2.checkpoint}

name=$(date +%Y-%m-%d_%H%M%S)
backup=$mount/backups/$name
loop=""
finish() {
    [ -z "$loop" ] || losetup --detach "$loop"
    rmdir "$backup"
}
mkdir "$backup"
trap finish EXIT

raw=$(find "$backup/raw" -samefile "$backup/disk.raw")
disk=$(basename "$raw" .raw)
base=$(cat "$note" 2>/dev/null || true)
if [ -n "$base" ] && [ -e "$backup/since/$base/$disk.bmap" ]; then
    device=$copy
    if [ ! -b "$copy" ]; then
        loop=$(losetup --find --show "$copy")
        device=$loop
    fi
    bmaptool --quiet copy --bmap "$backup/since/$base/$disk.bmap" "$raw" "$device"
    what="what changed since $base"
else
    # Nothing is skipped on a device, where something else may have been before.
    sparse=always
    [ ! -b "$copy" ] || sparse=never
    rm -f "$note"
    cp --sparse="$sparse" --no-preserve=mode "$raw" "$copy"
    what="everything"
fi
sync "$copy"
echo "$name" >"$note"
echo "$name: $copy is up to date, $what was copied"

#!/usr/bin/env bash
# A full backup and an incremental one of a virtual disk, with nothing but mkdir, rsync and dd.
#
#   examples/quickstart.sh
#
# Runs on a fresh Debian or Ubuntu with Rust, as root or with sudo (which only installing needs).
# Works in a temporary directory and takes everything away again. FLEECEFS=/path/to/fleecefs uses
# that one instead of building it.
set -euo pipefail

top=$(cd "$(dirname "$0")/.." && pwd)
PATH="$PATH:/usr/sbin:/sbin"

step=0
say() {
    step=$((step + 1))
    printf '\n%d. %s\n' "$step" "$*"
}
# Shows a command, then runs it.
run() {
    printf '   $ %s\n' "$*"
    "$@" 2>&1 | sed 's/^/     /'
}
die() { echo "quickstart: $*" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/flq.XXXXXX")
mnt=$work/mnt
editor="" # the storage daemon that stands in for the guest

mounted() { grep -qF " $1 " /proc/self/mountinfo; }

unmount() {
    for backup in "$mnt"/backups/*/; do
        [ ! -d "$backup" ] || run rmdir "${backup%/}"
    done
    run "$fleecefs" umount "$mnt"
}

stop_editor() {
    [ -n "$editor" ] || return 0
    kill -TERM "$editor" 2>/dev/null || true
    wait "$editor" 2>/dev/null || true
    editor=""
}

finish() {
    status=$?
    trap - EXIT
    stop_editor
    if mounted "$mnt"; then
        [ ! -s "$mnt/last-error" ] || sed 's/^/last-error: /' "$mnt/last-error" >&2
        (unmount) || umount -l "$mnt" 2>/dev/null || fusermount3 -uz "$mnt" || true
    fi
    rm -rf --one-file-system "$work"
    [ "$status" = 0 ] || echo "quickstart: FAILED in step $step" >&2
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "Install what is missing: QEMU's tools, FUSE, rsync."
"$top/scripts/deps" run

fleecefs=${FLEECEFS-}
if [ -z "$fleecefs" ]; then
    say "Build fleecefs."
    command -v cargo >/dev/null || PATH="$HOME/.cargo/bin:$PATH"
    (cd "$top" && cargo build --release --locked --quiet)
    fleecefs=${CARGO_TARGET_DIR:-$top/target}/release/fleecefs
fi
[ -x "$fleecefs" ] || die "there is no $fleecefs"

say "Make a virtual disk: a qcow2 image with an ext4 file system and some files in it."
mkdir "$mnt" "$work/state" "$work/files" "$work/files/photos"
echo "Monday: all quiet." >"$work/files/diary.txt"
for n in 1 2 3 4 5 6 7 8; do
    head -c 3000000 /dev/urandom >"$work/files/photos/$n.jpg"
done
truncate -s 256M "$work/flat"
mkfs.ext4 -q -F -d "$work/files" "$work/flat"
run qemu-img convert -f raw -O qcow2 "$work/flat" "$work/disk.qcow2"
rm "$work/flat"

# What the backups must equal in the end. qemu-img reads the image by itself, without fleecefs.
qemu-img convert -f qcow2 -O raw "$work/disk.qcow2" "$work/truth-mon.raw"

mount_disk() {
    # The state directory remembers the checkpoints from one mount to the next. Not through run:
    # what stays in the background must not be able to hold a pipe open.
    printf '   $ %s\n' "fleecefs mount -o state=$work/state $work/disk.qcow2 $mnt"
    "$fleecefs" mount -o "state=$work/state" "$work/disk.qcow2" "$mnt"
}

say "Mount the disk. Here it belongs to a domain that is off; qmp:/path would be a running one."
mount_disk
run ls "$mnt"

say "Mark this point in time, and freeze the disk: the checkpoint is what Tuesday's backup will" \
    "be incremental to, the backup is the frozen disk as a file."
run mkdir "$mnt/checkpoints/mon" "$mnt/backups/mon"
run ls -ls "$mnt/backups/mon"

say "Copy it. Any tool will do; rsync -S keeps the holes."
run rsync -S "$mnt/backups/mon/disk.raw" "$work/mon.raw"
run du -h --apparent-size "$work/mon.raw"
run du -h "$work/mon.raw"

say "End the backup and unmount. The checkpoint stays, inside the image."
unmount

say "Tuesday: files inside the image change. A guest would do that; here QEMU's storage daemon" \
    "shows the disk as a file, and debugfs writes into its ext4. What is written gets marked in" \
    "the checkpoint's dirty bitmap, by QEMU."
touch "$work/flat"
qemu-storage-daemon \
    --blockdev "driver=qcow2,node-name=d0,file.driver=file,file.filename=$work/disk.qcow2" \
    --export "type=fuse,id=e0,node-name=d0,mountpoint=$work/flat,writable=on" &
editor=$!
for _ in $(seq 100); do
    if mounted "$work/flat"; then break; fi
    kill -0 "$editor" 2>/dev/null || die "qemu-storage-daemon could not show the disk"
    sleep 0.1
done
mounted "$work/flat" || die "qemu-storage-daemon did not show the disk within 10 s"
echo "Tuesday: a new photo." >>"$work/files/diary.txt"
head -c 2000000 /dev/urandom >"$work/new.jpg"
cat >"$work/changes" <<END
rm /diary.txt
write $work/files/diary.txt /diary.txt
write $work/new.jpg new.jpg
rm /photos/3.jpg
END
run debugfs -w -f "$work/changes" "$work/flat"
stop_editor
qemu-img convert -f qcow2 -O raw "$work/disk.qcow2" "$work/truth-tue.raw"
if cmp -s "$work/truth-mon.raw" "$work/truth-tue.raw"; then die "nothing changed"; fi

say "Mount again and freeze Tuesday. A backup makes a checkpoint of its own name as well."
mount_disk
run mkdir "$mnt/backups/tue"
run ls "$mnt/checkpoints"

say "What changed since Monday? Offset, length, type, and the type in words."
run cat "$mnt/backups/tue/dirty.map"

say "Bring a copy of Monday's file up to Tuesday: copy what is dirty, and nothing else."
cp --sparse=always "$work/mon.raw" "$work/tue.raw"
copied=0
while read -r offset length type _; do
    case "$type" in
    1) # dirty: read it
        dd if="$mnt/backups/tue/disk.raw" of="$work/tue.raw" bs=1M conv=notrunc status=none \
            iflag=skip_bytes,count_bytes oflag=seek_bytes \
            skip="$offset" seek="$offset" count="$length"
        copied=$((copied + length))
        ;;
    3) # dirty, and now zeros: no need to read them
        fallocate --zero-range --offset "$offset" --length "$length" "$work/tue.raw" 2>/dev/null ||
            dd if=/dev/zero of="$work/tue.raw" bs=1M conv=notrunc status=none \
                iflag=count_bytes oflag=seek_bytes seek="$offset" count="$length"
        ;;
    esac
done <"$mnt/backups/tue/dirty.map"
size=$(stat -c %s "$work/tue.raw")
echo "   copied $((copied / 1024)) KiB of a disk of $((size / 1024)) KiB"
if [ "$copied" = 0 ] || [ "$copied" -gt $((size / 2)) ]; then die "that is not what changed"; fi

say "Verify both copies, bit for bit, against what qemu-img reads from the image by itself."
run cmp "$work/mon.raw" "$work/truth-mon.raw"
run cmp "$work/tue.raw" "$work/truth-tue.raw"
run cmp "$mnt/backups/tue/disk.raw" "$work/truth-tue.raw"

say "Look at a file inside the backup. No restore is needed for that."
run debugfs -R "ls -l /" "$mnt/backups/tue/disk.raw"
run debugfs -R "cat /diary.txt" "$mnt/backups/tue/disk.raw"
debugfs -R "cat /diary.txt" "$mnt/backups/tue/disk.raw" 2>/dev/null | grep -q "^Tuesday:" ||
    die "the backup does not have Tuesday's diary"

say "End the backup and unmount. Nothing is left running."
unmount
if mounted "$mnt"; then die "still mounted"; fi

printf '\nquickstart: it worked: a full and an incremental backup, both equal to the disk bit for bit.\n'

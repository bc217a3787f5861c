#!/usr/bin/env bash
# Deletes the oldest checkpoints. Nothing is lost to backups that begin from the ones that are kept.
#
#   examples/prune.sh MOUNT [KEEP]      keeps 14 unless KEEP says otherwise
set -euo pipefail
case $# in 1 | 2) ;; *) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2; exit 2 ;; esac
mount=$1 keep=${2-14}

# The time of a checkpoint is when it was made. No two have the same.
newest_first() { find "$mount/checkpoints" -mindepth 1 -maxdepth 1 -type d -printf '%T@ %f\n' | sort -rn; }

deleted=0
for checkpoint in $(newest_first | tail -n "+$((keep + 1))" | cut -d ' ' -f 2); do
    # One that a running backup lists is in use. It will be there the next time.
    if rmdir "$mount/checkpoints/$checkpoint"; then deleted=$((deleted + 1)); fi
done
echo "$deleted checkpoints were deleted, $(newest_first | wc -l) are left"

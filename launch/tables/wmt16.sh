#!/usr/bin/env bash
# The table on WMT16, English-Romanian news, every row on equal terms.
#
#   launch/tables/wmt16.sh --scale=smoke|cpu|full [--raw_dir=FOLDER] [--direction=enro|roen|both]
#
# FOLDER is a TFDS data folder; without it TFDS downloads (extra [prepare]).  Scales but smoke: not run by us.
# All options: launch/tables/wmt16.sh --help.  smoke needs no data: its text is generated.
set -euo pipefail
exec python "$(dirname "$0")/run.py" wmt16 "$@"

#!/usr/bin/env bash
# The table on Multi30k, English-German image captions, every row on equal terms.
#
#   launch/tables/multi30k.sh --scale=smoke|cpu|full [--raw_dir=FOLDER] [--direction=ende|deen|both]
#
# FOLDER holds the raw files (train.en.gz, val.de.gz, ...); without it they are downloaded.
# All options: launch/tables/multi30k.sh --help.  smoke needs no data: its text is generated.
set -euo pipefail
exec python "$(dirname "$0")/run.py" multi30k "$@"

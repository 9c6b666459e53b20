#!/usr/bin/env bash
# The table on Canadian federal law, English-French, long sentences, every row on equal terms.
#
#   launch/tables/canlaw.sh --scale=smoke|cpu|full --raw_dir=FOLDER [--direction=enfr|fren|both]
#
# FOLDER holds train and valid as .en[.gz] and .fr[.gz]; valid is the test set, and dev is cut from train.
# All options: launch/tables/canlaw.sh --help.  smoke needs no data: its text is generated.
set -euo pipefail
exec python "$(dirname "$0")/run.py" canlaw "$@"

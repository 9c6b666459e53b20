#!/usr/bin/env bash
# The table on IWSLT14, German-English talks, every row on equal terms.
#
#   launch/tables/iwslt14.sh --scale=smoke|cpu|full --raw_dir=FOLDER [--direction=deen|ende|both]
#
# FOLDER holds train, valid and test as .de[.gz] and .en[.gz].  Scales but smoke: not run by us.
# All options: launch/tables/iwslt14.sh --help.  smoke needs no data: its text is generated.
set -euo pipefail
exec python "$(dirname "$0")/run.py" iwslt14 "$@"

#!/usr/bin/env bash
# The table on Tatoeba, English-German everyday sentences, every row on equal terms.
#
#   launch/tables/tatoeba.sh --scale=smoke|cpu|full --raw_dir=FOLDER [--direction=ende|deen|both]
#
# FOLDER holds train and valid as .en[.gz] and .de[.gz]; valid is the test set, and dev is cut from train.
# All options: launch/tables/tatoeba.sh --help.  smoke needs no data: its text is generated.
set -euo pipefail
exec python "$(dirname "$0")/run.py" tatoeba "$@"

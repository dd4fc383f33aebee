#!/usr/bin/env bash
# The core tests on releases of torch, one after the other, each in an environment of its own under
# build/ that is removed afterwards: tools/test_releases.sh [RELEASE ...]. PYTHON selects a Python.
# Prints a line for each release; build/torch-RELEASE.log has the rest. Each takes some 6 GB of disk.
set -uo pipefail
cd "$(dirname "$0")/.."
test $# -gt 0 || set -- 2.6.0 2.7.1 2.8.0 2.9.1 2.10.0 2.11.0 2.12.0 2.13.0 2.14.1 2.15.0
mkdir -p build
trap 'rm -rf build/torch-*/' EXIT
failed=0
for release in "$@"; do
	environment=build/torch-$release log=build/torch-$release.log
	rm -rf "$environment"
	# The example in sharded.py takes down a gloo group in the tests' own process, which may wait
	# for ever on 2.6.
	{ "${PYTHON:-python3}" -m venv "$environment" &&
		"$environment/bin/pip" install --quiet "torch==$release" \
			$(grep -E '^(hypothesis|numpy|pytest)==' constraints.txt) &&
		"$environment/bin/python" -m pytest tests/core separate_loss \
			--ignore=separate_loss/_triton --ignore=separate_loss/plots.py \
			--ignore=separate_loss/sharded.py
	} > "$log" 2>&1 || failed=1
	echo "torch $release: $(tail -n 1 "$log")"
	rm -rf "$environment"
done
exit $failed

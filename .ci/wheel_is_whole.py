"""A wheel holds each file of the packages, and nothing else: python .ci/wheel_is_whole.py WHEEL."""

import subprocess
import sys
import zipfile

PACKAGES = ("qrlora_deploy", "exporters")

listed = subprocess.run(["git", "ls-files", *PACKAGES], capture_output=True, text=True, check=True).stdout.split("\n")
sources = {name for name in listed if name}
held = {name for name in zipfile.ZipFile(sys.argv[1]).namelist() if ".dist-info/" not in name}
assert {"qrlora_deploy/py.typed", "qrlora_deploy/data/clinc150/ATTRIBUTION.md"} <= sources
if sources != held:
    sys.exit(f"missing in the wheel: {sorted(sources - held)}; not of the packages: {sorted(held - sources)}")
print(f"the wheel holds all {len(held)} files of {' and '.join(PACKAGES)}")

#!/usr/bin/env bash
# safetensors 0.8.0: save_file() on a symbolic link no longer writes to the link's target.
#
# Expected:   Saving to a path works like open(path, "wb"): it writes through a link to its target.
# Observed:   0.7.0 does. 0.8.0 writes a temporary file and renames it to the path, which replaces the link with a new
#             file. Readers of the link's target keep the old weights, and no error is raised. Only the owner can read the
#             new file (mode 600), regardless of the umask and of the old file's mode.
# Affected:   Anyone who keeps "latest.safetensors" as a link into a shared folder, or serves weights as another user.
# Workaround: Resolve the path before saving (os.path.realpath), or save under a new name, chmod, and move the link last.
#
# Requires python3 with venv, and pip. Exits with code 1 if the behavior changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/probe.py" <<'PYTHON'
import os, stat, sys
import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

os.umask(0o022)
os.chdir(sys.argv[1])
save_file({"w": np.zeros(3, np.float32)}, "shared.safetensors")
os.chmod("shared.safetensors", 0o644)
os.symlink("shared.safetensors", "latest.safetensors")
save_file({"w": np.ones(3, np.float32)}, "latest.safetensors")
behind = load_file("shared.safetensors")["w"][0]
mode = stat.S_IMODE(os.stat("latest.safetensors").st_mode)
print(f"{safetensors.__version__} link={os.path.islink('latest.safetensors')} behind={behind:g} mode={mode:o}")
PYTHON
python3 -m venv "$folder/env"
for version in 0.7.0 0.8.0; do
  "$folder/env/bin/pip" install --quiet --disable-pip-version-check "safetensors==$version" "numpy==2.4.6" 2>/dev/null
  mkdir "$folder/$version"
  "$folder/env/bin/python" "$folder/probe.py" "$folder/$version" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'EXPECTED' || { echo "the behavior has changed" >&2; exit 1; }
0.7.0 link=True behind=1 mode=644
0.8.0 link=False behind=0 mode=600
EXPECTED

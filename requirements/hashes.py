"""Prints what `pip install --dry-run --report FILE` would install, with the hashes of the files that pip chose."""

import json
import sys
from pathlib import Path

chosen = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["install"]
for item in sorted(chosen, key=lambda item: item["metadata"]["name"].lower()):
    name, version = item["metadata"]["name"], item["metadata"]["version"].partition("+")[0]
    print(f"{name}=={version} \\\n    --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")

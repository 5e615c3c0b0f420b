"""Ask a server's own /health from inside its container: exit code 0 when it is well.

Arguments: its key folder, and the port of its live page (9464).
"""

import ssl
import sys
import urllib.request
from pathlib import Path

keys, port = Path(sys.argv[1]), int((sys.argv[2:] or ["9464"])[0])
context = ssl.create_default_context(cafile=str(keys / "ca.crt"))
token = (keys / "dashboard.token").read_text(encoding="ascii").strip()
request = urllib.request.Request(f"https://127.0.0.1:{port}/health", headers={"Authorization": f"Bearer {token}"})
try:
    with urllib.request.urlopen(request, timeout=5, context=context) as answer:
        sys.stdout.write(answer.read().decode())
except OSError as error:  # HTTP status 503 among them
    sys.exit(f"not well: {error}")

"""All contact with Flower: messages, the ways to run a federation, keys and byte counts.

No other part of kilotune imports flwr. Flower reports usage home and logs to the terminal unless told not to, so its
variables are set here, before any module below this package can import it.
"""

import os

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ.setdefault("FLWR_LOG_LEVEL", "CRITICAL")  # set it to INFO to see Flower's own log on stderr

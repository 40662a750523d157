"""Run by tests/integration/test_devices.py, in a process with eight CPU devices."""

import jax

if jax.device_count() < 8:
    collect_ignore_glob = ["test_*.py"]

"""What this machine is and how this process was launched, as values; `phi3-dist doctor`.

Begin with probe.py, which looks at both; launch_request.py and launcher.py have what a launcher asked for.
"""

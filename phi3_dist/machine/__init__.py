"""What this machine is and how this process was launched."""

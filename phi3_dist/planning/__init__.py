"""What will run and why, without torch: plan.py, support.py, memory.py (bytes a rank), advice and rendered configs."""

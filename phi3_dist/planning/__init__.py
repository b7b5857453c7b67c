"""What will run and why, without torch: plan.py, support.py, memory.py (bytes of a rank; activations in
activation_memory.py), attention_choice.py and its like (what `auto` becomes), advice and rendered configs."""

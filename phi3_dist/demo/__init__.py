"""`make demo`: its base model, its chats, and what the run learned of them."""

"""`make demo`: its base model, its chats, and what the run learned of them. Begin with __main__.py."""

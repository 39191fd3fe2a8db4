"""The parts of the chat client: the conversation, its commands, and the canvas in the terminal."""

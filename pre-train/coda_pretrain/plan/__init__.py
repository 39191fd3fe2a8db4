"""What a run needs before it is rented: memory, speed, days, and the compiled step."""

"""What is stuck or inconsistent in a server's stores, each finding with what to do about it."""

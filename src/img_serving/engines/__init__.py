"""What draws: the engine protocol and the procedural painter."""

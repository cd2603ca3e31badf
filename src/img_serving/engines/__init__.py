"""What draws: the engine protocol, the procedural painter and diffusers pipelines."""

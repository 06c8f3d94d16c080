"""Many adapters on one base behind an OpenAI-compatible endpoint on Ray Serve."""

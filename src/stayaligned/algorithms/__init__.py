"""The papers' mathematics: torch only, readable beside the papers."""

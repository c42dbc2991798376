"""The protocols as small models, checked exhaustively: see checker.py, and docs/reliability.md for what was found."""

"""Failure drills, ``python -m drills``: disturb the real scripts in every way; nothing finished may be lost."""

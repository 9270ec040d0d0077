"""Measures kernel instances, one by one, for dispatch tables: what ``pyquant profile`` runs."""

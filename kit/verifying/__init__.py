"""Verifying: every gate after training, and the reference they compare with."""

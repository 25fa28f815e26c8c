"""Measurement on other machines: boards over ssh, Android devices over adb, and several boards at once."""

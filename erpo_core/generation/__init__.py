"""Engines that sample answers."""

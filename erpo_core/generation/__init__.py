"""Engines that sample answers to prompts."""

"""Layers that somebody has trained: releases by name, files of other code, the Hugging Face hub."""

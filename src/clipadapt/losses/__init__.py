"""Objectives as pure functions of features."""

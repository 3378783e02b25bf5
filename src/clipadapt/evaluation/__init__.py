"""Protocols, benchmark suites, reports, studies, and the selection of a method."""

"""Whit: make language models small with the least possible damage."""

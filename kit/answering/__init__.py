"""Answers: of a model in memory, of llama.cpp, to a question and to a file; scores."""
